// Blocks of cells and their merge, the exact network of a tile with wires: effective conductances and their gradients.
//
// Leaves of 8 x 8 cells are merged in groups, one leaf a vector lane; above them every merge is a handful of
// small matrix products in a register-tiled kernel, depth first, so that a thread's blocks stay in its second cache.
// Only what the tile's result needs is computed: blocks at the far ends have no port there, and the admittances of the
// near ends are left out. Meaning and oracle: gpuxbar/reference/effective_conductance.py.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "gpuxbar/parasitics.cuh"
#include "wide.hpp"

namespace gpuxbar::blocks {

constexpr int LEAF = 8;  // cells along a leaf's side; every block is a multiple of it
constexpr int GROUP_WIDE = 4, GROUP_HIGH = LANES / GROUP_WIDE;  // leaves along the sides of a group
constexpr int LEAVES = LANES;
#if defined(__AVX512F__)
constexpr int WIDTH = 16, MICRO = 8;  // floats of a vector, rows of the register tile
constexpr int ACROSS = 4;             // columns of that of lanes
#else
constexpr int WIDTH = 8, MICRO = 4;
constexpr int ACROSS = 2;
#endif

typedef float Lane __attribute__((vector_size(4 * LEAVES)));  // one value of every leaf of a group

using LaneMemory = Floats<LEAVES>::Vec;

inline Lane load(const float* from) { return *(const LaneMemory*)from; }
inline void store(float* to, const Lane& x) { *(LaneMemory*)to = x; }

// ---------------------------------------------------------------- products

template <int STEP, int COLS>
void tile_column(i64 rows, i64 depth, const float* at, i64 lda, const float* b, i64 ldb, const float* c0, i64 ldc0,
                 float sign, float* c, i64 ldc) {
  constexpr int ROWS = COLS > 1 ? MICRO : 8;  // fewer sums would wait for each other
  for (i64 i = 0; i < rows; i += ROWS)
    register_tile<STEP, ROWS, COLS>(depth, at + i, lda, b, ldb, c0 ? c0 + i * ldc0 : nullptr, ldc0, sign, c + i * ldc,
                                    ldc);
}

// c = c0 + sign at' b: at [depth, rows], b [depth, cols]; rows and cols are multiples of 8. One copy of it: with its loops in
// line, a merge would not fit the cache of instructions.
__attribute__((noinline)) inline void product(i64 rows, i64 cols, i64 depth, const float* at, i64 lda, const float* b,
                                              i64 ldb, const float* c0, i64 ldc0, float sign, float* c, i64 ldc) {
  i64 j = 0;
  for (; j + 2 * WIDTH <= cols; j += 2 * WIDTH)
    tile_column<WIDTH, 2>(rows, depth, at, lda, b + j, ldb, c0 ? c0 + j : nullptr, ldc0, sign, c + j, ldc);
  for (; j + WIDTH <= cols; j += WIDTH)
    tile_column<WIDTH, 1>(rows, depth, at, lda, b + j, ldb, c0 ? c0 + j : nullptr, ldc0, sign, c + j, ldc);
  for (; j < cols; j += 8)
    tile_column<8, 1>(rows, depth, at, lda, b + j, ldb, c0 ? c0 + j : nullptr, ldc0, sign, c + j, ldc);
}

template <int ROWS, int COLS>
inline void lane_tile(i64 depth, const Lane* at, i64 lda, const Lane* b, i64 ldb, const Lane* c0, i64 ldc0, float sign,
                      Lane* c, i64 ldc) {
  Lane sum[ROWS][COLS] = {};
  for (i64 k = 0; k < depth; ++k, at += lda, b += ldb) {
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < COLS; ++j) sum[i][j] += at[i] * b[j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) c[i * ldc + j] = (c0 ? c0[i * ldc0 + j] : Lane{}) + sign * sum[i][j];
}

template <int ROWS, int COLS>
GPUXBAR_METHOD void lane_product(i64 rows, i64 cols, i64 depth, const Lane* at, i64 lda, const Lane* b, i64 ldb,
                                 const Lane* c0, i64 ldc0, float sign, Lane* c, i64 ldc) {
  for (i64 i = 0; i < rows; i += ROWS)
    for (i64 j = 0; j < cols; j += COLS)
      lane_tile<ROWS, COLS>(depth, at + i, lda, b + j, ldb, c0 ? c0 + i * ldc0 + j : nullptr, ldc0, sign,
                            c + i * ldc + j, ldc);
}

// The same for a matrix in every lane; sizes are 1, 2, 4 or 8.
GPUXBAR_METHOD void product(i64 rows, i64 cols, i64 depth, const Lane* at, i64 lda, const Lane* b, i64 ldb,
                            const Lane* c0, i64 ldc0, float sign, Lane* c, i64 ldc) {
  const i64 least = std::min(rows, cols);
  if (rows * cols * depth == 1) {  // of cells
    *c = (c0 ? *c0 : Lane{}) + sign * (*at * *b);
    return;
  }
  if (least >= 4)
    lane_product<4, ACROSS>(rows, cols, depth, at, lda, b, ldb, c0, ldc0, sign, c, ldc);
  else if (least == 2)
    lane_product<2, 2>(rows, cols, depth, at, lda, b, ldb, c0, ldc0, sign, c, ldc);
  else
    lane_product<1, 1>(rows, cols, depth, at, lda, b, ldb, c0, ldc0, sign, c, ldc);
}

// ---------------------------------------------------------------- transposes and inverse

// to = from', from [rows, cols]. One copy of it, too.
__attribute__((noinline)) inline void mirror(i64 rows, i64 cols, const float* from, i64 ld_from, float* to, i64 ld_to) {
  transpose(from, ld_from, rows, cols, to, ld_to);
}

inline void mirror(i64 rows, i64 cols, const Lane* from, i64 ld_from, Lane* to, i64 ld_to) {
  for (i64 i = 0; i < rows; ++i)
    for (i64 j = 0; j < cols; ++j) to[j * ld_to + i] = from[i * ld_from + j];
}

// In place, without pivots: 1 + A Z with A, Z positive semidefinite keeps its pivots at 1 or above in the mean.
inline void invert(i64 n, Lane* m, i64 ld, Lane*) {
  for (i64 t = 0; t < n; ++t) {
    Lane* const pivot = m + t * ld;
    const Lane inverse = 1.0f / pivot[t];
    pivot[t] = Lane{} + 1.0f;
    for (i64 j = 0; j < n; ++j) pivot[j] *= inverse;
    for (i64 i = 0; i < n; ++i) {
      if (i == t) continue;
      Lane* const row = m + i * ld;
      const Lane factor = row[t];
      row[t] = Lane{};
      for (i64 j = 0; j < n; ++j) row[j] -= factor * pivot[j];
    }
  }
}

// A row of a LEAF x LEAF matrix in registers. `Floats` is of memory: by its references, clang++ takes it for aligned.
typedef float LeafRow __attribute__((vector_size(4 * LEAF)));

// The same of such a matrix.
inline void invert_rows(LeafRow (&m)[LEAF]) {
#pragma GCC unroll 8
  for (int t = 0; t < LEAF; ++t) {
    const float inverse = 1.0f / m[t][t];
    m[t][t] = 1.0f;
    m[t] *= inverse;
#pragma GCC unroll 8
    for (int i = 0; i < LEAF; ++i) {
      if (i == t) continue;
      const float factor = m[i][t];
      m[i][t] = 0.0f;
      m[i] -= factor * m[t];
    }
  }
}

// Gauss-Jordan by panels of LEAF rows; `work` holds 2 LEAF (n + LEAF) numbers.
inline void invert(i64 n, float* m, i64 ld, float* work) {
  using Panel = Floats<LEAF>::Vec;
  float* const across = work;           // [LEAF, n]: the panel's rows, times the inverse of its pivot block
  float* const down = work + LEAF * n;  // [LEAF, n]: its columns, transposed
  for (i64 t = 0; t < n; t += LEAF) {
    LeafRow pivot[LEAF];
    float turned[LEAF * LEAF];
    for (int i = 0; i < LEAF; ++i) pivot[i] = *(const Panel*)(m + (t + i) * ld + t);
    invert_rows(pivot);
    transpose_tile<LEAF>([&](int i) { return pivot + i; }, turned, LEAF);
    for (int i = 0; i < LEAF; ++i) {
      Panel unit = {};
      unit[i] = 1.0f;
      *(Panel*)(m + (t + i) * ld + t) = unit;
    }
    product(LEAF, n, LEAF, turned, LEAF, m + t * ld, ld, nullptr, 0, 1.0f, across, n);
    mirror(n, LEAF, m + t, ld, down, n);
    for (i64 k = 0; k < LEAF; ++k) *(Panel*)(down + k * n + t) = Panel{};
    for (i64 i = 0; i < n; ++i) *(Panel*)(m + i * ld + t) = Panel{};
    for (i64 k = 0; k < LEAF; ++k) std::memcpy(m + (t + k) * ld, across + k * n, sizeof(float) * n);
    product(n, n, LEAF, down, n, across, n, m, ld, -1.0f, m, ld);
  }
}

// ---------------------------------------------------------------- blocks and their merge

enum Port { L, R, T, B };

// Hybrid ports of a block: q symmetric; port s takes `size[s]` rows and columns from `at[s]`. A missing port (an open
// end of the tile) has size 0.
template <class E>
struct Block {
  E* q;
  i64 ld, at[4], size[4];
  E* part(int a, int b) const { return q + at[a] * ld + at[b]; }
};

// A stack of memory; with no memory behind it, it only counts what a run would take.
template <class E>
struct Stack {
  E* base = nullptr;
  i64 top = 0, peak = 0;
  E* take(i64 count) {
    E* const here = base + top;
    top += (count + 15) / 16 * 16;
    peak = std::max(peak, top);
    return here;
  }
};

// Blocks of even depth on one stack, of odd depth on the other: a merge releases its parts below its result.
template <class E>
struct Stacks {
  Stack<E> stack[2];
  bool counting() const { return !stack[0].base; }
};

inline i64 padded(i64 size, float) { return (size + 15) / 16 * 16 + 16; }  // rows off a power of two apart
inline i64 padded(i64 size, const Lane&) { return size; }

// A side of one part, and where it lies in the merged block.
struct Segment {
  int port;
  i64 offset;
};

struct Wanted {
  bool ll, bb;  // whether the admittances of the left and lower sides matter
  bool operator()(int a, int b) const { return !(a == L && b == L && !ll) && !(a == B && b == B && !bb); }
};

// The ports of a's right (top) joined to b's left (bottom): sides joined, sides that stay, shape of the merged block.
template <class E>
struct Joint {
  int k1, k2;
  Segment rest1[3], rest2[3];
  Block<E> out;
  i64 total = 0;  // ports of the merged block
  Joint(const Block<E>& a, const Block<E>& b, bool along_rows)
      : k1(along_rows ? R : T),
        k2(along_rows ? L : B),
        rest1{along_rows ? Segment{L, 0} : Segment{L, b.size[L]}, along_rows ? Segment{T, 0} : Segment{R, b.size[R]},
              Segment{B, 0}},
        rest2{along_rows ? Segment{R, 0} : Segment{L, 0}, along_rows ? Segment{T, a.size[T]} : Segment{R, 0},
              along_rows ? Segment{B, a.size[B]} : Segment{T, 0}} {
    out.size[L] = along_rows ? a.size[L] : a.size[L] + b.size[L];
    out.size[R] = along_rows ? b.size[R] : a.size[R] + b.size[R];
    out.size[T] = along_rows ? a.size[T] + b.size[T] : b.size[T];
    out.size[B] = along_rows ? a.size[B] + b.size[B] : a.size[B];
    for (int s = 0; s < 4; ++s) {
      out.at[s] = total;
      total += out.size[s];
    }
    out.ld = padded(total, E{});
  }
  i64 place(const Segment& s) const { return out.at[s.port] + s.offset; }
};

// f = (1 + A Z)^-1 of two blocks' joined sides, with Z = -Q1[k1, k1] and A = Q2[k2, k2].
template <class E>
GPUXBAR_METHOD void joined(const Block<E>& a, const Block<E>& b, int k1, int k2, E* f, i64 ld, E* work) {
  const i64 k = a.size[k1];
  product(k, k, k, b.part(k2, k2), b.ld, a.part(k1, k1), a.ld, nullptr, 0, -1.0f, f, ld);
  for (i64 i = 0; i < k; ++i) f[i * ld + i] += 1.0f;
  invert(k, f, ld, work);
}

// Where the sizes of a and b are constants (inside leaves), all that follows from them is: its loops are unrolled for that.
template <class E>
GPUXBAR_METHOD Block<E> merge(const Block<E>& a, const Block<E>& b, bool along_rows, Wanted wanted, Stack<E>& results,
                              Stack<E>& scratch) {
  const Joint<E> joint(a, b, along_rows);
  const int k1 = joint.k1, k2 = joint.k2;
  const Segment* const rest1 = joint.rest1;
  const Segment* const rest2 = joint.rest2;
  Block<E> out = joint.out;
  out.q = results.take(joint.total * out.ld);

  const i64 k = a.size[k1], ld = padded(k, E{});
  i64 at1[3], at2[3], wide1 = 0, wide2 = 0;  // columns of the rests
#pragma GCC unroll 3
  for (int s = 0; s < 3; ++s) {
    at1[s] = wide1, wide1 += a.size[rest1[s].port];
    at2[s] = wide2, wide2 += b.size[rest2[s].port];
  }
  const i64 ld1 = padded(wide1, E{}), ld2 = padded(wide2, E{});
  E* const f = scratch.take(k * ld);   // (1 + A Z)^-1, the transpose of F
  E* const fz = scratch.take(k * ld);  // F Z
  E* const x = scratch.take(k * ld1);  // F B1'
  E* const y = scratch.take(k * ld1);  // A F B1'
  E* const w = scratch.take(k * ld2);  // F Z B2'
  E* const work = scratch.take(2 * LEAF * (k + LEAF));
  if (!scratch.base) return out;

  const E* const minus_z = a.part(k1, k1);
  const E* const admittance = b.part(k2, k2);
  joined(a, b, k1, k2, f, ld, work);

  bool any22 = false;
#pragma GCC unroll 3
  for (int s = 0; s < 3; ++s) {
#pragma GCC unroll 3
    for (int r = 0; r <= s; ++r)
      any22 |= b.size[rest2[s].port] && b.size[rest2[r].port] && wanted(rest2[r].port, rest2[s].port);
  }
  if (any22) product(k, k, k, f, ld, minus_z, a.ld, nullptr, 0, -1.0f, fz, ld);
#pragma GCC unroll 3
  for (int s = 0; s < 3; ++s) {
    const int port1 = rest1[s].port, port2 = rest2[s].port;
    bool inner1 = false, inner2 = false, cross = false;
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) {
      inner1 |= r <= s && a.size[rest1[r].port] && wanted(rest1[r].port, port1);
      inner2 |= r <= s && b.size[rest2[r].port] && wanted(rest2[r].port, port2);
      cross |= b.size[rest2[r].port] && wanted(port1, rest2[r].port);
    }
    if (inner1 || cross)
      product(k, a.size[port1], k, f, ld, a.part(k1, port1), a.ld, nullptr, 0, 1.0f, x + at1[s], ld1);
    if (inner1) product(k, a.size[port1], k, admittance, b.ld, x + at1[s], ld1, nullptr, 0, 1.0f, y + at1[s], ld1);
    if (inner2) product(k, b.size[port2], k, fz, ld, b.part(k2, port2), b.ld, nullptr, 0, 1.0f, w + at2[s], ld2);
  }

