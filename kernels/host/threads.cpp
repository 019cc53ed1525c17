// What the host kernels' threads are asked for.
#include "threads.hpp"

using namespace gpuxbar;

// Threads of the next kernels called from this thread of the process.
extern "C" void gpuxbar_set_threads(i64 count) {
#if defined(_OPENMP)
  omp_set_num_threads((int)count);
#else
  (void)count;  // one, whatever is asked for
#endif
}

// End the threads that kernels called from here left waiting, which a fork would not copy: the next kernel begins new ones.
extern "C" void gpuxbar_end_threads() {
#if defined(_OPENMP)
  omp_pause_resource_all(omp_pause_soft);
#endif
}

// How many threads kernels called from here run on.
extern "C" i64 gpuxbar_threads() { return threads_to_come(); }

// The month of OpenMP's version, 0 where the compiler has none.
extern "C" i64 gpuxbar_openmp() {
#if defined(_OPENMP)
  return _OPENMP;
#else
  return 0;
#endif
}
