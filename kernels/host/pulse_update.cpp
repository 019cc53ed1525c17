// pulse_update on the CPU: pulse trains of a batch, their coincidences through the device law, and the weights read out.
//
// A sliced weight is pulsed on its lowest slice. First the trains of every line, 32 samples of it together; patches of
// images are gathered on the way. Then blocks of 64 wordlines by 64 bitlines: exact, samples in sequence, every device at
// its own pace; aggregated, coincidences are counted over the batch, of each line with 256 of the other side
// together, and the devices move once. Every train and cell is a function of its own place, so the bits do not depend on
// threads.
// Meaning and oracle: gpuxbar/reference/pulse_update.py.
#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "cells.hpp"
#include "finite.hpp"
#include "gpuxbar/pulses.cuh"
#include "gpuxbar/slices.cuh"
#include "images.hpp"
#include "threads.hpp"

using namespace gpuxbar;

namespace {

constexpr int LINES = 64;
constexpr int CHUNK = 256;     // samples whose coincidences are found together, in sequence
constexpr int STRETCH = 4096;  // samples after which devices move, where coincidences are rare
constexpr int SAMPLES = 32;    // whose trains are made together
constexpr int EIGHT = 8;       // lines that a counter draws a slot of
constexpr int WORD = 32;       // lines that a word holds a bit of, slots of a train and its sign
constexpr int ACROSS = 256;    // lines whose coincidences with one of the other side are counted together
constexpr int PIECE = 128;     // samples of it: their slots on so many lines lie in the second cache
// Coincidences of a device and sample below which to go through slots that fire; comparing all words pays sooner where
// vectors are wide.
constexpr double RARE = LANES == 16 ? 1.0 / 64 : 0.2;

// Twin of `Update` in gpuxbar/ops/pulse_update.py.
struct Update {
  UpdateLaw law;
  Train train;
  Endurance endurance;
  Slices slices;
  Conv conv;  // whose patches and pixels drive the lines; without pixels, matrices do
  i64 batch, groups, inputs, outputs, step, aggregated;
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
};

inline i64 whole_vectors(i64 count) { return (count + LANES - 1) / LANES * LANES; }

// words[p][l] bit k = words[k][l] bit p before.
template <int STRIDE = WORD / 2>
void turn_bits(u32 (&words)[WORD][SAMPLES], u32 low = 0x0000FFFFu) {
  for (int k = 0; k < WORD; ++k) {
    if (k & STRIDE) continue;
#pragma omp simd
    for (int l = 0; l < SAMPLES; ++l) {
      const u32 swap = (words[k][l] >> STRIDE ^ words[k + STRIDE][l]) & low;
      words[k + STRIDE][l] ^= swap;
      words[k][l] ^= swap << STRIDE;
    }
  }
  if constexpr (STRIDE > 1) turn_bits<STRIDE / 2>(words, low ^ low << STRIDE / 2);
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
    lanes = (int)whole_vectors(samples);
    if (samples < SAMPLES) {
      std::fill(inputs.begin(), inputs.end(), 0.0f);
      std::fill(errors.begin(), errors.end(), 0.0f);
    }
    gather(group, b0, samples);
    multiply(errors, a.scale + group * u.outputs, u.outputs);
    if (a.sign) multiply(inputs, a.sign + group * u.inputs, u.inputs);
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
      a.length[group * u.samples() + b0 + l] = (float)sample.length;
    }
    a.slots[group * (u.samples() / SAMPLES) + block] = most;
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

  // Values of lines by a factor of each.
  static void multiply(std::vector<float>& values, const float* factor, i64 lines) {
    for (i64 line = 0; line < lines; ++line)
      for (int l = 0; l < SAMPLES; ++l) values[line * SAMPLES + l] *= factor[line];
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
    alignas(64) u32 words[WORD][SAMPLES];
    const i64 eights = (to.count + EIGHT - 1) / EIGHT, b0 = block * SAMPLES;
    for (i64 eight = 0; eight < eights; ++eight) {
      const float* value = values + eight * EIGHT * SAMPLES;
      const i64 line = eight * EIGHT, in_word = line % WORD;
      auto* slots = words + in_word;
      if (u.train.implicit)
        for (int k = 0; k < EIGHT; ++k)
#pragma omp simd
          for (int l = 0; l < SAMPLES; ++l)
            slots[k][l] = implied_slots(length[l], gpuxbar::abs(value[k * SAMPLES + l]) * per[l]);
      else
        draw(purpose, (u32)(group * eights + eight), (u32)b0, value, per, slots);
      for (int k = 0; k < EIGHT; ++k)
#pragma omp simd
        for (int l = 0; l < SAMPLES; ++l) slots[k][l] = signed_word(slots[k][l], value[k * SAMPLES + l]);
      if (to.held == Held::WHOLE) {
        for (int k = 0; k < EIGHT; ++k) std::copy_n(slots[k], SAMPLES, to.of_line(group, line + k) + b0);
      } else if (in_word + EIGHT == WORD || eight + 1 == eights) {
        std::fill_n(slots[0] + EIGHT * SAMPLES, (WORD - EIGHT - in_word) * SAMPLES, 0u);
        hold_bits(to, group, block, line - in_word, words);
      }
    }
  }

