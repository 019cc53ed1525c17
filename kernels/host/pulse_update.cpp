// pulse_update on the CPU: pulse trains of a batch, their coincidences through the device law, and the weights read out.
//
// First the trains of every line and sample, then blocks of 64 wordlines by 64 bitlines: exact, chunks of samples in
// sequence, every device at its own pace; aggregated, coincidences are counted over the batch and the devices move once. Every train and cell is a
// function of its own place, so the bits do not depend on threads.
// Meaning and oracle: gpuxbar/reference/pulse_update.py.
#include <algorithm>

#include "cells.hpp"
#include "gpuxbar/endurance.cuh"
#include "gpuxbar/pulses.cuh"

using namespace gpuxbar;

namespace {

constexpr int LINES = 64;
constexpr int CHUNK = 256;    // samples whose trains lie in the caches
constexpr int TOGETHER = 32;  // samples whose trains are made together

// Twin of `Update` in gpuxbar/ops/pulse_update.py.
struct Update {
  UpdateLaw law;
  Train train;
  Endurance endurance;
  i64 batch, groups, inputs, outputs, step;
  u64 seed;
  float g_min, range;  // S
  float stuck_low, stuck_high;
};

struct Arrays {
  float* g;            // [2, G * I, O] S
  i32* pulse_count;    // like g: pulses taken, below 0 by failed devices; null where none fail
  DeviceMap map;       // planes like g
  const float* x;      // [B, G * I]
  const float* d;      // [B, G * O]
  const float* scale;  // [G * O]     wanted pulses for an input and an error of 1
  const float* unit;   // [G]         the least of them
  float* w;            // [G, O, I]
  const float* w_max;  // [G * O]
  u32* inputs;         // [B, G * I]  trains
  u32* errors;         // [B, G * O]
  float* length;       // [B, G]
};

template <class Value>
float largest(i64 size, Value&& value) {
  float top = 0.0f;
#pragma omp simd reduction(max : top)
  for (i64 l = 0; l < size; ++l) top = std::max(top, gpuxbar::abs(value(l)));
  return top;
}

// Writes the trains of lines, 64 of them at a time: of any lines and samples, so that a narrow array fills the vectors
// as a wide one does. A line that cannot have a pulse draws nothing.
class Trainer {
 public:
  Trainer(const Update& u, u32 purpose, u32* words) : u(u), purpose(purpose), words(words) {}

  // Word `at` becomes the train of a line's value in a sample; `per`: probability for a value of 1.
  void add(i64 at, u32 line, u32 sample, i32 slots, float value, float per) {
    if (u.train.implicit) {
      words[at] = signed_word(implied_slots(slots, gpuxbar::abs(value) * per), value);
      return;
    }
    words[at] = signed_word(0, value);
    places[waiting] = at;
    lines[waiting] = line;
    samples[waiting] = sample;
    lengths[waiting] = (u32)slots;
    odds[waiting] = chance(gpuxbar::abs(value) * per);
    waiting += odds[waiting] != 0;
    if (waiting == WIDE_ROW) flush();
  }

  void flush() {
    alignas(64) Lines random[4], counters, word = {};
    for (u32 k = 0; k < COUNTERS; ++k) {  // counter by counter, so that loops vectorise
      std::fill(counters, counters + WIDE_ROW, k);
      draw_words_at<7>(purpose, (u32)u.step, u.seed, counters, lines, samples, random);
#pragma omp simd
      for (int l = 0; l < WIDE_ROW; ++l)
        word[l] = add_bits(word[l], odds[l], k, Counter{random[0][l], random[1][l], random[2][l], random[3][l]});
    }
#pragma omp simd
    for (int l = 0; l < WIDE_ROW; ++l) word[l] = cut_slots(word[l], odds[l], (i32)lengths[l]);
    for (i64 l = 0; l < waiting; ++l) words[places[l]] |= word[l];
    waiting = 0;
  }

