// pulse_update on the CPU: pulse trains of a batch, their coincidences through the device law, and the weights read out.
//
// A sliced weight is pulsed on its lowest slice. First the trains of every line, 32 samples of it together; patches of images are gathered on the way. Then blocks of 64
// wordlines by 64 bitlines: exact, chunks of samples in sequence, every device at its own pace; aggregated, coincidences
// are counted over the batch, 32 samples a word, and the devices move once. Every train and cell is a function of its own
// place, so the bits do not depend on threads.
// Meaning and oracle: gpuxbar/reference/pulse_update.py.
#include <algorithm>
#include <optional>
#include <vector>

#include "cells.hpp"
#include "gpuxbar/endurance.cuh"
#include "gpuxbar/pulses.cuh"
#include "gpuxbar/slices.cuh"
#include "images.hpp"

using namespace gpuxbar;

namespace {

constexpr int LINES = 64;
constexpr int CHUNK = 256;   // samples whose coincidences are found together, in sequence
constexpr int SAMPLES = 32;  // whose trains are made together
constexpr int EIGHT = 8;     // lines that a counter draws a slot of
#if defined(__AVX512F__)
constexpr int TILE = 4, WIDE = 16;  // wordlines and bitlines whose counts stay in registers, two vectors of them
#else
constexpr int TILE = 2, WIDE = 8;
#endif

// Twin of `Update` in gpuxbar/ops/pulse_update.py.
struct Update {
  UpdateLaw law;
  Train train;
  Endurance endurance;
  Slices slices;
  Conv conv;  // whose patches and pixels drive the lines; without pixels, matrices do
  i64 batch, groups, inputs, outputs, step;
  u64 seed;
  float g_min, range;  // S
  float stuck_low, stuck_high;

  i64 blocks() const { return (batch + SAMPLES - 1) / SAMPLES; }
  // Planes of devices that can move: of the lowest slice, both sides or the positive one.
  u32 sides() const { return law.sides == REFERENCE ? 1u : 2u; }
  // A row of devices of the lowest slice.
  Place place(u32 side, i64 group, i64 line, i64 col0) const {
    return Place{side * (u32)slices.count, (u32)(group * inputs + line), col0};
  }
};

// Trains of `count` lines on one side of an array; planes hold zeros for the lines behind these.
struct Trains {
  u32* words;  // [G, lines, blocks * SAMPLES]
  i64 count, lines, blocks;

  // The trains of a line, a word for each sample.
  u32* of_line(i64 group, i64 line) const { return words + (group * lines + line) * blocks * SAMPLES; }

  // A bit for each sample of a block, a word for each line: the lines' signs in plane 0, slot k in plane 1 + k.
  u32* plane(i64 group, i64 plane, i64 block) const {
    return words + ((group * SAMPLES + plane) * blocks + block) * lines;
  }
};

struct Arrays {
  float* g;            // [2 slices, G * I, O] S
  i32* pulse_count;    // like g: pulses taken, below 0 by failed devices; null where none fail
  DeviceMap map;       // planes like g
  const float* x;      // [B, G * I], or images [N, G * channels, height, width]
  const float* d;      // [B, G * O], or images [N, G * O, out_h, out_w]
  const float* scale;  // [G * O]     wanted pulses for an input and an error of 1
  const float* unit;   // [G]         the least of them
  float* w;            // [G, O, I]
  const float* w_max;  // [G * O]
  Trains inputs, errors;
  float* length;  // [G, blocks * SAMPLES]
  i32* slots;     // [G, blocks]  of a block's longest train that fires
  bool planes;    // whether trains are held in planes
};

// Bit l of the result is bit `bit` of word l.
inline u32 across(const u32 (&words)[SAMPLES], int bit) {
#if defined(__AVX512F__)
  const __m512i one = _mm512_set1_epi32((int)(1u << bit));
  return _mm512_test_epi32_mask(_mm512_load_si512(words), one) |
         (u32)_mm512_test_epi32_mask(_mm512_load_si512(words + 16), one) << 16;
#else
  u32 found = 0;
#pragma omp simd reduction(| : found)
  for (int l = 0; l < SAMPLES; ++l) found |= (words[l] >> bit & 1u) << l;
  return found;
#endif
}

// Makes the trains of blocks of samples.
class Trainer {
 public:
  Trainer(const Update& u, const Arrays& a)
      : u(u), a(a), inputs(a.inputs.lines * SAMPLES), errors(a.errors.lines * SAMPLES) {
    if (u.conv.out_h) patches.emplace(u.conv);
  }

