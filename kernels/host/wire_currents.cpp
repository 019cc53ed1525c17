// Tiles with wires on the CPU for given inputs, by conjugate gradients on lines: for few inputs, and for gradients.
//
// Sixteen inputs are solved side by side, one a vector lane (one or four where fewer are left). Exact solutions of
// single lines are sums of positive numbers and take any resistance or conductance of 0. Every lane has its own step
// sizes and stops on its own. Bits do not depend on threads. Meaning and oracle: gpuxbar/reference/wire_currents.py.
#include <algorithm>
#include <cmath>
#include <memory>

#include "gpuxbar/parasitics.cuh"

using namespace gpuxbar;

namespace {

struct Ends {
  const float *wordline, *bitline, *source, *sink;
};

template <int LANES>
struct Inputs {
  float x[LANES];
};

template <int LANES>
class Solver {
  using Vec = Inputs<LANES>;
  i64 rows, cols;
  const float* g;
  Ends ends;
  float *share_w, *share_b;                                // [R, C]: ladder factors of wordlines and bitlines
  Vec *u, *w, *residual, *step, *step_w, *source, *carry;  // [R, C], the last [C]; of scaled inputs
  Scale scale[LANES];

  float left(i64 r, i64 c) const { return c ? ends.wordline[r] : ends.source[r]; }
  float below(i64 r, i64 c) const { return r + 1 < rows ? ends.bitline[c] : ends.sink[c]; }

  // out = voltages of the wordlines for currents into their nodes, bitlines held at 0, drivers at `drive` [R].
  void wordlines(const Vec* into, const Vec* drive, Vec* out) const {
    for (i64 r = 0; r < rows; ++r) {
      Vec sum = {}, volts = drive ? drive[r] : Vec{};
      for (i64 c = cols - 1; c >= 0; --c) {
        const i64 e = r * cols + c;
        for (int l = 0; l < LANES; ++l) {
          sum.x[l] += into ? into[e].x[l] : 0.0f;
          out[e].x[l] = sum.x[l];
          sum.x[l] *= share_w[e];
        }
      }
      for (i64 c = 0; c < cols; ++c) {
        const i64 e = r * cols + c;
        const float resistance = left(r, c), share = share_w[e];
        for (int l = 0; l < LANES; ++l) out[e].x[l] = volts.x[l] = share * (volts.x[l] + resistance * out[e].x[l]);
      }
    }
  }

  // Bitlines alike: currents g x into their nodes, wordlines held at 0, lower ends at `drive` [C].
  void bitlines(const Vec* x, const Vec* drive, Vec* out) const {
    std::fill(carry, carry + cols, Vec{});
    for (i64 r = 0; r < rows; ++r)
      for (i64 c = 0; c < cols; ++c) {
        const i64 e = r * cols + c;
        for (int l = 0; l < LANES; ++l) {
          out[e].x[l] = carry[c].x[l] + g[e] * x[e].x[l];
          carry[c].x[l] = share_b[e] * out[e].x[l];
        }
      }
    for (i64 c = 0; c < cols; ++c) carry[c] = drive ? drive[c] : Vec{};
    for (i64 r = rows - 1; r >= 0; --r)
      for (i64 c = 0; c < cols; ++c) {
        const i64 e = r * cols + c;
        const float resistance = below(r, c), share = share_b[e];
        for (int l = 0; l < LANES; ++l)
          out[e].x[l] = carry[c].x[l] = share * (carry[c].x[l] + resistance * out[e].x[l]);
      }
  }

  void dot(const Vec* a, const Vec* b, double* out) const {
    double total[LANES] = {};
    for (i64 r = 0; r < rows; ++r) {
      Vec sum = {};
      for (i64 e = r * cols; e < (r + 1) * cols; ++e)
        for (int l = 0; l < LANES; ++l) sum.x[l] += a[e].x[l] * b[e].x[l];
      for (int l = 0; l < LANES; ++l) total[l] += (double)sum.x[l];
    }
    std::copy(total, total + LANES, out);
  }

 public:
  static i64 floats(i64 rows, i64 cols) { return 2 * rows * cols + LANES * (6 * rows * cols + rows + 2 * cols); }

  Solver(const float* g, i64 rows, i64 cols, Ends ends, float* memory) : rows(rows), cols(cols), g(g), ends(ends) {
    const i64 size = rows * cols;
    Vec* fields = (Vec*)memory;
    for (Vec** field : {&u, &w, &residual, &step, &step_w, &source}) *field = fields, fields += size;
    carry = fields;
    share_w = (float*)(fields + rows + 2 * cols);
    share_b = share_w + size;
    for (i64 r = 0; r < rows; ++r)
      ladder_factors((int)cols, left(r, 0), left(r, 1), [=](i64 c) { return g[r * cols + c]; },
                     [&](i64 c, float share) { share_w[r * cols + c] = share; });
    for (i64 c = 0; c < cols; ++c)
      ladder_factors((int)rows, below(rows - 1, c), ends.bitline[c],
                     [=](i64 r) { return g[(rows - 1 - r) * cols + c]; },
                     [&](i64 r, float share) { share_b[(rows - 1 - r) * cols + c] = share; });
  }

