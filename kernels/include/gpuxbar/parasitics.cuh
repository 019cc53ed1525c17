// parasitics.cuh: one cell between its wire segments, lines as ladders, and a tile coarsened.
//
// Meaning and proof: gpuxbar/reference/effective_conductance.py. `T` is a number, or a vector of numbers on the host.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// A cell as a network of four sides, left, right, top and bottom (upper triangle of a symmetric matrix, S, ohm and
// ratios): the device g with the wordline segment left of it and the bitline segment below it, both ohm.
template <class T>
struct CellPorts {
  T ll, lr, lt, lb, rr, rt, rb, tt, tb, bb;
};

template <class T>
GPUXBAR_FN CellPorts<T> cell_ports(T g, T left, T below) {
  const T drop = 1.0f / (1.0f + g * (left + below));
  const T through = g * drop;  // the device and its segments in series
  const T pass_right = (1.0f + g * below) * drop, pass_up = (1.0f + g * left) * drop;
  return CellPorts<T>{
      through,         -pass_right,      -through * below, -through, -left * pass_right, -through * left * below,
      -through * left, -below * pass_up, -pass_up,         through};
}

// The voltage over a cell's device for a unit of each of its sides, left, right, top and bottom.
template <class T>
GPUXBAR_FN void cell_voltage(T g, T left, T below, T* v) {
  const T drop = 1.0f / (1.0f + g * (left + below));
  v[0] = drop;
  v[1] = left * drop;
  v[2] = -below * drop;
  v[3] = -drop;
}

// Wires of a tile on a device: per line, ohm, or null and a value for all.
struct Wires {
  const float *wordline, *bitline, *source, *sink;
  float wordline_value, bitline_value, source_value, sink_value;

  GPUXBAR_METHOD float along(int row) const { return wordline ? wordline[row] : wordline_value; }
  GPUXBAR_METHOD float down(int col) const { return bitline ? bitline[col] : bitline_value; }
  GPUXBAR_METHOD float at_source(int row) const { return source ? source[row] : source_value; }
  GPUXBAR_METHOD float at_sink(int col) const { return sink ? sink[col] : sink_value; }
};

// What is left of a voltage behind a segment of `resistance` with an admittance `beyond` after it.
template <class T>
GPUXBAR_FN T ladder_factor(T resistance, T beyond) {
  return 1.0f / (1.0f + resistance * beyond);
}

// One line of `count` cells from the driven end on: take(i, share) gets what of the voltage before the segment of a cell
// reaches it. g(i): conductance, S; from the last cell on.
template <class Cell, class Take>
GPUXBAR_FN void ladder_factors(int count, float end, float segment, Cell g, Take take) {
  float beyond = 0.0f;
  for (int i = count - 1; i >= 0; --i) {
    beyond += g(i);
    const float factor = ladder_factor(i ? segment : end, beyond);
    beyond *= factor;
    take(i, factor);
  }
}

// What a cell adds to the walk along its line. ADDED: to first order in the resistances.
template <bool ADDED>
GPUXBAR_FN float walk_back(float g, float resistance, float& beyond) {  // from the last cell to the driven end
  beyond += g;
  if (ADDED) return resistance * beyond;
  const float factor = divide_fast(1.0f, 1.0f + resistance * beyond);
  beyond *= factor;
  return factor;
}
template <bool ADDED>
GPUXBAR_FN float walk_on(float back, float& reach) {  // and from there on; `reach` begins as nothing lost
  return reach = ADDED ? reach + back : reach * back;
}

// One line: `count` cells from the driven end on, `step` apart; share: of the drive, what reaches each cell.
GPUXBAR_FN void walk(const float* g, float* share, int count, int step, float end, float segment) {
  ladder_factors(
      count, end, segment, [=](int i) { return g[i * step]; }, [=](int i, float factor) { share[i * step] = factor; });
  for (int i = 1; i < count; ++i) share[i * step] *= share[(i - 1) * step];
}

// Powers of two that bring inputs, the largest of which is given (0 or above), to 1 to 2 and back: the squares of very large
// or small ones are not floats.
struct Scale {
  float down, up;
};

GPUXBAR_FN Scale scale_of(float largest) {
  u32 exponent = float_bits(largest) >> 23;
  exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  return Scale{bits_float((254 - exponent) << 23), bits_float(exponent << 23)};
}

// What stands before the middle of a coarse line of k lines side by side, each of `end` ohm and then k segments: a
// block's cells hang on average (k - 1) / 2 segments behind its first.
template <class T>
GPUXBAR_FN T coarse_end(T end, T segment, int k) {
  return (end + segment * (T)(k - 1) / 2) / (T)k;
}

// Where a cell lies between the centres of blocks of k: `low` and `low + 1` with a `share` of the latter; constant
// beyond the outer ones. `at` counts from the beginning of block 0.
struct Between {
  int low;
  float share;
};

GPUXBAR_FN Between between(int at, int k, int blocks) {
  const float place = ((float)at + 0.5f) / (float)k - 0.5f;
  int low = place > 0.0f ? (int)place : 0;
  if (low > blocks - 2) low = blocks > 1 ? blocks - 2 : 0;
  return Between{low, max(0.0f, min(1.0f, place - (float)low))};
}

// Blocks on a device are numbered so that neighbours in the number are merged next: the bits of column and row
// alternate (column first, as long as there are both), rows counted from below.
struct Leaf {
  int row, col;  // from the top left
};

GPUXBAR_FN Leaf leaf_place(int number, int high_bits, int wide_bits) {
  int row = 0, col = 0;
  for (int bit = 0; bit < high_bits || bit < wide_bits; ++bit) {
    if (bit < wide_bits) col |= (number & 1) << bit, number >>= 1;
    if (bit < high_bits) row |= (number & 1) << bit, number >>= 1;
  }
  return Leaf{(1 << high_bits) - 1 - row, col};
}

struct Place {
  int block, at;
};

// Where port `port` of a merged block of rows x cols cells lies in its parts. Ports are in the order left, right, top,
// bottom with the side joined next last (`second`: of the two then joined), those of the parts with the side joined now
// last: `along_rows`, left block 0 to right block 1, else lower 0 to upper 1.
GPUXBAR_FN Place source_of(int port, int rows, int cols, bool next_along_rows, bool second, bool along_rows) {
  const int joined = next_along_rows ? (second ? 0 : 1) : (second ? 3 : 2);  // side that is last
  int side = 0, at = port;
  for (int s = 0; s < 4; ++s) {  // sides in their order, but for the joined one
    const int count = s < 2 ? rows : cols;
    if (s == joined) continue;
    if (at < count) {
      side = s;
      break;
    }
    at -= count;
    side = joined;  // unless a later side holds it
  }
  const int part_rows = along_rows ? rows : rows / 2, part_cols = along_rows ? cols / 2 : cols;
  if (along_rows) {
    if (side == 0) return Place{0, at};  // left, of (left, top, bottom, right)
    if (side == 1) return Place{1, at};  // right, of (right, top, bottom, left)
    const int block = at >= part_cols;
    return Place{block, part_rows + (side - 2) * part_cols + at - block * part_cols};
  }
  if (side == 3) return Place{0, 2 * part_rows + at};  // bottom, of (left, right, bottom, top)
  if (side == 2) return Place{1, 2 * part_rows + at};  // top, of (left, right, top, bottom)
  const int block = at < part_rows;                    // the upper rows come first
  return Place{block, side * part_rows + (block ? at : at - part_rows)};
}

}  // namespace gpuxbar