  const auto place = [&](const Segment& s, const Segment& t) {
    return out.q + joint.place(s) * out.ld + joint.place(t);
  };
#pragma GCC unroll 3
  for (int s = 0; s < 3; ++s) {
#pragma GCC unroll 3
    for (int r = 0; r <= s; ++r) {  // Q11 and Q22, the segments' upper triangle and its mirror image
      const int p1 = rest1[r].port, q1 = rest1[s].port, p2 = rest2[r].port, q2 = rest2[s].port;
      if (wanted(p1, q1)) {
        E* const to = place(rest1[r], rest1[s]);
        product(a.size[p1], a.size[q1], k, a.part(k1, p1), a.ld, y + at1[s], ld1, a.part(p1, q1), a.ld, 1.0f, to,
                out.ld);
        if (r != s) mirror(a.size[p1], a.size[q1], to, out.ld, place(rest1[s], rest1[r]), out.ld);
      }
      if (wanted(p2, q2)) {
        E* const to = place(rest2[r], rest2[s]);
        product(b.size[p2], b.size[q2], k, b.part(k2, p2), b.ld, w + at2[s], ld2, b.part(p2, q2), b.ld, -1.0f, to,
                out.ld);
        if (r != s) mirror(b.size[p2], b.size[q2], to, out.ld, place(rest2[s], rest2[r]), out.ld);
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < 3; ++r) {
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) {  // Q12
      const int p = rest1[r].port, q = rest2[s].port;
      if (!wanted(p, q)) continue;
      E* const to = place(rest1[r], rest2[s]);
      product(a.size[p], b.size[q], k, x + at1[r], ld1, b.part(k2, q), b.ld, nullptr, 0, -1.0f, to, out.ld);
      mirror(a.size[p], b.size[q], to, out.ld, place(rest2[s], rest1[r]), out.ld);
    }
  }
  return out;
}

// ---------------------------------------------------------------- one tile

struct Lines {
  const float *wordline, *bitline, *source, *sink;  // [rows], [cols], [rows], [cols] ohm
};

// A block of rows [r0, r1) x columns [c0, c1) in halves, along its longer side: left and right, or lower and upper. Outside
// groups, halves are whole groups.
struct Cut {
  bool along_rows;
  i64 a[4], b[4];
  Cut(i64 r0, i64 r1, i64 c0, i64 c1, bool inside) {
    const i64 high = inside ? 1 : GROUP_HIGH, wide = inside ? 1 : GROUP_WIDE;
    along_rows = c1 - c0 > wide && (c1 - c0 > r1 - r0 || r1 - r0 <= high);
    const i64 i = r0 + ((r1 - r0) / 2 + high - 1) / high * high, j = c0 + ((c1 - c0) / 2 + wide - 1) / wide * wide;
    const i64 left[4] = {r0, r1, c0, j}, right[4] = {r0, r1, j, c1}, lower[4] = {i, r1, c0, c1},
              upper[4] = {r0, i, c0, c1};
    std::copy_n(along_rows ? left : lower, 4, a);
    std::copy_n(along_rows ? right : upper, 4, b);
  }
};

// Of the leaf at (r, c) in its group.
inline i64 lane_of(i64 r, i64 c) { return r % GROUP_HIGH * GROUP_WIDE + c % GROUP_WIDE; }

// Blocks that are kept, by their place: the halves of block n are 2 n + 1 and 2 n + 2.
template <class E>
struct Tree {
  std::vector<Block<E>> blocks;
  void put(u64 node, const Block<E>& block) {
    if (blocks.size() <= node) blocks.resize(node + 1);
    blocks[node] = block;
  }
};

// The cells of the leaves of a group with the segments before and below them, one leaf a lane; open cells where the tile ends.
struct GroupCells {
  Lane device[LEAF][LEAF];
  Lane left[LEAF], first[LEAF];  // of rows: segments, and what is before the leaf's first cell
  Lane below[LEAF], last[LEAF];  // of columns: segments, and what is below the leaf's last cell
  const Lane& before(i64 i, i64 j) const { return j ? left[i] : first[i]; }
  const Lane& under(i64 i, i64 j) const { return i + 1 < LEAF ? below[j] : last[j]; }
};

// Builds the blocks of one tile; its rows are padded to leaves at the top, its columns at the right.
struct Builder {
  i64 rows, cols;       // of cells
  i64 high, wide, pad;  // of leaves; rows of padding
  bool admittances;     // whether the tile's outer admittances are wanted
  Lines lines;
  const float* g = nullptr;
  GroupCells fetched;
  Stacks<float> blocks;
  Stacks<Lane> lanes;
  Tree<float>*outer = nullptr, *inner = nullptr;  // blocks to keep, on stack 0: of whole groups, inside a group
  Tree<Lane>* kept_cells = nullptr;               // inside leaves

