// Rows of cells for the host kernels that write devices: their spreads, and the choice of the law.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "draw.hpp"
#include "gpuxbar/endurance.cuh"
#include "gpuxbar/update.cuh"

namespace gpuxbar {

// 64 cells of one plane: a wordline, from bitline col0.
struct RowPlace {
  u32 plane, row;
  i64 col0;
};

// Up to 64 cells of one plane, in any order; `count` of them in whole vectors.
struct alignas(64) Places {
  Lines rows, columns, planes;  // the last all alike
  i64 cells[WIDE_ROW];          // places in arrays of all planes
  int count;
};

template <int ROUNDS>
static inline void draw_words(Purpose purpose, u32 step, const WideKeys& keys, const RowPlace& at, u32* word) {
  draw_words<ROUNDS>(Draw{purpose, at.plane, step, keys}, at.row, at.col0, word);
}
template <int ROUNDS>
static inline void draw_words(Purpose purpose, u32 step, const WideKeys& keys, const Places& at, u32* word) {
  draw_words_at<ROUNDS>(purpose, step, keys, at.count, at.rows, at.columns, at.planes, word);
}

inline int count_of(const RowPlace&) { return WIDE_ROW; }
inline int count_of(const Places& at) { return at.count; }

constexpr int AHEAD = 4;  // rows between asking for cells and moving them; many would push each other out of a cache

// Ask for the cells of a row ahead of their use: rows of a block lie too far apart to be foreseen. Cells that do not begin
// with a line of the caches end in one more.
template <class T>
inline void fetch(T* cells) {
  constexpr int LINE = 64 / sizeof(T), WRITTEN = !std::is_const_v<T>;
  for (int j = 0; j < WIDE_ROW; j += LINE) __builtin_prefetch(cells + j, WRITTEN);
  __builtin_prefetch(cells + WIDE_ROW - 1, WRITTEN);
}

// Do work for each of `count` cells of a row, in vectors.
template <class Work>
inline void each_cell(i64 count, Work&& work) {
  if (count == WIDE_ROW)
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) work(j);
  else
    for (i64 j = 0; j < count; ++j) work(j);
}

// Shares of the window of `count` cells, 0 in the others.
static inline void load_shares(const float* cells, float g_min, float inverse_range, i64 count, float* x,
                               float* before) {
  std::fill(x + count, x + WIDE_ROW, 0.0f);
  each_cell(count, [=](i64 j) { x[j] = before[j] = (cells[j] - g_min) * inverse_range; });
}

// A cell that did not move keeps its bits.
static inline void write_back(float* cells, const float* x, const float* before, float g_min, float range, i64 count) {
  each_cell(count, [=](i64 j) {
    const float kept = cells[j], moved = fma(x[j], range, g_min);  // both at once: without branches, as vectors need it
    cells[j] = x[j] != before[j] ? moved : kept;
  });
}

// Floats of `count` halves, at most a row.
static inline void read_halves(const u16* from, i64 count, float* to) {
#if defined(__F16C__)
  if (count == WIDE_ROW) {  // a compiler that does not know fp16 finds no instruction for it
    for (int j = 0; j < WIDE_ROW; j += 8)
      _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + j))));
    return;
  }
#endif
  each_cell(count, [=](i64 j) { to[j] = half_value(from[j]); });
}

// Planes of a map of devices of this law.
static inline int map_planes(const UpdateLaw& s) {
  return (s.step_spread != 0.0f) + (s.asymmetry_spread != 0.0f) + (s.low_spread != 0.0f) + (s.high_spread != 0.0f) +
         (s.spread_up != 0.0f) + (s.spread_down != 0.0f);
}

// Some devices of a row of cells, in an order of their own, in whole vectors.
struct Chosen {
  const u32* device;
  int count;

  // values[k] of device k so far; `to` may be `values`.
  template <class T>
  void pick(const T* values, T* to) const {
    alignas(64) T own[WIDE_ROW];
    for (int k = 0; k < count; ++k) own[k] = values[device[k]];
    std::copy(own, own + count, to);
  }
};

// The spreads of a row of devices; parameters without spread draw nothing.
struct SpreadDraws {
  alignas(64) float normal[6][WIDE_ROW];  // in the order of `Spreads`

  // `first`, `count`: index of the row's first cell in a plane of the map, and how many there are. `chosen`: the devices that are
  // asked for; null: all.
  SpreadDraws(const UpdateLaw& s, DeviceMap map, i64 first, i64 count, const RowPlace& at, const WideKeys& keys,
              const Chosen* chosen = nullptr) {
    const auto halves = [&](const u16* plane, float* to) { read_halves(plane + first, count, to); };
    make(s, map, halves, at, keys, chosen);
  }

  // Of cells in any order.
  SpreadDraws(const UpdateLaw& s, DeviceMap map, const Places& at, const WideKeys& keys) {
    const auto halves = [&](const u16* plane, float* to) {
      for (int j = 0; j < at.count; ++j) to[j] = half_value(plane[at.cells[j]]);
    };
    make(s, map, halves, at, keys, nullptr);
  }

