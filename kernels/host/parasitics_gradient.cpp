// The gradient of effective_conductance on the CPU: the block merge (blocks.hpp) undone, one tile a thread.
//
// The ports of a merged block set those of its parts, x1 = P1 x and x2 = P2 x. Matrices of networks are symmetric and
// what is eliminated is stationary, so that dQ = P1' dQ1 P1 + P2' dQ2 P2: a gradient D of Q becomes P1 D P1' and P2 D P2'
// of the parts, and that of a cell e' D e, with e its voltage for unit ports. Parts are merged anew on the way down, which
// costs less than keeping them. Bits do not depend on threads. Oracle: gpuxbar/reference/wire_currents.py.
#include <memory>

#include "blocks.hpp"

using namespace gpuxbar;
using namespace gpuxbar::blocks;

namespace {

template <class E>
Block<E> like(const Block<E>& block, Stack<E>& stack) {
  Block<E> out = block;
  i64 total = 0;
  for (int s = 0; s < 4; ++s) {
    out.at[s] = total;
    total += out.size[s];
  }
  out.ld = padded(total, E{});
  out.q = stack.take(total * out.ld);
  return out;
}

// turned [n, k]: what the joined side of a part sees of the merged block's ports. Gradients `whole` of the block to `part`.
template <class E>
void pull(const Joint<E>& joint, const Segment* rest, int side, const E* turned, i64 ld, const Block<E>& whole,
          const Block<E>& part, E* work) {
  const i64 n = joint.total, k = part.size[side];
  for (int s = 0; s < 3; ++s)
    for (int t = 0; t < 3; ++t) {
      const int p = rest[s].port, q = rest[t].port;
      for (i64 i = 0; i < part.size[p]; ++i) {
        const E* const from = whole.q + (joint.place(rest[s]) + i) * whole.ld + joint.place(rest[t]);
        std::copy(from, from + part.size[q], part.part(p, q) + i * part.ld);
      }
    }
  product(n, k, n, whole.q, whole.ld, turned, ld, nullptr, 0, 1.0f, work, ld);
  product(k, k, n, turned, ld, work, ld, nullptr, 0, 1.0f, part.part(side, side), part.ld);
  for (int s = 0; s < 3; ++s) {
    const int p = rest[s].port;
    const E* const across = work + joint.place(rest[s]) * ld;
    for (i64 i = 0; i < part.size[p]; ++i)
      std::copy(across + i * ld, across + i * ld + k, part.part(p, side) + i * part.ld);
    mirror(part.size[p], k, across, ld, part.part(side, p), part.ld);
  }
}

// Gradients of two parts from that of their merged block.
template <class E>
void split(const Block<E>& a, const Block<E>& b, bool along_rows, const Block<E>& whole, const Block<E>& grad_a,
           const Block<E>& grad_b, Stack<E>& scratch) {
  const Joint<E> joint(a, b, along_rows);
  const int k1 = joint.k1, k2 = joint.k2;
  const i64 k = a.size[k1], ld = padded(k, E{});
  E* const f = scratch.take(k * ld);   // F', F = (1 + Z A)^-1
  E* const ft = scratch.take(k * ld);  // F
  E* const fz = scratch.take(k * ld);  // F Z
  E* const fa = scratch.take(k * ld);  // F' A
  E* const turned = scratch.take(joint.total * ld);
  E* const work = scratch.take(std::max(joint.total * ld, 2 * LEAF * (k + LEAF)));
  if (!scratch.base) return;
  joined(a, b, k1, k2, f, ld, work);
  mirror(k, k, f, ld, ft, ld);
  product(k, k, k, f, ld, a.part(k1, k1), a.ld, nullptr, 0, -1.0f, fz, ld);
  product(k, k, k, ft, ld, b.part(k2, k2), b.ld, nullptr, 0, 1.0f, fa, ld);
  // currents into a's side: F' A B1' x1 - F' B2' x2; voltages of b's side: -F B1' x1 - F Z B2' x2
  const auto seen = [&](const E* of_first, float sign, const E* of_second) {
    for (const Segment& s : joint.rest1)
      product(a.size[s.port], k, k, a.part(k1, s.port), a.ld, of_first, ld, nullptr, 0, sign,
              turned + joint.place(s) * ld, ld);
    for (const Segment& s : joint.rest2)
      product(b.size[s.port], k, k, b.part(k2, s.port), b.ld, of_second, ld, nullptr, 0, -1.0f,
              turned + joint.place(s) * ld, ld);
  };
  seen(fa, 1.0f, ft);
  pull(joint, joint.rest1, k1, turned, ld, whole, grad_a, work);
  seen(f, -1.0f, fz);
  pull(joint, joint.rest2, k2, turned, ld, whole, grad_b, work);
}

// Brings the gradient of a tile's transfer down to its cells.
struct Adjoint {
  Builder builder;
  Stack<float> kept;  // gradients on the way down, leaves of the group at hand
  Stack<Lane> kept_lanes;
  const float* grad = nullptr;  // [rows, cols] of the effective conductance
  float* out = nullptr;         // [rows, cols] of the conductance

