// fold: patches added back to the images that they were taken from, in the transposed read of a convolution.
#pragma once
#include <algorithm>
#include <vector>

#include "images.hpp"
#include "lanes.hpp"

namespace gpuxbar {

// The images of a unit of work, with their padding: [images][channels][height][width], channels of some groups.
//
// A block of rows is whole images, else whole lines of one, else part of a line. The cut depends on the shape of an image
// alone, and with it the order of every sum.
//
// The columns of a panel are first laid out line by line, between zeros as many as the taps of the kernel shift a line. Taps
// that are neighbours on a line of the kernel then add up in registers before they meet the images; without strides, for all
// lines of an image in one go, since the lines have the distance of the padded image's.
class Folded {
 public:
  Folded(const Conv& c, i64 images, i64 groups)
      : c(c),
        channels(groups * c.channels),
        height(c.height + 2 * c.pad_h),
        width(c.width + 2 * c.pad_w),
        most_lines(std::max<i64>(1, std::min<i64>(c.out_h, ROWS / c.out_w))),
        reach((c.kernel_w - 1) * c.dilation_w / c.stride_w),
        pitch(std::min<i64>(c.out_w, ROWS) + reach),
        apart(reach + (most_lines * pitch + LANES - 1) / LANES * LANES),
        column(images * apart),
        at(images * channels * height * width + LANES * c.stride_w),
        laid(COLS * column + LANES),  // a vector reads past the end of a line
        taps(channels * c.kernel_h * c.kernel_w) {
    for (i64 channel = 0; channel < channels; ++channel)
      for (i64 ky = 0; ky < c.kernel_h; ++ky)
        for (i64 kx = 0; kx < c.kernel_w; ++kx)
          taps[channel / c.channels * c.channels * c.kernel_h * c.kernel_w + channel % c.channels * c.channel_step +
               (ky * c.kernel_w + kx) * c.position_step] = Tap{(channel * height + ky * c.dilation_h) * width, kx};
  }

  // How many rows the block that starts at row0 has.
  i64 rows(i64 row0, i64 end) const {
    const i64 pixels = c.out_h * c.out_w, pixel = row0 % pixels;
    if (pixels <= ROWS) return end - row0;
    if (c.out_w <= ROWS) return std::min(most_lines * c.out_w, pixels - pixel);
    return std::min<i64>(ROWS, c.out_w - pixel % c.out_w);
  }

  // These runs, in images from `first_image` on, are the block that follows.
  void start(const std::vector<Run>& runs, i64 first_image) {
    const i64 before = parts.empty() ? 0 : parts.size() * parts[0].lines * parts[0].count;
    parts.clear();
    for (const Run& run : runs) {
      const i64 image = run.image - first_image;
      if (parts.empty() || parts.back().image != image) parts.push_back(Part{image, run.y, run.x, 0, run.count});
      ++parts.back().lines;
    }
    if ((i64)parts.size() * parts[0].lines * parts[0].count < before) std::fill(laid.begin(), laid.end(), 0.0f);
  }

  // Where the block that follows is laid out, if every vector of its rows is part of a line: vector v of column j at the
  // returned address + j * column + vector[v]. Else null.
  float* places(i64* vector) {
    i64 from = 0;
    for (const Part& part : parts) {
      if (part.count % LANES) return nullptr;
      for (i64 line = 0; line < part.lines; ++line)
        for (i64 x = 0; x < part.count; x += LANES) *vector++ = from + line * pitch + x;
      from += apart;
    }
    return laid.data() + reach;
  }

  // Lays out column j of a panel.
  void place(i64 j, const float* sum) {
    float* to = laid.data() + j * column + reach;
    for (const Part& part : parts) {
      for (i64 line = 0; line < part.lines; ++line, sum += part.count) copy(to + line * pitch, sum, part.count);
      to += apart;
    }
  }

  // Adds columns begin .. end - 1 of a panel whose first column is line `local` of the groups.
  void add(i64 local, i64 begin, i64 end) {
    for (i64 j = begin, count; j < end; j += count) {
      const Tap& first = taps[local + j];
      count = c.position_step == 1 ? std::min({(i64)3, end - j, c.kernel_w - first.kx}) : 1;
      if (count == 3)
        add_taps<3>(j, first);
      else if (count == 2)
        add_taps<2>(j, first);
      else
        add_taps<1>(j, first);
    }
  }