  void fire(i64 group, i64 block) {
    const i64 b0 = block * SAMPLES, samples = std::min<i64>(SAMPLES, u.batch - b0);
    if (samples < SAMPLES) {
      std::fill(inputs.begin(), inputs.end(), 0.0f);
      std::fill(errors.begin(), errors.end(), 0.0f);
    }
    gather(group, b0, samples);
    const float* scale = a.scale + group * u.outputs;
    for (i64 o = 0; o < u.outputs; ++o)
      for (int l = 0; l < SAMPLES; ++l) errors[o * SAMPLES + l] *= scale[o];
    alignas(64) float top_input[SAMPLES], top_error[SAMPLES];
    largest(inputs.data(), u.inputs, top_input);
    largest(errors.data(), u.outputs, top_error);
    most = 0;
    for (int l = 0; l < SAMPLES; ++l) {
      const Sample sample = sample_train(u.train, top_input[l], top_error[l], a.unit[group]);
      length[l] = sample.length;
      per_input[l] = sample.per_input;
      per_error[l] = sample.per_error;
      most = std::max(most, sample.per_input > 0.0f ? sample.length : 0);
      a.length[group * u.blocks() * SAMPLES + b0 + l] = (float)sample.length;
    }
    a.slots[group * u.blocks() + block] = most;
    fire_lines(a.inputs, PULSE_INPUT, group, block, inputs.data(), per_input);
    fire_lines(a.errors, PULSE_ERROR, group, block, errors.data(), per_error);
  }

 private:
  // Inputs and errors of samples from b0 on, [lines][SAMPLES].
  void gather(i64 group, i64 b0, i64 samples) {
    if (u.conv.out_h) {
      const auto from = [](const float* images) {
        return [=](float* to, i64 first, i64 count) { std::copy_n(images + first, count, to); };
      };
      patches->pack(from(a.x), u.groups, group, runs_of(u.conv, b0, samples), inputs.data());
      pack_pixels<SAMPLES>(u.conv, from(a.d), u.groups, group, u.outputs, b0, samples, errors.data());
    } else {
      const i64 first = b0 * u.groups + group, by_input = u.groups * u.inputs, by_output = u.groups * u.outputs;
      transpose(a.x + first * u.inputs, by_input, samples, u.inputs, inputs.data(), SAMPLES);
      transpose(a.d + first * u.outputs, by_output, samples, u.outputs, errors.data(), SAMPLES);
    }
  }

  // The largest magnitude of each sample.
  static void largest(const float* values, i64 lines, float* top) {
    std::fill(top, top + SAMPLES, 0.0f);
    for (i64 line = 0; line < lines; ++line)
#pragma omp simd
      for (int l = 0; l < SAMPLES; ++l) top[l] = max(top[l], gpuxbar::abs(values[line * SAMPLES + l]));
  }

