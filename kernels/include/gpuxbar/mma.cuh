// mma: tensor-core products and asynchronous copies, one PTX instruction a function; sm_80 and later.
//
// Fragments of a warp's 16 x 8 x 16 product (PTX ISA, mma.m16n8k16): with row = lane / 4 and pair = lane % 4,
//
//   a[0..3]  columns 2 pair, 2 pair + 1 of row, row + 8 (k < 8), then of row, row + 8 (k >= 8)
//   b[0..1]  lines 2 pair, 2 pair + 1 (k < 8), then (k >= 8), of column row
//   c[0..3]  columns 2 pair, 2 pair + 1 of row, then of row + 8
//
// The 16 x 8 x 32 product of bytes (mma.m16n8k32) is the same, with four bytes where these have two halves.
//
// On the CPU tests/cuda_shim/tensor.hpp supplies the same names.
#pragma once
#include "gpuxbar/bfloat.cuh"

#if !defined(__CUSHIM__)

namespace gpuxbar {

// threadIdx.x, read anew: what is computed from it need not stay in registers between uses.
GPUXBAR_FN u32 thread_index() {
  u32 index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

GPUXBAR_FN u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// 16 bytes from global to shared memory; zeros unless `real`. Lands any time before the wait for its group.
GPUXBAR_FN void copy_async(u32 to, const void* from, bool real) {
  const int bytes = real ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Closes the group of this thread's copies since the last call.
GPUXBAR_FN void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are under way.
template <int PENDING>
GPUXBAR_FN void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lanes 8 m .. 8 m + 7 give the addresses of the rows of matrix m.
GPUXBAR_FN void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a b, fp16 operands
GPUXBAR_FN void multiply_half(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b, bf16 operands
GPUXBAR_FN void multiply_bfloat(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b, operands of four signed bytes a register, exact
GPUXBAR_FN void multiply_bytes(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sum of two pairs of fp16.
GPUXBAR_FN u32 add_halves(u32 x, u32 y) {
  u32 sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(x), "r"(y));
  return sum;
}

// 0xFFFF for each negative fp16 of a pair, else 0.
GPUXBAR_FN u32 negative_halves(u32 x) {
  u32 mask;
  asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(mask) : "r"(x));
  return mask;
}

// The squares of a pair of fp16, as a pair of bf16 (nearest).
GPUXBAR_FN u32 square_halves(u32 x) {
  const float low = half_value((u16)x), high = half_value((u16)(x >> 16));
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high * high), "f"(low * low));
  return pair;
}

// The squares of a pair of bf16, as a pair of bf16 (nearest).
GPUXBAR_FN u32 square_bfloats(u32 x) {
  const float low = bfloat_value((i16)x), high = bfloat_value((i16)(x >> 16));
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high * high), "f"(low * low));
  return pair;
}

}  // namespace gpuxbar

#endif
