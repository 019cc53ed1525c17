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
#else
  return __builtin_popcount(word);
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

constexpr u32 COUNTERS = 6;  // of a train, of seven rounds: 24 random words, one for each bit of a chance

// Bits 4 k .. 4 k + 3 of a chance, from the lowest up, with the random words of counter k: a set one gives every slot
// that its random bit chooses, an unset one keeps only those.
GPUXBAR_FN u32 add_bits(u32 word, u32 chance, u32 k, Counter c) {
  const u32 bits = chance >> (4 * k);
  const u32 set0 = 0u - (bits & 1u), set1 = 0u - (bits >> 1 & 1u), set2 = 0u - (bits >> 2 & 1u);
  const u32 set3 = 0u - (bits >> 3 & 1u);
  word = (word & c.x) | (set0 & (word | c.x));
  word = (word & c.y) | (set1 & (word | c.y));
  word = (word & c.z) | (set2 & (word | c.z));
  return (word & c.w) | (set3 & (word | c.w));
}

// The first `length` of 32 slots; a chance of 2^24 fills them all.
GPUXBAR_FN u32 cut_slots(u32 word, u32 chance, i32 length) {
  return (word | (0u - (chance >> 24))) & ((1u << length) - 1u);
}

// Independent slots of a chance.
GPUXBAR_FN u32 stochastic_slots(u32 chance, i32 length, u32 line, u32 purpose, u32 sample, u32 step, u64 seed) {
  u32 word = 0;
#pragma unroll
  for (u32 k = 0; k < COUNTERS; ++k)
    word = add_bits(word, chance, k, philox<7>(counter(k, line, purpose, sample, step), (u32)seed, (u32)(seed >> 32)));
  return cut_slots(word, chance, length);
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
GPUXBAR_FN float after_pulses(const UpdateLaw& s, const Spreads& device, float x, float ups, float downs, float z) {
  const Window window = device_window(s, device);
  const float y = min(max((x - window.low) * (1.0f / window.width), 0.0f), 1.0f), each = 1.0f / s.pulses;
  const Change up = change_of<L>(s, device, window.width, y, ups * each, true);
  const Change down = change_of<L>(s, device, window.width, y, downs * each, false);
  const float from = fma(y, window.width, window.low) + (up.size - down.size);
  const float to = fma(sqrt_fast(up.variance + down.variance), z, from);
  return ups + downs > 0.0f ? min(max(to, window.low), window.low + window.width) : x;
}

}  // namespace gpuxbar
