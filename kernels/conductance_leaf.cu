// conductance_leaf: the cells of every tile merged into leaves of 16 x 16, in shared memory.
//
// Axes    g [T, R, C]; the tile is padded with open cells at the top and the right to 2^a x 2^b leaves, numbered so
//         that neighbours in the number are merged next: bits of column and row alternate, rows counted from below.
//         q [T, leaves, 64, 64]: hybrid ports of a leaf, the side it is joined at next last, the others in the order
//         left, right, top, bottom.
// Launch  one block of 256 threads a leaf; grid T * leaves. Every output is the work of one thread in a fixed order.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle gpuxbar/reference/effective_conductance.py
#include "gpuxbar/leaf.cuh"

namespace gpuxbar {

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
  const Wires wires{r_wordline, r_bitline, r_source, r_sink, wordline_value, bitline_value, source_value, sink_value};
  cell_level(leaf_cell(g + tile * rows * cols, wires, at, rows, cols, (LEAF << high_bits) - rows), blocks[0]);
  merge_levels(LAST, blocks[0], blocks[1], work);
  merge_level<LAST>(blocks[1], blocks[0], work, Next{wide_bits > 0, (leaf & 1) != 0});
  for (int e = threadIdx.x; e < 4096; e += THREADS) q[(i64)blockIdx.x * 4096 + e] = blocks[0][e];
}

}  // namespace gpuxbar
