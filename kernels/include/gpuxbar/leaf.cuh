// leaf: a leaf of 16 x 16 cells of a tile in shared memory, merged level by level by a block of 256 threads.
//
// CUDA only. Every result is the work of one thread in a fixed order.
#pragma once
#include "gpuxbar/parasitics.cuh"

namespace gpuxbar {

constexpr int LEAF = 16, THREADS = 256;

// The thread's index, anew for every level: places that are computed from it are not kept in registers between levels.
GPUXBAR_FN int this_thread() {
  int me = threadIdx.x;
  asm volatile("" : "+r"(me));
  return me;
}

// The cell of a thread in its leaf with the segments before and below it, open where the tile ends. Cells are numbered like
// leaves: the bits of column and row alternate, rows from below.
struct LeafCell {
  float device, left, below;
  int row, col;  // of the tile; row below 0 or col beyond the last: padding
  bool second;   // of the pair that is joined first
};

__device__ __forceinline__ LeafCell leaf_cell(const float* g, const Wires& wires, Leaf at, int rows, int cols,
                                              int pad) {
  const int me = this_thread();
  int i = 0, j = 0;
  for (int bit = 0; bit < 4; ++bit) {
    j |= (me >> (2 * bit) & 1) << bit;
    i |= (me >> (2 * bit + 1) & 1) << bit;
  }
  const int row = at.row * LEAF + (LEAF - 1 - i) - pad, col = at.col * LEAF + j;
  LeafCell cell{0.0f, 0.0f, 0.0f, row, col, (j & 1) != 0};
  if (row >= 0 && col < cols) {
    cell.device = g[(i64)row * cols + col];
    cell.left = col ? wires.along(row) : wires.at_source(row);
    cell.below = row + 1 < rows ? wires.down(col) : wires.at_sink(col);
  }
  return cell;
}

// Which of left, right, top and bottom (0 to 3) is side `place` of a cell: the one it is joined at, right or left, goes last.
GPUXBAR_FN int cell_side(int place, bool second) {
  if (second) return place == 3 ? 0 : place + 1;
  return place == 0 ? 0 : place == 3 ? 1 : place + 1;
}

// Ports of all cells of the leaf, 4 x 4 each.
__device__ __forceinline__ void cell_level(const LeafCell& cell, float* out) {
  float* const own = out + 16 * this_thread();
  const CellPorts<float> p = cell_ports(cell.device, cell.left, cell.below);
  const float m[4][4] = {
      {p.ll, p.lr, p.lt, p.lb}, {p.lr, p.rr, p.rt, p.rb}, {p.lt, p.rt, p.tt, p.tb}, {p.lb, p.rb, p.tb, p.bb}};
#pragma unroll
  for (int a = 0; a < 4; ++a)
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const float first = m[cell_side(a, false)][cell_side(b, false)];
      const float other = m[cell_side(a, true)][cell_side(b, true)];
      own[a * 4 + b] = cell.second ? other : first;
    }
  __syncthreads();
}

// f(e) for all e below COUNT, each by one thread; rolled up, which keeps the code of all levels small.
template <int COUNT, class F>
__device__ __forceinline__ void for_each(F f) {
#pragma unroll 1
  for (int e = this_thread(); e < COUNT; e += THREADS) f(e);
}

// start + sum_k a[k * step_a] b[k * step_b]
template <int DEPTH>
__device__ __forceinline__ float dot(const float* a, int step_a, const float* b, int step_b, float start = 0.0f) {
#pragma unroll 4
  for (int k = 0; k < DEPTH; ++k) start = fma(a[k * step_a], b[k * step_b], start);
  return start;
}

// Inverses of COUNT matrices of K x K in place, without pivots; `spare` is as large.
template <int COUNT, int K>
__device__ __forceinline__ void invert_all(float* f, float* spare) {
  for (int t = 0; t < K; ++t) {
    for_each<COUNT * K * K>([&](int e) {
      const float* const m = f + e / (K * K) * K * K;
      const int i = e / K % K, j = e % K;
      const float inverse = 1.0f / m[t * K + t];
      const float row = (j == t ? 1.0f : m[t * K + j]) * inverse;
      spare[e] = i == t ? row : fma(-m[i * K + t], row, j == t ? 0.0f : m[i * K + j]);
    });
    __syncthreads();
    for_each<COUNT * K * K>([&](int e) { f[e] = spare[e]; });
    __syncthreads();
  }
}

constexpr int LAST = 7;  // level of a leaf's last merge, of its lower and its upper half

