// images: what the patches of a convolution, or the pixels of its result, drive the lines of an array with.
#pragma once
#include <algorithm>
#include <vector>

#include "gpuxbar/images.cuh"
#include "wide.hpp"

namespace gpuxbar {

// Part of a block that lies on one output line of a convolution: rows first .. first + count - 1.
struct Run {
  i64 first, count, image, y, x;
};

inline std::vector<Run> runs_of(const Conv& c, i64 row0, i64 rows) {
  std::vector<Run> runs;
  const i64 pixels = c.out_h * c.out_w;
  for (i64 i = 0; i < rows; i += runs.back().count) {
    const i64 image = (row0 + i) / pixels, pixel = (row0 + i) % pixels, x = pixel % c.out_w;
    runs.push_back(Run{i, std::min(rows - i, c.out_w - x), image, pixel / c.out_w, x});
  }
  return runs;
}

// Copies a short line: vectors of N floats, the last one over its predecessor; shorter ones by halves.
template <int N = LANES>
inline void copy(float* to, const float* from, i64 count) {
  if constexpr (N > 2) {
    typedef float Part __attribute__((vector_size(4 * N), aligned(4), may_alias));
    if (count < N) return copy<N / 2>(to, from, count);
    for (i64 i = 0; i < count; i += N) {
      const i64 at = std::min(i, count - N);
      *(Part*)(to + at) = *(const Part*)(from + at);
    }
  } else {
    for (i64 i = 0; i < count; ++i) to[i] = from[i];
  }
}

// a[k][i]: what patch i of a block drives line k of a group with, rows of ROW. The lines that the block's patches of an
// image touch are driven once into `window`, zero-padded, [channels][lines][width], and each tap of the kernel copies its
// part. `drive(to, from, count)` fetches consecutive values from element `from` of the images on.
template <int ROW, class Drive>
void pack_patches(const Conv& c, const Drive& drive, i64 groups, i64 group, const std::vector<Run>& runs,
                  std::vector<float>& window, float* a) {
  const i64 width = c.width + 2 * c.pad_w;
  for (auto begin = runs.begin(), end = begin; begin != runs.end(); begin = end) {
    while (end != runs.end() && end->image == begin->image) ++end;
    const i64 top = begin->y * c.stride_h;
    const i64 lines = ((end - 1)->y - begin->y) * c.stride_h + (c.kernel_h - 1) * c.dilation_h + 1;
    window.assign(c.channels * lines * width, 0.0f);
    for (i64 channel = 0; channel < c.channels; ++channel) {
      const i64 image = (begin->image * groups + group) * c.channels + channel;
      for (i64 line = 0; line < lines; ++line) {
        const i64 y = top + line - c.pad_h;
        if (y < 0 || y >= c.height) continue;
        drive(window.data() + (channel * lines + line) * width + c.pad_w, (image * c.height + y) * c.width, c.width);
      }
    }
    float* to = a;
    const auto pack_line = [&](i64 channel, i64 ky, i64 kx) {
      const float* tap = window.data() + (channel * lines + ky * c.dilation_h - top) * width + kx * c.dilation_w;
      for (auto run = begin; run != end; ++run) {
        const float* from = tap + run->y * c.stride_h * width + run->x * c.stride_w;
        if (c.stride_w == 1)
          copy(to + run->first, from, run->count);
        else
          for (i64 i = 0; i < run->count; ++i) to[run->first + i] = from[i * c.stride_w];
      }
      to += ROW;
    };
    if (c.position_step == 1)
      for (i64 channel = 0; channel < c.channels; ++channel)
        for (i64 ky = 0; ky < c.kernel_h; ++ky)
          for (i64 kx = 0; kx < c.kernel_w; ++kx) pack_line(channel, ky, kx);
    else
      for (i64 ky = 0; ky < c.kernel_h; ++ky)
        for (i64 kx = 0; kx < c.kernel_w; ++kx)
          for (i64 channel = 0; channel < c.channels; ++channel) pack_line(channel, ky, kx);
  }
}

// The same of images that drive the bitlines, `lines` of a group: a pixel is a row, from row0 on.
template <int ROW, class Drive>
void pack_pixels(const Conv& c, const Drive& drive, i64 groups, i64 group, i64 lines, i64 row0, i64 rows, float* a) {
  const i64 pixels = c.out_h * c.out_w;
  for (i64 i = 0; i < rows;) {
    const i64 image = (row0 + i) / pixels, pixel = (row0 + i) % pixels, run = std::min(rows - i, pixels - pixel);
    for (i64 k = 0; k < lines; ++k)
      drive(a + k * ROW + i, ((image * groups + group) * lines + k) * pixels + pixel, run);
    i += run;
  }
}

}  // namespace gpuxbar
