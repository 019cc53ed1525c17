// Blocks of cells by their ports, and the merge of two. Only what the result needs is computed: a block at the far end of the tile has
// no port there, and unwanted admittances are left out. Meaning and oracle: gpuxbar/reference/effective_conductance.py.
#pragma once
#include "block_products.hpp"

namespace gpuxbar::blocks {

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

}  // namespace gpuxbar::blocks
