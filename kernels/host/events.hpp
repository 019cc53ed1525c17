// events: the samples that move the devices of a wordline, found and brought in the order in which they are taken.
#pragma once
#include <algorithm>
#include <utility>

#include "pulse_update.hpp"

namespace gpuxbar::pulses {

constexpr int CHUNK = 256;     // samples whose coincidences are found together
constexpr int STRETCH = 4096;  // samples after which devices move, where coincidences are rare

// Samples that move the devices of a wordline, in order and of each device for itself: devices with few coincidences do not
// wait for their neighbours. An event holds its sample (16 bits), its coincidences (5 bits) and, in the sign, whether they
// raise the weight; 0 is none. `ROOM`: events that a device can have, and a vector more.
template <i64 ROOM>
struct alignas(64) EventsOf {
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

  i64 how_many() const {
    i64 some = 0;
#pragma omp simd reduction(+ : some)
    for (int j = 0; j < WIDE_ROW; ++j) some += found[j] > 0;
    return some;
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

  // The devices that have any or, else, those that have none; returns how many.
  i64 devices(bool any, u32* which) const {
    alignas(64) u32 marked[WIDE_ROW];
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) marked[j] = (found[j] > 0) == any ? (u32)j | NEGATIVE : 0u;
    const i64 count = keep(marked, WIDE_ROW, which);
    for (i64 k = 0; k < count; ++k) which[k] &= SLOTS;
    return count;
  }

  // Bring devices in order, and their events in turns.
  void line_up() {
    u32 some[WIDE_ROW + LANES];
    moving = (i32)devices(true, some);
    devices(false, some + moving);
    i32 place[ROOM + 1], before = 0;
    std::fill_n(place, most() + 1, 0);
    for (i32 k = 0; k < moving; ++k) ++place[found[some[k]]];
    for (i32 n = most(); n > 0; --n) before += std::exchange(place[n], before);
    for (i32 k = 0; k < moving; ++k) order[place[found[some[k]]]++] = some[k];
    std::copy(some + moving, some + WIDE_ROW, order + moving);
    for (i64 k = 0; k < moving; k += LANES) {
      const i64 whole = whole_vectors(found[order[k]]);
      for (i64 r = k; r < k + LANES; ++r)
        for (i64 t = found[order[r]]; t < whole; t += LANES) std::fill_n(of_device[order[r]] + t, LANES, 0u);
      for (i64 t = 0; t < whole; t += LANES)
        transpose_tile<LANES>([&](int r) { return of_device[order[k + r]] + t; }, in_turn[t] + k, WIDE_ROW);
    }
  }
};

using Events = EventsOf<2 * CHUNK + LANES>;

// Devices of a block that few samples move, gathered from its wordlines.
struct Gathered {
  static constexpr i64 MOST = LANES;  // events of a device
  EventsOf<MOST + LANES> events;
  u32 pair[WIDE_ROW];  // line * WIDE_ROW + column
  i64 count = 0;

  void clear() {
    count = 0;
    events.clear();
  }

  // The devices of a line that move, whose events are none of theirs then. `take`: moves what there is where no room is left.
  template <class Take>
  void add(Events& of, u32 line, Take&& take) {
    u32 some[WIDE_ROW + LANES];
    const i64 more = of.devices(true, some);
    for (i64 k = 0; k < more; ++k) {
      if (count == WIDE_ROW) take();
      std::copy_n(of.of_device[some[k]], MOST, events.of_device[count]);
      events.found[count] = of.found[some[k]];
      pair[count++] = line * WIDE_ROW + some[k];
    }
    of.clear();
  }
};

}  // namespace gpuxbar::pulses
