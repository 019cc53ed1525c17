// tensor: CPU twins of kernels/include/gpuxbar/mma.cuh.
//
// An asynchronous copy lands when the launch says, EAGER at once (so that a stage overwritten too early shows), else
// only when a wait of its thread demands it (so that a missing or weak wait shows); until then its place is poisoned.
// Errors: addresses outside the launch's shared memory or misaligned, loads of matrices whose rows share banks. Products
// add in float64 and round once; a tensor core may round differently.
#pragma once
#include "shim.hpp"

#pragma GCC visibility push(default)
namespace gpuxbar {

static inline unsigned thread_index() { return threadIdx.x; }
static inline unsigned shared_address(const void* p) { return unsigned(static_cast<const unsigned char*>(p) - gx_smem); }

void copy_async(unsigned to, const void* from, bool real);
void copy_commit();
void copy_wait(int pending);
template <int PENDING> inline void copy_wait() { copy_wait(PENDING); }

void load_matrices(unsigned (&r)[4], unsigned address);
void multiply_half(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
void multiply_bfloat(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
void multiply_bytes(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

unsigned add_halves(unsigned x, unsigned y);
unsigned negative_halves(unsigned x);
unsigned square_halves(unsigned x);
unsigned square_bfloats(unsigned x);

}  // namespace gpuxbar
#pragma GCC visibility pop