  Builder(i64 rows, i64 cols, Lines lines, bool admittances)
      : rows(rows),
        cols(cols),
        high((rows + LEAF - 1) / LEAF),
        wide((cols + LEAF - 1) / LEAF),
        pad(high * LEAF - rows),
        admittances(admittances),
        lines(lines) {}

  // Where the leaf of a lane of the group at (r0, c0) begins.
  i64 row_of(i64 r0, i64 lane) const { return (r0 + lane / GROUP_WIDE) * LEAF - pad; }
  i64 col_of(i64 c0, i64 lane) const { return (c0 + lane % GROUP_WIDE) * LEAF; }

  // The cells of the group at (r0, c0).
  void fetch(i64 r0, i64 c0) {
    constexpr i64 ROWS = LEAVES / LEAF;  // of a leaf, in one vector
    for (i64 i = 0; i < LEAF; i += ROWS) {
      Lane square[LEAVES] = {};
      for (i64 lane = 0; lane < LEAVES; ++lane)
        for (i64 n = 0; n < ROWS; ++n) {
          const i64 row = row_of(r0, lane) + i + n, col = col_of(c0, lane);
          if (row < 0 || row >= rows || col >= cols) continue;
          float* const to = (float*)(square + lane) + n * LEAF;
          if (col + LEAF <= cols)
            std::memcpy(to, g + row * cols + col, sizeof(float) * LEAF);
          else
            std::copy(g + row * cols + col, g + (row + 1) * cols, to);
        }
      swap_lanes<1>(square);
      std::copy(square, square + LEAVES, fetched.device[i]);
    }
    for (i64 i = 0; i < LEAF; ++i)
      for (i64 lane = 0; lane < LEAVES; ++lane) {
        const i64 row = row_of(r0, lane) + i, col = col_of(c0, lane) + i;
        const bool high = row >= 0 && row < rows, wide = col < cols;
        fetched.left[i][lane] = high ? lines.wordline[row] : 0.0f;
        fetched.first[i][lane] = high ? (col_of(c0, lane) ? lines.wordline : lines.source)[row] : 0.0f;
        fetched.below[i][lane] = wide ? lines.bitline[col] : 0.0f;
        fetched.last[i][lane] = wide ? (row_of(r0, lane) + LEAF < rows ? lines.bitline : lines.sink)[col] : 0.0f;
      }
  }

