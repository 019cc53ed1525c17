// pulse_trains: makes the trains of all lines, those of 32 samples of a line together; patches of images are gathered on
// the way.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

#include "images.hpp"
#include "pulse_update.hpp"

namespace gpuxbar::pulses {

constexpr int EIGHT = 8;  // lines that a counter draws a slot of

typedef u16 Halves __attribute__((vector_size(4 * LANES), may_alias));  // of a vector of words

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

// The words of slots of eight lines, for a block's samples. Of a counter {slot, eight, sample} the samples alone change from
// lane to lane: of the first two rounds what they make is worked out once for all slots, and what a slot makes once for all
// samples.
class SlotWords {
 public:
  SlotWords(u32 purpose, u32 step, const WideKeys& keys, u32 eight, u32 sample) : keys(keys), step(step) {
    const Wide first = (u64)(purpose << 24 | sample) + even_lanes();  // blocks of samples do not carry into the purpose
    for (int l = 0; l < SAMPLES; l += LANES)
      for (int odd = 0; odd < 2; ++odd) {
        const Wide p1 = multiply_low(first + (u64)(l + odd), PHILOX_Z + Wide{});
        const Wide p0 = multiply_low(high_halves(p1) ^ (eight ^ keys.low[0]), PHILOX_X + Wide{});
        begun[l / LANES][odd] = Begun{p1 ^ keys.low[1], high_halves(p0) ^ keys.high[1], p0};
      }
  }

  // Of `samples` in whole vectors.
  void draw(u32 slot, int samples, u32 (&words)[4][SAMPLES]) const {
    const u64 p0 = PHILOX_X * slot, p1 = PHILOX_Z * (u32)(p0 >> 32 ^ step ^ keys.high[0][0]);
    const Wide x = p1 >> 32 ^ Wide {}, y = p1 ^ Wide{}, z = p0 ^ Wide{};
    for (int l = 0; l < samples; l += LANES) {
      const auto counter = [&](const Begun& b) { return WideCounter{b.x ^ x, y, b.z ^ z, b.w}; };
      WideCounter c[2] = {counter(begun[l / LANES][0]), counter(begun[l / LANES][1])};
      philox_lanes<7, 2>(c, keys, words[0] + l, words[1] + l, words[2] + l, words[3] + l);
    }
  }

 private:
  struct Begun {
    Wide x, z, w;  // after two rounds, but for what the slot brings
  };
  const WideKeys& keys;
  u32 step;
  Begun begun[SAMPLES / LANES][2];
};

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

  // Independent slots, see stochastic_slots. Half words are compared as they lie in their words, sixteen slots together.
  void draw(u32 purpose, u32 eight, u32 sample, const float* value, const float* per, u32 (*slots)[SAMPLES]) const {
    alignas(64) u32 chances[EIGHT][SAMPLES], words[4][SAMPLES];
    alignas(64) u32 below[4][SAMPLES],
        fired[2][4][SAMPLES] = {};  // of line 2 q the low halves, of 2 q + 1 the high ones
    u32 any = 0;
    for (int k = 0; k < EIGHT; ++k)
#pragma omp simd reduction(| : any)
      for (int l = 0; l < SAMPLES; ++l) {
        chances[k][l] = chance(gpuxbar::abs(value[k * SAMPLES + l]) * per[l]);
        slots[k][l] = 0;
        any |= chances[k][l];
      }
    if (!any) return;  // as of pixels at the edge of all images
    for (int q = 0; q < 4; ++q)
#pragma omp simd
      for (int l = 0; l < SAMPLES; ++l)  // a slot that fires for certain is left open by the largest half
        below[q][l] = std::min(chances[2 * q][l] >> 8, 0xFFFFu) | std::min(chances[2 * q + 1][l] >> 8, 0xFFFFu) << 16;
    const SlotWords draws(purpose, (u32)u.step, a.keys, eight, sample);
    for (u32 slot = 0; slot < (u32)most; ++slot) {
      draws.draw(slot, lanes, words);
      const u16 bit = (u16)(1u << slot % 16);
      Halves open = {};
      for (int q = 0; q < 4; ++q)
        for (int l = 0; l < lanes; l += LANES) {
          const Halves half = *(const Halves*)(words[q] + l), limit = *(const Halves*)(below[q] + l);
          *(Halves*)(fired[slot / 16][q] + l) |= (Halves)(half < limit) & bit;
          open |= (Halves)(half == limit);
        }
      u64 some = 0;
      for (int k = 0; k < LANES / 2; ++k) some |= ((Wide)open)[k];
      if (some) settle(purpose, eight, sample, slot, chances, words, slots);
    }
    for (int q = 0; q < 4; ++q)
#pragma omp simd
      for (int l = 0; l < SAMPLES; ++l) {
        const u32 first = fired[0][q][l], second = fired[1][q][l], all = (1u << length[l]) - 1u;
        slots[2 * q][l] = (slots[2 * q][l] | (first & 0xFFFFu) | second << 16) & all;
        slots[2 * q + 1][l] = (slots[2 * q + 1][l] | first >> 16 | (second & 0xFFFF0000u)) & all;
      }
  }

  // The few slots that the first random bits leave open.
  void settle(u32 purpose, u32 eight, u32 sample, u32 slot, const u32 (*chances)[SAMPLES], const u32 (*words)[SAMPLES],
              u32 (*slots)[SAMPLES]) const {
    for (int l = 0; l < lanes; ++l) {
      const u32 first[4] = {words[0][l], words[1][l], words[2][l], words[3][l]};
      for (u32 k = 0; k < EIGHT; ++k) {
        const u32 half = half_word(first, k), wanted = chances[k][l];
        slots[k][l] |= (u32)fires(wanted, half) << slot;
        if (!undecided(wanted, half)) continue;
        u32 last[4];
        slot_words(LAST_BITS + slot, eight, purpose, sample + (u32)l, (u32)u.step, u.seed, last);
        slots[k][l] |= (u32)fires_at_last(wanted, half_word(last, k)) << slot;
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

}  // namespace gpuxbar::pulses
