// pulses: trains of voltage pulses on the lines of an array, and what their coincidences do to a device.
//
// A train is a word: bit 31 the sign of its line's value, bits 0 .. length - 1 its slots; or, where coincidences are
// implied, the number of slots with a pulse. With e = rate d / step, the wanted number of pulses of a pair for an input
// of 1, the probabilities of a pulse are |x| r / sqrt(length) and |e| / (r sqrt(length)), at most 1.
//
// Source: Gokmen and Vlasov, Frontiers in Neuroscience 2016; Rasch et al., aihwkit, AICAS 2021 (managements, implicit
// pulses). Oracle: gpuxbar/reference/pulse_update.py.
#pragma once
#include "gpuxbar/update.cuh"

namespace gpuxbar {

constexpr u32 SLOTS = 0x7FFFFFFFu, NEGATIVE = 0x80000000u;

// Twin of `Train` in gpuxbar/ops/pulse_update.py.
struct Train {
  i32 length, implicit, update_management, bound_management;
};

GPUXBAR_FN i32 popcount(u32 word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#elif defined(__AVX512VPOPCNTDQ__)
  return __builtin_popcount(word);
#else  // in vectors; not as compilers know it, who would make it an instruction that is none of vectors
  word -= word >> 1 & 0x55555555u;
  word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
  word = (word + (word >> 4)) & 0x0F0F0F0Fu;
  word += word >> 8;
  return (i32)((word + (word >> 16)) & 0x3Fu);
#endif
}

// What all lines of one sample share: probability of a pulse for an input and for an error of 1.
struct Sample {
  i32 length;
  float per_input, per_error;
};

// `unit`: e of an error of 1, for the largest step. Where inputs or errors are all 0, no pulse is fired.
GPUXBAR_FN Sample sample_train(const Train& t, float max_input, float max_error, float unit) {
  const float wanted = max_input * max_error;  // pulses of the device that moves most
  if (!(wanted > 0.0f)) return Sample{1, 0.0f, 0.0f};
  float length = (float)t.length;
  if (t.bound_management) {
    const float whole = (float)(i32)min(wanted, length);
    length = min(whole + (whole < wanted ? 1.0f : 0.0f), length);
  }
  const float error = max_error * min(1.0f, length / wanted);  // clip errors rather than inputs
  const float split = t.update_management ? sqrt_fast(error / max_input) : sqrt_fast(unit);
  const float share = sqrt_fast(1.0f / length);
  return Sample{(i32)length, share * split, share / split};
}

// Chances of a pulse in 2^24.
GPUXBAR_FN u32 chance(float probability) { return (u32)(i32)round_even(min(probability, 1.0f) * 16777216.0f); }

// A slot has a pulse where 24 random bits are below its chance. The first 16 decide but for one slot in 2^16, and only for
// that one the other 8 are drawn. One counter {slot, eight, sample} makes the first bits of eight neighbouring lines, the
// low half of word k those of line 2 k; {LAST_BITS + slot, ..} has the other bits in the same halves.
constexpr u32 LAST_BITS = 32;

GPUXBAR_FN u32 half_word(const u32 words[4], u32 line) {
  return line & 1u ? words[line / 2] >> 16 : words[line / 2] & 0xFFFFu;
}

GPUXBAR_FN bool fires(u32 chance, u32 first) { return first < chance >> 8; }
GPUXBAR_FN bool undecided(u32 chance, u32 first) { return first == chance >> 8; }
GPUXBAR_FN bool fires_at_last(u32 chance, u32 last) { return (last & 0xFFu) < (chance & 0xFFu); }

// The words of a sample's slot on eight lines.
GPUXBAR_FN void slot_words(u32 slot, u32 eight, u32 purpose, u32 sample, u32 step, u64 seed, u32 words[4]) {
  const Counter c = philox<7>(counter(slot, eight, purpose, sample, step), (u32)seed, (u32)(seed >> 32));
  words[0] = c.x, words[1] = c.y, words[2] = c.z, words[3] = c.w;
}

// Independent slots of eight lines' chances.
GPUXBAR_FN void stochastic_slots(const u32 chances[8], i32 length, u32 eight, u32 purpose, u32 sample, u32 step,
                                 u64 seed, u32 slots[8]) {
#pragma unroll
  for (int l = 0; l < 8; ++l) slots[l] = 0;
  for (u32 slot = 0; slot < (u32)length; ++slot) {
    u32 words[4];
    slot_words(slot, eight, purpose, sample, step, seed, words);
    bool open = false;
#pragma unroll
    for (int l = 0; l < 8; ++l) {
      const u32 first = half_word(words, l);
      slots[l] |= (u32)fires(chances[l], first) << slot;
      open |= undecided(chances[l], first);
    }
    if (!open) continue;
    u32 last[4];
    slot_words(LAST_BITS + slot, eight, purpose, sample, step, seed, last);
#pragma unroll
    for (int l = 0; l < 8; ++l)
      if (undecided(chances[l], half_word(words, l)))
        slots[l] |= (u32)fires_at_last(chances[l], half_word(last, l)) << slot;
  }
}

// Slots with a pulse, where only their number counts.
GPUXBAR_FN u32 implied_slots(i32 length, float probability) {
  return (u32)(i32)round_even(min(probability, 1.0f) * (float)length);
}

GPUXBAR_FN u32 signed_word(u32 slots, float value) { return slots | (float_bits(value) & NEGATIVE); }

// Pulses that a device gets of a wordline's and a bitline's train.
template <bool IMPLICIT>
GPUXBAR_FN i32 coincidences(u32 input, u32 error, float length) {
  if (!IMPLICIT) return popcount(input & error & SLOTS);
  return (i32)round_even((float)((input & SLOTS) * (error & SLOTS)) / length);
}

// All bits where coincidences raise the weight, which moves by -x d; else none.
GPUXBAR_FN i32 raising(u32 input, u32 error) { return (i32)(input ^ error) >> 31; }

// Pulses of one device of a pair, for those that raise and lower the weight.
GPUXBAR_FN float pulses_up(i32 sides, bool positive, float raise, float lower) {
  return positive ? raise : sides == REFERENCE ? 0.0f : lower;
}
GPUXBAR_FN float pulses_down(i32 sides, bool positive, float raise, float lower) {
  return sides == ONE_SIDED ? 0.0f : positive ? lower : sides == REFERENCE ? 0.0f : raise;
}

// x after pulses both ways whose order does not matter.
template <class L>
GPUXBAR_FN float after_pulses(const UpdateLaw& s, const Spreads& z, float x, float ups, float downs, float noise) {
  const Device rising = device_under<L>(s, z, true), falling = device_under<L>(s, z, false);
  const float y = min(max((x - rising.low) * rising.inverse_width, 0.0f), 1.0f), each = 1.0f / s.pulses;
  const Change up = change_of<L>(s, rising, effort_of<L>(s, rising, ups * each, true), y, true);
  const Change down = change_of<L>(s, falling, effort_of<L>(s, falling, downs * each, false), y, false);
  const float from = fma(y, rising.width, rising.low) + (up.size - down.size);
  const float to = fma(sqrt_fast(up.variance + down.variance), noise, from);
  return ups + downs > 0.0f ? min(max(to, rising.low), rising.low + rising.width) : x;
}

}  // namespace gpuxbar
