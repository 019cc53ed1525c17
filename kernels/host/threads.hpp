// threads: OpenMP's, or the only one where the compiler has no OpenMP.
#pragma once
#include "gpuxbar/portable.cuh"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace gpuxbar {

// Fewer are done before a second thread wakes up.
constexpr i64 WORTH_A_THREAD = 1 << 14;           // cells or values
constexpr i64 PRODUCTS_WORTH_A_THREAD = 1 << 17;  // of values and cells, added up

// Threads of the parallel region around the call, and of one that begins here.
#if defined(_OPENMP)
inline i64 threads_here() { return omp_get_num_threads(); }
inline i64 threads_to_come() { return omp_get_max_threads(); }
#else
inline i64 threads_here() { return 1; }
inline i64 threads_to_come() { return 1; }
#endif

// The first of the things that threads found, in their order; -1 before any.
inline void note_first(i64* first, i64 found) {
#pragma omp critical
  if (*first < 0 || found < *first) *first = found;
}

}  // namespace gpuxbar
