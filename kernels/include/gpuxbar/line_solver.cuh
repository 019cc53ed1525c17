// line_solver: a tile with resistive wires solved for one input by a block of 512 threads, by conjugate gradients on whole
// lines.
//
// CUDA only. A warp has 128 columns at a time. A wordline is the work of a warp, in two scans of affine maps over its lanes;
// bitlines are cut into a strip of rows for each warp, whose maps are put together in shared memory. Every sum is made in a
// fixed order. Meaning and oracle: gpuxbar/reference/wire_currents.py.
//
// Memory  [blocks, R, ceil(C / 128), 128 of each field]: what a block of the launch works in, the far fields before the near.
// Macros  ON_CHIP: near fields are in dynamic shared memory, R * ceil(C / 128) * 1536 bytes.
#pragma once
#include "gpuxbar/parasitics.cuh"

#ifndef ON_CHIP
#define ON_CHIP 1
#endif

extern __shared__ __align__(1024) unsigned char gx_smem[];

namespace gpuxbar {

constexpr int THREADS = 512, WARPS = THREADS / 32, WIDE = 128;
// Fields, 128 neighbouring cells of each. Far ones: cells, ladder factors of wordlines and bitlines, voltage of the wordlines,
// residual current. Near ones: direction of the step, the currents that make it, and what one pass leaves to the next.
enum Far { G, SHARE_W = WIDE, SHARE_B = 2 * WIDE, U = 3 * WIDE, RESIDUAL = 4 * WIDE, FAR = 5 * WIDE };
enum Near { STEP, SOURCE = WIDE, WORK = 2 * WIDE, NEAR = 3 * WIDE };
constexpr u32 ALL = 0xFFFFFFFFu, NOT_A_NUMBER = 0x7FC00000u;

// Fields of a cell.
struct At {
  float *far, *near;
};

// Four neighbouring cells of a wordline.
struct __align__(16) Cells {
  float x[4];
};

constexpr Cells ONES{{1.0f, 1.0f, 1.0f, 1.0f}};

GPUXBAR_FN Cells load(const float* from) {
  const float4 v = *(const float4*)from;
  return Cells{{v.x, v.y, v.z, v.w}};
}

GPUXBAR_FN void store(float* to, const Cells& from) {
  *(float4*)to = make_float4(from.x[0], from.x[1], from.x[2], from.x[3]);
}

GPUXBAR_FN Cells times(const Cells& a, const Cells& b) {
  Cells out;
#pragma unroll
  for (int j = 0; j < 4; ++j) out.x[j] = a.x[j] * b.x[j];
  return out;
}

GPUXBAR_FN double dot(const Cells& a, const Cells& b) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; ++j) sum = fma(a.x[j], b.x[j], sum);
  return (double)sum;
}

// What some cells make of a current or voltage x: factor x + sum.
struct Affine {
  float factor, sum;
};

// What all lanes before this one make of `carry`, from the first on, or from the last on (BACKWARDS); then `carry` is what
// all do.
template <bool BACKWARDS>
GPUXBAR_FN float scan(Affine map, float& carry) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = BACKWARDS ? lane + step : lane - step;
    const float factor = __shfl_sync(ALL, map.factor, other & 31), sum = __shfl_sync(ALL, map.sum, other & 31);
    if (other < 0 || other > 31) continue;
    map.sum = fma(map.factor, sum, map.sum);
    map.factor *= factor;
  }
  const float reached = fma(map.factor, carry, map.sum);
  const int before = BACKWARDS ? lane + 1 : lane - 1;
  const float mine = __shfl_sync(ALL, reached, before & 31), from = carry;
  carry = __shfl_sync(ALL, reached, BACKWARDS ? 0 : 31);
  return before < 0 || before > 31 ? from : mine;
}

struct Shared {
  Cells sum[WARPS][32], factor[WARPS][32], back[WARPS][32];  // of strips of bitlines, downwards and upwards
  double parts[WARPS];
};