  // `per`: each sample's probability of a pulse for a value of 1.
  void fire_lines(const Trains& to, u32 purpose, i64 group, i64 block, const float* values, const float* per) {
    alignas(64) u32 words[EIGHT][SAMPLES];
    const i64 eights = (to.count + EIGHT - 1) / EIGHT;
    for (i64 eight = 0; eight < eights; ++eight) {
      const float* value = values + eight * EIGHT * SAMPLES;
      if (u.train.implicit)
        for (int k = 0; k < EIGHT; ++k)
#pragma omp simd
          for (int l = 0; l < SAMPLES; ++l)
            words[k][l] = implied_slots(length[l], gpuxbar::abs(value[k * SAMPLES + l]) * per[l]);
      else
        draw(purpose, (u32)(group * eights + eight), (u32)(block * SAMPLES), value, per, words);
      for (int k = 0; k < EIGHT; ++k)
#pragma omp simd
        for (int l = 0; l < SAMPLES; ++l) words[k][l] = signed_word(words[k][l], value[k * SAMPLES + l]);
      for (int k = 0; k < EIGHT; ++k) {
        const i64 line = eight * EIGHT + k;
        if (!a.planes) {
          std::copy_n(words[k], SAMPLES, to.of_line(group, line) + block * SAMPLES);
          continue;
        }
        to.plane(group, 0, block)[line] = across(words[k], 31);
        for (int slot = 0; slot < most; ++slot) to.plane(group, 1 + slot, block)[line] = across(words[k], slot);
      }
    }
    if (a.planes)
      for (int plane = 0; plane <= most; ++plane) {
        u32* words = to.plane(group, plane, block);
        std::fill(words + eights * EIGHT, words + to.lines, 0u);
      }
  }

  // Independent slots, see stochastic_slots.
  void draw(u32 purpose, u32 eight, u32 sample, const float* value, const float* per, u32 (*slots)[SAMPLES]) const {
    alignas(64) u32 chances[EIGHT][SAMPLES], words[4][SAMPLES], at[SAMPLES], eights[SAMPLES], samples[SAMPLES];
    for (int k = 0; k < EIGHT; ++k)
#pragma omp simd
      for (int l = 0; l < SAMPLES; ++l) {
        chances[k][l] = chance(gpuxbar::abs(value[k * SAMPLES + l]) * per[l]);
        slots[k][l] = 0;
      }
    for (int l = 0; l < SAMPLES; ++l) eights[l] = eight, samples[l] = sample + (u32)l;
    for (u32 slot = 0; slot < (u32)most; ++slot) {
      std::fill(at, at + SAMPLES, slot);
      draw_words_at<7>(purpose, (u32)u.step, u.seed, at, eights, samples, words);
      u32 open = 0;
      for (int q = 0; q < 4; ++q)
#pragma omp simd reduction(| : open)
        for (int l = 0; l < SAMPLES; ++l) {
          const u32 low = words[q][l] & 0xFFFFu, high = words[q][l] >> 16;
          const u32 chance_low = chances[2 * q][l], chance_high = chances[2 * q + 1][l];
          slots[2 * q][l] |= (u32)fires(chance_low, low) << slot;
          slots[2 * q + 1][l] |= (u32)fires(chance_high, high) << slot;
          open |= (u32)undecided(chance_low, low) | (u32)undecided(chance_high, high);
        }
      if (open) settle(purpose, eight, samples, slot, chances, words, slots);
    }
    for (int k = 0; k < EIGHT; ++k)
#pragma omp simd
      for (int l = 0; l < SAMPLES; ++l) slots[k][l] &= (1u << length[l]) - 1u;
  }

  // The few slots that the first random bits leave undecided.
  void settle(u32 purpose, u32 eight, const u32* samples, u32 slot, const u32 (*chances)[SAMPLES],
              const u32 (*words)[SAMPLES], u32 (*slots)[SAMPLES]) const {
    for (int l = 0; l < SAMPLES; ++l) {
      const u32 first[4] = {words[0][l], words[1][l], words[2][l], words[3][l]};
      for (u32 k = 0; k < EIGHT; ++k) {
        if (!undecided(chances[k][l], half_word(first, k))) continue;
        u32 last[4];
        slot_words(LAST_BITS + slot, eight, purpose, samples[l], (u32)u.step, u.seed, last);
        slots[k][l] |= (u32)fires_at_last(chances[k][l], half_word(last, k)) << slot;
      }
    }
  }