 private:
  const Update& u;
  const u32 purpose;
  u32* const words;
  i64 waiting = 0, places[WIDE_ROW];
  alignas(64) Lines lines = {}, samples = {}, lengths = {}, odds = {};
};

// The trains of samples begin .. end - 1.
void fire_samples(const Update& u, const Arrays& a, i64 begin, i64 end) {
  Trainer inputs(u, PULSE_INPUT, a.inputs), errors(u, PULSE_ERROR, a.errors);
  for (i64 b = begin; b < end; ++b)
    for (i64 group = 0; group < u.groups; ++group) {
      const i64 x0 = group * u.inputs, d0 = group * u.outputs;
      const i64 first_x = b * u.groups * u.inputs + x0, first_d = b * u.groups * u.outputs + d0;
      const float *x = a.x + first_x, *d = a.d + first_d, *scale = a.scale + d0;
      const auto input = [=](i64 l) { return x[l]; };
      const auto error = [=](i64 l) { return d[l] * scale[l]; };
      const Sample sample = sample_train(u.train, largest(u.inputs, input), largest(u.outputs, error), a.unit[group]);
      a.length[b * u.groups + group] = (float)sample.length;
      for (i64 l = 0; l < u.inputs; ++l)
        inputs.add(first_x + l, (u32)(x0 + l), (u32)b, sample.length, input(l), sample.per_input);
      for (i64 l = 0; l < u.outputs; ++l)
        errors.add(first_d + l, (u32)(d0 + l), (u32)b, sample.length, error(l), sample.per_error);
    }
  inputs.flush();
  errors.flush();
}

// A row of devices with what they keep for all time.
struct Row {
  Draws draws;
  alignas(64) float free[WIDE_ROW];

  // `failed`: whether a device has, null where none can.
  Row(const Update& u, DeviceMap map, const Place& at, i64 count, const bool* failed)
      : draws(u.law, map, (at.plane * u.groups * u.inputs + at.row) * u.outputs + at.col0, count, at, u.seed) {
    draw_free(u.stuck_low, u.stuck_high, at, u.seed, free);
    if (failed)
      for (int j = 0; j < WIDE_ROW; ++j) free[j] = failed[j] ? 0.0f : free[j];
  }
};

// `after_pulses` for cell j of a row, see moved_cell.
template <class L>
GPUXBAR_FN float both_ways(const UpdateLaw& s, const Draws& z, int j, float x, float ups, float downs, float noise) {
  return after_pulses<L>(s, spreads(z, j), x, ups, downs, noise);
}

// Pulses of a row's devices, of one plane, for coincidences that raise the weight and all.
void share_pulses(i32 sides, bool positive, const float* free, const i32* raise, const i32* all, float* ups,
                  float* downs) {
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const float raising = free[j] * (float)raise[j], lowering = free[j] * (float)(all[j] - raise[j]);
    ups[j] = pulses_up(sides, positive, raising, lowering);
    downs[j] = pulses_down(sides, positive, raising, lowering);
  }
}

// Trains of a chunk of samples on the lines of a block: samples of a line together, or bitlines of a sample.
struct alignas(64) Trains {
  u32 inputs[LINES][CHUNK], errors[CHUNK][WIDE_ROW];
  float length[CHUNK];

  void load(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, i64 b0, i64 samples) {
    const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
    const i64 first = b0 * u.groups + group;
    if (lines < LINES) std::fill(inputs[lines], inputs[LINES], 0u);
    transpose(a.inputs + first * u.inputs + i0, u.groups * u.inputs, samples, lines, inputs[0], CHUNK);
    for (i64 b = 0; b < samples; ++b) {
      const u32* error = a.errors + (first + b * u.groups) * u.outputs + o0;
      std::copy(error, error + count, errors[b]);
      std::fill(errors[b] + count, errors[b] + WIDE_ROW, 0u);
      length[b] = a.length[first + b * u.groups];
    }
  }
};

