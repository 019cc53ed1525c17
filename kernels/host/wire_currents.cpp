// Tiles with wires on the CPU for given inputs, by conjugate gradients on lines: for few inputs, and for gradients.
//
// As many inputs as a vector has lanes are solved side by side (one or four where fewer are left). Exact solutions of
// single lines are sums of positive numbers and take any resistance or conductance of 0. Every lane has its own step
// sizes and stops on its own. Bits do not depend on threads. Meaning and oracle: gpuxbar/reference/wire_currents.py.
#include <algorithm>
#include <cmath>

#include "gpuxbar/parasitics.cuh"
#include "threads.hpp"
#include "wide.hpp"

using namespace gpuxbar;

namespace {

struct Ends {
  const float *wordline, *bitline, *source, *sink;
};

template <int COUNT>
class Solver {
  using Vec = typename Floats<COUNT>::Vec;
  static constexpr int ABREAST = COUNT == 1   ? 8
                                 : COUNT == 4 ? 4
                                              : 2;  // wordlines whose sums do not wait for each other
  i64 rows, cols;
  const float* g;
  Ends ends;
  float *share_w, *share_b;                  // [R, C]: ladder factors of wordlines and bitlines
  Vec *u, *residual, *step, *source, *work;  // [R, C] of scaled inputs; `work` is what one pass leaves to the next
  Vec *carry, *at_w, *at_b;                  // [C], and drives [R], [C]
  Scale scale[COUNT];

  float left(i64 r, i64 c) const { return c ? ends.wordline[r] : ends.source[r]; }
  float below(i64 r, i64 c) const { return r + 1 < rows ? ends.bitline[c] : ends.sink[c]; }

  static float lane(const Vec& x, int l) { return ((const float*)&x)[l]; }
  static float& lane(Vec& x, int l) { return ((float*)&x)[l]; }

  static void add(const Vec& x, double* total) {
    for (int l = 0; l < COUNT; ++l) total[l] += (double)lane(x, l);
  }

  // Wordlines r .. r + ROWS - 1; see below.
  template <int ROWS, class Current, class Take>
  void abreast(i64 r, const Vec* drive, Current current, Take take, double* total) const {
    Vec sum[ROWS] = {}, volts[ROWS], taken[ROWS] = {};
    float share[ROWS] = {};
    for (i64 c = cols - 1; c >= 0; --c)
      for (int k = 0; k < ROWS; ++k) {
        const i64 e = (r + k) * cols + c;
        sum[k] = current(e) + share[k] * sum[k];
        work[e] = sum[k];
        share[k] = share_w[e];
      }
    for (int k = 0; k < ROWS; ++k) volts[k] = drive ? drive[r + k] : Vec{};
    for (i64 c = 0; c < cols; ++c)
      for (int k = 0; k < ROWS; ++k) {
        const i64 e = (r + k) * cols + c;
        volts[k] = share_w[e] * left(r + k, c) * work[e] + share_w[e] * volts[k];
        taken[k] += take(e, volts[k]);
      }
    for (int k = 0; k < ROWS; ++k) add(taken[k], total);
  }

  // Voltages of the wordlines for currents into their nodes, bitlines held at 0, drivers at `drive` [R] or 0, are given to `take`;
  // total: the sum of what it makes of them.
  template <class Current, class Take>
  void wordlines(const Vec* drive, Current current, Take take, double* total) const {
    std::fill(total, total + COUNT, 0.0);
    i64 r = 0;
    for (; r + ABREAST <= rows; r += ABREAST) abreast<ABREAST>(r, drive, current, take, total);
    for (; r < rows; ++r) abreast<1>(r, drive, current, take, total);
  }

  // Bitlines alike, wordlines held at 0, lower ends at `drive` [C] or 0.
  template <class Current, class Take>
  void bitlines(const Vec* drive, Current current, Take take, double* total) const {
    std::fill(carry, carry + cols, Vec{});
    for (i64 r = 0; r < rows; ++r)
#pragma omp simd
      for (i64 c = 0; c < cols; ++c) {
        const i64 e = r * cols + c;
        work[e] = carry[c] + current(e);
        carry[c] = share_b[e] * work[e];
      }
    std::fill(total, total + COUNT, 0.0);
    for (i64 c = 0; c < cols; ++c) carry[c] = drive ? drive[c] : Vec{};
    for (i64 r = rows - 1; r >= 0; --r) {
      Vec taken = {};
      for (i64 c = 0; c < cols; ++c) {
        const i64 e = r * cols + c;
        carry[c] = share_b[e] * (carry[c] + below(r, c) * work[e]);
        taken += take(e, carry[c]);
      }
      add(taken, total);
    }
  }

 public:
  static i64 floats(i64 rows, i64 cols) {
    return (2 * rows * cols + COUNT * (5 * rows * cols + rows + 2 * cols) + 15) / 16 * 16;
  }

