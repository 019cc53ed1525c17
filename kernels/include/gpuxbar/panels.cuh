// panels: how the operands of fused_tile_mvm_sm90 lie in memory, so that a stage of its pipeline is a few bulk copies.
//
// A panel is 128 rows by 64 driven lines of fp16, 16 KB in one piece, as wgmma reads it with the swizzle of 128 bytes
// (PTX ISA, asynchronous warpgroup matrix shared memory layout): row after row, the eight 16-byte chunks of a row in the
// order chunk ^ (row & 7). Panels of the same rows follow one another along the lines.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

constexpr int PANEL_ROWS = 128, PANEL_LINES = 64, PANEL = PANEL_ROWS * PANEL_LINES;

// Where a chunk of eight values of a row lies in a panel.
GPUXBAR_FN int panel_chunk(int row, int chunk) { return PANEL_LINES * row + 8 * (chunk ^ (row & 7)); }

// Where an element lies among the panels of an operand with `lines` driven lines.
GPUXBAR_FN i64 panel_place(int row, int line, int lines) {
  const i64 panel = (i64)(row / PANEL_ROWS) * (lines / PANEL_LINES) + line / PANEL_LINES;
  return panel * PANEL + panel_chunk(row % PANEL_ROWS, line % PANEL_LINES / 8) + line % 8;
}

// The row of a sensed line among the panels of b: of 32, line 8 q + 2 j + e is row 8 j + 2 q + e, so that a thread of
// the product, which owns the columns 8 j + 2 q + e for every j, gets eight neighbours.
GPUXBAR_FN int panel_row(int n) { return (n & ~31) | (n >> 1 & 3) << 3 | (n >> 3 & 3) << 1 | (n & 1); }

}  // namespace gpuxbar