// One sample's coincidences on a row of devices.
template <bool IMPLICIT>
void coincide(u32 input, const u32* errors, float length, i32* raise, i32* all) {
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    all[j] = coincidences<IMPLICIT>(input, errors[j], length);
    raise[j] = all[j] & raising(input, errors[j]);
  }
}

// Samples of a chunk that move the devices of a wordline, in order and of each device for itself: devices with few
// coincidences do not wait for their neighbours. An event holds its sample (8 bits), its coincidences and, in the
// sign, whether they raise the weight; 0 is none.
struct alignas(64) Events {
  static_assert(CHUNK == 256);
  static constexpr i64 ROOM = CHUNK + LANES;
  u32 of_device[WIDE_ROW][ROOM], in_turn[ROOM][WIDE_ROW];
  i64 turns;

  static u32 sample(u32 event) { return event & 0xFFu; }
  static float pulses(u32 event) { return (float)(i32)(event >> 8 & 0x7Fu); }
  static bool raises(u32 event) { return (event & NEGATIVE) != 0; }

  // For trains of a wordline and, of every bitline, `errors` [WIDE_ROW][CHUNK].
  template <bool IMPLICIT>
  void find(const u32* inputs, const u32 (*errors)[CHUNK], const float* length, i64 samples, i64 devices) {
    i64 most = 0, found[WIDE_ROW] = {};
    alignas(64) u32 all[CHUNK];
    for (i64 j = 0; j < devices; ++j) {
      const u32* error = errors[j];
#pragma omp simd
      for (i64 b = 0; b < samples; ++b) {
        const u32 n = (u32)coincidences<IMPLICIT>(inputs[b], error[b], length[b]);
        all[b] = n ? (u32)b | n << 8 | ((inputs[b] ^ error[b]) & NEGATIVE) : 0u;
      }
      found[j] = keep(all, samples, of_device[j]);
      most = std::max(most, found[j]);
    }
    turns = most;
    const i64 whole = (most + LANES - 1) / LANES * LANES;
    for (i64 j = 0; j < WIDE_ROW; ++j) std::fill(of_device[j] + found[j], of_device[j] + std::max(whole, found[j]), 0u);
    transpose(of_device[0], ROOM, WIDE_ROW, whole, in_turn[0], WIDE_ROW);
  }

  // Copy the events among `samples` words, and perhaps some words behind them; how many they are.
  static i64 keep(const u32* all, i64 samples, u32* to) {
    i64 kept = 0, b = 0;
#if defined(__AVX512F__)
    for (; b + 16 <= samples; b += 16) {
      const __m512i words = _mm512_load_si512(all + b);
      const __mmask16 some = _mm512_test_epi32_mask(words, words);
      _mm512_storeu_si512(to + kept, _mm512_maskz_compress_epi32(some, words));
      kept += popcount(some);
    }
#endif
    for (; b < samples; ++b) {
      to[kept] = all[b];
      kept += all[b] != 0;
    }
    return kept;
  }
};

// A row of devices of one plane after the events of a chunk of samples from b0 on; their pulses are added to `more`.
template <class L>
void pulse_row(const Update& u, const Place& at, const Row& row, i64 b0, const Events& events, i32* more, float* x) {
  const UpdateLaw s = u.law;
  const float each = 1.0f / s.pulses;
  const bool positive = at.plane == 0, noise = noisy(s);
  alignas(64) float z[WIDE_ROW] = {}, up[WIDE_ROW], d[WIDE_ROW];
  alignas(64) Lines slots;
  for (i64 turn = 0; turn < events.turns; ++turn) {
    const u32* event = events.in_turn[turn];
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) {
      const float n = row.free[j] * Events::pulses(event[j]);
      const float raise = Events::raises(event[j]) ? n : 0.0f, lower = n - raise;
      up[j] = pulses_up(s.sides, positive, raise, lower);
      const float pulses = up[j] + pulses_down(s.sides, positive, raise, lower);
      d[j] = pulses * each;
      more[j] += (i32)pulses;
      slots[j] = 2 * ((u32)b0 + Events::sample(event[j])) + at.plane;
    }
    if (noise) draw_normals_at(Draw{PULSE_CYCLE, 0, (u32)u.step, u.seed}, at.row, at.col0, slots, z);
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) x[j] = moved_cell<L>(s, row.draws, j, x[j], d[j], up[j] > 0.0f, z[j]);
  }
}