  const Update& u;
  const Arrays& a;
  std::vector<float> inputs, errors;
  std::optional<PatchLines<SAMPLES>> patches;
  i32 most = 0;  // slots of the block
  alignas(64) i32 length[SAMPLES];
  alignas(64) float per_input[SAMPLES], per_error[SAMPLES];
};

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

// `after_pulses` for cell j of a row; a struct made in a simd loop itself would keep it from vectorising.
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

  // For trains of a wordline and of `devices` bitlines, which lie `stride` apart.
  template <bool IMPLICIT>
  void find(const u32* inputs, const u32* errors, i64 stride, const float* length, i64 samples, i64 devices) {
    i64 most = 0, found[WIDE_ROW] = {};
    alignas(64) u32 all[CHUNK];
    for (i64 j = 0; j < devices; ++j) {
      const u32* error = errors + j * stride;
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
      kept += __builtin_popcount(some);
    }
#elif defined(__AVX2__) && defined(__BMI2__)
    for (; b + 8 <= samples; b += 8) {
      const __m256i words = _mm256_load_si256((const __m256i*)(all + b));
      const __m256i none = _mm256_cmpeq_epi32(words, _mm256_setzero_si256());
      const u32 some = ~(u32)_mm256_movemask_ps(_mm256_castsi256_ps(none)) & 0xFFu;
      const u64 places = _pext_u64(0x0706050403020100u, 0xFFu * _pdep_u64(some, 0x0101010101010101u));
      const __m256i from = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((i64)places));
      _mm256_storeu_si256((__m256i*)(to + kept), _mm256_permutevar8x32_epi32(words, from));
      kept += __builtin_popcount(some);
    }
#endif
    for (; b < samples; ++b) {
      to[kept] = all[b];
      kept += all[b] != 0;
    }
    return kept;
  }
};

// A row of devices of one plane both ways, [0] down and [1] up: all that stays the same from pulse to pulse.
struct alignas(64) Pulsed {
  float free[WIDE_ROW], low[WIDE_ROW], width[WIDE_ROW], inverse_width[WIDE_ROW];
  float gain[2][WIDE_ROW], shape[2][WIDE_ROW];
};

template <class L>
Pulsed pulsed_row(const UpdateLaw& s, const Row& row) {
  Pulsed p;
  std::copy_n(row.free, WIDE_ROW, p.free);
  for (int up = 0; up < 2; ++up)
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) {
      const Device device = device_under<L>(s, spreads(row.draws, j), up != 0);
      p.low[j] = device.low, p.width[j] = device.width, p.inverse_width[j] = device.inverse_width;
      p.gain[up][j] = device.gain, p.shape[up][j] = device.shape;
    }
  return p;
}

// Cell j of a row, as `device_under` makes it; a struct made in a simd loop itself would keep it from vectorising.
GPUXBAR_FN Device device_at(const Pulsed& row, int j, bool rising) {
  const float gain = rising ? row.gain[1][j] : row.gain[0][j], shape = rising ? row.shape[1][j] : row.shape[0][j];
  return Device{row.low[j], row.width[j], row.inverse_width[j], gain, shape};
}

// Devices of one plane after an event each; their pulses are added to `more`. What does not wait for the last event comes
// first: its operations fill those of others.
template <class L>
void pulse_row(const UpdateLaw s, bool positive, const Pulsed& row, const u32* event, const float* z, i32* more,
               float* x) {
  const float each = 1.0f / s.pulses;
  alignas(64) float up[WIDE_ROW], d[WIDE_ROW];
  alignas(64) float from[WIDE_ROW], by[WIDE_ROW], per_square[WIDE_ROW], fixed[WIDE_ROW];
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const float n = row.free[j] * Events::pulses(event[j]);
    const float raise = Events::raises(event[j]) ? n : 0.0f, lower = n - raise;
    up[j] = pulses_up(s.sides, positive, raise, lower);
    const float pulses = up[j] + pulses_down(s.sides, positive, raise, lower);
    d[j] = pulses * each;
    more[j] += (i32)pulses;
  }
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const Effort effort = effort_of<L>(s, device_at(row, j, up[j] > 0.0f), d[j], up[j] > 0.0f);
    from[j] = effort.reach.from, by[j] = effort.reach.by, per_square[j] = effort.per_square, fixed[j] = effort.fixed;
  }
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) {
    const Effort effort{Reach{from[j], by[j]}, per_square[j], fixed[j]};
    x[j] = moved<L>(s, device_at(row, j, up[j] > 0.0f), effort, x[j], d[j], up[j] > 0.0f, z[j], s.scatter);
  }
}