  // Adds the images of `count` groups from `group` on, without their padding, to those of y,
  // [N, groups * channels, height, width], or puts the first of them there, and forgets them.
  void store(float* y, i64 groups, i64 group, i64 count, i64 first_image, i64 images, bool first) {
    for (i64 image = 0; image < images; ++image)
      for (i64 channel = 0; channel < count * c.channels; ++channel) {
        const i64 place = ((first_image + image) * groups + group) * c.channels + channel;
        float* __restrict__ to = y + place * c.height * c.width;
        const float* __restrict__ from =
            at.data() + ((image * channels + channel) * height + c.pad_h) * width + c.pad_w;
        for (i64 line = 0; line < c.height; ++line, to += c.width, from += width)
          for (i64 x = 0; x < c.width; ++x) to[x] = (first ? 0.0f : to[x]) + from[x];
      }
    std::fill(at.begin(), at.end(), 0.0f);
  }

 private:
  // The rows of a block in one image: lines of `count` pixels from (y, x) on.
  struct Part {
    i64 image, y, x, lines, count;
  };

  // A line of a patch: where the line of the padded images that it meets at the first pixel begins, and how far along.
  struct Tap {
    i64 line, kx;
  };

  // Adds columns from j on, of TAPS neighbours on a line of the kernel.
  template <int TAPS>
  void add_taps(i64 j, const Tap& first) {
    const bool flat = c.stride_h == 1 && c.stride_w == 1;
    const float* from = laid.data() + j * column + reach;
    for (const Part& part : parts) {
      const i64 y = part.image * channels * height + part.y * c.stride_h;
      float* to = at.data() + y * width + first.line + part.x * c.stride_w;
      if (flat)
        add_lines<TAPS>(from, first.kx, (part.lines - 1) * pitch + part.count + reach, to);
      else
        for (i64 line = 0; line < part.lines; ++line)
          add_strided<TAPS>(from + line * pitch, first.kx, part.count + reach, to + line * c.stride_h * width);
      from += apart;
    }
  }

  template <int TAPS>
  void add_lines(const float* from, i64 kx, i64 count, float* to) {
    const float* shifted[TAPS];
    for (int t = 0; t < TAPS; ++t) shifted[t] = from + t * column - (kx + t) * c.dilation_w;
    for (i64 i = 0; i < count; i += LANES) {  // behind the last line stand zeros
      Vec sum = *(const Vec*)(shifted[0] + i);
#pragma GCC unroll 2
      for (int t = 1; t < TAPS; ++t) sum += *(const Vec*)(shifted[t] + i);
      *(Vec*)(to + i) += sum;
    }
  }

  // A pixel of the line meets every stride_w-th of the images: taps that differ by whole strides meet the same ones.
  template <int TAPS>
  void add_strided(const float* from, i64 kx, i64 count, float* to) {
    using Part = Floats<8>::Vec;
    i64 i = 0;
    if (c.stride_w == 2)
      for (; i + 8 <= count; i += 8) {
        const Part even = sum_taps<TAPS, 8>(from + i, kx, 0), odd = sum_taps<TAPS, 8>(from + i, kx, 1);
        *(Part*)(to + 2 * i) += pick(even, odd, [](int k) { return k / 2 + k % 2 * 8; });
        *(Part*)(to + 2 * i + 8) += pick(even, odd, [](int k) { return k / 2 + k % 2 * 8 + 4; });
      }
    for (; i < count; ++i)
      for (i64 phase = 0; phase < c.stride_w; ++phase)
        to[i * c.stride_w + phase] += sum_taps<TAPS, 1>(from + i, kx, phase);
  }

  // N sums of the taps that are `phase` behind whole strides.
  template <int TAPS, int N>
  typename Floats<N>::Vec sum_taps(const float* from, i64 kx, i64 phase) const {
    using V = typename Floats<N>::Vec;
    V sum{};
    for (int t = 0; t < TAPS; ++t) {
      const i64 shift = (kx + t) * c.dilation_w;
      if (shift % c.stride_w == phase) sum += *(const V*)(from + t * column - shift / c.stride_w);
    }
    return sum;
  }

  const Conv& c;
  const i64 channels, height, width, most_lines;
  const i64 reach, pitch, apart;  // of what is laid out: zeros of a line, and from line to line, image to image

 public:
  const i64 column;  // from column to column

 private:
  std::vector<float> at, laid;
  std::vector<Tap> taps;  // of every line
  std::vector<Part> parts;
};

}  // namespace gpuxbar
