// The exact network of a tile with wires, of which effective conductances and their gradients are computed.
//
// Leaves of 8 x 8 cells are merged in groups, one leaf a vector lane; above them every merge is a handful of
// small matrix products in a register-tiled kernel, depth first, so that a thread's blocks stay in its second cache.
#pragma once
#include <vector>

#include "block_merge.hpp"
#include "gpuxbar/parasitics.cuh"

namespace gpuxbar::blocks {

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
