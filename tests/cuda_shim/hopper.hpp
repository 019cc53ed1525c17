// hopper: CPU twins of kernels/include/gpuxbar/wgmma.cuh.
//
// Everything asynchronous happens at a moment the launch chooses. A bulk copy lands EAGER at once (so that a stage freed
// too early shows), else when no thread can go on without it, the last one first (so that a missing wait, or one for too
// few bytes, shows); until then its place is poisoned. A product reads its operands at the latest moment, when its warp
// waits for it and no thread can go on otherwise, those in registers too; until then its sums are poisoned. Operands in
// shared memory are found by decoding their descriptors, swizzle included. Errors: addresses outside or misaligned,
// barriers not made, or met by copies or the cluster and not fenced, too many arrivals, products of one warpgroup that
// differ, sums touched in flight, products not fenced, copies or products under way at the end; arrivals and copies at a
// block of the cluster whose barriers are not made yet, or that has ended. Between a thread's own accesses of shared memory
// and what products and bulk copies do there an async_fence is demanded: operands that its copies brought, places that it read
// (by load_matrices) and that a bulk copy writes. Registers are counted: a claim waits until others have released what it takes.
// A barrier must not be waited for two phases ahead: parity cannot tell, here as there.
#pragma once
#include "tensor.hpp"

#pragma GCC visibility push(default)
namespace shim {
struct Multiply {  // a product: where its sums are, and its left operand unless `a` names that
  float* c[64];
  const uint32_t* registers[4];
  uint64_t a, b;
  bool add;
  int thread;
};
void multiply(Multiply& mine);
}  // namespace shim

namespace gpuxbar {

void barrier_init(unsigned barrier, unsigned arrivals);
void barrier_fence();
void barrier_arrive(unsigned barrier);
void barrier_expect(unsigned barrier, unsigned bytes);
void barrier_wait(unsigned barrier, unsigned parity);
void copy_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier);

unsigned cluster_rank();
void barrier_arrive_at(unsigned barrier, unsigned rank);
static inline void barrier_wait_cluster(unsigned barrier, unsigned parity) { barrier_wait(barrier, parity); }
void copy_bulk_to(unsigned blocks, unsigned to, const void* from, unsigned bytes, unsigned barrier);
void cluster_barrier();

void async_fence();

void registers_change(unsigned count, bool more);
template <int COUNT> inline void registers_release() { registers_change(COUNT, false); }
template <int COUNT> inline void registers_claim() { registers_change(COUNT, true); }

void products_fence();
void products_commit();
void products_wait(int pending);
template <int PENDING> inline void products_wait() { products_wait(PENDING); }
void multiply_warpgroup(float (&c)[64], unsigned long long a, unsigned long long b, bool add);
void multiply_warpgroup_bfloat(float (&c)[64], const unsigned (&a)[4], unsigned long long b, bool add);

}  // namespace gpuxbar
#pragma GCC visibility pop