typedef u32 Words __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

inline Words count_bits(Words v) {
#if defined(__AVX512VPOPCNTDQ__)
  return (Words)_mm512_popcnt_epi32((__m512i)v);
#else
  v -= v >> 1 & 0x55555555u;
  v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
  v = (v + (v >> 4)) & 0x0F0F0F0Fu;
  return (v * 0x01010101u) >> 24;
#endif
}

using Counts = i32[LINES][WIDE_ROW];

// Coincidences of TILE wordlines and 2 WIDE bitlines over some blocks of samples, added to those that raise the weight and
// to all.
inline void count_tile(const Arrays& a, i64 group, i64 line, i64 bitline, i64 begin, i64 end, i32* raise, i32* all) {
  Words up[TILE][2] = {}, both[TILE][2] = {};
  for (i64 block = begin; block < end; ++block) {
    const u32* negative = a.inputs.plane(group, 0, block) + line;
    const Words* down = (const Words*)(a.errors.plane(group, 0, block) + bitline);
    for (i32 slot = 1; slot <= a.slots[group * a.inputs.blocks + block]; ++slot) {
      const u32* input = a.inputs.plane(group, slot, block) + line;
      const Words* error = (const Words*)(a.errors.plane(group, slot, block) + bitline);
#pragma GCC unroll 4
      for (int i = 0; i < TILE; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const Words meet = error[v] & input[i];
          both[i][v] += count_bits(meet);
          up[i][v] += count_bits(meet & (down[v] ^ negative[i]));
        }
    }
  }
  for (int i = 0; i < TILE; ++i)
    for (int v = 0; v < 2; ++v) {
      *(Words*)(raise + i * WIDE_ROW + v * WIDE) += up[i][v];
      *(Words*)(all + i * WIDE_ROW + v * WIDE) += both[i][v];
    }
}

// The same of a block of devices, whose trains lie in the first cache for a piece of the samples.
void count_planes(const Arrays& a, i64 group, i64 i0, i64 lines, i64 o0, i64 count, Counts& raise, Counts& all) {
  constexpr i64 WORDS = 8192;  // of a piece, and at least one block of samples
  const i64 blocks = a.inputs.blocks;
  for (i64 begin = 0, end = 0; begin < blocks; begin = end) {
    for (i64 words = 0; end < blocks && words < WORDS; ++end)
      words += (1 + a.slots[group * blocks + end]) * (LINES + WIDE_ROW);
    for (i64 i = 0; i < lines; i += TILE)
      for (i64 j = 0; j < count; j += 2 * WIDE)
        count_tile(a, group, i0 + i, o0 + j, begin, end, raise[i] + j, all[i] + j);
  }
}

void count_implied(const Update& u, const Arrays& a, i64 group, i64 i0, i64 lines, i64 o0, i64 count, Counts& raise,
                   Counts& all) {
  const float* length = a.length + group * u.blocks() * SAMPLES;
  for (i64 i = 0; i < lines; ++i)
    for (i64 j = 0; j < count; ++j) {
      const u32 *input = a.inputs.of_line(group, i0 + i), *error = a.errors.of_line(group, o0 + j);
      i32 up = 0, both = 0;
#pragma omp simd reduction(+ : up, both)
      for (i64 b = 0; b < u.batch; ++b) {
        const i32 n = coincidences<true>(input[b], error[b], length[b]);
        both += n;
        up += n & raising(input[b], error[b]);
      }
      raise[i][j] += up;
      all[i][j] += both;
    }
}

