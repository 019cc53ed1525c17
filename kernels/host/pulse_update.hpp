// What the parts of pulse_update.cpp share: its settings and arrays, trains as they are held, rows and blocks of devices.
#pragma once
#include <algorithm>

#include "cells.hpp"
#include "gpuxbar/images.cuh"
#include "gpuxbar/pulses.cuh"
#include "gpuxbar/slices.cuh"

namespace gpuxbar::pulses {

constexpr int LINES = 64;    // wordlines of a block
constexpr int SAMPLES = 32;  // whose trains are made together
constexpr int WORD = 32;     // lines that a word holds a bit of, slots of a train and its sign

// Twin of `Update` in gpuxbar/ops/pulse_update.py.
struct Update {
  UpdateLaw law;
  Train train;
  Endurance endurance;
  Slices slices;
  Conv conv;  // whose patches and pixels drive the lines; without pixels, matrices do
  i64 batch, groups, inputs, outputs, step, aggregated;
  i64 weights_held;  // whether the weights are what devices read before, so that those of others than move may stay
  u64 seed;
  float g_min, range;  // S
  float stuck_low, stuck_high;
  float pulses;  // wanted for an input, an error and a full weight of 1

  i64 x_size() const {
    if (!conv.out_h) return batch * groups * inputs;
    return batch / (conv.out_h * conv.out_w) * groups * conv.channels * conv.height * conv.width;
  }
  i64 d_size() const { return batch * groups * outputs; }
  // In whole blocks.
  i64 samples() const { return (batch + SAMPLES - 1) / SAMPLES * SAMPLES; }
  // Planes of devices that can move: of the lowest slice, both sides or the positive one.
  u32 sides() const { return law.sides == REFERENCE ? 1u : 2u; }
  // Place of a device in arrays like g.
  i64 cell(i64 plane, i64 row, i64 column) const { return (plane * groups * inputs + row) * outputs + column; }
  // A row of devices of the lowest slice.
  RowPlace place(u32 side, i64 group, i64 line, i64 col0) const {
    return RowPlace{side * (u32)slices.count, (u32)(group * inputs + line), col0};
  }
};

// How trains are held: as they are, a word for each line and sample; or as words of a slot's bits, over the samples of a
// block (a line's signs and then its slots behind each other) or over lines (the signs in the place of the last slot).
enum class Held { WHOLE, OVER_SAMPLES, OVER_LINES };

// Words that a line takes of a block whose longest train that fires has so many slots; even, as they are read by twos.
inline i64 words_of_line(i32 slots) { return (slots + 2) / 2 * 2; }

// Trains of `count` lines on one side of an array.
struct Trains {
  // [G, lines, samples], [G, samples / SAMPLES, lines, words_of_line] or for every `across` lines
  // [samples, WORD, row_words]
  u32* words;
  i64 count, lines, samples;
  Held held;
  i64 across;  // lines of a row of bits over lines

  u32* of_line(i64 group, i64 line) const { return words + (group * lines + line) * samples; }
  u32* over_samples(i64 group, i64 block, i64 line, i32 slots) const {
    return words + (group * samples + block * SAMPLES) * lines + line * words_of_line(slots);
  }
  // From a multiple of `across` on.
  u32* over_lines(i64 group, i64 line, i64 sample) const {
    return of_line(group, line) + sample * WORD * row_words(line);
  }
  i64 row_words(i64 line) const { return std::min(across, lines - line) / WORD; }
};

struct Arrays {
  float* g;            // [2 slices, G * I, O] S
  float* g_held;       // like g: what devices with write noise hold, where g is what they show; null without
  i32* pulse_count;    // like g: pulses taken, below 0 by failed devices; null where none fail
  DeviceMap map;       // planes like g
  const float* x;      // [B, G * I], or images [N, G * channels, height, width]
  const float* d;      // [B, G * O], or images [N, G * O, out_h, out_w]
  const float* scale;  // [G * O]     wanted pulses for an input and an error of 1
  const float* unit;   // [G]         the least of them
  const float* sign;   // [G * I], or null: 1   what an input is driven with
  float* w;            // [G, O, I]
  const float* w_max;  // [G * O]
  Trains inputs, errors;
  float* length;  // [G, blocks * SAMPLES]
  i32* slots;     // [G, blocks]  of a block's longest train that fires
  const WideKeys& keys;

  float* held() const { return g_held ? g_held : g; }
  // Whether to know which devices took pulses: those that can fail, or show others than they hold.
  bool tracked() const { return pulse_count || g_held; }
};

// Copy those of `count` words that are not 0, and perhaps some words behind them; how many they are.
inline i64 keep(const u32* all, i64 count, u32* to) {
  i64 kept = 0, b = 0;
#if defined(__AVX512F__)
  for (; b + 16 <= count; b += 16) {
    const __m512i words = _mm512_load_si512(all + b);
    const __mmask16 some = _mm512_test_epi32_mask(words, words);
    _mm512_storeu_si512(to + kept, _mm512_maskz_compress_epi32(some, words));
    kept += __builtin_popcount(some);
  }
#elif defined(__AVX2__) && defined(__BMI2__)
  for (; b + 8 <= count; b += 8) {
    const __m256i words = _mm256_load_si256((const __m256i*)(all + b));
    const __m256i none = _mm256_cmpeq_epi32(words, _mm256_setzero_si256());
    const u32 some = ~(u32)_mm256_movemask_ps(_mm256_castsi256_ps(none)) & 0xFFu;
    const u64 places = _pext_u64(0x0706050403020100u, 0xFFu * _pdep_u64(some, 0x0101010101010101u));
    const __m256i from = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((i64)places));
    _mm256_storeu_si256((__m256i*)(to + kept), _mm256_permutevar8x32_epi32(words, from));
    kept += __builtin_popcount(some);
  }
#endif
  for (; b < count; ++b) {
    to[kept] = all[b];
    kept += all[b] != 0;
  }
  return kept;
}

