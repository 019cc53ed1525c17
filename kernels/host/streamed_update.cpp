// streamed_update on the CPU: what the lines of an array carry when a batch is streamed into sliced weights.
//
// Blocks of samples; patches of images are gathered on the way. Every value is a function of its own place, so the bits do
// not depend on threads. Meaning and oracle: gpuxbar/reference/streamed_update.py.
#include <algorithm>
#include <optional>
#include <vector>

#include "gpuxbar/streams.cuh"
#include "images.hpp"

using namespace gpuxbar;

namespace {

constexpr int SAMPLES = 32;  // of a block

// Twin of `Lines` in gpuxbar/ops/streamed_update.py.
struct Lines {
  Streams streams;
  Slices slices;
  Conv conv;  // whose patches and pixels drive the lines; without pixels, matrices do
  i64 groups, inputs, outputs;
};

// Fetches consecutive values of images.
auto from(const float* images) {
  return [=](float* to, i64 first, i64 count) { std::copy_n(images + first, count, to); };
}

// Values of samples on the lines of a group, sample by sample.
class Samples {
 public:
  explicit Samples(const Lines& l) : l(l) {
    if (l.conv.out_h) patches.emplace(l.conv);
  }

  const float* inputs(const float* x, i64 group, i64 b0, i64 samples, i64* stride) {
    if (!l.conv.out_h) return of_matrix(x, group, b0, l.inputs, stride);
    packed.resize(l.inputs * SAMPLES);
    patches->pack(from(x), l.groups, group, runs_of(l.conv, b0, samples), packed.data());
    return of_images(l.inputs, samples, stride);
  }

  const float* errors(const float* d, i64 group, i64 b0, i64 samples, i64* stride) {
    if (!l.conv.out_h) return of_matrix(d, group, b0, l.outputs, stride);
    packed.resize(l.outputs * SAMPLES);
    pack_pixels<SAMPLES>(l.conv, from(d), l.groups, group, l.outputs, b0, samples, packed.data());
    return of_images(l.outputs, samples, stride);
  }

 private:
  const float* of_matrix(const float* values, i64 group, i64 b0, i64 lines, i64* stride) const {
    *stride = l.groups * lines;
    return values + (b0 * l.groups + group) * lines;
  }

  const float* of_images(i64 lines, i64 samples, i64* stride) {
    rows.resize(lines * SAMPLES);
    transpose(packed.data(), SAMPLES, lines, samples, rows.data(), lines);
    *stride = lines;
    return rows.data();
  }

  const Lines& l;
  std::optional<PatchLines<SAMPLES>> patches;
  std::vector<float> packed, rows;
};

}  // namespace

extern "C" void gpuxbar_streamed_lines(const float* x,        // [B, G * I], or images [N, G * channels, height, width]
                                       const float* d,        // [B, G * O], or images [N, G * O, out_h, out_w]
                                       const float* largest,  // [G]            largest magnitude of an input
                                       const float* w_max,    // [G * O]        weight of a full pair
                                       const Lines* lines, i64 group, i64 first, i64 samples,
                                       float* bits,      // [samples * T, I]    -1, 0 or 1
                                       float* digits) {  // [S, samples * T, O] units
  const Lines l = *lines;
  const i32 streams = l.streams.bits;
  const float top = largest[group];
  const float* full = w_max + group * l.outputs;
#pragma omp parallel
  {
    Samples values(l);
#pragma omp for schedule(static)
    for (i64 b0 = 0; b0 < samples; b0 += SAMPLES) {
      const i64 count = std::min<i64>(SAMPLES, samples - b0);
      i64 stride;
      const float* value = values.inputs(x, group, first + b0, count, &stride);
      for (i64 b = 0; b < count; ++b)
        for (i32 t = 0; t < streams; ++t) {
          float* to = bits + ((b0 + b) * streams + t) * l.inputs;
          const float* x_b = value + b * stride;
#pragma omp simd
          for (i64 i = 0; i < l.inputs; ++i) to[i] = input_bit(input_code(l.streams, x_b[i], top), t);
        }
      value = values.errors(d, group, first + b0, count, &stride);
      for (i64 b = 0; b < count; ++b)
        for (i32 k = 0; k < l.slices.count; ++k)
          for (i32 t = 0; t < streams; ++t) {
            float* to = digits + ((k * samples + b0 + b) * streams + t) * l.outputs;
            const float* d_b = value + b * stride;
#pragma omp simd
            for (i64 o = 0; o < l.outputs; ++o)
              to[o] = error_digit(l.slices, error_units(l.streams, d_b[o], top, full[o]), t, k);
          }
    }
  }
}
