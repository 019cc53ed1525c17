// The gradient of effective_conductance on the CPU: the block merge (blocks.hpp) undone, one tile a thread.
//
// The ports of a merged block set those of its parts, x1 = P1 x and x2 = P2 x. Matrices of networks are symmetric and
// what is eliminated is stationary, so that dQ = P1' dQ1 P1 + P2' dQ2 P2: a gradient D of Q becomes P1 D P1' and P2 D P2'
// of the parts, and that of a cell e' D e, with e its voltage for unit ports. Blocks above groups are kept on the way up;
// those of a group are made again, and kept, when it is its turn, so that they stay in the second cache: 7 MB a thread
// in all for a tile of 128 x 128. Bits do not depend on threads. Oracle: gpuxbar/reference/wire_currents.py.

#include "blocks.hpp"

using namespace gpuxbar;
using namespace gpuxbar::blocks;

namespace {

// The gradient of a block's q, by pairs of its sides.
template <class E>
struct Gradient {
  E* at[4][4];
  i64 ld[4][4];
  i64 size[4];

  // Where the rows of segment s and the columns of segment t of a merged block's sides begin.
  E* from(const Segment& s, const Segment& t) const {
    return at[s.port][t.port] + s.offset * ld[s.port][t.port] + t.offset;
  }
};

// From the gradient of a merged block to that of a part. Of the sides that stay it is the same memory; that of the joined
// side is made: turned [2k, k] is what the side sees of (1) and (2) below, u_t [2k, n] and g [2k, k] see `split`.
template <class E>
Gradient<E> part_of(const Gradient<E>& whole, const Block<E>& part, const Segment* rest, int side, const E* turned,
                    i64 ld_turned, const E* u_t, i64 ld_u, const E* g, Stack<E>& results) {
  Gradient<E> out;
  std::copy_n(part.size, 4, out.size);
  i64 wide = 0;
  for (int s = 0; s < 3; ++s) wide += part.size[rest[s].port];
  const i64 k = part.size[side], ld = padded(k, E{}), ld_across = padded(wide, E{});
  E* const across = results.take(k * ld_across);
  E* const down = results.take(wide * ld);
  E* const own = results.take(k * ld);
  i64 place = 0;
  for (int s = 0; s < 3; ++s) {
    const int p = rest[s].port;
    for (int t = 0; t < 3; ++t) {
      out.at[p][rest[t].port] = whole.from(rest[s], rest[t]);
      out.ld[p][rest[t].port] = whole.ld[p][rest[t].port];
    }
    out.at[side][p] = across + place, out.ld[side][p] = ld_across;
    out.at[p][side] = down + place * ld, out.ld[p][side] = ld;
    place += part.size[p];
  }
  out.at[side][side] = own, out.ld[side][side] = ld;
  if (!results.base) return out;
  product(k, wide, 2 * k, turned, ld_turned, u_t, ld_u, nullptr, 0, 1.0f, across, ld_across);
  mirror(k, wide, across, ld_across, down, ld);
  product(k, k, 2 * k, turned, ld_turned, g, ld_turned, nullptr, 0, 1.0f, own, ld);
  return out;
}

// Gradients of two parts from that of their merged block: with B = [[B1, 0], [0, B2]] and T = [[A F, -F'], [-F, -F Z]],
// the joined sides of the parts see B T of the merged block's ports, so that theirs are T' (B' D B) T and D B T.
template <class E>
void split(const Block<E>& a, const Block<E>& b, bool along_rows, Wanted wanted, const Gradient<E>& whole,
           Gradient<E>& grad_a, Gradient<E>& grad_b, Stack<E>& results, Stack<E>& scratch) {
  const Joint<E> joint(a, b, along_rows);
  const int k1 = joint.k1, k2 = joint.k2;
  const i64 k = a.size[k1], n = joint.total, ld = padded(2 * k, E{}), ld_t = padded(n, E{});
  E* const f = scratch.take(k * ld);      // F', F = (1 + Z A)^-1
  E* const t = scratch.take(2 * k * ld);  // T
  E* const u = scratch.take(n * ld);      // D B
  E* const u_t = scratch.take(2 * k * ld_t);
  E* const h = scratch.take(2 * k * ld);  // B' D B
  E* const g = scratch.take(2 * k * ld);  // B' D B T
  E* const work = scratch.take(2 * LEAF * (k + LEAF));
  i64 wide1 = 0;
  for (int s = 0; s < 3; ++s) wide1 += a.size[joint.rest1[s].port];
  if (scratch.base) {
    joined(a, b, k1, k2, f, ld, work);
    mirror(k, k, f, ld, t + k * ld, ld);
    for (i64 i = 0; i < k; ++i)
      for (i64 j = 0; j < k; ++j) {
        t[i * ld + k + j] = -f[i * ld + j];
        t[(k + i) * ld + j] = -t[(k + i) * ld + j];
      }
    product(k, k, k, t + k * ld, ld, b.part(k2, k2), b.ld, nullptr, 0, -1.0f, t, ld);
    product(k, k, k, f, ld, a.part(k1, k1), a.ld, nullptr, 0, 1.0f, t + k * ld + k, ld);

    i64 row = 0;
    for (int half = 0; half < 2; ++half)
      for (int s = 0; s < 3; ++s) {
        const Segment& to = (half ? joint.rest2 : joint.rest1)[s];
        const i64 rows = (half ? b : a).size[to.port];
        for (int side = 0; side < 2; ++side) {
          const Block<E>& part = side ? b : a;
          E* const out = u + row * ld + side * k;
          bool any = false;
          for (const Segment& of : side ? joint.rest2 : joint.rest1) {
            const i64 depth = part.size[of.port];
            if (!rows || !depth || !wanted(of.port, to.port)) continue;
            product(rows, k, depth, whole.from(of, to), whole.ld[of.port][to.port], part.part(of.port, side ? k2 : k1),
                    part.ld, any ? out : nullptr, ld, 1.0f, out, ld);
            any = true;
          }
          for (i64 i = 0; !any && i < rows; ++i) std::fill_n(out + i * ld, k, E{});
        }
        // the upper triangle of B' D B
        const Block<E>& part = half ? b : a;
        if (rows)
          product(k, half ? k : 2 * k, rows, part.part(to.port, half ? k2 : k1), part.ld, u + row * ld + half * k, ld,
                  row > half * wide1 ? h + half * (k * ld + k) : nullptr, ld, 1.0f, h + half * (k * ld + k), ld);
        row += rows;
      }
    mirror(k, k, h + k, ld, h + k * ld, ld);
    mirror(n, 2 * k, u, ld, u_t, ld_t);
    product(2 * k, 2 * k, 2 * k, h, ld, t, ld, nullptr, 0, 1.0f, g, ld);
  }
  grad_a = part_of(whole, a, joint.rest1, k1, t, ld, u_t, ld_t, g, results);
  grad_b = part_of(whole, b, joint.rest2, k2, t + k, ld, u_t + wide1, ld_t, g + k, results);
}

// Brings the gradient of a tile's transfer down to its cells.
struct Adjoint {
  Builder builder;
  Stack<Lane> lane_grads;
  Stack<float> grads;
  Tree<float> outer, inner;
  Tree<Lane> kept_cells;
  const float* grad = nullptr;  // [rows, cols] of the effective conductance
  float* out = nullptr;         // [rows, cols] of the conductance

