// conductance_leaf: the cells of every tile merged into leaves of 16 x 16, in shared memory.
//
// Axes    g [T, R, C]; the tile is padded with open cells at the top and the right to 2^a x 2^b leaves, numbered so
//         that neighbours in the number are merged next: bits of column and row alternate, rows counted from below.
//         q [T, leaves, 64, 64]: hybrid ports of a leaf, the side it is joined at next last, the others in the order
//         left, right, top, bottom.
// Launch  one block of 256 threads a leaf; grid T * leaves. Every output is the work of one thread in a fixed order.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle gpuxbar/reference/effective_conductance.py
#include "gpuxbar/parasitics.cuh"

namespace gpuxbar {

constexpr int LEAF = 16, THREADS = 256;

// Joins all pairs of blocks of P x Q cells: ALONG_ROWS left (1) to right (2), else lower (1) to upper (2). Blocks lie
// one after the other, their joined side last; `later` is the way of the next merge.
template <int P, int Q, bool ALONG_ROWS>
__device__ void merge_level(const float* in, float* out, float* work, bool last, bool last_along_rows,
                            bool last_second) {
  constexpr int S = 2 * P + 2 * Q, K = ALONG_ROWS ? P : Q, E = S - K, PAIRS = LEAF * LEAF / (2 * P * Q);
  float* const f = work;                // [PAIRS, K, K] (1 + Z A)^-1
  float* const fz = f + PAIRS * K * K;  // [PAIRS, K, K]
  float* const x = fz + PAIRS * K * K;  // [PAIRS, K, E]
  float* const y = x + PAIRS * K * E;
  float* const w = y + PAIRS * K * E;
  const int me = threadIdx.x;

  for (int e = me; e < PAIRS * K * K; e += THREADS) {
    const float* const q1 = in + e / (K * K) * 2 * S * S;
    const float* const q2 = q1 + S * S;
    const int i = e / K % K, j = e % K;
    float sum = i == j ? 1.0f : 0.0f;
    for (int k = 0; k < K; ++k) sum = fma(-q1[(E + i) * S + E + k], q2[(E + k) * S + E + j], sum);
    f[e] = sum;
  }
  __syncthreads();
  for (int t = 0; t < K; ++t) {  // Gauss-Jordan of all pairs at once, without pivots
    for (int e = me; e < PAIRS * K * K; e += THREADS) {
      const float* const m = f + e / (K * K) * K * K;
      const int i = e / K % K, j = e % K;
      const float inverse = 1.0f / m[t * K + t];
      const float row = (j == t ? 1.0f : m[t * K + j]) * inverse;
      fz[e] = i == t ? row : fma(-m[i * K + t], row, j == t ? 0.0f : m[i * K + j]);
    }
    __syncthreads();
    for (int e = me; e < PAIRS * K * K; e += THREADS) f[e] = fz[e];
    __syncthreads();
  }
  for (int e = me; e < PAIRS * K * E; e += THREADS) {
    const float* const m = f + e / (K * E) * K * K;
    const float* const q1 = in + e / (K * E) * 2 * S * S;
    const int i = e / E % K, j = e % E;
    float sum = 0.0f;
    for (int k = 0; k < K; ++k) sum = fma(m[i * K + k], q1[(E + k) * S + j], sum);
    x[e] = sum;
  }
  for (int e = me; e < PAIRS * K * K; e += THREADS) {
    const float* const m = f + e / (K * K) * K * K;
    const float* const q1 = in + e / (K * K) * 2 * S * S;
    const int i = e / K % K, j = e % K;
    float sum = 0.0f;
    for (int k = 0; k < K; ++k) sum = fma(m[i * K + k], -q1[(E + k) * S + E + j], sum);
    fz[e] = sum;
  }
  __syncthreads();
  for (int e = me; e < PAIRS * K * E; e += THREADS) {
    const int pair = e / (K * E), i = e / E % K, j = e % E;
    const float* const q2 = in + (2 * pair + 1) * S * S;
    float across = 0.0f, down = 0.0f;
    for (int k = 0; k < K; ++k) {
      across = fma(q2[(E + i) * S + E + k], x[pair * K * E + k * E + j], across);
      down = fma(fz[pair * K * K + i * K + k], q2[(E + k) * S + j], down);
    }
    y[e] = across;
    w[e] = down;
  }
  __syncthreads();

  constexpr int ROWS = ALONG_ROWS ? P : 2 * P, COLS = ALONG_ROWS ? 2 * Q : Q, OUT = 2 * ROWS + 2 * COLS;
  for (int e = me; e < PAIRS * OUT * OUT; e += THREADS) {
    const int pair = e / (OUT * OUT);
    const bool along = last ? last_along_rows : !ALONG_ROWS, second = last ? last_second : pair & 1;
    const Place i = source_of(e / OUT % OUT, ROWS, COLS, along, second, ALONG_ROWS);
    const Place j = source_of(e % OUT, ROWS, COLS, along, second, ALONG_ROWS);
    const float* const q1 = in + 2 * pair * S * S;
    const float* const q2 = q1 + S * S;
    const float* left;   // a row of K numbers, S a row: ports of the block joined
    const float* right;  // a column of K numbers, E apart
    float sum = 0.0f, sign = 1.0f;
    if (i.block == 0 && j.block == 0) {
      left = q1 + i.at * S + E, right = y + pair * K * E + j.at, sum = q1[i.at * S + j.at];
    } else if (i.block == 1 && j.block == 1) {
      left = q2 + i.at * S + E, right = w + pair * K * E + j.at, sum = q2[i.at * S + j.at], sign = -1.0f;
    } else {
      left = q2 + (i.block ? i.at : j.at) * S + E, right = x + pair * K * E + (i.block ? j.at : i.at), sign = -1.0f;
    }
    for (int k = 0; k < K; ++k) sum = fma(sign * left[k], right[k * E], sum);
    out[e] = sum;
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(256)
    conductance_leaf(const float* __restrict__ g,           // [T, R, C] S
                     const float* __restrict__ r_wordline,  // [R] ohm, or null: wordline_value; the others alike
                     const float* __restrict__ r_bitline, const float* __restrict__ r_source,
                     const float* __restrict__ r_sink,
                     float* __restrict__ q,  // [T, leaves, 64, 64]
                     float wordline_value, float bitline_value, float source_value, float sink_value, int rows,
                     int cols, int high_bits, int wide_bits)  // leaves: 2^high_bits x 2^wide_bits
{
  __shared__ float blocks[2][4608];
  __shared__ float work[2048];
  const i64 tile = blockIdx.x >> (high_bits + wide_bits);
  const int leaf = (int)(blockIdx.x & ((1u << (high_bits + wide_bits)) - 1));
  const Leaf at = leaf_place(leaf, high_bits, wide_bits);
  const int pad = (LEAF << high_bits) - rows;
  {
    // cells are numbered like leaves: the bits of column and row alternate, rows from below
    const int me = threadIdx.x;
    int i = 0, j = 0;
    for (int bit = 0; bit < 4; ++bit) {
      j |= (me >> (2 * bit) & 1) << bit;
      i |= (me >> (2 * bit + 1) & 1) << bit;
    }
    const bool second = j & 1;
    const int row = (at.row * LEAF) + (LEAF - 1 - i) - pad, col = at.col * LEAF + j;
    float device = 0.0f, left = 0.0f, below = 0.0f;
    if (row >= 0 && col < cols) {
      device = g[(tile * rows + row) * cols + col];
      left = col ? (r_wordline ? r_wordline[row] : wordline_value) : (r_source ? r_source[row] : source_value);
      below = row + 1 < rows ? (r_bitline ? r_bitline[col] : bitline_value) : (r_sink ? r_sink[col] : sink_value);
    }
    const CellPorts<float> p = cell_ports(device, left, below);
    const float m[4][4] = {
        {p.ll, p.lr, p.lt, p.lb}, {p.lr, p.rr, p.rt, p.rb}, {p.lt, p.rt, p.tt, p.tb}, {p.lb, p.rb, p.tb, p.bb}};
    // the side it is joined at, right or left, goes last
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const float first = m[a == 0 ? 0 : a == 3 ? 1 : a + 1][b == 0 ? 0 : b == 3 ? 1 : b + 1];
        const float other = m[a == 3 ? 0 : a + 1][b == 3 ? 0 : b + 1];
        blocks[0][me * 16 + a * 4 + b] = second ? other : first;
      }
  }
  __syncthreads();
  merge_level<1, 1, true>(blocks[0], blocks[1], work, false, false, false);
  merge_level<1, 2, false>(blocks[1], blocks[0], work, false, false, false);
  merge_level<2, 2, true>(blocks[0], blocks[1], work, false, false, false);
  merge_level<2, 4, false>(blocks[1], blocks[0], work, false, false, false);
  merge_level<4, 4, true>(blocks[0], blocks[1], work, false, false, false);
  merge_level<4, 8, false>(blocks[1], blocks[0], work, false, false, false);
  merge_level<8, 8, true>(blocks[0], blocks[1], work, false, false, false);
  merge_level<8, 16, false>(blocks[1], blocks[0], work, true, wide_bits > 0, leaf & 1);
  for (int e = threadIdx.x; e < 4096; e += THREADS) q[(i64)blockIdx.x * 4096 + e] = blocks[0][e];
}

}  // namespace gpuxbar