  // ROWS x COLS cells from (i, j) on of every leaf of the group; by sides, 2 (ROWS + COLS) squared.
  template <int ROWS, int COLS>
  Lane* cells(i64 i, i64 j, int depth, u64 node = 0) {
    Stack<Lane>&results = lanes.stack[depth & 1], &parts = lanes.stack[~depth & 1];
    Lane* out;
    if constexpr (ROWS == 1 && COLS == 1) {
      out = cell(i, j, results);
    } else {
      constexpr bool along_rows = COLS > ROWS;
      constexpr int H = along_rows ? ROWS : ROWS / 2, W = along_rows ? COLS / 2 : COLS;
      const i64 mark = parts.top;
      const int below = kept_cells ? depth : depth + 1;
      Lane* const a = cells<H, W>(along_rows ? i : i + H, j, below, 2 * node + 1);
      Lane* const b = cells<H, W>(i, along_rows ? j + W : j, below, 2 * node + 2);
      out = merge(block<H, W>(a), block<H, W>(b), along_rows, Wanted{true, true}, results, parts).q;
      parts.top = mark;
    }
    if (kept_cells) kept_cells->put(node, block<ROWS, COLS>(out));
    return out;
  }

  template <int ROWS, int COLS>
  static Block<Lane> block(Lane* q) {
    return {q, 2 * (ROWS + COLS), {0, ROWS, 2 * ROWS, 2 * ROWS + COLS}, {ROWS, ROWS, COLS, COLS}};
  }