  Solver(const float* g, i64 rows, i64 cols, Ends ends, float* memory) : rows(rows), cols(cols), g(g), ends(ends) {
    const i64 size = rows * cols;
    Vec* fields = (Vec*)memory;
    for (Vec** field : {&u, &residual, &step, &source, &work}) *field = fields, fields += size;
    carry = fields;
    at_w = carry + cols;
    at_b = at_w + rows;
    share_w = (float*)(at_b + cols);
    share_b = share_w + size;
    for (i64 r = 0; r < rows; ++r)
      ladder_factors((int)cols, left(r, 0), left(r, 1), [=](i64 c) { return g[r * cols + c]; },
                     [&](i64 c, float share) { share_w[r * cols + c] = share; });
    for (i64 c = 0; c < cols; ++c)
      ladder_factors((int)rows, below(rows - 1, c), ends.bitline[c],
                     [=](i64 r) { return g[(rows - 1 - r) * cols + c]; },
                     [&](i64 r, float share) { share_b[(rows - 1 - r) * cols + c] = share; });
  }

  // Voltages of the wordlines for `count` inputs: drivers at v [count, R], lower ends of bitlines at drive [count, C]; null:
  // at 0. False if a lane has not come below `tolerance` after `iterations`.
  bool solve(const float* v, const float* drive, i64 count, double tolerance, i64 iterations) {
    const i64 size = rows * cols;
    for (int l = 0; l < COUNT; ++l) {
      float largest = 0.0f;
      for (i64 r = 0; v && l < count && r < rows; ++r) largest = std::max(largest, std::fabs(v[l * rows + r]));
      for (i64 c = 0; drive && l < count && c < cols; ++c) largest = std::max(largest, std::fabs(drive[l * cols + c]));
      scale[l] = scale_of(largest);
      for (i64 r = 0; r < rows; ++r) lane(at_w[r], l) = v && l < count ? scale[l].down * v[l * rows + r] : 0.0f;
      for (i64 c = 0; c < cols; ++c) lane(at_b[c], l) = drive && l < count ? scale[l].down * drive[l * cols + c] : 0.0f;
    }
    double norm[COUNT] = {}, start[COUNT], power[COUNT], next[COUNT];
    wordlines(at_w, [](i64) { return Vec{}; }, [this](i64 e, Vec volts) { return u[e] = volts, Vec{}; }, start);
    bitlines(
        at_b, [this](i64 e) { return g[e] * u[e]; },
        [this](i64 e, Vec volts) {
          residual[e] = g[e] * volts;
          return g[e] * u[e] * u[e];
        },
        start);
    std::fill(step, step + size, Vec{});
    std::fill(source, source + size, Vec{});
    std::fill(work, work + size, Vec{});
    Vec alpha = {}, beta = {};
    for (i64 n = 0;; ++n) {
      wordlines(
          nullptr,
          [=](i64 e) {
            u[e] += alpha * step[e];
            return residual[e] -= alpha * (source[e] - g[e] * work[e]);
          },
          [this](i64 e, Vec volts) {
            work[e] = volts;  // the preconditioned residual
            return residual[e] * volts;
          },
          next);
      bool done = true;
      for (int l = 0; l < COUNT; ++l) {
        // the bound is on a power: that of the cells, or of the correction where the drivers do nothing
        if (n == 0) start[l] = tolerance * tolerance * std::max(start[l], next[l]);
        const bool moved = lane(alpha, l) > 0.0f;
        lane(beta, l) = moved ? (float)(next[l] / norm[l]) : 0.0f;
        if (n == 0 || moved) norm[l] = next[l];
        done = done && norm[l] <= start[l];
      }
      if (done) return true;
      if (n == iterations) return false;
      bitlines(
          nullptr,
          [=](i64 e) {
            step[e] = work[e] + beta * step[e];
            source[e] = residual[e] + beta * source[e];
            return g[e] * step[e];
          },
          [this](i64 e, Vec volts) {
            work[e] = volts;
            return step[e] * (source[e] - g[e] * volts);
          },
          power);
      for (int l = 0; l < COUNT; ++l)
        lane(alpha, l) = norm[l] > start[l] && power[l] > 0.0 ? (float)(norm[l] / power[l]) : 0.0f;
    }
  }

  // Leaves the voltages of the bitlines, for those of the wordlines, in `work`.
  void solve_bitlines() const {
    double unused[COUNT];
    bitlines(
        at_b, [this](i64 e) { return g[e] * u[e]; }, [this](i64 e, Vec volts) { return work[e] = volts, Vec{}; },
        unused);
  }

  // i [count, C]: what flows into the sensed ends, at 0, by the voltages of the wordlines. No difference is formed.
  void bitline_currents(i64 count, float* i) const {
    std::fill(carry, carry + cols, Vec{});
    for (i64 r = 0; r < rows; ++r)
      for (i64 c = 0; c < cols; ++c) {
        const i64 e = r * cols + c;
        carry[c] = share_b[e] * (carry[c] + g[e] * u[e]);
      }
    for (i64 l = 0; l < count; ++l)
      for (i64 c = 0; c < cols; ++c) i[l * cols + c] = scale[l].up * lane(carry[c], l);
  }