  explicit Adjoint(const Builder& builder) : builder(builder) {}

  template <class Visit>
  void stacks(Visit visit) {
    visit(lane_grads);
    builder.stacks(visit);
    visit(grads);
  }

  void tile() {
    grads.top = 0;
    for (Stack<float>& s : builder.blocks.stack) s.top = 0;
    const i64 rows = builder.high * LEAF, cols = builder.wide * LEAF;
    const i64 ld = padded(cols, 0.0f), ld_t = padded(rows, 0.0f);
    Gradient<float> whole = {};
    whole.size[L] = rows, whole.size[B] = cols;
    float* const across = whole.at[L][B] = grads.take(rows * ld);
    float* const down = whole.at[B][L] = grads.take(cols * ld_t);
    whole.ld[L][B] = ld, whole.ld[B][L] = ld_t;
    if (grads.base) {
      std::fill_n(across, rows * ld, 0.0f);
      for (i64 r = 0; r < builder.rows; ++r)  // G_eff = -Q[L, B], which stands twice in Q
        for (i64 c = 0; c < builder.cols; ++c) across[(builder.pad + r) * ld + c] = -0.5f * grad[r * builder.cols + c];
      mirror(rows, cols, across, ld, down, ld_t);
    }
    const i64 all[4] = {0, builder.high, 0, builder.wide};
    builder.outer = &outer, builder.inner = nullptr, builder.kept_cells = nullptr;
    if (!one_group(all)) {
      const Cut cut(all[0], all[1], all[2], all[3], false);
      build(cut.a, false, nullptr, 1);
      build(cut.b, false, nullptr, 2);
    }
    builder.inner = &inner, builder.kept_cells = &kept_cells;
    descend(all, 0, whole);
  }