  Lane* cell(i64 i, i64 j, Stack<Lane>& results) const {
    Lane* const out = results.take(16);
    if (lanes.counting()) return out;
    const CellPorts<Lane> p = cell_ports(fetched.device[i][j], fetched.before(i, j), fetched.under(i, j));
    const Lane q[16] = {p.ll, p.lr, p.lt, p.lb, p.lr, p.rr, p.rt, p.rb, p.lt, p.rt, p.tt, p.tb, p.lb, p.rb, p.tb, p.bb};
    std::copy(q, q + 16, out);
    return out;
  }

  // The leaves of the group at (r0, c0), each a matrix of its own, one after the other.
  float* leaves(i64 r0, i64 c0, Stack<float>& results) {
    constexpr i64 SIZE = 4 * LEAF * 4 * LEAF;
    float* const out = results.take(LEAVES * SIZE);
    if (!lanes.counting()) fetch(r0, c0);
    const Lane* const q = cells<LEAF, LEAF>(0, 0, 0);
    if (!kept_cells) lanes.stack[0].top = 0;
    if (blocks.counting()) return out;
    for (i64 e0 = 0; e0 < SIZE; e0 += LEAVES) {
      Lane square[LEAVES];
      std::copy(q + e0, q + e0 + LEAVES, square);
      swap_lanes<1>(square);
      for (int lane = 0; lane < LEAVES; ++lane) std::memcpy(out + lane * SIZE + e0, square + lane, sizeof(Lane));
    }
    return out;
  }

