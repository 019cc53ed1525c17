// wgmma: products of a warpgroup (128 threads) out of shared memory, barriers in shared memory, and bulk copies that
// arrive at them; one PTX instruction a function, sm_90a only.
//
// The sums of a 64 x 128 product (PTX ISA, wgmma.m64n128k16): with warp the thread's warp in its warpgroup, row =
// 16 warp + lane / 4 and pair = lane % 4,
//
//   c[4 j .. 4 j + 3]  columns 8 j + 2 pair, 8 j + 2 pair + 1 of row, then of row + 8
//
// A left operand in registers is the fragment of a 16 x 16 part that mma.cuh describes, of the warp's 16 rows.
//
// On the CPU tests/cuda_shim/hopper.hpp supplies the same names.
#pragma once
#include "gpuxbar/mma.cuh"

namespace gpuxbar {

// Names a matrix in shared memory to a product: rows of 128 bytes with the swizzle of 128 bytes, eight rows a unit of
// 1024 bytes; the first row lies at a multiple of 1024. Adding 2 moves 16 halves along the rows.
GPUXBAR_FN u64 descriptor(u32 address) {
  return (u64)(address >> 4 & 0x3FFF) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

}  // namespace gpuxbar

#if !defined(__CUSHIM__)

namespace gpuxbar {

// ---- barriers: 8 bytes each. A phase ends when `arrivals` threads have arrived and all expected bytes have landed.

GPUXBAR_FN void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the barriers known to bulk copies and to the cluster; by the thread that made them, before the block's own barrier.
GPUXBAR_FN void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

GPUXBAR_FN void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and adds bytes that must land before the phase ends.
GPUXBAR_FN void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended; of a new barrier, the phase before the first (parity 1) has.
GPUXBAR_FN void barrier_wait(u32 barrier, u32 parity) {
  u32 ended;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!ended);
}

// Bytes (a multiple of 16, from and to multiples of 16) from global to shared memory; arrives at the barrier.
GPUXBAR_FN void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Products and bulk copies reach shared memory by a path of their own, the async proxy. Orders what this thread itself did
// there, by copies (copy_async) that it has waited for too, before what they do: neither would products see what was copied,
// nor a bulk copy wait for what is read. By every thread that did something, before it arrives anywhere. (The other way
// round nothing is needed: bulk copies and products that were waited for are over.)
GPUXBAR_FN void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- clusters: blocks that run at the same time and reach each other's shared memory

// Of this block in its cluster.
GPUXBAR_FN u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for every thread of the cluster that has not ended, and sees what they wrote.
GPUXBAR_FN void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Arrives at the barrier of the same address in a block of the cluster. Ordered are accesses of shared memory alone:
// mbarrier.arrive.release.cluster would wait for all memory of the device at every step.
GPUXBAR_FN void barrier_arrive_at(u32 barrier, u32 rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "fence.release.sync_restrict::shared::cta.cluster;\n"
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// barrier_wait for arrivals and copies from the cluster; of shared memory alone, too.
GPUXBAR_FN void barrier_wait_cluster(u32 barrier, u32 parity) {
  u32 ended;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}

// copy_bulk to the same address in every block of a mask of ranks; arrives at the barrier of each.
GPUXBAR_FN void copy_bulk_to(u32 blocks, u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"((u16)blocks)
      : "memory");
}

// ---- registers of a warpgroup: the whole warpgroup calls these

template <int COUNT>
GPUXBAR_FN void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
GPUXBAR_FN void registers_claim() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- products

// Orders what was done to registers before the products that follow.
GPUXBAR_FN void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of this warpgroup's products since the last call.
GPUXBAR_FN void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING of the latest groups are under way; until then neither sums nor operands may be touched.
template <int PENDING>
GPUXBAR_FN void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Text and operands of a product of 64 x 128 sums.
#define GPUXBAR_SUM_NAMES                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define GPUXBAR_SUMS(i)                                                                                       \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define GPUXBAR_ALL_SUMS                                                                                    \
  GPUXBAR_SUMS(0), GPUXBAR_SUMS(8), GPUXBAR_SUMS(16), GPUXBAR_SUMS(24), GPUXBAR_SUMS(32), GPUXBAR_SUMS(40), \
      GPUXBAR_SUMS(48), GPUXBAR_SUMS(56)

// c = a b^T, plus c if `add`: 64 rows of a, 128 rows of b, 16 fp16 of each.
GPUXBAR_FN void multiply_warpgroup(float (&c)[64], u64 a, u64 b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " GPUXBAR_SUM_NAMES "%64, %65, p, 1, 1, 0, 0;\n}"
      : GPUXBAR_ALL_SUMS
      : "l"(a), "l"(b), "r"((int)add));
}

// The same of bf16, with a in registers; they must stay as they are until the product has been waited for.
GPUXBAR_FN void multiply_warpgroup_bfloat(float (&c)[64], const u32 (&a)[4], u64 b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " GPUXBAR_SUM_NAMES
      "{%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"
      : GPUXBAR_ALL_SUMS
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

#undef GPUXBAR_SUM_NAMES
#undef GPUXBAR_SUMS
#undef GPUXBAR_ALL_SUMS

}  // namespace gpuxbar

#endif