 private:
  static constexpr i64 SIDE = 4 * LEAF;

  static bool one_group(const i64* at) { return at[1] - at[0] <= GROUP_HIGH && at[3] - at[2] <= GROUP_WIDE; }

  void build(const i64* at, bool inside, float* leaves, u64 node) {
    builder.build(at[0], at[1], at[2], at[3], 0, inside, leaves, node);
  }

  // Leaves [at[0], at[1]) x [at[2], at[3]), whole groups.
  void descend(const i64* at, u64 node, const Gradient<float>& whole) {
    if (one_group(at)) return group(at, whole);
    const i64 mark = grads.top;
    const Cut cut(at[0], at[1], at[2], at[3], false);
    Gradient<float> a, b;
    part(at, cut, outer, node, whole, a, b);
    descend(cut.a, 2 * node + 1, a);
    descend(cut.b, 2 * node + 2, b);
    grads.top = mark;
  }

  void part(const i64* at, const Cut& cut, const Tree<float>& tree, u64 node, const Gradient<float>& whole,
            Gradient<float>& a, Gradient<float>& b) {
    Stack<float>& scratch = builder.blocks.stack[1];
    const i64 mark = scratch.top;
    split(tree.blocks[2 * node + 1], tree.blocks[2 * node + 2], cut.along_rows, builder.wanted(at[1], at[2]), whole, a,
          b, grads, scratch);
    scratch.top = mark;
  }

  // A group, whose blocks are made again.
  void group(const i64* at, const Gradient<float>& whole) {
    const i64 mark = grads.top, blocks = builder.blocks.stack[0].top;
    float* const leaves = builder.leaves(at[0], at[2], builder.blocks.stack[0]);
    float* const leaf_grads = grads.take(LEAVES * SIDE * SIDE);
    if (grads.base) std::fill_n(leaf_grads, LEAVES * SIDE * SIDE, 0.0f);
    if (at[1] - at[0] > 1 || at[3] - at[2] > 1) {
      const Cut cut(at[0], at[1], at[2], at[3], true);
      build(cut.a, true, leaves, 1);
      build(cut.b, true, leaves, 2);
    }
    inside(at, 0, leaf_grads, whole);
    to_cells(at[0], at[2], leaf_grads);
    builder.blocks.stack[0].top = blocks;
    grads.top = mark;
    for (Stack<Lane>& s : builder.lanes.stack) s.top = 0;
  }

  void inside(const i64* at, u64 node, float* leaf_grads, const Gradient<float>& whole) {
    if (at[1] - at[0] == 1 && at[3] - at[2] == 1) {
      if (!grads.base) return;
      float* const leaf = leaf_grads + lane_of(at[0], at[2]) * SIDE * SIDE;
      const Wanted wanted = builder.wanted(at[1], at[2]);
      for (int s = 0; s < 4; ++s)
        for (int t = 0; t < 4; ++t)
          for (i64 i = 0; wanted(s, t) && i < whole.size[s]; ++i)
            std::copy_n(whole.at[s][t] + i * whole.ld[s][t], whole.size[t], leaf + (s * LEAF + i) * SIDE + t * LEAF);
      return;
    }
    const i64 mark = grads.top;
    const Cut cut(at[0], at[1], at[2], at[3], true);
    Gradient<float> a, b;
    part(at, cut, inner, node, whole, a, b);
    inside(cut.a, 2 * node + 1, leaf_grads, a);
    inside(cut.b, 2 * node + 2, leaf_grads, b);
    grads.top = mark;
  }