struct alignas(64) Block {
  // of the lowest slice, [side]
  float x[2][LINES][WIDE_ROW], before[2][LINES][WIDE_ROW];
  alignas(64) Counts raise, all;
  bool counted;  // whether devices can fail, which the next three are for
  bool failed[2][LINES][WIDE_ROW];
  i32 more[2][LINES][WIDE_ROW];  // pulses of this update

  const bool* failures(u32 side, i64 line) const { return counted ? failed[side][line] : nullptr; }
};

template <class L, bool IMPLICIT>
void pulse_in_sequence(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, Block& block) {
  static thread_local Events events;
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  const float* length = a.length + group * u.blocks() * SAMPLES;
  const UpdateLaw s = u.law;
  alignas(64) float z[2][WIDE_ROW] = {};
  alignas(64) Lines slots;
  for (i64 b0 = 0; b0 < u.batch; b0 += CHUNK) {
    const i64 samples = std::min<i64>(CHUNK, u.batch - b0);
    for (i64 i = 0; i < lines; ++i) {
      events.find<IMPLICIT>(a.inputs.of_line(group, i0 + i) + b0, a.errors.of_line(group, o0) + b0,
                            u.blocks() * SAMPLES, length + b0, samples, count);
      if (!events.turns) continue;
      const auto devices = [&](u32 side) {
        return pulsed_row<L>(s, Row(u, a.map, u.place(side, group, i0 + i, o0), count, block.failures(side, i)));
      };
      const Pulsed rows[2] = {devices(0), devices(1)};
      for (i64 turn = 0; turn < events.turns; ++turn) {
        const u32* event = events.in_turn[turn];
        for (int j = 0; j < WIDE_ROW; ++j) slots[j] = (u32)b0 + Events::sample(event[j]);
        if (noisy(s))
          draw_pairs_at(Draw{PULSE_CYCLE, 0, (u32)u.step, u.seed}, (u32)(group * u.inputs + i0 + i), o0, slots, z[0],
                        z[1]);
        for (u32 side = 0; side < u.sides(); ++side)
          pulse_row<L>(s, side == 0, rows[side], event, z[side], block.more[side][i], block.x[side][i]);
      }
    }
  }
}