  // i [count, R]: what flows into the drivers, at 0, by the voltages of the bitlines.
  void wordline_currents(i64 count, float* i) const {
    for (i64 r = 0; r < rows; ++r) {
      Vec sum = {};
      for (i64 c = cols - 1; c >= 0; --c) {
        const i64 e = r * cols + c;
        sum = share_w[e] * (sum + g[e] * work[e]);
      }
      for (i64 l = 0; l < count; ++l) i[l * rows + r] = scale[l].up * lane(sum, l);
    }
  }

  // into += voltage over the cells here times there.
  void add_products(const Solver& other, i64 count, float* into) const {
    for (i64 e = 0; e < rows * cols; ++e) {
      const Vec here = u[e] - work[e], there = other.u[e] - other.work[e];
      float sum = 0.0f;
      for (i64 l = 0; l < count; ++l) sum += lane(here, l) * scale[l].up * (lane(there, l) * other.scale[l].up);
      into[e] += sum;
    }
  }
};

// The currents of `count` inputs of one tile.
template <int COUNT>
bool currents(const float* v, const float* g, i64 rows, i64 cols, Ends ends, i64 count, double tolerance,
              i64 iterations, float* i) {
  const Aligned memory(Solver<COUNT>::floats(rows, cols));
  Solver<COUNT> solver(g, rows, cols, ends, memory.get());
  if (!solver.solve(v, nullptr, count, tolerance, iterations)) return false;
  solver.bitline_currents(count, i);
  return true;
}

// Their gradients: the same network driven at its sense ends, at -grad_i.
template <int COUNT>
bool gradients(const float* v, const float* g, const float* grad_i, i64 rows, i64 cols, Ends ends, i64 count,
               double tolerance, i64 iterations, float* grad_v, float* grad_g) {
  const i64 floats = Solver<COUNT>::floats(rows, cols);
  const Aligned memory(2 * floats + COUNT * cols);
  float* const drive = memory.get() + 2 * floats;
  for (i64 k = 0; k < count * cols; ++k) drive[k] = -grad_i[k];
  Solver<COUNT> forward(g, rows, cols, ends, memory.get()), adjoint(g, rows, cols, ends, memory.get() + floats);
  if (!forward.solve(v, nullptr, count, tolerance, iterations) ||
      !adjoint.solve(nullptr, drive, count, tolerance, iterations))
    return false;
  forward.solve_bitlines();
  adjoint.solve_bitlines();
  // the adjoint's drivers take in the current that its sense ends drive: -v's share of it
  adjoint.wordline_currents(count, grad_v);
  for (i64 k = 0; k < count * rows; ++k) grad_v[k] = -grad_v[k];
  forward.add_products(adjoint, count, grad_g);
  return true;
}

}  // namespace

// i [tiles, batch, C] for v [tiles, batch, R]; bad[0]: first tile that did not converge, or -1.
extern "C" void gpuxbar_wire_currents(const float* v, const float* g, const float* r_wordline, const float* r_bitline,
                                      const float* r_source, const float* r_sink, float* i, i64 tiles, i64 batch,
                                      i64 rows, i64 cols, double tolerance, i64 iterations, i64* bad) {
  const Ends ends{r_wordline, r_bitline, r_source, r_sink};
  const i64 groups = (batch + LANES - 1) / LANES;
  *bad = -1;
#pragma omp parallel for schedule(dynamic, 1)
  for (i64 task = 0; task < tiles * groups; ++task) {
    const i64 tile = task / groups, b = task % groups * LANES, count = std::min<i64>(LANES, batch - b);
    const auto run = count == 1 ? currents<1> : count <= 4 ? currents<4> : currents<LANES>;
    if (!run(v + (tile * batch + b) * rows, g + tile * rows * cols, rows, cols, ends, count, tolerance, iterations,
             i + (tile * batch + b) * cols))
      note_first(bad, tile);
  }
}

// grad_v [tiles, batch, R] and grad_g [tiles, R, C], summed over the batch in its order.
extern "C" void gpuxbar_wire_currents_gradient(const float* v, const float* g, const float* grad_i,
                                               const float* r_wordline, const float* r_bitline, const float* r_source,
                                               const float* r_sink, float* grad_v, float* grad_g, i64 tiles, i64 batch,
                                               i64 rows, i64 cols, double tolerance, i64 iterations, i64* bad) {
  const Ends ends{r_wordline, r_bitline, r_source, r_sink};
  *bad = -1;
#pragma omp parallel for schedule(dynamic, 1)
  for (i64 tile = 0; tile < tiles; ++tile) {
    float* const to = grad_g + tile * rows * cols;
    std::fill(to, to + rows * cols, 0.0f);
    for (i64 b = 0; b < batch; b += LANES) {
      const i64 count = std::min<i64>(LANES, batch - b), at = tile * batch + b;
      const auto run = count == 1 ? gradients<1> : count <= 4 ? gradients<4> : gradients<LANES>;
      if (!run(v + at * rows, g + tile * rows * cols, grad_i + at * cols, rows, cols, ends, count, tolerance,
               iterations, grad_v + at * rows, to))
        note_first(bad, tile);
    }
  }
}