// Pairs of blocks of P x Q cells that are joined at a level: ALONG_ROWS left (1) to right (2), else lower (1) to upper (2); S
// ports of a block, K of them at the joined side, and E others. The pair is a block of ROWS x COLS.
template <int LEVEL>
struct Level {
  static constexpr int P = 1 << LEVEL / 2, Q = 1 << (LEVEL + 1) / 2, PAIRS = LEAF * LEAF / (2 * P * Q);
  static constexpr bool ALONG_ROWS = LEVEL % 2 == 0;
  static constexpr int S = 2 * P + 2 * Q, K = ALONG_ROWS ? P : Q, E = S - K;
  static constexpr int ROWS = ALONG_ROWS ? P : 2 * P, COLS = ALONG_ROWS ? 2 * Q : Q;
};

// How blocks are joined after their leaf is whole: along the wordlines, and this one as the second of a pair.
struct Next {
  bool along_rows, second;
};

// Where a port of pair `pair` of a level lies in its parts.
template <int LEVEL>
__device__ __forceinline__ Place port_of(int port, int pair, Next next) {
  using L = Level<LEVEL>;
  const bool along = LEVEL == LAST ? next.along_rows : !L::ALONG_ROWS, second = LEVEL == LAST ? next.second : pair & 1;
  return source_of(port, L::ROWS, L::COLS, along, second, L::ALONG_ROWS);
}

// Joins all pairs of a level. Blocks lie one after the other, their joined side last.
template <int LEVEL>
__device__ __forceinline__ void merge_level(const float* in, float* out, float* work, Next next) {
  using L = Level<LEVEL>;
  constexpr int PAIRS = L::PAIRS, S = L::S, K = L::K, E = L::E;
  float* const f = work;                // [PAIRS, K, K] (1 + Z A)^-1
  float* const fz = f + PAIRS * K * K;  // [PAIRS, K, K], negative
  float* const x = fz + PAIRS * K * K;  // [PAIRS, K, E]
  float* const y = x + PAIRS * K * E;
  float* const w = y + PAIRS * K * E;  // negative
  constexpr int OUT = 2 * L::ROWS + 2 * L::COLS;
  __shared__ u16 ports[2 * OUT];  // of even pairs, then of odd ones: block + 2 at
  for_each<2 * OUT>([=](int e) {
    const Place place = port_of<LEVEL>(e % OUT, e / OUT, next);
    ports[e] = (u16)(place.block + 2 * place.at);
  });

  for_each<PAIRS * K * K>([=](int e) {
    const float* const q1 = in + e / (K * K) * 2 * S * S + E * S + E;
    const int i = e / K % K, j = e % K;
    f[e] = (i == j ? 1.0f : 0.0f) - dot<K>(q1 + i * S, 1, q1 + S * S + j, S);
  });
  __syncthreads();
  invert_all<PAIRS, K>(f, fz);
  for_each<PAIRS * K * E>([=](int e) {
    const int pair = e / (K * E), i = e / E % K, j = e % E;
    x[e] = dot<K>(f + (pair * K + i) * K, 1, in + (2 * pair * S + E) * S + j, S);
  });
  for_each<PAIRS * K * K>([=](int e) {
    const int pair = e / (K * K), i = e / K % K, j = e % K;
    fz[e] = dot<K>(f + (pair * K + i) * K, 1, in + (2 * pair * S + E) * S + E + j, S);
  });
  __syncthreads();
  for_each<PAIRS * K * E>([=](int e) {
    const int pair = e / (K * E), i = e / E % K, j = e % E;
    const float* const q2 = in + ((2 * pair + 1) * S + E) * S;
    y[e] = dot<K>(q2 + i * S + E, 1, x + pair * K * E + j, E);
    w[e] = dot<K>(fz + (pair * K + i) * K, 1, q2 + j, S);
  });
  __syncthreads();

  for_each<PAIRS * OUT * OUT>([=](int e) {
    const int pair = e / (OUT * OUT);
    const u16 row = ports[(pair & 1) * OUT + e / OUT % OUT], col = ports[(pair & 1) * OUT + e % OUT];
    const Place i{row & 1, row >> 1}, j{col & 1, col >> 1};
    const float* const q = in + 2 * pair * S * S;
    const bool same = i.block == j.block;
    const Place& from = same || i.block ? i : j;  // across, from the second block
    const Place& to = same || i.block ? j : i;
    const float* const solved = (!same ? x : i.block ? w : y) + pair * K * E + to.at;
    const float own = same ? q[(i.block * S + i.at) * S + j.at] : 0.0f;
    const float sum = dot<K>(q + ((from.block * S) + from.at) * S + E, 1, solved, E);
    out[e] = same ? own + sum : -sum;
  });
  __syncthreads();
}

// Merges cells in `a` so many levels up; what they are made of lies in `a` again, or in `b` after an odd number of them.
template <int LEVEL = 0>
__device__ __forceinline__ void merge_levels(int count, float* a, float* b, float* work) {
  if (count > LEVEL) merge_level<LEVEL>(a, b, work, Next{});
  if constexpr (LEVEL + 1 < LAST) merge_levels<LEVEL + 1>(count, b, a, work);
}

}  // namespace gpuxbar
