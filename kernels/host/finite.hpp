// Values that are NaN or infinite, by their bits.
#pragma once
#include <algorithm>

#include "gpuxbar/portable.cuh"

namespace gpuxbar {

constexpr u32 INFINITE = 0x7F800000u;  // bits of infinity; those of NaN, without the sign, are above

GPUXBAR_FN bool not_finite(float x) { return (float_bits(x) & INFINITE) == INFINITE; }

inline i64 count_not_finite(const float* values, i64 size) {
  constexpr i64 PIECE = 4096;  // counts of a piece stay in the lanes that compare
  i64 count = 0;
#pragma omp parallel for reduction(+ : count) schedule(static) if (size >= 4 * PIECE)
  for (i64 first = 0; first < size; first += PIECE) {
    const i64 end = std::min(first + PIECE, size);
    u32 found = 0;
#pragma omp simd reduction(+ : found)
    for (i64 e = first; e < end; ++e) found += not_finite(values[e]);
    count += found;
  }
  return count;
}

}  // namespace gpuxbar