 private:
  // halves(plane, to): what a plane of the map holds of the cells.
  template <class Halves, class Place>
  void make(const UpdateLaw& s, DeviceMap map, const Halves& halves, const Place& at, const WideKeys& keys,
            const Chosen* chosen) {
    const float spread[6] = {s.step_spread, s.asymmetry_spread, s.low_spread,
                             s.high_spread, s.spread_up,        s.spread_down};
    if (map.normal)
      read(spread, map, halves, chosen);
    else
      draw(spread, at, keys, chosen);
  }

  template <class Halves>
  void read(const float (&spread)[6], DeviceMap map, const Halves& halves, const Chosen* chosen) {
    for (int k = 0; k < 6; ++k) {
      float* to = normal[k];
      std::fill(to, to + WIDE_ROW, 0.0f);
      if (spread[k] == 0.0f) continue;
      halves(map.normal, to);
      if (chosen) chosen->pick(to, to);
      map.normal += map.cells;
    }
  }

  // All words first: many chains of rounds, then of normals, keep the processor busy.
  template <class Place>
  void draw(const float (&spread)[6], const Place& at, const WideKeys& keys, const Chosen* chosen) {
    constexpr Purpose OF[3] = {UPDATE_SPREAD_STEP, UPDATE_SPREAD_WINDOW, UPDATE_SPREAD_SHAPE};
    alignas(64) u32 word[3][WIDE_ROW];
    const auto wanted = [&](int k) { return spread[2 * k] != 0.0f || spread[2 * k + 1] != 0.0f; };
    for (int k = 0; k < 3; ++k)
      if (wanted(k)) draw_words<7>(OF[k], 0, keys, at, word[k]);
    for (int k = 0; k < 3; ++k) {
      float *a = normal[2 * k], *b = normal[2 * k + 1];
      if (!wanted(k)) {
        std::fill(a, a + 2 * WIDE_ROW, 0.0f);
      } else if (chosen) {
        chosen->pick(word[k], word[k]);
        make_pairs(word[k], chosen->count, a, b);
      } else {
        make_pairs(word[k], count_of(at), a, b);
      }
    }
  }
};

GPUXBAR_FN Spreads spreads(const SpreadDraws& z, int j) {
  return Spreads{z.normal[0][j], z.normal[1][j], z.normal[2][j], z.normal[3][j], z.normal[4][j], z.normal[5][j]};
}

static inline bool noisy(const UpdateLaw& s) {
  return s.law == LOOKUP_TABLE || s.gamma2 + s.cycle2 + s.pulse_cycle2 + s.range_cycle2 > 0.0f;
}

// 1 for cells that move, 0 for stuck ones.
template <class Place>
static inline void draw_free(float stuck_low, float stuck_high, const Place& at, const WideKeys& keys, float* free) {
  if (stuck_low + stuck_high > 0.0f) {
    alignas(64) Lines word;
    draw_words<10>(STUCK, 0, keys, at, word);
#pragma omp simd
    for (int j = 0; j < count_of(at); ++j) {
      const float u = uniform(word[j]);
      free[j] = u < stuck_low || u > 1.0f - stuck_high ? 0.0f : 1.0f;
    }
  } else {
    std::fill(free, free + WIDE_ROW, 1.0f);
  }
}

// Counts the pulses of a row of devices, and leaves those that fail by them where they fail; `shown` may be null.
static inline void wear_row(const Endurance e, const RowPlace& at, const WideKeys& keys, const i32* pulses, i64 count,
                            i32* taken, float* x, float* shown) {
  alignas(64) float z[WIDE_ROW] = {}, none[WIDE_ROW] = {};
  alignas(64) i32 now[WIDE_ROW] = {};
  if (e.spread > 0.0f) draw_normals(Draw{ENDURANCE, at.plane, 0, keys}, at.row, at.col0, z);
  std::copy(taken, taken + count, now);
  float* seen = shown ? shown : none;
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const bool touched = pulses[j] > 0;  // and so alive
    const i32 after = after_wear(e, touched ? now[j] : 0, pulses[j], z[j]);
    now[j] = touched ? after : now[j];
    x[j] = touched && after < 0 ? failed_share(e, x[j]) : x[j];
    seen[j] = touched && after < 0 ? failed_share(e, seen[j]) : seen[j];
  }
  std::copy(now, now + count, taken);
}

template <int KIND>
struct LawTag {
  using Type = LawOf<KIND>;
};

// Call work with the tag of a law known at run time.
template <int KIND = 0, class Work>
void with_law(i32 law, Work&& work) {
  if constexpr (KIND < Laws::COUNT) {
    if (law == KIND)
      work(LawTag<KIND>{});
    else
      with_law<KIND + 1>(law, std::forward<Work>(work));
  }
}

}  // namespace gpuxbar
