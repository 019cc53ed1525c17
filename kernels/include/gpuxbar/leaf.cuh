// leaf: a leaf of 16 x 16 cells of a tile merged level by level by a block of 128 threads: four cells in a thread's
// registers, what is larger in shared memory.
//
// CUDA only. Every result is the work of one thread in a fixed order.
#pragma once
#include "gpuxbar/inverse.cuh"
#include "gpuxbar/parasitics.cuh"

namespace gpuxbar {

constexpr int LEAF = 16, THREADS = 128;

// The thread's index, anew for every level: places that are computed from it are not kept in registers between levels.
GPUXBAR_FN int this_thread() {
  int me = threadIdx.x;
  asm volatile("" : "+r"(me));
  return me;
}

// f(e) for all e below COUNT, each by one thread; rolled up, which keeps the code of all levels small.
template <int COUNT, class F>
__device__ __forceinline__ void for_each(F f) {
#pragma unroll 1
  for (int e = this_thread(); e < COUNT; e += THREADS) f(e);
}

// Neighbours in memory, up to four by one access; as aligned as that.
template <int COUNT>
__device__ __forceinline__ void load(const float* from, float (&to)[COUNT]) {
#pragma unroll
  for (int n = 0; n < COUNT; n += COUNT % 4 ? COUNT % 2 ? 1 : 2 : 4) {
    if constexpr (COUNT % 4 == 0) {
      const float4 v = *(const float4*)(from + n);
      to[n] = v.x, to[n + 1] = v.y, to[n + 2] = v.z, to[n + 3] = v.w;
    } else if constexpr (COUNT % 2 == 0) {
      const float2 v = *(const float2*)(from + n);
      to[n] = v.x, to[n + 1] = v.y;
    } else {
      to[n] = from[n];
    }
  }
}

template <int COUNT>
__device__ __forceinline__ void store(float* to, const float (&from)[COUNT]) {
#pragma unroll
  for (int n = 0; n < COUNT; n += COUNT % 4 ? COUNT % 2 ? 1 : 2 : 4) {
    if constexpr (COUNT % 4 == 0)
      *(float4*)(to + n) = make_float4(from[n], from[n + 1], from[n + 2], from[n + 3]);
    else if constexpr (COUNT % 2 == 0)
      *(float2*)(to + n) = make_float2(from[n], from[n + 1]);
    else
      to[n] = from[n];
  }
}

// v = m v, with row(i, to): a row of m.
template <int K, class Row>
__device__ __forceinline__ void apply(Row row, float (&v)[K]) {
  float product[K];
#pragma unroll
  for (int i = 0; i < K; ++i) {
    float own[K];
    row(i, own);
    product[i] = own[0] * v[0];
#pragma unroll
    for (int k = 1; k < K; ++k) product[i] = fma(own[k], v[k], product[i]);
  }
#pragma unroll
  for (int i = 0; i < K; ++i) v[i] = product[i];
}

// sum[r][c] += a[k step_a + r apart] b[k step_b + c], k below DEPTH; rows that are not neighbours lie APART.
template <int DEPTH, int APART = 1, int R, int C>
__device__ __forceinline__ void multiply(const float* a, int step_a, const float* b, int step_b, float (&sum)[R][C]) {
#pragma unroll 4
  for (int k = 0; k < DEPTH; ++k) {
    float left[R], right[C];
    if constexpr (APART == 1)
      load(a + k * step_a, left);
    else
#pragma unroll
      for (int r = 0; r < R; ++r) left[r] = a[k * step_a + r * APART];
    load(b + k * step_b, right);
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) sum[r][c] = fma(left[r], right[c], sum[r][c]);
  }
}

constexpr int LAST = 7;           // level of a leaf's last merge, of its lower and its upper half
constexpr int MERGE_WORK = 1792;  // floats that a merge works in