// Of x of all threads, the sum or the largest (LARGEST); in a fixed order, and a barrier of the block.
template <bool LARGEST>
GPUXBAR_FN double joined(double x, Shared& shared) {
  for (int step = 16; step; step >>= 1) {
    const double other = __shfl_xor_sync(ALL, x, step);
    x = !LARGEST ? x + other : other > x ? other : x;
  }
  if (threadIdx.x % 32 == 0) shared.parts[threadIdx.x / 32] = x;
  __syncthreads();
  double all = 0.0;
  for (int w = 0; w < WARPS; ++w)
    all = !LARGEST ? all + shared.parts[w] : shared.parts[w] > all ? shared.parts[w] : all;
  __syncthreads();
  return all;
}

// A tile, and the voltages of an input, in the memory of a block.
struct Solver {
  Shared& shared;
  Wires wires;
  int rows, cols, blocks;
  At first;

  __device__ __forceinline__ Solver(Shared& shared, const Wires& wires, int rows, int cols, float* memory)
      : shared(shared), wires(wires), rows(rows), cols(cols), blocks((cols + WIDE - 1) / WIDE) {
    const i64 size = (i64)rows * blocks;
    first.far = memory + blockIdx.x * size * (ON_CHIP ? FAR : FAR + NEAR);
    first.near = ON_CHIP ? (float*)gx_smem : first.far + size * FAR;
  }

  __device__ __forceinline__ static int lane() { return threadIdx.x & 31; }
  __device__ __forceinline__ static int warp() { return threadIdx.x >> 5; }

  __device__ __forceinline__ At at(int row, int col) const {
    const i64 block = (i64)row * blocks + col / WIDE;
    return At{first.far + block * FAR + col % WIDE, first.near + block * NEAR + col % WIDE};
  }

  // Cells and ladder factors of another tile, which no thread is at work on any more.
  __device__ __forceinline__ void read(const float* g) const {
    for (int row = warp(); row < rows; row += WARPS)
      for (int col = lane(); col < (cols + 3) / 4 * 4; col += 32) {
        float* const to = at(row, col).far;
        to[G] = col < cols ? g[(i64)row * cols + col] : 0.0f;
        if (col >= cols) to[SHARE_W] = to[SHARE_B] = 1.0f;
      }
    for (int line = threadIdx.x; line < rows + cols; line += THREADS) {
      const int row = line, col = line - rows;
      if (line < rows)
        ladder_factors(
            cols, wires.at_source(row), wires.along(row), [=](int i) { return g[(i64)row * cols + i]; },
            [=](int i, float share) { at(row, i).far[SHARE_W] = share; });
      else
        ladder_factors(
            rows, wires.at_sink(col), wires.down(col), [=](int i) { return g[(i64)(rows - 1 - i) * cols + col]; },
            [=](int i, float share) { at(rows - 1 - i, col).far[SHARE_B] = share; });
    }
    __syncthreads();
  }

  // Currents into the nodes of a wordline, `current` of the fields of four cells; in WORK, those that pass each, and what the
  // driver takes in at 0.
  template <class Current>
  __device__ __forceinline__ float gather(int row, Current current) const {
    float carry = 0.0f;
#pragma unroll 1
    for (int col = (blocks - 1) * WIDE + 4 * lane(); col >= 0; col -= WIDE) {
      const At here = at(row, col);
      Cells share = ONES, sum{};
      if (col < cols) sum = current(here), share = load(here.far + SHARE_W);
      Affine map{1.0f, 0.0f};
#pragma unroll
      for (int j = 3; j >= 0; --j) map.sum = share.x[j] * (map.sum + sum.x[j]), map.factor *= share.x[j];
      float beyond = scan<true>(map, carry);
#pragma unroll
      for (int j = 3; j >= 0; --j) sum.x[j] += beyond, beyond = share.x[j] * sum.x[j];
      if (col < cols) store(here.near + WORK, sum);
    }
    return carry;
  }