  template <class Visit>
  void stacks(Visit visit) {
    visit(kept_lanes);
    builder.stacks(visit);
    visit(kept);
  }

  void tile() {
    kept.top = kept_lanes.top = 0;
    release();
    const i64 rows = builder.high * LEAF, cols = builder.wide * LEAF;
    const Block<float> whole = like(Block<float>{nullptr, 0, {}, {rows, 0, 0, cols}}, kept);
    if (kept.base) {
      std::fill(whole.q, whole.q + (rows + cols) * whole.ld, 0.0f);
      for (i64 r = 0; r < builder.rows; ++r)  // G_eff = -Q[L, B], which stands twice in Q
        for (i64 c = 0; c < builder.cols; ++c)
          whole.part(L, B)[(builder.pad + r) * whole.ld + c] = -0.5f * grad[r * builder.cols + c];
      mirror(rows, cols, whole.part(L, B), whole.ld, whole.part(B, L), whole.ld);
    }
    descend(0, builder.high, 0, builder.wide, false, nullptr, nullptr, whole);
  }

 private:
  static constexpr i64 SIDE = 4 * LEAF;

  void release() {
    for (Stack<float>& s : builder.blocks.stack) s.top = 0;
    for (Stack<Lane>& s : builder.lanes.stack) s.top = 0;
  }

  // Leaves [r0, r1) x [c0, c1); in a group, `group` are its leaves and `grads` theirs.
  void descend(i64 r0, i64 r1, i64 c0, i64 c1, bool inside, float* group, float* grads, const Block<float>& whole) {
    const i64 mark = kept.top;
    if (inside && r1 - r0 == 1 && c1 - c0 == 1) {
      if (!kept.base) return;
      float* const leaf = grads + (r0 % GROUP * GROUP + c0 % GROUP) * SIDE * SIDE;
      for (int s = 0; s < 4; ++s)
        for (int t = 0; t < 4; ++t)
          for (i64 i = 0; i < whole.size[s]; ++i)
            std::copy_n(whole.part(s, t) + i * whole.ld, whole.size[t], leaf + (s * LEAF + i) * SIDE + t * LEAF);
      return;
    }
    if (!inside && r1 - r0 <= GROUP && c1 - c0 <= GROUP) {
      group = builder.leaves(r0, c0, kept);
      grads = kept.take(LEAVES * SIDE * SIDE);
      if (kept.base) std::fill(grads, grads + LEAVES * SIDE * SIDE, 0.0f);
      descend(r0, r1, c0, c1, true, group, grads, whole);
      leaves(r0, c0, grads);
      kept.top = mark;
      return;
    }
    const Cut cut(r0, r1, c0, c1, inside);
    const auto build = [&](const i64* part) {
      return builder.build(part[0], part[1], part[2], part[3], 1, inside, group);
    };
    const Block<float> a = build(cut.a), b = build(cut.b);
    const Block<float> grad_a = like(a, kept), grad_b = like(b, kept);
    split(a, b, cut.along_rows, whole, grad_a, grad_b, builder.blocks.stack[0]);
    release();
    descend(cut.a[0], cut.a[1], cut.a[2], cut.a[3], inside, group, grads, grad_a);
    descend(cut.b[0], cut.b[1], cut.b[2], cut.b[3], inside, group, grads, grad_b);
    kept.top = mark;
  }