typedef i32 Ints __attribute__((vector_size(64)));

inline Ints count_bits(Ints v) {
#if defined(__AVX512VPOPCNTDQ__)
  return (Ints)_mm512_popcnt_epi32((__m512i)v);
#else
  v -= v >> 1 & 0x55555555;  // of words whose sign is clear
  v = (v & 0x33333333) + (v >> 2 & 0x33333333);
  v = (v + (v >> 4)) & 0x0F0F0F0F;
  return (v * 0x01010101) >> 24;
#endif
}

constexpr int TILE = 4, WIDE = 16;  // wordlines and bitlines whose counts stay in registers, two vectors of them
constexpr int PIECE = 64;           // samples whose trains lie in the first cache

// Coincidences of a block over a piece of a chunk, added to those that raise the weight and to all.
inline void count_tile(const Trains& t, i64 line, int j0, i64 begin, i64 end, i32 (*raise)[WIDE_ROW],
                       i32 (*all)[WIDE_ROW]) {
  Ints up[TILE][2] = {}, both[TILE][2] = {};
  for (i64 b = begin; b < end; ++b) {
    const Ints error[2] = {*(const Ints*)(t.errors[b] + j0), *(const Ints*)(t.errors[b] + j0 + WIDE)};
#pragma GCC unroll 4
    for (int i = 0; i < TILE; ++i) {
      const i32 input = (i32)t.inputs[line + i][b];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const Ints n = count_bits(error[v] & (input & (i32)SLOTS));
        both[i][v] += n;
        up[i][v] += n & (error[v] ^ input) >> 31;
      }
    }
  }
  for (int i = 0; i < TILE; ++i)
    for (int v = 0; v < 2; ++v) {
      *(Ints*)(raise[line + i] + j0 + v * WIDE) += up[i][v];
      *(Ints*)(all[line + i] + j0 + v * WIDE) += both[i][v];
    }
}

inline void count_implied(const Trains& t, i64 lines, i64 samples, i32 (*raise)[WIDE_ROW], i32 (*all)[WIDE_ROW]) {
  alignas(64) i32 up[WIDE_ROW], both[WIDE_ROW];
  for (i64 i = 0; i < lines; ++i)
    for (i64 b = 0; b < samples; ++b) {
      coincide<true>(t.inputs[i][b], t.errors[b], t.length[b], up, both);
#pragma omp simd
      for (int j = 0; j < WIDE_ROW; ++j) raise[i][j] += up[j], all[i][j] += both[j];
    }
}

struct alignas(64) Block {
  float x[2][LINES][WIDE_ROW], before[2][LINES][WIDE_ROW];
  alignas(64) i32 raise[LINES][WIDE_ROW], all[LINES][WIDE_ROW];
  bool counted;  // whether devices can fail, which the next three are for
  bool failed[2][LINES][WIDE_ROW];
  i32 more[2][LINES][WIDE_ROW];  // pulses of this update

  const bool* failures(u32 plane, i64 line) const { return counted ? failed[plane][line] : nullptr; }
};