// Pairs of blocks of P x Q cells that are joined at a level: ALONG_ROWS left (1) to right (2), else lower (1) to upper (2); S
// ports of a block, K of them at the joined side, which are last, and E others; G neighbours stay neighbours. The pair is a block
// of ROWS x COLS. Blocks lie SIZE apart: threads that each have one of their own meet different banks.
template <int LEVEL>
struct Level {
  static constexpr int P = 1 << LEVEL / 2, Q = 1 << (LEVEL + 1) / 2, PAIRS = LEAF * LEAF / (2 * P * Q);
  static constexpr bool ALONG_ROWS = LEVEL % 2 == 0;
  static constexpr int S = 2 * P + 2 * Q, K = ALONG_ROWS ? P : Q, E = S - K, SIZE = S * S + 4;
  static constexpr int G = P < 4 ? P : 4;
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

// ---- up to four cells, in a thread's registers

// A cell of a leaf with the segments before and below it, open where the tile ends. Cells are numbered like leaves: the bits
// of column and row alternate, rows from below.
struct LeafCell {
  float device, left, below;
  int row, col;  // of the tile; row below 0 or col beyond the last: padding
};

struct LeafCells {
  const float* g;
  Wires wires;
  Leaf at;
  int rows, cols, pad;

  __device__ __forceinline__ LeafCell operator()(int number) const {
    int i = 0, j = 0;
    for (int bit = 0; bit < 4; ++bit) {
      j |= (number >> (2 * bit) & 1) << bit;
      i |= (number >> (2 * bit + 1) & 1) << bit;
    }
    LeafCell cell{0.0f, 0.0f, 0.0f, at.row * LEAF + (LEAF - 1 - i) - pad, at.col * LEAF + j};
    if (cell.row >= 0 && cell.col < cols) {
      cell.device = g[(i64)cell.row * cols + cell.col];
      cell.left = cell.col ? wires.along(cell.row) : wires.at_source(cell.row);
      cell.below = cell.row + 1 < rows ? wires.down(cell.col) : wires.at_sink(cell.col);
    }
    return cell;
  }
};

// Which of left, right, top and bottom (0 to 3) is side `place` of a cell: the one it is joined at, right or left, goes last.
GPUXBAR_FN int cell_side(int place, bool second) {
  if (second) return place == 3 ? 0 : place + 1;
  return place == 0 ? 0 : place == 3 ? 1 : place + 1;
}

__device__ __forceinline__ void cell_block(const LeafCell& cell, bool second, float (&q)[4][4]) {
  const CellPorts<float> p = cell_ports(cell.device, cell.left, cell.below);
  const float m[4][4] = {
      {p.ll, p.lr, p.lt, p.lb}, {p.lr, p.rr, p.rt, p.rb}, {p.lt, p.rt, p.tt, p.tb}, {p.lb, p.rb, p.tb, p.bb}};
#pragma unroll
  for (int a = 0; a < 4; ++a)
#pragma unroll
    for (int b = 0; b < 4; ++b) q[a][b] = m[cell_side(a, second)][cell_side(b, second)];
}

// The pair of two blocks of a level, `second` of the two joined next.
template <int LEVEL, int S, int OUT>
__device__ __forceinline__ void join(const float (&q1)[S][S], const float (&q2)[S][S], bool second,
                                     float (&out)[OUT][OUT]) {
  constexpr int K = Level<LEVEL>::K, E = Level<LEVEL>::E;
  const auto row_of = [](const float (&q)[S][S]) {
    return [&](int i, float (&row)[K]) {
#pragma unroll
      for (int k = 0; k < K; ++k) row[k] = q[E + i][E + k];
    };
  };
  float f[K][K];  // (1 + Z A)^-1, by columns
#pragma unroll
  for (int j = 0; j < K; ++j) {
#pragma unroll
    for (int i = 0; i < K; ++i) f[j][i] = q2[E + i][E + j];
    apply<K>(row_of(q1), f[j]);
#pragma unroll
    for (int i = 0; i < K; ++i) f[j][i] = (i == j ? 1.0f : 0.0f) - f[j][i];
  }
#pragma unroll
  for (int t = 0; t < K; ++t) {
    float pivot[K];
#pragma unroll
    for (int i = 0; i < K; ++i) pivot[i] = f[t][i];
#pragma unroll
    for (int j = 0; j < K; ++j) eliminate(pivot, j == t, f[j]);
  }
  const auto solve = [&](int i, float (&row)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k) row[k] = f[k][i];
  };
  float joined[2 * E][2 * E];  // ports of the first block, then of the second
#pragma unroll
  for (int e = 0; e < E; ++e) {
    float x[K], y[K], w[K];
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = q1[E + k][e], w[k] = q2[E + k][e];
    apply<K>(solve, x);
#pragma unroll
    for (int k = 0; k < K; ++k) y[k] = x[k];
    apply<K>(row_of(q2), y);
    apply<K>(row_of(q1), w);
    apply<K>(solve, w);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      float first = 0.0f, other = 0.0f, cross = 0.0f;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        first = fma(q1[i][E + k], y[k], first);
        other = fma(q2[i][E + k], w[k], other);
        cross = fma(q2[i][E + k], -x[k], cross);
      }
      if (i <= e) {
        joined[i][e] = joined[e][i] = q1[i][e] + first;
        joined[E + i][E + e] = joined[E + e][E + i] = q2[i][e] + other;
      }
      joined[E + i][e] = joined[e][E + i] = cross;
    }
  }