  // From the leaves' gradients, one after the other, to cells, one leaf a lane.
  void leaves(i64 r0, i64 c0, const float* grads) {
    const Block<Lane> whole{
        kept_lanes.take(SIDE * SIDE), SIDE, {0, LEAF, 2 * LEAF, 3 * LEAF}, {LEAF, LEAF, LEAF, LEAF}};
    for (i64 e0 = 0; kept_lanes.base && e0 < SIDE * SIDE; e0 += LEAVES) {
      Lane square[LEAVES];
      for (int lane = 0; lane < LEAVES; ++lane) square[lane] = some(grads + lane * SIDE * SIDE + e0, LEAVES);
      swap_lanes<1>(square);
      std::copy(square, square + LEAVES, whole.q + e0);
    }
    cells(r0, c0, 0, LEAF, 0, LEAF, whole);
    kept_lanes.top = 0;
  }

  void cells(i64 r0, i64 c0, i64 i0, i64 i1, i64 j0, i64 j1, const Block<Lane>& whole) {
    if (i1 - i0 == 1 && j1 - j0 == 1) return cell(r0, c0, i0, j0, whole);
    const i64 mark = kept_lanes.top;
    const Cut cut(i0, i1, j0, j1, true);
    const auto build = [&](const i64* part) { return builder.cells(r0, c0, part[0], part[1], part[2], part[3], 1); };
    const Block<Lane> a = build(cut.a), b = build(cut.b);
    const Block<Lane> grad_a = like(a, kept_lanes), grad_b = like(b, kept_lanes);
    split(a, b, cut.along_rows, whole, grad_a, grad_b, builder.lanes.stack[0]);
    release();
    cells(r0, c0, cut.a[0], cut.a[1], cut.a[2], cut.a[3], grad_a);
    cells(r0, c0, cut.b[0], cut.b[1], cut.b[2], cut.b[3], grad_b);
    kept_lanes.top = mark;
  }

  void cell(i64 r0, i64 c0, i64 i, i64 j, const Block<Lane>& whole) {
    if (!kept_lanes.base) return;
    Lane device, left, below;
    builder.segments(r0, c0, i, j, device, left, below);
    const Lane drop = 1.0f / (1.0f + device * (left + below));
    const Lane voltage[4] = {drop, left * drop, -below * drop, -drop};  // over the device, of L, R, T, B
    Lane sum = {};
    for (int s = 0; s < 4; ++s)
      for (int t = 0; t < 4; ++t) sum += voltage[s] * whole.q[s * whole.ld + t] * voltage[t];
    for (int lane = 0; lane < LEAVES; ++lane) {
      const i64 row = (r0 + lane / GROUP) * LEAF + i - builder.pad, col = (c0 + lane % GROUP) * LEAF + j;
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
  const Adjoint plan{Builder(rows, cols, {r_wordline, r_bitline, r_source, r_sink}, false), {}, {}};
  const Memory<Adjoint> memory(plan);
#pragma omp parallel
  {
    std::unique_ptr<float[]> block(new float[memory.floats() + 16]);
    Adjoint adjoint(plan);
    memory.give(adjoint, (float*)(((u64)block.get() + 63) / 64 * 64));
#pragma omp for schedule(dynamic, 1)
    for (i64 tile = 0; tile < tiles; ++tile) {
      adjoint.builder.g = g + tile * rows * cols;
      adjoint.grad = grad + tile * rows * cols;
      adjoint.out = grad_g + tile * rows * cols;
      adjoint.tile();
    }
  }
}
