// conv_outer_product on the CPU: the gradient of a convolution's weights, straight from what the DAC drove.
//
// No patch matrix is made. Both sides are laid out line by line at one distance, the inputs by the strides' phases and with
// their padding, the gradients with zeros behind every line: then a weight is one dot product of two runs of memory, the
// inputs' shifted by its tap. Register tiles hold OUT outputs by TAPS taps, or of groups of few outputs one by MORE_TAPS, over
// some images at a time. Every weight is summed in one order, so the bits do not depend on threads. Threads share some groups
// at a time: to wait for each other at every one would take longer than a depthwise layer's products.
// Oracle: gpuxbar/reference/outer_product.py.
#include <algorithm>
#include <vector>

#include "images.hpp"

using namespace gpuxbar;

namespace {

#if defined(__AVX512F__)
constexpr int OUT = 8;  // outputs of a register tile
#else
constexpr int OUT = 4;
#endif
constexpr int TAPS = 3;        // lines of a patch of a register tile
constexpr int MORE_TAPS = 9;   // of one of a single output
constexpr i64 LAID = 1 << 13;  // floats of a register tile's gradients laid out at a time, a part of the first cache
constexpr i64 HELD = 1 << 18;  // of groups laid out at a time, a part of the others

// Where images of one group lie once they are laid out, its outputs in tiles of `high`.
struct Layout {
  const Conv& c;
  i64 outputs, pitch, plane, channel, inputs_size, depth, gradients_size;
  Layout(const Conv& c, i64 outputs, i64 high)
      : c(c),
        outputs((outputs + high - 1) / high * high),
        pitch(c.out_w + (c.kernel_w - 1) * c.dilation_w / c.stride_w),
        plane((c.out_h + (c.kernel_h - 1) * c.dilation_h / c.stride_h) * pitch),
        channel(c.stride_h * c.stride_w * plane),
        inputs_size(c.channels * channel + (pitch - c.out_w) + LANES),  // what the last line's dot products read beyond
        depth((c.out_h * pitch + LANES - 1) / LANES * LANES),
        gradients_size(this->outputs * depth) {}

  // Where the dot products of line k of a patch, in the order of a weight, start.
  i64 start(i64 k) const {
    const i64 taps = c.kernel_h * c.kernel_w, y = k % taps / c.kernel_w * c.dilation_h,
              x = k % c.kernel_w * c.dilation_w;
    const i64 phase = y % c.stride_h * c.stride_w + x % c.stride_w;
    return k / taps * channel + phase * plane + y / c.stride_h * pitch + x / c.stride_w;
  }
};

// Lays out a channel; the padding holds zeros already.
template <class Value>
void lay_inputs(const Layout& l, const Value* from, float scale, float* to) {
  const Conv& c = l.c;
  for (i64 phase = 0; phase < c.stride_h * c.stride_w; ++phase, to += l.plane) {
    const i64 left = c.pad_w - phase % c.stride_w, step = c.stride_w;  // x = place * step - left
    const i64 begin = left > 0 ? (left + step - 1) / step : 0;
    const i64 end = std::min(l.pitch, (c.width + left + step - 1) / step);
    for (i64 line = 0; line * l.pitch < l.plane; ++line) {
      const i64 y = line * c.stride_h + phase / c.stride_w - c.pad_h;
      if (y < 0 || y >= c.height) continue;
      const Value* x = from + y * c.width - left;
      float* line_to = to + line * l.pitch;
      if (step == 1)
        for (i64 i = begin; i < end; ++i) line_to[i] = (float)x[i] * scale;
      else
        for (i64 i = begin; i < end; ++i) line_to[i] = (float)x[i * step] * scale;
    }
  }
}

// The sums of N vectors, a power of two up to LANES: that of vector k in lane k, and in those N lanes on.
template <int STEP, int N>
inline Vec lane_sums(const Vec (&v)[N]) {
  const auto same = [](int k) { return k & STEP ? LANES + k : k; };  // half of the lanes take the first of two vectors
  const auto other = [](int k) { return k & STEP ? LANES + (k ^ STEP) : k ^ STEP; };
  if constexpr (N > 1) {
    alignas(4 * LANES) Vec half[N / 2];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) half[i] = pick(v[2 * i], v[2 * i + 1], same) + pick(v[2 * i], v[2 * i + 1], other);
    return lane_sums<2 * STEP>(half);
  } else if constexpr (STEP < LANES) {
    alignas(4 * LANES) Vec sum[1] = {v[0] + pick(v[0], v[0], other)};
    return lane_sums<2 * STEP>(sum);
  } else {
    return v[0];
  }
}

