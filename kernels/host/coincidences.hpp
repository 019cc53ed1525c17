// coincidences: how often the trains of a wordline and of a bitline fire together, counted over the batch.
//
// Of each line with 256 of the other side together: a line's slots that fire are gone through, and what fires in them on
// the other side, a bit a line, is added to counters whose bits lie in vectors of their own. Implied ones are compared word
// by word.
#pragma once
#include <algorithm>

#include "pulse_update.hpp"

namespace gpuxbar::pulses {

constexpr int ACROSS = 256;  // lines whose coincidences with one of the other side are counted together
constexpr int PIECE = 128;   // samples of it: their slots on so many lines lie in the second cache

typedef u64 Bits __attribute__((vector_size(ACROSS / 8), aligned(4), may_alias));  // one for each of ACROSS lines

// sum = the ones of three bits, whose twos are the result.
inline Bits add_bits(Bits& sum, Bits a, Bits b) {
#if defined(__AVX512VL__)  // an instruction each, which g++ does not find
  const __m256i s = (__m256i)sum, x = (__m256i)a, y = (__m256i)b;
  const Bits twos = (Bits)_mm256_ternarylogic_epi64(s, x, y, 0xE8);
  sum = (Bits)_mm256_ternarylogic_epi64(s, x, y, 0x96);
#else
  const Bits either = sum ^ a, twos = (sum & a) | (either & b);
  sum = either ^ b;
#endif
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
    if (k < count) {
      const auto last = [&](i64 k) {
        const Pair bits = slot(std::min(k, count - 1));
        const u64 there = -(u64)(k < count);
        return Pair{bits.raise & there, bits.all & there};
      };
      add<LEVEL>(carry<LEVEL>(last, k));
    }
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
inline i64 find_slots(const u32* bits, i32 slots, u32 sample, u32* fired) {
  constexpr int TOGETHER = 4;  // are written without a look at whether there are so many
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

inline void count_implied(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, Counts& raise, Counts& all) {
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

}  // namespace gpuxbar::pulses