  // Leaves [r0, r1) x [c0, c1); `inside` a group, `group` are its leaves.
  Block<float> build(i64 r0, i64 r1, i64 c0, i64 c1, int depth, bool inside = false, float* group = nullptr,
                     u64 node = 0) {
    Stack<float>&results = blocks.stack[depth & 1], &parts = blocks.stack[~depth & 1];
    const i64 r = r1 - r0, c = c1 - c0;
    const bool entered = !inside && r <= GROUP_HIGH && c <= GROUP_WIDE;
    Tree<float>* const tree = inside ? inner : outer;
    Block<float> out;
    if (r == 1 && c == 1 && (inside || entered)) {
      constexpr i64 SIDE = 4 * LEAF;
      if (entered) group = leaves(r0, c0, results);
      const i64 lane = lane_of(r0, c0);
      out = {group + lane * SIDE * SIDE,
             SIDE,
             {0, LEAF, 2 * LEAF, 3 * LEAF},
             {LEAF, c1 < wide ? LEAF : 0, r0 > 0 ? LEAF : 0, LEAF}};
    } else {
      const i64 mark = parts.top;
      if (entered) group = leaves(r0, c0, parts);
      inside |= entered;
      const int below = (inside ? inner : outer) ? depth : depth + 1;
      const Cut cut(r0, r1, c0, c1, inside);
      const Block<float> a = build(cut.a[0], cut.a[1], cut.a[2], cut.a[3], below, inside, group, 2 * node + 1);
      const Block<float> b = build(cut.b[0], cut.b[1], cut.b[2], cut.b[3], below, inside, group, 2 * node + 2);
      out = merge(a, b, cut.along_rows, wanted(r1, c0), results, parts);
      parts.top = mark;
    }
    if (tree) tree->put(node, out);
    return out;
  }