// Adds the products of some images to `outputs` rows of dw, at most HIGH: those of `count` lines of a patch, at most COUNT,
// where they start.
template <int HIGH, int COUNT>
void multiply(const Layout& l, const float* d, const float* x, const i64* start, i64 count, i64 images, i64 outputs,
              float* dw, i64 lines) {
  if constexpr (COUNT > 1)
    if (count < COUNT) return multiply<HIGH, COUNT - 1>(l, d, x, start, count, images, outputs, dw, lines);
  alignas(4 * LANES) Vec sum[COUNT][HIGH] = {};
  const float* right[COUNT];
  for (int t = 0; t < COUNT; ++t) right[t] = x + start[t];
  for (i64 image = 0; image < images; ++image) {
    for (i64 i = 0; i < l.depth; i += LANES) {
      alignas(4 * LANES) Vec tap[COUNT];
#pragma GCC unroll 9
      for (int t = 0; t < COUNT; ++t) {
        tap[t] = *(const Vec*)(right[t] + i);
        keep(tap[t]);
      }
#pragma GCC unroll 8
      for (int o = 0; o < HIGH; ++o) {
        alignas(4 * LANES) Vec left = *(const Vec*)(d + o * l.depth + i);
        keep(left);
#pragma GCC unroll 9
        for (int t = 0; t < COUNT; ++t) sum[t][o] += left * tap[t];
      }
    }
    d += l.gradients_size;
    for (int t = 0; t < COUNT; ++t) right[t] += l.inputs_size;
  }
#pragma GCC unroll 9
  for (int t = 0; t < COUNT; ++t) {
    const Vec found = lane_sums<1>(sum[t]);
    for (i64 o = 0; o < outputs; ++o) dw[o * lines + t] += found[o];
  }
}

}  // namespace

extern "C" void gpuxbar_conv_outer_product(const float* d,      // [N, G * O, out_h, out_w]
                                           const void* x,       // codes or float32 [N, G * channels, height, width]
                                           const float* scale,  // [1] or [N]: value of one unit of x
                                           const Conv* conv,
                                           float* dw,  // [G * O, channels, kernel_h, kernel_w]
                                           i64 images, i64 groups, i64 outputs, i64 is_code, i64 scale_count) {
  const Conv& c = *conv;
  const bool few = outputs < OUT;
  const i64 high = few ? 1 : OUT, wide = few ? MORE_TAPS : TAPS;
  const auto multiply_tile = few ? multiply<1, MORE_TAPS> : multiply<OUT, TAPS>;
  const Layout l(c, outputs, high);
  const i64 lines = c.channels * c.kernel_h * c.kernel_w, chunks = (lines + wide - 1) / wide, tiles = l.outputs / high;
  const i64 most = std::clamp<i64>(LAID / (high * l.depth), 1, std::max<i64>(images, 1));
  const i64 inputs_size = most * l.inputs_size, gradients_size = most * l.gradients_size;
  const i64 together = std::clamp<i64>(HELD / (inputs_size + gradients_size), 1, groups);
  std::vector<float> inputs(together * inputs_size);
  const Aligned gradients(together * gradients_size);
  std::fill_n(gradients.get(), together * gradients_size, 0.0f);
  std::vector<i64> starts(lines);
  for (i64 k = 0; k < lines; ++k) starts[k] = l.start(k);
  std::fill_n(dw, groups * outputs * lines, 0.0f);
#pragma omp parallel
  for (i64 group0 = 0; group0 < groups; group0 += together)
    for (i64 first = 0; first < images; first += most) {
      const i64 count = std::min(most, images - first), group_end = std::min(groups, group0 + together);
#pragma omp for collapse(3) schedule(static) nowait
      for (i64 group = group0; group < group_end; ++group)
        for (i64 i = 0; i < count; ++i)
          for (i64 k = 0; k < c.channels; ++k) {
            const i64 image = first + i, from = ((image * groups + group) * c.channels + k) * c.height * c.width;
            const float unit = scale[scale_count > 1 ? image : 0];
            float* to = inputs.data() + (group - group0) * inputs_size + i * l.inputs_size + k * l.channel;
            if (is_code)
              lay_inputs(l, (const i16*)x + from, unit, to);
            else
              lay_inputs(l, (const float*)x + from, unit, to);
          }
#pragma omp for collapse(3) schedule(static)
      for (i64 group = group0; group < group_end; ++group)
        for (i64 i = 0; i < count; ++i)
          for (i64 o = 0; o < outputs; ++o) {
            const float* from = d + (((first + i) * groups + group) * outputs + o) * c.out_h * c.out_w;
            float* to = gradients.get() + (group - group0) * gradients_size + i * l.gradients_size + o * l.depth;
            for (i64 y = 0; y < c.out_h; ++y) copy(to + y * l.pitch, from + y * c.out_w, c.out_w);
          }
#pragma omp for collapse(3) schedule(static)
      for (i64 group = group0; group < group_end; ++group)
        for (i64 tile = 0; tile < tiles; ++tile)
          for (i64 chunk = 0; chunk < chunks; ++chunk) {
            const i64 k = chunk * wide, o = tile * high;
            multiply_tile(l, gradients.get() + (group - group0) * gradients_size + o * l.depth,
                          inputs.data() + (group - group0) * inputs_size, starts.data() + k, lines - k, count,
                          std::min(high, outputs - o), dw + (group * outputs + o) * lines + k, lines);
          }
    }
}
