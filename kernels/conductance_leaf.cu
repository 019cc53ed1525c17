// conductance_leaf: the cells of every tile merged into leaves of 16 x 16, in registers and shared memory.
//
// Axes    g [T, R, C]; the tile is padded with open cells at the top and the right to 2^a x 2^b leaves, numbered so
//         that neighbours in the number are merged next: bits of column and row alternate, rows counted from below.
//         q [T, leaves, 64, 64]: hybrid ports of a leaf, the side it is joined at next last, the others in the order
//         left, right, top, bottom.
// Launch  one block of 128 threads a leaf; grid T * leaves. Every output is the work of one thread in a fixed order.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle gpuxbar/reference/effective_conductance.py
#include "gpuxbar/leaf.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(128, 5)
    conductance_leaf(const float* __restrict__ g,           // [T, R, C] S
                     const float* __restrict__ r_wordline,  // [R] ohm, or null: wordline_value; the others alike
                     const float* __restrict__ r_bitline, const float* __restrict__ r_source,
                     const float* __restrict__ r_sink,
                     float* __restrict__ q,  // [T, leaves, 64, 64]
                     float wordline_value, float bitline_value, float source_value, float sink_value, int rows,
                     int cols, int high_bits, int wide_bits)  // leaves: 2^high_bits x 2^wide_bits
{
  __shared__ float4 even[64 * Level<2>::SIZE / 4], odd[32 * Level<3>::SIZE / 4], work[MERGE_WORK / 4];
  const i64 tile = blockIdx.x >> (high_bits + wide_bits);
  const int leaf = (int)(blockIdx.x & ((1u << (high_bits + wide_bits)) - 1));
  const Leaf at = leaf_place(leaf, high_bits, wide_bits);
  const Wires wires{r_wordline, r_bitline, r_source, r_sink, wordline_value, bitline_value, source_value, sink_value};
  const LeafCells cells{g + tile * rows * cols, wires, at, rows, cols, (LEAF << high_bits) - rows};
  low_level<2>(cells, (float*)even);
  merge_levels(LAST, (float*)even, (float*)odd, (float*)work);
  merge_level<LAST>((float*)odd, (float*)((float4*)q + (i64)blockIdx.x * 1024), (float*)work,
                    Next{wide_bits > 0, (leaf & 1) != 0});
}

}  // namespace gpuxbar