template <class L, bool IMPLICIT>
void pulse_in_sequence(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, Block& block) {
  static thread_local Trains trains;
  static thread_local Events events;
  alignas(64) static thread_local u32 errors[WIDE_ROW][CHUNK];  // of a bitline together
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  for (i64 b0 = 0; b0 < u.batch; b0 += CHUNK) {
    const i64 samples = std::min<i64>(CHUNK, u.batch - b0);
    trains.load(u, a, group, i0, o0, b0, samples);
    transpose(trains.errors[0], WIDE_ROW, samples, WIDE_ROW, errors[0], CHUNK);
    for (i64 i = 0; i < lines; ++i) {
      events.find<IMPLICIT>(trains.inputs[i], errors, trains.length, samples, count);
      for (u32 plane = 0; events.turns && plane < (u.law.sides == REFERENCE ? 1u : 2u); ++plane) {
        const Place at{plane, (u32)(group * u.inputs + i0 + i), o0};
        const Row row(u, a.map, at, count, block.failures(plane, i));
        pulse_row<L>(u, at, row, b0, events, block.more[plane][i], block.x[plane][i]);
      }
    }
  }
}

template <class L, bool IMPLICIT>
void pulse_at_once(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, Block& block) {
  static thread_local Trains trains;
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  for (i64 i = 0; i < LINES; ++i) {
    std::fill(block.raise[i], block.raise[i] + WIDE_ROW, 0);
    std::fill(block.all[i], block.all[i] + WIDE_ROW, 0);
  }
  for (i64 b0 = 0; b0 < u.batch; b0 += CHUNK) {
    const i64 samples = std::min<i64>(CHUNK, u.batch - b0);
    trains.load(u, a, group, i0, o0, b0, samples);
    if (IMPLICIT) {
      count_implied(trains, lines, samples, block.raise, block.all);
      continue;
    }
    for (i64 begin = 0; begin < samples; begin += PIECE)
      for (i64 i = 0; i < lines; i += TILE)
        for (int j0 = 0; j0 < count; j0 += 2 * WIDE)
          count_tile(trains, i, j0, begin, std::min(begin + PIECE, samples), block.raise, block.all);
  }
  const UpdateLaw s = u.law;
  for (u32 plane = 0; plane < (s.sides == REFERENCE ? 1u : 2u); ++plane)
    for (i64 i = 0; i < lines; ++i) {
      const Place at{plane, (u32)(group * u.inputs + i0 + i), o0};
      const Row row(u, a.map, at, count, block.failures(plane, i));
      alignas(64) float z[WIDE_ROW] = {};
      if (noisy(u.law)) draw_normals(Draw{PULSE_CYCLE, plane, (u32)u.step, u.seed}, at.row, at.col0, z);
      alignas(64) float ups[WIDE_ROW], downs[WIDE_ROW];
      share_pulses(s.sides, plane == 0, row.free, block.raise[i], block.all[i], ups, downs);
      float* x = block.x[plane][i];
#pragma omp simd
      for (int j = 0; j < WIDE_ROW; ++j) x[j] = both_ways<L>(s, row.draws, j, x[j], ups[j], downs[j], z[j]);
      for (int j = 0; j < WIDE_ROW; ++j) block.more[plane][i][j] = (i32)(ups[j] + downs[j]);
    }
}

// Count the pulses of a row of devices, and leave those that fail by them where they fail.
void wear_row(const Update& u, const Place& at, const i32* more, i64 count, i32* taken, float* x) {
  alignas(64) float z[WIDE_ROW] = {};
  if (u.endurance.spread > 0.0f) draw_normals(Draw{ENDURANCE, at.plane, 0, u.seed}, at.row, at.col0, z);
  alignas(64) i32 now[WIDE_ROW] = {};
  std::copy(taken, taken + count, now);
  const Endurance e = u.endurance;
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const bool touched = more[j] > 0;  // and so alive
    const i32 after = after_wear(e, touched ? now[j] : 0, more[j], z[j]);
    now[j] = touched ? after : now[j];
    x[j] = touched && after < 0 ? failed_share(e, x[j]) : x[j];
  }
  std::copy(now, now + count, taken);
}