inline i64 whole_vectors(i64 count) { return (count + LANES - 1) / LANES * LANES; }

// A row of devices with what they keep for all time.
struct Row {
  SpreadDraws draws;
  alignas(64) float free[WIDE_ROW];

  // `failed`: whether a device has, null where none can. `chosen`: the devices that are asked for; null: all.
  Row(const Update& u, const Arrays& a, const RowPlace& at, i64 count, const bool* failed,
      const Chosen* chosen = nullptr)
      : draws(u.law, a.map, u.cell(at.plane, at.row, at.col0), count, at, a.keys, chosen) {
    draw_free(u.stuck_low, u.stuck_high, at, a.keys, free);
    if (failed)
      for (int j = 0; j < WIDE_ROW; ++j) free[j] = failed[j] ? 0.0f : free[j];
    if (chosen) chosen->pick(free, free);
  }

  // The same of devices in any order, of which none can fail.
  Row(const Update& u, const Arrays& a, const Places& at) : draws(u.law, a.map, at, a.keys) {
    draw_free(u.stuck_low, u.stuck_high, at, a.keys, free);
  }
};

using Counts = i32[LINES][WIDE_ROW];

// Up to 64 pairs of a block, line * WIDE_ROW + column of each; in the place of what fills the last vector, the first one again.
struct PairsOfBlock : Places {
  PairsOfBlock(const Update& u, i64 group, i64 i0, i64 o0, const u32* pairs, i64 pairs_there) {
    count = (int)whole_vectors(pairs_there);
    for (i64 k = 0; k < count; ++k) {
      const u32 pair = pairs[k < pairs_there ? k : 0];
      rows[k] = (u32)(group * u.inputs + i0) + pair / WIDE_ROW, columns[k] = (u32)o0 + pair % WIDE_ROW;
    }
  }

  // Their devices of one side, of the lowest slice.
  void lie_in(const Update& u, u32 side) {
    for (int k = 0; k < count; ++k) {
      planes[k] = side * (u32)u.slices.count;
      cells[k] = u.cell(planes[k], rows[k], columns[k]);
    }
  }
};

// Devices of LINES wordlines by WIDE_ROW bitlines, as they are moved one sample after the other.
struct alignas(64) Block {
  bool moved[LINES];  // wordlines with coincidences so far, whose devices are loaded
  // of the lowest slice, [side]
  float x[2][LINES][WIDE_ROW], before[2][LINES][WIDE_ROW];
  bool counted;  // whether devices can fail
  bool failed[2][LINES][WIDE_ROW];
  bool tracked;                  // whether their pulses are to be known
  i32 more[2][LINES][WIDE_ROW];  // of this update

  const bool* failures(u32 side, i64 line) const { return counted ? failed[side][line] : nullptr; }
  // Devices by line * WIDE_ROW + column.
  float* of_side(u32 side) { return &x[side][0][0]; }

  // Ask for the devices of a wordline ahead of their use.
  void ask_for(const Update& u, const Arrays& a, i64 group, i64 i0, i64 i, i64 o0) const {
    for (u32 side = 0; side < u.sides() && !moved[i]; ++side) {
      const RowPlace at = u.place(side, group, i0 + i, o0);
      fetch(a.held() + u.cell(at.plane, at.row, o0));
    }
  }

  // The devices of a wordline, if they are not there yet.
  void load(const Update& u, const Arrays& a, i64 group, i64 i0, i64 i, i64 o0) {
    if (moved[i]) return;
    moved[i] = true;
    const i64 count = std::min<i64>(WIDE_ROW, u.outputs - o0);
    for (u32 side = 0; side < u.sides(); ++side) {
      const RowPlace at = u.place(side, group, i0 + i, o0);
      const i64 first = u.cell(at.plane, at.row, o0);
      load_shares(a.held() + first, u.g_min, 1.0f / u.range, count, x[side][i], before[side][i]);
      if (tracked) std::fill(more[side][i], more[side][i] + WIDE_ROW, 0);
      if (!counted) continue;
      std::fill(failed[side][i], failed[side][i] + WIDE_ROW, false);
      for (i64 j = 0; j < count; ++j) failed[side][i][j] = a.pulse_count[first + j] < 0;
    }
  }
};

// Keep a row of devices that were moved to `x` by `more` pulses, from what they held `before`. Those that were pulsed show anew,
// and may fail.
inline void keep_row(const Update& u, const Arrays& a, const RowPlace& at, i64 count, const i32* more,
                     const float* before, float* x) {
  const i64 first = u.cell(at.plane, at.row, at.col0);
  alignas(64) float shown[WIDE_ROW], shown_before[WIDE_ROW], noise[WIDE_ROW];
  if (a.g_held) {
    const float write_noise = u.law.write_noise, floor = u.law.floor;
    load_shares(a.g + first, u.g_min, 1.0f / u.range, count, shown, shown_before);
    draw_normals(Draw{UPDATE_WRITE, at.plane, (u32)u.step, a.keys}, at.row, at.col0, noise);
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) shown[j] = more[j] > 0 ? max(fma(write_noise, noise[j], x[j]), floor) : shown[j];
  }
  if (a.pulse_count)
    wear_row(u.endurance, at, a.keys, more, count, a.pulse_count + first, x, a.g_held ? shown : nullptr);
  write_back(a.held() + first, x, before, u.g_min, u.range, count);
  if (a.g_held) write_back(a.g + first, shown, shown_before, u.g_min, u.range, count);
}

}  // namespace gpuxbar::pulses