  // The slots that fire, and the signs, of WORD lines.
  void hold_bits(const Trains& to, i64 group, i64 block, i64 line, u32 (&words)[WORD][SAMPLES]) const {
    if (to.held == Held::OVER_SAMPLES) {
      alignas(64) u32 turned[SAMPLES][WORD];
      transpose(words[0], SAMPLES, WORD, SAMPLES, turned[0], WORD);
      turn_bits(turned);
      transpose(turned[0], WORD, WORD, WORD, words[0], WORD);  // words[line][slot]
      for (int k = 0; k < WORD; ++k) {
        u32* bits = to.over_samples(group, block, line + k, most);
        bits[0] = words[k][WORD - 1];
        bits[words_of_line(most) - 1] = 0;
        std::copy_n(words[k], most, bits + 1);
      }
    } else {
      const i64 first = line / to.across * to.across, row = to.row_words(first);
      u32* bits = to.over_lines(group, first, block * SAMPLES) + (line - first) / WORD;
      turn_bits(words);
      const auto hold = [&](int slot) {
        for (int l = 0; l < SAMPLES; ++l) bits[(l * WORD + slot) * row] = words[slot][l];
      };
      for (int slot = 0; slot < most; ++slot) hold(slot);
      hold(WORD - 1);
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
      draw_words_at<7>(purpose, (u32)u.step, a.keys, at, eights, samples, words, lanes);
      u32 open = 0;
      for (int q = 0; q < 4; ++q)
#pragma omp simd reduction(| : open)
        for (int l = 0; l < lanes; ++l) {
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
    for (int l = 0; l < lanes; ++l) {
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
  int lanes;     // its samples, in whole vectors
  alignas(64) i32 length[SAMPLES];
  alignas(64) float per_input[SAMPLES], per_error[SAMPLES];
};

// A row of devices with what they keep for all time.
struct Row {
  SpreadDraws draws;
  alignas(64) float free[WIDE_ROW];

  // `failed`: whether a device has, null where none can. `chosen`: the devices that are asked for; null: all.
  Row(const Update& u, const Arrays& a, const RowPlace& at, i64 count, const bool* failed,
      const Chosen* chosen = nullptr)
      : draws(u.law, a.map, (at.plane * u.groups * u.inputs + at.row) * u.outputs + at.col0, count, at, a.keys,
              chosen) {
    draw_free(u.stuck_low, u.stuck_high, at, a.keys, free);
    if (failed)
      for (int j = 0; j < WIDE_ROW; ++j) free[j] = failed[j] ? 0.0f : free[j];
    if (chosen) chosen->pick(free, free);
  }
};

// `after_pulses` for cell j of a row; a struct made in a simd loop itself would keep it from vectorising.
template <class L>
GPUXBAR_FN float both_ways(const UpdateLaw& s, const SpreadDraws& z, int j, float x, float ups, float downs,
                           float noise) {
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

// Samples that move the devices of a wordline, in order and of each device for itself: devices with few coincidences do not
// wait for their neighbours. An event holds its sample (16 bits), its coincidences (5 bits) and, in the sign, whether they
// raise the weight; 0 is none.
struct alignas(64) Events {
  static constexpr i64 ROOM = 2 * CHUNK + LANES;
  static constexpr u32 ONCE = 1u << 16, MANY = 30 * ONCE;  // one coincidence; the bits of more
  static_assert(STRETCH <= ONCE && CHUNK <= ONCE);
  u32 of_device[WIDE_ROW][ROOM], in_turn[ROOM][WIDE_ROW];
  alignas(64) i32 found[WIDE_ROW];
  i32 moving;           // devices that have any
  u32 order[WIDE_ROW];  // devices, those with most events first

  static u32 sample(u32 event) { return event & (ONCE - 1); }
  static float pulses(u32 event) { return (float)(i32)((event & ~NEGATIVE) / ONCE); }
  static bool raises(u32 event) { return (event & NEGATIVE) != 0; }

  void clear() { std::fill_n(found, WIDE_ROW, 0); }
  i32 most() const {
    i32 top = 0;
#pragma omp simd reduction(max : top)
    for (int j = 0; j < WIDE_ROW; ++j) top = found[j] > top ? found[j] : top;
    return top;
  }

  // In a chunk of samples from `first` on, for trains of a wordline and of `devices` bitlines, which lie `stride` apart.
  template <bool IMPLICIT>
  void find(const u32* inputs, const u32* errors, i64 stride, const float* length, u32 first, i64 samples,
            i64 devices) {
    alignas(64) u32 all[CHUNK];
    for (i64 j = 0; j < devices; ++j) {
      const u32* error = errors + j * stride;
#pragma omp simd
      for (i64 b = 0; b < samples; ++b) {
        const u32 n = (u32)coincidences<IMPLICIT>(inputs[b], error[b], length[b]);
        all[b] = n ? (first + (u32)b) | n * ONCE | ((inputs[b] ^ error[b]) & NEGATIVE) : 0u;
      }
      found[j] += (i32)keep(all, samples, of_device[j] + found[j]);
    }
  }

  // The same of bitlines held over lines: `bits` from their first sample on, in rows of `row` words. Goes through the slots in
  // which the wordline fires.
  void find_rare(const u32* inputs, const u32* bits, i64 row, u32 first, i64 samples, i64 devices) {
    const u64 every = ~0ull >> (WIDE_ROW - devices);
    alignas(64) u32 all[CHUNK], fired[CHUNK + LANES];
#pragma omp simd
    for (i64 b = 0; b < samples; ++b) all[b] = inputs[b] & SLOTS ? (u32)b | NEGATIVE : 0u;
    const i64 count = keep(all, samples, fired);
    for (i64 k = 0; k < count; ++k) {
      const u32 b = fired[k] & SLOTS, event = (first + b) | ONCE;
      const auto of_slot = [&](int slot) {
        u64 lines;
        __builtin_memcpy(&lines, bits + (b * WORD + slot) * row, sizeof lines);
        return lines & every;
      };
      const u32 fires = inputs[b] & SLOTS;
      u64 met = 0, again = 0;
      for (u32 slots = fires; slots; slots &= slots - 1) {
        const u64 meet = of_slot(__builtin_ctz(slots));
        again |= met & meet;
        met |= meet;
      }
      const u64 raising = of_slot(WORD - 1) ^ -(u64)(inputs[b] >> 31);
      for (u64 lines = met; lines; lines &= lines - 1) {
        const int j = __builtin_ctzll(lines);
        of_device[j][found[j]++] = event | (u32)(raising >> j) << 31;
      }
      for (; again; again &= again - 1) {
        const int j = __builtin_ctzll(again);
        u32 more = 0;
        for (u32 slots = fires; slots; slots &= slots - 1) more += (u32)(of_slot(__builtin_ctz(slots)) >> j & 1);
        of_device[j][found[j] - 1] += (more - 1) * ONCE;
      }
    }
  }

  // Bring devices in order, and their events in turns.
  void line_up() {
    alignas(64) u32 busy[WIDE_ROW], idle[WIDE_ROW], some[WIDE_ROW + LANES];  // marked, and so not 0
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) {
      busy[j] = found[j] ? (u32)j | NEGATIVE : 0u;
      idle[j] = found[j] ? 0u : (u32)j | NEGATIVE;
    }
    moving = (i32)keep(busy, WIDE_ROW, some);
    keep(idle, WIDE_ROW, some + moving);
    for (int k = 0; k < WIDE_ROW; ++k) some[k] &= SLOTS;
    i32 place[ROOM], before = 0;
    std::fill_n(place, most() + 1, 0);
    for (i32 k = 0; k < moving; ++k) ++place[found[some[k]]];
    for (i32 n = most(); n > 0; --n) before += std::exchange(place[n], before);
    for (i32 k = 0; k < moving; ++k) order[place[found[some[k]]]++] = some[k];
    std::copy(some + moving, some + WIDE_ROW, order + moving);
    for (i64 k = 0; k < moving; k += LANES) {
      const i64 whole = whole_vectors(found[order[k]]);
      for (i64 r = k; r < k + LANES; ++r)
        std::fill(of_device[order[r]] + found[order[r]], of_device[order[r]] + whole, 0u);
      for (i64 t = 0; t < whole; t += LANES)
        transpose_tile<LANES>([&](int r) { return of_device[order[k + r]] + t; }, in_turn[t] + k, WIDE_ROW);
    }
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

// Devices of one plane both ways, [0] down and [1] up: all that stays the same from pulse to pulse, and where they are.
struct alignas(64) Pulsed {
  float free[WIDE_ROW], low[WIDE_ROW], width[WIDE_ROW], inverse_width[WIDE_ROW];
  float gain[2][WIDE_ROW], shape[2][WIDE_ROW];
  float from[2][WIDE_ROW], by[2][WIDE_ROW], fixed[2][WIDE_ROW], per_square[WIDE_ROW];  // effort of one pulse
  float x[WIDE_ROW];
  i32 more[WIDE_ROW];  // pulses taken in these turns
};

// The first `count` of a row, in whole vectors.
template <class L>
void pulsed_row(const UpdateLaw& s, const Row& row, int count, Pulsed& p) {
  std::copy(row.free, row.free + count, p.free);
  for (int up = 0; up < 2; ++up)
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const Device device = device_under<L>(s, spreads(row.draws, j), up != 0);
      p.low[j] = device.low, p.width[j] = device.width, p.inverse_width[j] = device.inverse_width;
      p.gain[up][j] = device.gain, p.shape[up][j] = device.shape;
      const Effort effort = effort_of<L>(s, device, 1.0f / s.pulses, up != 0);
      p.from[up][j] = effort.reach.from, p.by[up][j] = effort.reach.by;
      p.per_square[j] = effort.per_square, p.fixed[up][j] = effort.fixed;
    }
}

// Loads both: a choice of addresses is slow in vectors.
GPUXBAR_FN float either(bool which, const float (&of)[2][WIDE_ROW], int j) {
  const float down = of[0][j], up = of[1][j];
  return which ? up : down;
}

// Device j, as `device_under` makes it; a struct made in a simd loop itself would keep it from vectorising.
GPUXBAR_FN Device device_at(const Pulsed& p, int j, bool rising) {
  return Device{p.low[j], p.width[j], p.inverse_width[j], either(rising, p.gain, j), either(rising, p.shape, j)};
}

// Whether a vector of events has no device with two coincidences.
GPUXBAR_FN bool all_single(const u32* event) {
  u32 any = 0;
#pragma omp simd reduction(| : any)
  for (int j = 0; j < LANES; ++j) any |= event[j];
  return (any & Events::MANY) == 0;
}

// `lanes` devices of one plane after an event each. What does not wait for the last event comes first: its operations fill
// those of others. Mostly it is one pulse, of which the effort is known.
template <class L>
void pulse_row(const UpdateLaw& s, bool positive, int lanes, const u32* event, const float* z, Pulsed& p) {
  const float each = 1.0f / s.pulses;
  alignas(64) float up[WIDE_ROW], d[WIDE_ROW];
  alignas(64) float from[WIDE_ROW], by[WIDE_ROW], per_square[WIDE_ROW], fixed[WIDE_ROW];
#pragma omp simd
  for (int j = 0; j < lanes; ++j) {
    const float n = p.free[j] * Events::pulses(event[j]);
    const float raise = Events::raises(event[j]) ? n : 0.0f, lower = n - raise;
    up[j] = pulses_up(s.sides, positive, raise, lower);
    const float pulses = up[j] + pulses_down(s.sides, positive, raise, lower);
    d[j] = pulses * each;
    p.more[j] += (i32)pulses;
  }
  for (int k = 0; k < lanes; k += LANES)
    if (all_single(event + k)) {
#pragma omp simd
      for (int j = k; j < k + LANES; ++j) {
        const bool rising = up[j] > 0.0f;
        from[j] = either(rising, p.from, j), by[j] = either(rising, p.by, j);
        per_square[j] = p.per_square[j], fixed[j] = either(rising, p.fixed, j);
      }
    } else {
#pragma omp simd
      for (int j = k; j < k + LANES; ++j) {
        const Effort effort = effort_of<L>(s, device_at(p, j, up[j] > 0.0f), d[j], up[j] > 0.0f);
        from[j] = effort.reach.from, by[j] = effort.reach.by, per_square[j] = effort.per_square,
        fixed[j] = effort.fixed;
      }
    }
#pragma omp simd
  for (int j = 0; j < lanes; ++j) {
    const Effort effort{Reach{from[j], by[j]}, per_square[j], fixed[j]};
    p.x[j] = moved<L>(s, device_at(p, j, up[j] > 0.0f), effort, p.x[j], d[j], up[j] > 0.0f, z[j], s.scatter);
  }
}

typedef u64 Bits __attribute__((vector_size(ACROSS / 8), aligned(4), may_alias));  // one for each of ACROSS lines

// sum = the ones of three bits, whose twos are the result.
inline Bits add_bits(Bits& sum, Bits a, Bits b) {
  const Bits either = sum ^ a, twos = (sum & a) | (either & b);
  sum = either ^ b;
  return twos;
}

// Bit p of each line's count in plane p, of the coincidences that raise the weight and of all.
struct Tally {
  static constexpr int PLANES = 8, MOST = (1 << PLANES) - 1;
  struct Pair {
    Bits raise, all;
  };
  Pair plane[PLANES] = {};

  // Add what the next 2^LEVEL slots bring, but for what they carry over, which is the result.
  template <int LEVEL, class Slot>
  Pair carry(const Slot& slot, i64 first) {
    if constexpr (LEVEL == 0) {
      return slot(first);
    } else {
      const Pair a = carry<LEVEL - 1>(slot, first), b = carry<LEVEL - 1>(slot, first + (1 << (LEVEL - 1)));
      Pair& sum = plane[LEVEL - 1];
      return Pair{add_bits(sum.raise, a.raise, b.raise), add_bits(sum.all, a.all, b.all)};
    }
  }

  // Add bits of weight 2^LEVEL.
  template <int LEVEL>
  void add(Pair bits) {
    for (int p = LEVEL; p < PLANES; ++p) {
      const Pair over{plane[p].raise & bits.raise, plane[p].all & bits.all};
      plane[p].raise ^= bits.raise, plane[p].all ^= bits.all;
      bits = over;
    }
  }

  // slot(k): where slot k of `count`, at most MOST, has coincidences.
  template <class Slot>
  void add_slots(const Slot& slot, i64 count) {
    constexpr int LEVEL = 3;
    i64 k = 0;
    for (; k + (1 << LEVEL) <= count; k += 1 << LEVEL) add<LEVEL>(carry<LEVEL>(slot, k));
    for (; k < count; ++k) add<0>(slot(k));
  }

  // Add the counts to those of the lines.
  void add_to(i32* raise, i32* all) const {
    read(&Pair::raise, raise);
    read(&Pair::all, all);
  }

 private:
  void read(Bits Pair::* which, i32* counts) const {
    alignas(64) u8 bits[PLANES][ACROSS / 8];
    alignas(64) u64 eights[ACROSS / 8];
    for (int p = 0; p < PLANES; ++p) *(Bits*)bits[p] = plane[p].*which;
#pragma omp simd
    for (int j = 0; j < ACROSS / 8; ++j) {
      u64 x = 0;  // eight lines' counts: a byte of each plane, turned to a byte of each line
      for (int p = 0; p < PLANES; ++p) x |= (u64)bits[p][j] << 8 * p;
      u64 swap = (x ^ x >> 7) & 0x00AA00AA00AA00AAull;
      x ^= swap ^ swap << 7;
      swap = (x ^ x >> 14) & 0x0000CCCC0000CCCCull;
      x ^= swap ^ swap << 14;
      swap = (x ^ x >> 28) & 0x00000000F0F0F0F0ull;
      eights[j] = x ^ swap ^ swap << 28;
    }
    const u8* of_line = (const u8*)eights;
#pragma omp simd
    for (int j = 0; j < ACROSS; ++j) counts[j] += of_line[j];
  }
};

// The slots in which a line fires, in a block of samples from `sample` on: 64 sample + 2 slot, and 1 where the line's sign
// is negative. `bits`: its words over samples. How many there are.
i64 find_slots(const u32* bits, i32 slots, u32 sample, u32* fired) {
  constexpr int TOGETHER = 8;  // are written without a look at whether there are so many
  const u32 negative = bits[0];
  i64 count = 0;
  for (i64 word = 0; word < words_of_line(slots); word += 2) {
    u64 both = (u64)bits[word + 1] << 32 | (word ? bits[word] : 0u);  // many branches on few bits are foreseen badly
    const int found = __builtin_popcountll(both);
    for (int k = 0; k < found; k += TOGETHER)
      for (int q = 0; q < TOGETHER; ++q, both &= both - 1) {
        const u32 at = (u32)__builtin_ctzll(both | 1ull << 63), l = at % SAMPLES;
        fired[count + k + q] = (sample + l) * 2 * WORD | ((u32)word + at / SAMPLES - 1) << 1 | (negative >> l & 1u);
      }
    count += found;
  }
  return count;
}

// Coincidences over the batch of LINES of one side with ACROSS of the other.
struct alignas(64) Coincidences {
  i32 raise[LINES][ACROSS], all[LINES][ACROSS];

  // `first` and `across`: the first line of each.
  void count(const Arrays& a, i64 batch, const Trains& each, const Trains& many, i64 group, i64 first, i64 across) {
    std::fill_n(raise[0], LINES * ACROSS, 0);
    std::fill_n(all[0], LINES * ACROSS, 0);
    u32 fired[PIECE * WORD + WORD];
    const i64 lines = std::min<i64>(LINES, each.count - first), blocks = each.samples / SAMPLES;
    const i64 in_row = across % ACROSS, row = many.row_words(across - in_row);
    for (i64 b0 = 0; b0 < batch; b0 += PIECE) {
      const u32* bits = many.over_lines(group, across - in_row, b0) + in_row / WORD;
      for (i64 i = 0; i < lines; ++i) {
        i64 found = 0;
        for (i64 block = b0 / SAMPLES; block < std::min((b0 + PIECE) / SAMPLES, blocks); ++block) {
          const i32 slots = a.slots[group * blocks + block];
          found += find_slots(each.over_samples(group, block, first + i, slots), slots, (u32)(block * SAMPLES - b0),
                              fired + found);
        }
        for (i64 begin = 0; begin < found; begin += Tally::MOST) {
          const auto slot = [&](i64 k) {
            const u32 at = fired[begin + k];
            const Bits meet = *(const Bits*)(bits + (at >> 1) * row);
            const Bits negative = *(const Bits*)(bits + (at >> 1 | (WORD - 1)) * row);
            return Tally::Pair{meet & (negative ^ -(u64)(at & 1u)), meet};
          };
          Tally tally;
          tally.add_slots(slot, std::min<i64>(Tally::MOST, found - begin));
          tally.add_to(raise[i], all[i]);
        }
      }
    }
  }
};

using Counts = i32[LINES][WIDE_ROW];

void count_implied(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, Counts& raise, Counts& all) {
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  const float* length = a.length + group * u.samples();
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
      raise[i][j] = up;
      all[i][j] = both;
    }
}

struct alignas(64) Block {
  // of the lowest slice, [side]
  float x[2][LINES][WIDE_ROW], before[2][LINES][WIDE_ROW];
  alignas(64) Counts raise, all;  // coincidences over the batch
  bool counted;                   // whether devices can fail, which the next three are for
  bool failed[2][LINES][WIDE_ROW];
  i32 more[2][LINES][WIDE_ROW];  // pulses of this update

  const bool* failures(u32 side, i64 line) const { return counted ? failed[side][line] : nullptr; }
};

struct Scratch {
  Events events;
  Coincidences together;
  Block block;
};

// A thread's own. Of a template there would be one for each law.
Scratch& scratch() {
  static thread_local const std::unique_ptr<Scratch> own(new Scratch);
  return *own;
}

// Move the devices of line `i` of a block by the events of samples from b0 on, one after the other.
template <class L>
void take_turns(const Update& u, const Arrays& a, i64 group, i64 i0, i64 i, i64 o0, i64 b0, Block& block) {
  Events& events = scratch().events;
  if (!events.most()) return;
  events.line_up();
  const UpdateLaw s = u.law;
  const u32* order = events.order;
  const i64 moving = whole_vectors(events.moving), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  const Chosen chosen{order, (int)moving};
  alignas(64) float z[2][WIDE_ROW] = {};
  alignas(64) Lines columns, samples;
  Pulsed devices[2];
  for (u32 side = 0; side < u.sides(); ++side) {
    Pulsed& p = devices[side];
    pulsed_row<L>(s, Row(u, a, u.place(side, group, i0 + i, o0), count, block.failures(side, i), &chosen), (int)moving,
                  p);
    chosen.pick(block.x[side][i], p.x);
    std::fill(p.more, p.more + moving, 0);
  }
  for (i64 k = 0; k < moving; ++k) columns[k] = (u32)o0 + order[k];
  i64 active = moving;
  for (i64 turn = 0; turn < events.found[order[0]]; ++turn) {
    while (events.found[order[active - LANES]] <= turn) active -= LANES;
    const u32* event = events.in_turn[turn];
    if (noisy(s)) {
      for (i64 k = 0; k < active; ++k) samples[k] = (u32)b0 + Events::sample(event[k]);
      draw_pairs_at(Draw{PULSE_CYCLE, 0, (u32)u.step, a.keys}, (u32)(group * u.inputs + i0 + i), active, columns,
                    samples, z[0], z[1]);
    }
    for (u32 side = 0; side < u.sides(); ++side) pulse_row<L>(s, side == 0, (int)active, event, z[side], devices[side]);
  }
  for (u32 side = 0; side < u.sides(); ++side) {
    const Pulsed& p = devices[side];
    for (i64 k = 0; k < moving; ++k) block.x[side][i][order[k]] = p.x[k];
    if (block.counted)
      for (i64 k = 0; k < moving; ++k) block.more[side][i][order[k]] += p.more[k];
  }
  events.clear();
}

template <class L, bool IMPLICIT>
void pulse_in_sequence(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, Block& block) {
  Events& events = scratch().events;
  events.clear();
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  const Trains &inputs = a.inputs, &errors = a.errors;
  const bool rare = errors.held == Held::OVER_LINES;
  const i64 stretch = rare ? STRETCH : CHUNK;
  for (i64 b0 = 0; b0 < u.batch; b0 += stretch)
    for (i64 i = 0; i < lines; ++i) {
      const i64 end = std::min(b0 + stretch, u.batch);
      for (i64 b = b0; b < end; b += CHUNK) {
        const u32* input = inputs.of_line(group, i0 + i) + b;
        const i64 samples = whole_vectors(std::min<i64>(CHUNK, end - b));  // those behind the batch have no pulses
        if (rare)
          events.find_rare(input, errors.over_lines(group, o0, b), errors.row_words(o0), (u32)(b - b0), samples, count);
        else
          events.find<IMPLICIT>(input, errors.of_line(group, o0) + b, u.samples(), a.length + group * u.samples() + b,
                                (u32)(b - b0), samples, count);
        if (events.most() > CHUNK) take_turns<L>(u, a, group, i0, i, o0, b0, block);
      }
      take_turns<L>(u, a, group, i0, i, o0, b0, block);
    }
}

template <class L>
void pulse_at_once(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, Block& block) {
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  const UpdateLaw s = u.law;
  alignas(64) float z[2][WIDE_ROW] = {}, ups[WIDE_ROW], downs[WIDE_ROW];
  for (i64 i = 0; i < lines; ++i) {
    if (noisy(s))
      draw_pairs(Draw{PULSE_CYCLE, 0, (u32)u.step, a.keys}, (u32)(group * u.inputs + i0 + i), o0, z[0], z[1]);
    for (u32 side = 0; side < u.sides(); ++side) {
      const Row row(u, a, u.place(side, group, i0 + i, o0), count, block.failures(side, i));
      share_pulses(s.sides, side == 0, row.free, block.raise[i], block.all[i], ups, downs);
      float* x = block.x[side][i];
#pragma omp simd
      for (int j = 0; j < WIDE_ROW; ++j) x[j] = both_ways<L>(s, row.draws, j, x[j], ups[j], downs[j], z[side][j]);
      if (block.counted)
        for (int j = 0; j < WIDE_ROW; ++j) block.more[side][i][j] = (i32)(ups[j] + downs[j]);
    }
  }
}

template <class L, bool IMPLICIT>
void update_block(const Update& u, const Arrays& a, bool aggregated, i64 group, i64 i0, i64 o0, Block& block) {
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
      load_shares(from, u.g_min, inverse_range, count, x, before);
      if (!block.counted) continue;
      std::fill(block.more[side][i], block.more[side][i] + WIDE_ROW, 0);
      std::fill(block.failed[side][i], block.failed[side][i] + WIDE_ROW, false);
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
        wear_row(u.endurance, u.place(side, group, i0 + i, o0), a.keys, block.more[side][i], count,
                 a.pulse_count + (to - a.g), x, nullptr);
      write_back(to, x, before, u.g_min, u.range, count);
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

// All blocks of rows x cols devices from a corner on, whose coincidences are counted together.
template <class L, bool IMPLICIT>
void update_blocks(const Update& u, const Arrays& a, bool aggregated, i64 group, i64 i0, i64 o0, i64 rows, i64 cols) {
  Coincidences& together = scratch().together;
  Block& block = scratch().block;
  const bool many_outputs = aggregated && a.errors.held == Held::OVER_LINES,
             many_inputs = a.inputs.held == Held::OVER_LINES;
  if (many_outputs) together.count(a, u.batch, a.inputs, a.errors, group, i0, o0);
  if (many_inputs) together.count(a, u.batch, a.errors, a.inputs, group, o0, i0);
  for (i64 i = i0; i < std::min(i0 + rows, u.inputs); i += LINES)
    for (i64 o = o0; o < std::min(o0 + cols, u.outputs); o += WIDE_ROW) {
      if (many_outputs) {
        for (i64 line = 0; line < LINES; ++line) {
          std::copy_n(together.raise[line] + (o - o0), WIDE_ROW, block.raise[line]);
          std::copy_n(together.all[line] + (o - o0), WIDE_ROW, block.all[line]);
        }
      } else if (many_inputs) {
        transpose(together.raise[0] + (i - i0), ACROSS, WIDE_ROW, LINES, block.raise[0], WIDE_ROW);
        transpose(together.all[0] + (i - i0), ACROSS, WIDE_ROW, LINES, block.all[0], WIDE_ROW);
      } else if (aggregated) {
        count_implied(u, a, group, i, o, block.raise, block.all);
      }
      update_block<L, IMPLICIT>(u, a, aggregated, group, i, o, block);
    }
}

double mean_magnitude(const float* values, i64 size) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (i64 e = 0; e < size; ++e) sum += gpuxbar::abs(values[e]);
  return sum / (double)size;
}

// Of a device and a sample, about.
double coincidences_expected(const Update& u, const float* x, const float* d, const float* scale) {
  return mean_magnitude(x, u.x_size()) * mean_magnitude(d, u.d_size()) * mean_magnitude(scale, u.groups * u.outputs);
}

}  // namespace

// `bad`, [3]: how many values of x and d are not finite, and of w_max not finite or not above 0; nothing moves then.
extern "C" void gpuxbar_pulse_update(float* g, i32* pulse_count, const u16* device_map, const float* x, const float* d,
                                     const float* sign, float* w, const float* w_max, const Update* update, i64* bad) {
  const Update u = *update;
  const i64 bitlines_of_all = u.groups * u.outputs;
  bad[0] = count_not_finite(x, u.x_size());
  bad[1] = count_not_finite(d, u.d_size());
  bad[2] = std::count_if(w_max, w_max + bitlines_of_all, [](float w) { return !(w > 0.0f) || not_finite(w); });
  if (bad[0] + bad[1] + bad[2]) return;
  const bool aggregated = u.aggregated != 0;
  std::vector<float> scale(bitlines_of_all), unit(u.groups);
  for (i64 j = 0; j < bitlines_of_all; ++j) scale[j] = u.pulses / w_max[j];
  for (i64 group = 0; group < u.groups; ++group)
    unit[group] = *std::min_element(&scale[group * u.outputs], &scale[group * u.outputs] + u.outputs);
  // samples and lines in whole blocks, and room behind them for the bits of more lines than there are
  const auto words_for = [&](i64 lines) {
    return std::unique_ptr<u32[]>(new u32[u.groups * u.samples() * ((lines + WORD - 1) / WORD * WORD) + WORD]);
  };
  const auto input_words = words_for(u.inputs), error_words = words_for(u.outputs);
  u32 *const inputs = input_words.get(), *const errors = error_words.get();
  std::vector<float> length(u.groups * u.samples());
  std::vector<i32> slots(u.groups * u.samples() / SAMPLES);
  const DeviceMap map{device_map, 2 * u.slices.count * u.groups * u.inputs * u.outputs};
  // the side of fewer lines has fewer slots to go through
  const bool bits = aggregated && !u.train.implicit, many_inputs = u.inputs > u.outputs;
  const auto trains = [&](u32* words, i64 count, Held held, i64 across) {
    return Trains{words, count, (count + WORD - 1) / WORD * WORD, u.samples(), held, across};
  };
  const auto counted = [&](u32* words, i64 count, bool many) {
    return trains(words, count, many ? Held::OVER_LINES : Held::OVER_SAMPLES, ACROSS);
  };
  const bool rare = !aggregated && !u.train.implicit && coincidences_expected(u, x, d, scale.data()) < RARE;
  const Trains wordlines = bits ? counted(inputs, u.inputs, many_inputs) : trains(inputs, u.inputs, Held::WHOLE, 0),
               bitlines = bits ? counted(errors, u.outputs, !many_inputs)
                               : trains(errors, u.outputs, rare ? Held::OVER_LINES : Held::WHOLE, WIDE_ROW);
  const WideKeys keys(u.seed);
  const Arrays a{g,        pulse_count,   map,          x,   d, scale.data(), unit.data(), sign, w, w_max, wordlines,
                 bitlines, length.data(), slots.data(), keys};
#pragma omp parallel if (u.groups * u.samples() > SAMPLES)
  {
    Trainer trainer(u, a);
#pragma omp for collapse(2) schedule(static)
    for (i64 group = 0; group < u.groups; ++group)
      for (i64 block = 0; block < u.samples() / SAMPLES; ++block) trainer.fire(group, block);
  }
  i64 rows = bits && many_inputs ? ACROSS : LINES, cols = bits && !many_inputs ? ACROSS : WIDE_ROW;
  const auto blocks = [](i64 lines, i64 size) { return (lines + size - 1) / size; };
  while (rows * cols > LINES * WIDE_ROW &&
         u.groups * blocks(u.inputs, rows) * blocks(u.outputs, cols) < threads_to_come())
    (many_inputs ? rows : cols) /= 2;
  const i64 row_blocks = blocks(u.inputs, rows), col_blocks = blocks(u.outputs, cols);
  with_law(u.law.law, [&](auto law) {
    using L = typename decltype(law)::Type;
#pragma omp parallel for collapse(3) schedule(dynamic) if (u.groups * row_blocks * col_blocks > 1)
    for (i64 group = 0; group < u.groups; ++group)
      for (i64 rb = 0; rb < row_blocks; ++rb)
        for (i64 cb = 0; cb < col_blocks; ++cb)
          if (u.train.implicit)
            update_blocks<L, true>(u, a, aggregated, group, rb * rows, cb * cols, rows, cols);
          else
            update_blocks<L, false>(u, a, aggregated, group, rb * rows, cb * cols, rows, cols);
  });
}