  // Voltages of `count` inputs: drivers at v [count, R], lower ends of bitlines at drive [count, C]; null: at 0.
  // False if a lane has not come below `tolerance` after `iterations`.
  bool solve(const float* v, const float* drive, i64 count, double tolerance, i64 iterations) {
    const i64 size = rows * cols;
    Vec *const at_w = carry + cols, *const at_b = at_w + rows;
    for (int l = 0; l < LANES; ++l) {
      float largest = 0.0f;
      for (i64 r = 0; v && l < count && r < rows; ++r) largest = std::max(largest, std::fabs(v[l * rows + r]));
      for (i64 c = 0; drive && l < count && c < cols; ++c) largest = std::max(largest, std::fabs(drive[l * cols + c]));
      scale[l] = scale_of(largest);
      for (i64 r = 0; r < rows; ++r) at_w[r].x[l] = v && l < count ? scale[l].down * v[l * rows + r] : 0.0f;
      for (i64 c = 0; c < cols; ++c) at_b[c].x[l] = drive && l < count ? scale[l].down * drive[l * cols + c] : 0.0f;
    }
    wordlines(nullptr, at_w, u);
    bitlines(u, at_b, w);
    for (i64 e = 0; e < size; ++e)
      for (int l = 0; l < LANES; ++l) residual[e].x[l] = g[e] * w[e].x[l];
    wordlines(residual, nullptr, step);
    std::copy(residual, residual + size, source);
    double norm[LANES], start[LANES], power[LANES], next[LANES];
    dot(residual, step, norm);
    // the bound is on a power: that of the cells, or of the correction where the drivers do nothing
    for (i64 e = 0; e < size; ++e)
      for (int l = 0; l < LANES; ++l) step_w[e].x[l] = g[e] * u[e].x[l];
    dot(step_w, u, start);
    for (int l = 0; l < LANES; ++l) start[l] = tolerance * tolerance * std::max(start[l], norm[l]);
    for (i64 n = 0;; ++n) {
      bool done = true;
      for (int l = 0; l < LANES; ++l) done = done && norm[l] <= start[l];
      if (done) return true;
      if (n == iterations) return false;
      bitlines(step, nullptr, step_w);
      for (int l = 0; l < LANES; ++l) power[l] = 0.0;
      for (i64 r = 0; r < rows; ++r) {
        Vec sum = {};
        for (i64 e = r * cols; e < (r + 1) * cols; ++e)
          for (int l = 0; l < LANES; ++l) sum.x[l] += step[e].x[l] * (source[e].x[l] - g[e] * step_w[e].x[l]);
        for (int l = 0; l < LANES; ++l) power[l] += (double)sum.x[l];
      }
      float alpha[LANES], beta[LANES];
      for (int l = 0; l < LANES; ++l)
        alpha[l] = norm[l] > start[l] && power[l] > 0.0 ? (float)(norm[l] / power[l]) : 0.0f;
      for (i64 e = 0; e < size; ++e)
        for (int l = 0; l < LANES; ++l) {
          u[e].x[l] += alpha[l] * step[e].x[l];
          w[e].x[l] += alpha[l] * step_w[e].x[l];
          residual[e].x[l] -= alpha[l] * (source[e].x[l] - g[e] * step_w[e].x[l]);
        }
      wordlines(residual, nullptr, step_w);  // the preconditioned residual
      dot(residual, step_w, next);
      for (int l = 0; l < LANES; ++l) {
        beta[l] = alpha[l] > 0.0f ? (float)(next[l] / norm[l]) : 0.0f;
        if (alpha[l] > 0.0f) norm[l] = next[l];
      }
      for (i64 e = 0; e < size; ++e)
        for (int l = 0; l < LANES; ++l) {
          step[e].x[l] = step_w[e].x[l] + beta[l] * step[e].x[l];
          source[e].x[l] = residual[e].x[l] + beta[l] * source[e].x[l];
        }
    }
  }

  // i [count, C]: what flows into the sensed ends, at 0, by the voltages of the wordlines. No difference is formed.
  void bitline_currents(i64 count, float* i) const {
    std::fill(carry, carry + cols, Vec{});
    for (i64 r = 0; r < rows; ++r)
      for (i64 c = 0; c < cols; ++c) {
        const i64 e = r * cols + c;
        for (int l = 0; l < LANES; ++l) carry[c].x[l] = share_b[e] * (carry[c].x[l] + g[e] * u[e].x[l]);
      }
    for (i64 l = 0; l < count; ++l)
      for (i64 c = 0; c < cols; ++c) i[l * cols + c] = scale[l].up * carry[c].x[l];
  }