#pragma unroll
  for (int a = 0; a < OUT; ++a)
#pragma unroll
    for (int b = 0; b < OUT; ++b) {
      const Place i = port_of<LEVEL>(a, second, Next{}), j = port_of<LEVEL>(b, second, Next{});
      out[a][b] = joined[i.block * E + i.at][j.block * E + j.at];
    }
}

template <int S>
__device__ __forceinline__ void store_block(float* to, const float (&q)[S][S]) {
#pragma unroll
  for (int i = 0; i < S; ++i) store(to + i * S, q[i]);
}

// Blocks of the cells of a leaf that are joined at LEVEL, up to 2; by a thread four cells.
template <int LEVEL>
__device__ __forceinline__ void low_level(const LeafCells& cells, float* out) {
  for_each<LEAF * LEAF / 4>([&](int quad) {
    float pairs[2][6][6];
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      float q[2][4][4];
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        const int number = 4 * quad + 2 * upper + right;
        cell_block(cells(number), right, q[right]);
        if (LEVEL == 0) store_block(out + number * Level<0>::SIZE, q[right]);
      }
      if (LEVEL > 0) join<0>(q[0], q[1], upper, pairs[upper]);
      if (LEVEL == 1) store_block(out + (2 * quad + upper) * Level<1>::SIZE, pairs[upper]);
    }
    if (LEVEL < 2) return;
    float whole[8][8];
    join<1>(pairs[0], pairs[1], false, whole);
    float* const own = out + quad * Level<2>::SIZE;
    const int flip = quad & 1 ? 6 : 0;  // of the second of a pair, left and right change places
#pragma unroll
    for (int a = 0; a < 8; ++a)
#pragma unroll
      for (int b = 0; b < 8; b += 2) {
        const int i = a < 2 || a >= 6 ? a ^ flip : a, j = b < 2 || b >= 6 ? b ^ flip : b;
        store(own + i * 8 + j, {whole[a][b], whole[a][b + 1]});
      }
  });
  __syncthreads();
}

// ---- larger blocks, in shared memory

// f [PAIRS, K, K] = (1 + Z A)^-1 for all pairs of a level, by a thread a column. Since q is symmetric, its columns of the joined
// side are read as rows, here and below.
template <int LEVEL>
__device__ __forceinline__ void solve_joints(const float* in, float* f) {
  using L = Level<LEVEL>;
  constexpr int K = L::K, S = L::S, E = L::E, COUNT = L::PAIRS * K;
  constexpr u32 LANES = COUNT < 32 ? (1u << COUNT) - 1 : ~0u;  // of a warp
  for_each<COUNT>([=](int e) {
    const int pair = e / K, j = e % K;
    const float* const joint = in + 2 * pair * L::SIZE + E * S + E;  // of the first block
    float column[K];
#pragma unroll
    for (int k = 0; k < K; ++k) column[k] = joint[L::SIZE + k * S + j];
    apply<K>([=](int i, float (&row)[K]) { load(joint + i * S, row); }, column);
#pragma unroll
    for (int i = 0; i < K; ++i) column[i] = (i == j ? 1.0f : 0.0f) - column[i];
    invert<LANES>(j, column);
#pragma unroll
    for (int i = 0; i < K; ++i) f[(pair * K + i) * K + j] = column[i];
  });
}