  // Voltages of the wordlines for currents into their nodes, bitlines held at 0, drivers at scale * v [R] or at 0: `take` gets
  // those of four cells.
  template <class Current, class Take>
  __device__ __forceinline__ void wordlines(const float* v, float scale, Current current, Take take) const {
#pragma unroll 1
    for (int row = warp(); row < rows; row += WARPS) {
      const float segment = wires.along(row), end = wires.at_source(row);
      gather(row, current);
      float carry = v ? scale * v[row] : 0.0f;
#pragma unroll 1
      for (int col = 4 * lane(); col < blocks * WIDE; col += WIDE) {
        const At here = at(row, col);
        Cells share = ONES, volts{};
        if (col < cols) volts = load(here.near + WORK), share = load(here.far + SHARE_W);
        Affine map{1.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          volts.x[j] *= col + j ? segment : end;
          map.sum = share.x[j] * (map.sum + volts.x[j]), map.factor *= share.x[j];
        }
        float before = scan<false>(map, carry);
#pragma unroll
        for (int j = 0; j < 4; ++j) volts.x[j] = before = share.x[j] * (before + volts.x[j]);
        if (col < cols) take(here, volts);
      }
    }
  }

  // The first row of a warp's strip.
  __device__ __forceinline__ int strip(int warp) const { return (int)((i64)rows * warp / WARPS); }

  // Currents into the nodes of four bitlines from `col` on, kept in WORK; what strips pass on of them, in shared memory.
  template <class Current>
  __device__ __forceinline__ void collect(int col, Current current) const {
    Cells sum{}, factor = ONES;
#pragma unroll 1
    for (int row = strip(warp()); row < strip(warp() + 1) && col < cols; ++row) {
      const At here = at(row, col);
      const Cells into = current(here), share = load(here.far + SHARE_B);
      store(here.near + WORK, into);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.x[j] = share.x[j] * (sum.x[j] + into.x[j]), factor.x[j] *= share.x[j];
    }
    store(shared.sum[warp()][lane()].x, sum);
    store(shared.factor[warp()][lane()].x, factor);
    __syncthreads();
  }

  // `carry` past a strip.
  __device__ __forceinline__ void pass(const Cells (*sums)[32], int warp, Cells& carry) const {
    const Cells sum = load(sums[warp][lane()].x), factor = load(shared.factor[warp][lane()].x);
#pragma unroll
    for (int j = 0; j < 4; ++j) carry.x[j] = fma(factor.x[j], carry.x[j], sum.x[j]);
  }