  // i [count, R]: what flows into the drivers, at 0, by the voltages of the bitlines.
  void wordline_currents(i64 count, float* i) const {
    for (i64 r = 0; r < rows; ++r) {
      Vec sum = {};
      for (i64 c = cols - 1; c >= 0; --c) {
        const i64 e = r * cols + c;
        for (int l = 0; l < LANES; ++l) sum.x[l] = share_w[e] * (sum.x[l] + g[e] * w[e].x[l]);
      }
      for (i64 l = 0; l < count; ++l) i[l * rows + r] = scale[l].up * sum.x[l];
    }
  }

  // into += voltage over the cells here times there.
  void add_products(const Solver& other, i64 count, float* into) const {
    for (i64 e = 0; e < rows * cols; ++e) {
      float sum = 0.0f;
      for (i64 l = 0; l < count; ++l)
        sum += (u[e].x[l] - w[e].x[l]) * scale[l].up * ((other.u[e].x[l] - other.w[e].x[l]) * other.scale[l].up);
      into[e] += sum;
    }
  }
};

// The currents of `count` inputs of one tile.
template <int LANES>
bool currents(const float* v, const float* g, i64 rows, i64 cols, Ends ends, i64 count, double tolerance,
              i64 iterations, float* i) {
  std::unique_ptr<float[]> memory(new float[Solver<LANES>::floats(rows, cols)]);
  Solver<LANES> solver(g, rows, cols, ends, memory.get());
  if (!solver.solve(v, nullptr, count, tolerance, iterations)) return false;
  solver.bitline_currents(count, i);
  return true;
}

// Their gradients: the same network driven at its sense ends, at -grad_i.
template <int LANES>
bool gradients(const float* v, const float* g, const float* grad_i, i64 rows, i64 cols, Ends ends, i64 count,
               double tolerance, i64 iterations, float* grad_v, float* grad_g) {
  const i64 floats = Solver<LANES>::floats(rows, cols);
  std::unique_ptr<float[]> memory(new float[2 * floats + LANES * cols]);
  float* const drive = memory.get() + 2 * floats;
  for (i64 k = 0; k < count * cols; ++k) drive[k] = -grad_i[k];
  Solver<LANES> forward(g, rows, cols, ends, memory.get()), adjoint(g, rows, cols, ends, memory.get() + floats);
  if (!forward.solve(v, nullptr, count, tolerance, iterations) ||
      !adjoint.solve(nullptr, drive, count, tolerance, iterations))
    return false;
  // the adjoint's drivers take in the current that its sense ends drive: -v's share of it
  adjoint.wordline_currents(count, grad_v);
  for (i64 k = 0; k < count * rows; ++k) grad_v[k] = -grad_v[k];
  forward.add_products(adjoint, count, grad_g);
  return true;
}

void note(i64* first, i64 tile) {
#pragma omp critical
  if (*first < 0 || tile < *first) *first = tile;
}

}  // namespace

// i [tiles, batch, C] for v [tiles, batch, R]; bad[0]: first tile that did not converge, or -1.
extern "C" void gpuxbar_wire_currents(const float* v, const float* g, const float* r_wordline, const float* r_bitline,
                                      const float* r_source, const float* r_sink, float* i, i64 tiles, i64 batch,
                                      i64 rows, i64 cols, double tolerance, i64 iterations, i64* bad) {
  const Ends ends{r_wordline, r_bitline, r_source, r_sink};
  const i64 groups = (batch + 15) / 16;
  *bad = -1;
#pragma omp parallel for schedule(dynamic, 1)
  for (i64 task = 0; task < tiles * groups; ++task) {
    const i64 tile = task / groups, b = task % groups * 16, count = std::min<i64>(16, batch - b);
    const auto run = count == 1 ? currents<1> : count <= 4 ? currents<4> : currents<16>;
    if (!run(v + (tile * batch + b) * rows, g + tile * rows * cols, rows, cols, ends, count, tolerance, iterations,
             i + (tile * batch + b) * cols))
      note(bad, tile);
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
    for (i64 b = 0; b < batch; b += 16) {
      const i64 count = std::min<i64>(16, batch - b), at = tile * batch + b;
      const auto run = count == 1 ? gradients<1> : count <= 4 ? gradients<4> : gradients<16>;
      if (!run(v + at * rows, g + tile * rows * cols, grad_i + at * cols, rows, cols, ends, count, tolerance,
               iterations, grad_v + at * rows, to))
        note(bad, tile);
    }
  }
}