// Joins all pairs of a level, 2 or above. At the last one, `out` need not be shared memory.
template <int LEVEL>
__device__ __forceinline__ void merge_level(const float* in, float* out, float* work, Next next) {
  using L = Level<LEVEL>;
  constexpr int PAIRS = L::PAIRS, S = L::S, K = L::K, E = L::E, SIZE = L::SIZE, OUT = 2 * E;
  constexpr int G = L::G, N = E / G;        // groups of a block
  float* const f = work;                    // [PAIRS, K, K]
  float* const solved = f + PAIRS * K * K;  // [3, PAIRS, K, E] A F B1', -F Z B2' and -F B1'
  static_assert(PAIRS * K * (K + 3 * E) <= MERGE_WORK);
  __shared__ int places[2][2 * N];  // of groups in the pair; of even pairs, then of odd ones
  if (const int e = THREADS - 1 - this_thread(); e < 2 * OUT / G) {
    const int odd = e / (OUT / G), port = e % (OUT / G) * G;
    const Place from = port_of<LEVEL>(port, odd, next);
    places[odd][(from.block * E + from.at) / G] = port;
  }
  solve_joints<LEVEL>(in, f);
  __syncthreads();

  for_each<2 * PAIRS * E>([=](int e) {
    const int pair = e / (2 * E), port = e % E;
    const bool second = e / E % 2;
    const float* const q = in + (2 * pair + second) * SIZE + E * S;
    const float* const own_f = f + pair * K * K;
    const float* const joint = in + (2 * pair + !second) * SIZE + E * S + E;  // of the other block
    const float *const first = second ? joint : own_f, *const then = second ? own_f : joint;
    float* const to = solved + (second * PAIRS + pair) * K * E + port;
    float v[K];
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = q[k * S + port];
    apply<K>([=](int i, float (&row)[K]) { load(first + i * (second ? S : K), row); }, v);
    if (!second)
#pragma unroll
      for (int k = 0; k < K; ++k) to[(2 * PAIRS * K + k) * E] = -v[k];
    apply<K>([=](int i, float (&row)[K]) { load(then + i * (second ? K : S), row); }, v);
#pragma unroll
    for (int k = 0; k < K; ++k) to[k * E] = v[k];
  });
  __syncthreads();

  for_each<3 * PAIRS * N * N>([=](int e) {  // squares of G x G: of the first blocks, the second ones, and across
    const int pair = e / (N * N) % PAIRS, kind = e / (PAIRS * N * N), i = e / N % N, j = e % N;
    const bool second_row = kind > 0, second_col = kind == 1, across = kind == 2;
    const float* const q = in + (2 * pair + second_row) * SIZE;
    float sum[G][G] = {};
    multiply<K>(q + E * S + i * G, S, solved + (kind * PAIRS + pair) * K * E + j * G, E, sum);
    const int row = places[pair & 1][second_row * N + i], col = places[pair & 1][second_col * N + j];
    float* const to = out + pair * Level<LEVEL + 1>::SIZE;
    if (!across)
#pragma unroll
      for (int r = 0; r < G; ++r) {
        float own[G];
        load(q + (i * G + r) * S + j * G, own);
#pragma unroll
        for (int c = 0; c < G; ++c) sum[r][c] = own[c] + sum[r][c];
      }
#pragma unroll
    for (int r = 0; r < G; ++r) store(to + (row + r) * OUT + col, sum[r]);
    if (across)
#pragma unroll
      for (int c = 0; c < G; ++c) {
        float turned[G];
#pragma unroll
        for (int r = 0; r < G; ++r) turned[r] = sum[r][c];
        store(to + (col + c) * OUT + row, turned);
      }
  });
  __syncthreads();
}

// Merges blocks of level 2 in `a` up to those of another; they lie in `a` again, or in `b` after an odd number of merges.
template <int LEVEL = 2>
__device__ __forceinline__ void merge_levels(int level, float* a, float* b, float* work) {
  if (level > LEVEL) merge_level<LEVEL>(a, b, work, Next{});
  if constexpr (LEVEL + 1 < LAST) merge_levels<LEVEL + 1>(level, b, a, work);
}

}  // namespace gpuxbar