  // Of a block whose rows end at leaf r1 and whose columns begin at leaf c0.
  Wanted wanted(i64 r1, i64 c0) const { return {c0 > 0 || admittances, r1 < high || admittances}; }

  template <class Visit>
  void stacks(Visit visit) {
    for (Stack<Lane>& s : lanes.stack) visit(s);
    for (Stack<float>& s : blocks.stack) visit(s);
  }

  Block<float> tile() {
    for (Stack<float>& s : blocks.stack) s.top = 0;
    return build(0, high, 0, wide, 0);
  }
};

// Memory of one thread: counted once on an empty worker, a Builder or what is made of one.
template <class Worker>
struct Memory {
  std::vector<i64> sizes;  // of the stacks, floats; those of vectors come first
  explicit Memory(Worker counter) {
    counter.tile();
    counter.stacks([&](auto& stack) { sizes.push_back(stack.peak * (i64)(sizeof *stack.base / sizeof(float))); });
  }
  i64 floats() const {
    i64 sum = 0;
    for (i64 size : sizes) sum += size;
    return sum;
  }
  void give(Worker& worker, float* memory) const {
    const i64* size = sizes.data();
    worker.stacks([&](auto& stack) {
      stack.base = (decltype(stack.base))memory;
      memory += *size++;
    });
  }
};

}  // namespace gpuxbar::blocks