  // Bitlines alike, wordlines held at 0, sensed ends at -scale * grad_i [C] or at 0; `take` gets the place of the first cell
  // too. A barrier of the block.
  template <class Current, class Take>
  __device__ __forceinline__ void bitlines(const float* grad_i, float scale, Current current, Take take) const {
#pragma unroll 1
    for (int col = 4 * lane(); col < blocks * WIDE; col += WIDE) {
      const int from = strip(warp()), to = strip(warp() + 1);
      collect(col, current);
      Cells segment{}, end{}, carry{}, drive{}, back{}, factor = ONES;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (col + j < cols) {
          segment.x[j] = wires.down(col + j), end.x[j] = wires.at_sink(col + j);
          drive.x[j] = grad_i ? -scale * grad_i[col + j] : 0.0f;
        }
#pragma unroll 1
      for (int w = 0; w < warp(); ++w) pass(shared.sum, w, carry);
#pragma unroll 1
      for (int row = from; row < to && col < cols; ++row) {
        const At here = at(row, col);
        Cells sum = load(here.near + WORK);
        const Cells share = load(here.far + SHARE_B);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum.x[j] += carry.x[j];
          carry.x[j] = share.x[j] * sum.x[j];
          sum.x[j] *= row + 1 < rows ? segment.x[j] : end.x[j];
          factor.x[j] *= share.x[j];
          back.x[j] = fma(factor.x[j], sum.x[j], back.x[j]);
        }
        store(here.near + WORK, sum);
      }
      store(shared.back[warp()][lane()].x, back);
      __syncthreads();
#pragma unroll 1
      for (int w = WARPS - 1; w > warp(); --w) pass(shared.back, w, drive);
#pragma unroll 1
      for (int row = to - 1; row >= from && col < cols; --row) {
        const At here = at(row, col);
        const Cells drop = load(here.near + WORK), share = load(here.far + SHARE_B);
#pragma unroll
        for (int j = 0; j < 4; ++j) drive.x[j] = share.x[j] * (drive.x[j] + drop.x[j]);
        take(here, row, col, drive);
      }
      __syncthreads();
    }
  }

  // Voltages of the wordlines, drivers at scale * v and sensed ends at -scale * grad_i; null: at 0. False if they did not
  // come below `tolerance` in so many iterations.
  __device__ __forceinline__ bool solve(const float* v, const float* grad_i, float scale, double tolerance,
                                        int iterations) const {
    wordlines(v, scale, [](At) { return Cells{}; }, [](At at, const Cells& volts) { store(at.far + U, volts); });
    __syncthreads();
    double start = 0.0, norm = 0.0, bound = 0.0;
    bitlines(
        grad_i, scale, [](At at) { return times(load(at.far + G), load(at.far + U)); },
        [&](At at, int, int, const Cells& volts) {
          const Cells cells = load(at.far + G), across = load(at.far + U);
          store(at.far + RESIDUAL, times(cells, volts));
          start += dot(times(cells, across), across);
        });
    start = joined<false>(start, shared);
    float alpha = 0.0f;
#pragma unroll 1
    for (int n = 0;; ++n) {
      double next = 0.0, power = 0.0;
      wordlines(
          nullptr, scale,
          [=](At at) {
            Cells left = load(at.far + RESIDUAL);
            if (n == 0) return left;
            Cells across = load(at.far + U);
            const Cells cells = load(at.far + G), volts = load(at.near + WORK), along = load(at.near + STEP);
            const Cells into = load(at.near + SOURCE);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              across.x[j] = fma(alpha, along.x[j], across.x[j]);
              left.x[j] = fma(-alpha, fma(-cells.x[j], volts.x[j], into.x[j]), left.x[j]);
            }
            store(at.far + U, across);
            store(at.far + RESIDUAL, left);
            return left;
          },
          [&](At at, const Cells& volts) {
            store(at.near + WORK, volts);
            next += dot(load(at.far + RESIDUAL), volts);
          });
      next = joined<false>(next, shared);
      // the bound is on a power: that of the cells, or of the correction where the drivers do nothing
      if (n == 0) bound = tolerance * tolerance * (start > next ? start : next);
      if (next <= bound) return bound < 1e300;  // else they are infinite
      if (n == iterations) return false;
      const float beta = n ? (float)(next / norm) : 0.0f;
      norm = next;
      bitlines(
          nullptr, scale,
          [=](At at) {
            Cells along = load(at.near + WORK), into = load(at.far + RESIDUAL);
            if (n) {
              const Cells old_along = load(at.near + STEP), old_into = load(at.near + SOURCE);
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                along.x[j] = fma(beta, old_along.x[j], along.x[j]);
                into.x[j] = fma(beta, old_into.x[j], into.x[j]);
              }
            }
            store(at.near + STEP, along);
            store(at.near + SOURCE, into);
            return times(load(at.far + G), along);
          },
          [&](At at, int, int, const Cells& volts) {
            Cells left = load(at.near + SOURCE);
            const Cells cells = load(at.far + G);
            store(at.near + WORK, volts);
#pragma unroll
            for (int j = 0; j < 4; ++j) left.x[j] = fma(-cells.x[j], volts.x[j], left.x[j]);
            power += dot(load(at.near + STEP), left);
          });
      power = joined<false>(power, shared);
      if (!(power > 0.0)) return false;
      alpha = (float)(norm / power);
    }
  }

  // Of inputs x [count]. A barrier of the block.
  __device__ __forceinline__ Scale scale(const float* x, int count) const {
    float largest = 0.0f;
    for (int k = threadIdx.x; k < count; k += THREADS) largest = max(largest, abs(x[k]));
    return scale_of((float)joined<true>((double)largest, shared));
  }
};

}  // namespace gpuxbar