template <class L>
void pulse_at_once(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, Block& block) {
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  for (i64 i = 0; i < LINES; ++i) {
    std::fill(block.raise[i], block.raise[i] + WIDE_ROW, 0);
    std::fill(block.all[i], block.all[i] + WIDE_ROW, 0);
  }
  if (a.planes)
    count_planes(a, group, i0, lines, o0, count, block.raise, block.all);
  else
    count_implied(u, a, group, i0, lines, o0, count, block.raise, block.all);
  const UpdateLaw s = u.law;
  alignas(64) float z[2][WIDE_ROW] = {}, ups[WIDE_ROW], downs[WIDE_ROW];
  for (i64 i = 0; i < lines; ++i) {
    if (noisy(s))
      draw_pairs(Draw{PULSE_CYCLE, 0, (u32)u.step, u.seed}, (u32)(group * u.inputs + i0 + i), o0, z[0], z[1]);
    for (u32 side = 0; side < u.sides(); ++side) {
      const Row row(u, a.map, u.place(side, group, i0 + i, o0), count, block.failures(side, i));
      share_pulses(s.sides, side == 0, row.free, block.raise[i], block.all[i], ups, downs);
      float* x = block.x[side][i];
#pragma omp simd
      for (int j = 0; j < WIDE_ROW; ++j) x[j] = both_ways<L>(s, row.draws, j, x[j], ups[j], downs[j], z[side][j]);
      for (int j = 0; j < WIDE_ROW; ++j) block.more[side][i][j] = (i32)(ups[j] + downs[j]);
    }
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
  const auto cells = [&](u32 side, i32 slice, i64 i) {
    const i64 plane = side * u.slices.count + slice;
    return a.g + ((plane * u.groups + group) * u.inputs + i0 + i) * u.outputs + o0;
  };
  for (u32 side = 0; side < 2; ++side)
    for (i64 i = 0; i < lines; ++i) {
      const float* from = cells(side, 0, i);
      float *x = block.x[side][i], *before = block.before[side][i];
      std::fill(x, x + WIDE_ROW, 0.0f);
      for (i64 j = 0; j < count; ++j) before[j] = x[j] = (from[j] - u.g_min) * inverse_range;
      std::fill(block.more[side][i], block.more[side][i] + WIDE_ROW, 0);
      std::fill(block.failed[side][i], block.failed[side][i] + WIDE_ROW, false);
      if (block.counted)
        for (i64 j = 0; j < count; ++j) block.failed[side][i][j] = a.pulse_count[from - a.g + j] < 0;
    }
  if (aggregated)
    pulse_at_once<L>(u, a, group, i0, o0, block);
  else
    pulse_in_sequence<L, IMPLICIT>(u, a, group, i0, o0, block);
  for (u32 side = 0; side < 2; ++side)
    for (i64 i = 0; i < lines; ++i) {
      float *to = cells(side, 0, i), *x = block.x[side][i], *before = block.before[side][i];
      if (block.counted)
        wear_row(u, u.place(side, group, i0 + i, o0), block.more[side][i], count, a.pulse_count + (to - a.g), x);
#pragma omp simd
      for (i64 j = 0; j < count; ++j)
        to[j] = x[j] != before[j] ? fma(x[j], u.range, u.g_min) : to[j];  // a cell that did not move keeps its bits
    }
  const i64 output = group * u.outputs + o0;
  auto& weight = block.x[0];
  for (i64 i = 0; i < lines; ++i) {
    float* sum = weight[i];
    std::fill(sum, sum + count, 0.0f);
    for (i32 slice = 0; slice < u.slices.count; ++slice)
      for (u32 side = 0; side < 2; ++side) {
        const float share = inverse_range * slice_weight(u.slices, slice), by = side ? -share : share;
        const float* from = cells(side, slice, i);
#pragma omp simd
        for (i64 j = 0; j < count; ++j) sum[j] = fma(from[j], by, sum[j]);
      }
#pragma omp simd
    for (i64 j = 0; j < count; ++j) sum[j] *= a.w_max[output + j];
  }
  transpose(weight[0], WIDE_ROW, lines, count, a.w + output * u.inputs + i0, u.inputs);
}

}  // namespace

extern "C" void gpuxbar_pulse_update(float* g, i32* pulse_count, const u16* device_map, const float* x, i64 x_size,
                                     const float* d, i64 d_size, const float* scale, const float* unit, float* w,
                                     const float* w_max, u32* inputs, u32* errors, float* length, i32* slots,
                                     const Update* update, i64 aggregated, i64* bad) {
  const Update u = *update;
  const DeviceMap map{device_map, 2 * u.slices.count * u.groups * u.inputs * u.outputs};
  const bool planes = aggregated && !u.train.implicit;
  const auto trains = [&](u32* words, i64 count) {
    const i64 together = planes ? 2 * WIDE : EIGHT;
    return Trains{words, count, (count + together - 1) / together * together, u.blocks()};
  };
  const Trains wordlines = trains(inputs, u.inputs), bitlines = trains(errors, u.outputs);
  const Arrays a{g, pulse_count, map, x, d, scale, unit, w, w_max, wordlines, bitlines, length, slots, planes};
  bad[0] = count_not_finite(x, x_size);
  bad[1] = count_not_finite(d, d_size);
  if (bad[0] + bad[1]) return;
#pragma omp parallel
  {
    Trainer trainer(u, a);
#pragma omp for collapse(2) schedule(static)
    for (i64 group = 0; group < u.groups; ++group)
      for (i64 block = 0; block < u.blocks(); ++block) trainer.fire(group, block);
  }
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