template <class L, bool IMPLICIT>
void update_block(const Update& u, const Arrays& a, bool aggregated, i64 group, i64 i0, i64 o0) {
  static thread_local Block block;
  block.counted = a.pulse_count != nullptr;
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  const float inverse_range = 1.0f / u.range;
  const auto cells = [&](u32 plane, i64 i) {
    return a.g + ((i64)plane * u.groups * u.inputs + group * u.inputs + i0 + i) * u.outputs + o0;
  };
  for (u32 plane = 0; plane < 2; ++plane)
    for (i64 i = 0; i < lines; ++i) {
      const float* from = cells(plane, i);
      float *x = block.x[plane][i], *before = block.before[plane][i];
      std::fill(x, x + WIDE_ROW, 0.0f);
      for (i64 j = 0; j < count; ++j) before[j] = x[j] = (from[j] - u.g_min) * inverse_range;
      std::fill(block.more[plane][i], block.more[plane][i] + WIDE_ROW, 0);
      std::fill(block.failed[plane][i], block.failed[plane][i] + WIDE_ROW, false);
      if (block.counted)
        for (i64 j = 0; j < count; ++j) block.failed[plane][i][j] = a.pulse_count[from - a.g + j] < 0;
    }
  if (aggregated)
    pulse_at_once<L, IMPLICIT>(u, a, group, i0, o0, block);
  else
    pulse_in_sequence<L, IMPLICIT>(u, a, group, i0, o0, block);
  for (u32 plane = 0; plane < 2; ++plane)
    for (i64 i = 0; i < lines; ++i) {
      float *to = cells(plane, i), *x = block.x[plane][i], *before = block.before[plane][i];
      if (block.counted)
        wear_row(u, Place{plane, (u32)(group * u.inputs + i0 + i), o0}, block.more[plane][i], count,
                 a.pulse_count + (to - a.g), x);
      for (i64 j = 0; j < count; ++j) {
        to[j] = x[j] != before[j] ? fma(x[j], u.range, u.g_min) : to[j];  // a cell that did not move keeps its bits
        x[j] = plane ? fma(-to[j], inverse_range, block.x[0][i][j]) : to[j] * inverse_range;
      }
    }
  const i64 output = group * u.outputs + o0;
  for (i64 i = 0; i < lines; ++i)
#pragma omp simd
    for (i64 j = 0; j < count; ++j) block.x[1][i][j] *= a.w_max[output + j];
  transpose(block.x[1][0], WIDE_ROW, lines, count, a.w + output * u.inputs + i0, u.inputs);
}

}  // namespace

extern "C" void gpuxbar_pulse_update(float* g, i32* pulse_count, const u16* device_map, const float* x, const float* d,
                                     const float* scale, const float* unit, float* w, const float* w_max, u32* inputs,
                                     u32* errors, float* length, const Update* update, i64 aggregated, i64* bad) {
  const Update u = *update;
  const Arrays a{g,      pulse_count, DeviceMap{device_map, 2 * u.groups * u.inputs * u.outputs},
                 x,      d,           scale,
                 unit,   w,           w_max,
                 inputs, errors,      length};
  bad[0] = count_not_finite(x, u.batch * u.groups * u.inputs);
  bad[1] = count_not_finite(d, u.batch * u.groups * u.outputs);
  if (bad[0] + bad[1]) return;
#pragma omp parallel for schedule(static)
  for (i64 b = 0; b < u.batch; b += TOGETHER) fire_samples(u, a, b, std::min<i64>(b + TOGETHER, u.batch));
  const i64 row_blocks = (u.inputs + LINES - 1) / LINES, col_blocks = (u.outputs + WIDE_ROW - 1) / WIDE_ROW;
  with_law(u.law.law, [&](auto law) {
    using L = typename decltype(law)::Type;
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (i64 group = 0; group < u.groups; ++group)
      for (i64 rb = 0; rb < row_blocks; ++rb)
        for (i64 cb = 0; cb < col_blocks; ++cb)
          if (u.train.implicit)
            update_block<L, true>(u, a, aggregated != 0, group, rb * LINES, cb * WIDE_ROW);
          else
            update_block<L, false>(u, a, aggregated != 0, group, rb * LINES, cb * WIDE_ROW);
  });
}
