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
    for (i64 i = 0; i < count - N; i += N) *(Part*)(to + i) = *(const Part*)(from + i);
    *(Part*)(to + count - N) = *(const Part*)(from + count - N);
  } else {
    for (i64 i = 0; i < count; ++i) to[i] = from[i];
  }
}

// N floats, or every second of 2 N.
template <int STRIDE, int N>
inline typename Floats<N>::Vec every(const float* from) {
  using V = typename Floats<N>::Vec;
  if constexpr (STRIDE == 1 || N == 1)
    return *(const V*)from;
  else
    return pick(*(const V*)from, *(const V*)(from + N), [](int k) { return 2 * k; });
}

// What lines of an array see of the values of patches: these as they are; see `PatchLines`.
struct AsTheyAre {
  void touch(float*, i64) const {}
  struct Line {
    template <int STRIDE, int N>
    void put(const float* from, float* to) const {
      *(typename Floats<N>::Vec*)to = every<STRIDE, N>(from);
    }
  };
  Line line(i64) const { return {}; }
};

// The lines of an image that the patches of at most ROW neighbouring pixels touch, [channels][lines][width] with their
// padding: every line of an array is driven by a shifted part of them.
template <int ROW>
struct PatchLines {
  const Conv& c;
  const i64 width, lines, size;
  std::vector<i64> places;  // of the first value of every driven line
  std::vector<float> values;
  i64 line_step = ROW,
      vector_step = LANES;  // of what is packed: from line to line, and from vector to vector of its rows

  // `kinds`: of values that are held, each kind behind the one before
  explicit PatchLines(const Conv& c, int kinds = 1)
      : c(c),
        width(c.width + 2 * c.pad_w),
        lines((touched(c) - 1) * c.stride_h + (c.kernel_h - 1) * c.dilation_h + 1),
        size(c.channels * lines * width),
        places(c.channels * c.kernel_h * c.kernel_w),
        values(kinds * kind()) {
    for (i64 channel = 0; channel < c.channels; ++channel)
      for (i64 y = 0; y < c.kernel_h; ++y)
        for (i64 x = 0; x < c.kernel_w; ++x)
          places[channel * c.channel_step + (y * c.kernel_w + x) * c.position_step] =
              (channel * lines + y * c.dilation_h) * width + x * c.dilation_w;
  }

  // Values of a kind; a vector reads past the end of a line.
  i64 kind() const { return size + LANES; }

  // Fetches what the patches from one run to another of an image touch; padding at the sides of `to` holds zeros.
  // `drive(to, from, count)` fetches consecutive values from element `from` of the images on, and `seen.touch(to, count)` is
  // shown all that patches touch of a channel, and may change it, but no zeros.
  template <class Drive, class Seen>
  void fill(const Drive& drive, const Seen& seen, i64 groups, i64 group, const Run& begin, const Run& back,
            float* to) const {
    const i64 filled = (back.y - begin.y) * c.stride_h + (c.kernel_h - 1) * c.dilation_h + 1;
    const i64 top = begin.y * c.stride_h - c.pad_h;
    for (i64 channel = 0; channel < c.channels; ++channel) {
      const i64 from = ((begin.image * groups + group) * c.channels + channel) * c.height;
      float* const first = to + channel * lines * width;
      float* line = first + c.pad_w;
      for (i64 y = top; y < top + filled; ++y, line += width)
        if (y < 0 || y >= c.height)
          std::fill_n(line, c.width, 0.0f);
        else
          drive(line, (from + y) * c.width, c.width);
      seen.touch(first, filled * width);
    }
  }

  // How far a run's first pixel is from the first of another run, at which the window begins.
  i64 pixel(const Run& begin, const Run& run) const {
    return (run.y - begin.y) * c.stride_h * width + run.x * c.stride_w;
  }

  // a[k][i]: what patch i of a block drives line k of a group with, rows of ROW. `seen.line(k)` puts values of patches to line k.
  template <class Drive, class Seen = AsTheyAre>
  void pack(const Drive& drive, i64 groups, i64 group, const std::vector<Run>& runs, float* a, const Seen& seen = {}) {
    for (auto begin = runs.begin(), end = begin; begin != runs.end(); begin = end) {
      while (end != runs.end() && end->image == begin->image) ++end;
      fill(drive, seen, groups, group, *begin, *(end - 1), values.data());
      if (c.stride_w == 1)
        pack_runs<1>(begin, end, seen, a);
      else if (c.stride_w == 2)
        pack_runs<2>(begin, end, seen, a);
      else
        pack_vectors<1, 1>(begin, end, ROW + 1, seen, a);
    }
  }

  // Output lines of ROW pixels, wherever these begin.
  static i64 touched(const Conv& c) {
    const bool whole = ROW % c.out_w == 0 && c.out_h * c.out_w % ROW == 0;
    return whole ? ROW / c.out_w : std::min<i64>(c.out_h, (ROW + c.out_w - 2) / c.out_w + 1);
  }

 private:
  using Runs = std::vector<Run>::const_iterator;

  template <int STRIDE, class Seen>
  void pack_runs(Runs begin, Runs end, const Seen& seen, float* a) const {
    pack_vectors<LANES, STRIDE>(begin, end, ROW + 1, seen, a);
    pack_vectors<8, STRIDE>(begin, end, LANES, seen, a);
    pack_vectors<4, STRIDE>(begin, end, 8, seen, a);
    pack_vectors<1, STRIDE>(begin, end, 4, seen, a);
  }

  // Packs runs of N or more, but fewer than `below`, in vectors of N, the last one over its predecessor. N = 1 serves all
  // strides.
  template <int N, int STRIDE, class Seen>
  void pack_vectors(Runs begin, Runs end, i64 below, const Seen& seen, float* to) const {
    const float* from[ROW];
    i64 row[ROW];
    int count = 0;
    for (auto run = begin; run != end; ++run)
      for (i64 i = 0; i < run->count && run->count >= N && run->count < below; i += N, ++count) {
        const i64 at = std::min(i, run->count - N);
        from[count] = values.data() + pixel(*begin, *run) + at * c.stride_w;
        row[count] = (run->first + at) / LANES * vector_step + (run->first + at) % LANES;
      }
    if (!count) return;
    for (i64 k = 0; k < (i64)places.size(); ++k, to += line_step) {
      const auto line = seen.line(k);
      for (int i = 0; i < count; ++i) line.template put<STRIDE, N>(from[i] + places[k], to + row[i]);
    }
  }
};

// Whether patches are single pixels, of all in turn.
inline bool pointwise(const Conv& c) {
  return c.kernel_h * c.kernel_w == 1 && c.stride_h * c.stride_w == 1 && c.pad_h + c.pad_w == 0;
}

// Of such images, whose pixels drive `lines` lines of a group: a pixel is a row, from row0 on.
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
