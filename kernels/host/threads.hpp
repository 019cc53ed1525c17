// threads: OpenMP's, or the only one where the compiler has no OpenMP.
#pragma once
#include "gpuxbar/portable.cuh"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace gpuxbar {

// Threads of the parallel region around the call.
inline i64 threads_here() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Threads of a parallel region that begins here.
inline i64 threads_to_come() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace gpuxbar