  // From the leaves' gradients, one after the other, to cells, one leaf a lane.
  void to_cells(i64 r0, i64 c0, const float* leaf_grads) {
    Lane* const q = lane_grads.take(SIDE * SIDE);
    for (i64 e0 = 0; lane_grads.base && e0 < SIDE * SIDE; e0 += LEAVES) {
      Lane square[LEAVES];
      for (int lane = 0; lane < LEAVES; ++lane) square[lane] = load(leaf_grads + lane * SIDE * SIDE + e0);
      swap_lanes<1>(square);
      std::copy(square, square + LEAVES, q + e0);
    }
    Gradient<Lane> whole;
    for (int s = 0; s < 4; ++s) {
      whole.size[s] = LEAF;
      for (int t = 0; t < 4; ++t) whole.at[s][t] = q + s * LEAF * SIDE + t * LEAF, whole.ld[s][t] = SIDE;
    }
    cells(r0, c0, 0, LEAF, 0, LEAF, 0, whole);
    lane_grads.top = 0;
  }

  void cells(i64 r0, i64 c0, i64 i0, i64 i1, i64 j0, i64 j1, u64 node, const Gradient<Lane>& whole) {
    if (i1 - i0 == 1 && j1 - j0 == 1) return cell(r0, c0, i0, j0, whole);
    const i64 mark = lane_grads.top;
    const Cut cut(i0, i1, j0, j1, true);
    Gradient<Lane> a, b;
    Stack<Lane>& scratch = builder.lanes.stack[1];
    split(kept_cells.blocks[2 * node + 1], kept_cells.blocks[2 * node + 2], cut.along_rows, Wanted{true, true}, whole,
          a, b, lane_grads, scratch);
    scratch.top = 0;
    cells(r0, c0, cut.a[0], cut.a[1], cut.a[2], cut.a[3], 2 * node + 1, a);
    cells(r0, c0, cut.b[0], cut.b[1], cut.b[2], cut.b[3], 2 * node + 2, b);
    lane_grads.top = mark;
  }

  void cell(i64 r0, i64 c0, i64 i, i64 j, const Gradient<Lane>& whole) {
    if (!lane_grads.base) return;
    const GroupCells& cells = builder.fetched;
    Lane voltage[4];
    cell_voltage(cells.device[i][j], cells.before(i, j), cells.under(i, j), voltage);
    Lane sum = {};
    for (int s = 0; s < 4; ++s)
      for (int t = 0; t < 4; ++t) sum += voltage[s] * *whole.at[s][t] * voltage[t];
    for (int lane = 0; lane < LEAVES; ++lane) {
      const i64 row = builder.row_of(r0, lane) + i, col = builder.col_of(c0, lane) + j;
      if (row >= 0 && row < builder.rows && col < builder.cols) out[row * builder.cols + col] = sum[lane];
    }
  }
};

}  // namespace

// grad_g [tiles, R, C] of the exact effective conductance for its gradient grad [tiles, R, C].
extern "C" void gpuxbar_effective_conductance_gradient(const float* g, const float* grad, const float* r_wordline,
                                                       const float* r_bitline, const float* r_source,
                                                       const float* r_sink, float* grad_g, i64 tiles, i64 rows,
                                                       i64 cols) {
  const Adjoint plan(Builder(rows, cols, {r_wordline, r_bitline, r_source, r_sink}, false));
  const Memory<Adjoint> memory(plan);
#pragma omp parallel
  {
    const Aligned block(memory.floats());
    Adjoint adjoint(plan);
    memory.give(adjoint, block.get());
#pragma omp for schedule(dynamic, 1)
    for (i64 tile = 0; tile < tiles; ++tile) {
      adjoint.builder.g = g + tile * rows * cols;
      adjoint.grad = grad + tile * rows * cols;
      adjoint.out = grad_g + tile * rows * cols;
      adjoint.tile();
    }
  }
}
