// program on the CPU: weights [groups, outputs, inputs] to conductances [planes, groups * inputs, outputs], and the
// same again where the weights have changed since.
//
// Blocks of 16 wordlines by 64 bitlines are transposed through the first cache. Every cell is a function of its own
// place, so the bits do not depend on threads. Meaning and oracle: gpuxbar/reference/program.py.
#include <algorithm>
#include <vector>

#include "draw.hpp"
#include "gpuxbar/programming.cuh"

using namespace gpuxbar;

namespace {

constexpr int LINES = 16;
constexpr i64 WORTH_A_THREAD = 1 << 14;  // cells; fewer are done before a second thread wakes up
constexpr u32 INFINITE = 0x7F800000u;    // bits of infinity; NaN is above

bool is_ideal(const Programming& p) {
  return p.spread == 0.0f && p.write_noise == 0.0f && p.stuck_low <= 0.0f && p.stuck_high >= 1.0f;
}

// What a write leaves of the targets of plane `slot`, in place.
void write_row(const Programming& p, u32 slot, u32 row, i64 col0, float* g) {
  alignas(64) float spread[WIDE_ROW] = {}, noise[WIDE_ROW] = {}, u[WIDE_ROW];
  if (p.spread > 0.0f) draw_normals(Draw{DEVICE_SPREAD, slot, 0, p.seed}, row, col0, spread);
  if (p.write_noise > 0.0f) draw_normals(Draw{WRITE, slot, (u32)p.step, p.seed}, row, col0, noise);
  if (p.stuck_low > 0.0f || p.stuck_high < 1.0f)
    draw_uniforms(Draw{STUCK, slot, 0, p.seed}, row, col0, u);
  else
    std::fill(u, u + WIDE_ROW, 0.5f);
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) g[j] = written(p, g[j], spread[j], noise[j], u[j]);
}

// Conductances of one row without noise whose planes are the weight itself, its two sides, or an offset.
void plain_row(const Programming& p, const float* w, float* pos, float* neg) {
  const float range = p.g_max - p.g_min, low = p.g_min;
  if (p.merge == MERGE_OFFSET) {
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) pos[j] = fma(fma(0.5f, w[j], 0.5f), range, low);
  } else if (p.merge == MERGE_NONE) {
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) {
      pos[j] = fma(max(w[j], 0.0f), range, low);
      neg[j] = fma(max(-w[j], 0.0f), range, low);
    }
  } else {
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) pos[j] = w[j] * range;
  }
}

// Targets of slice k on one side of the pairs: w in units of w_max, code of all its slices.
void target_row(const Programming& p, const float* w, const u32* code, i64 k, float side, float* g) {
  if (p.slice_bits) {
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) g[j] = slice_target(p, w[j], code[j], k, side);
  } else if (p.merge == MERGE_OFFSET) {
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) g[j] = offset_target(p, w[j]);
  } else {
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) g[j] = pair_target(p, w[j], side);
  }
}

// Read noise of the devices of one row.
void variance_row(const Programming& p, const float* g, float* variance) {
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) variance[j] = read_variance(p, g[j]);
}

// Join the sides of slice k (pos + negative neg, times `weight` of the slice) as the mapping says, and store them.
void store_row(const Programming& p, i64 k, const float* pos, const float* neg, float negative, float weight,
               float* sum, float* out, i64 count) {
  const i64 plane = p.groups * p.inputs * p.outputs;
  if (p.merge == MERGE_OFFSET || p.merge == MERGE_NONE) {
    std::copy(pos, pos + count, out + k * plane);
    if (p.merge == MERGE_NONE) std::copy(neg, neg + count, out + (p.slices + k) * plane);
  } else if (p.merge == MERGE_SUBTRACT) {
    for (i64 j = 0; j < count; ++j) out[k * plane + j] = pos[j] + negative * neg[j];
  } else {
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) sum[j] = fma(weight, pos[j] + negative * neg[j], sum[j]);
    if (k + 1 == p.slices) std::copy(sum, sum + count, out);
  }
}

// Weights of 64 bitlines from o0 and up to 16 wordlines from i0, transposed, in units of w_max; 1 / w_max of each.
void load_block(const Programming& p, const float* weight, const float* w_max, i64 output, i64 i0, i64 lines, i64 count,
                float block[LINES][WIDE_ROW], double* inverse) {
  if (count < WIDE_ROW) std::fill(&block[0][0], &block[0][0] + LINES * WIDE_ROW, 0.0f);
  for (i64 j = 0; j < count; ++j) {
    inverse[j] = 1.0 / (double)w_max[p.scale_count > 1 ? output + j : 0];
    const float* line = weight + (output + j) * p.inputs + i0;
    const float by = (float)inverse[j];
    if (lines == LINES)
      for (int i = 0; i < LINES; ++i) block[i][j] = clip_weight(line[i] * by);
    else
      for (i64 i = 0; i < lines; ++i) block[i][j] = clip_weight(line[i] * by);
  }
}

// Every cell of finite weights.
void program_cells(const Programming& p, const float* weight, const float* w_max, float* g, float* noise_var) {
  const bool plain = is_ideal(p) && p.steps == 0.0f && p.slice_bits == 0 && !noise_var;
  const bool pairs = p.merge != MERGE_OFFSET;
  const double top = (double)((1ull << (p.slices * p.slice_bits)) - 1);
  const i64 row_blocks = (p.inputs + LINES - 1) / LINES, col_blocks = (p.outputs + WIDE_ROW - 1) / WIDE_ROW;
#pragma omp parallel for collapse(3) schedule(static) if (p.groups * p.inputs * p.outputs >= WORTH_A_THREAD)
  for (i64 group = 0; group < p.groups; ++group)
    for (i64 rb = 0; rb < row_blocks; ++rb)
      for (i64 cb = 0; cb < col_blocks; ++cb) {
        const i64 i0 = rb * LINES, o0 = cb * WIDE_ROW, output = group * p.outputs + o0;
        const i64 lines = std::min<i64>(LINES, p.inputs - i0), count = std::min<i64>(WIDE_ROW, p.outputs - o0);
        alignas(64) float block[LINES][WIDE_ROW];
        double inverse[WIDE_ROW] = {};
        load_block(p, weight, w_max, output, i0, lines, count, block, inverse);
        for (i64 i = 0; i < lines; ++i) {
          const i64 row = group * p.inputs + i0 + i, to = row * p.outputs + o0;
          const float* w = block[i];
          alignas(64) float pos[WIDE_ROW], neg[WIDE_ROW], var_pos[WIDE_ROW], var_neg[WIDE_ROW];
          alignas(64) float sum[WIDE_ROW] = {}, var_sum[WIDE_ROW] = {};
          if (plain) {
            plain_row(p, w, pos, neg);
            std::copy(pos, pos + count, g + to);
            if (p.merge == MERGE_NONE) std::copy(neg, neg + count, g + to + p.groups * p.inputs * p.outputs);
            continue;
          }
          alignas(64) u32 code[WIDE_ROW] = {};
          if (p.slice_bits)
            for (i64 j = 0; j < count; ++j)
              code[j] = weight_code(weight[(output + j) * p.inputs + i0 + i], inverse[j], top);
          for (i64 k = 0; k < p.slices; ++k) {
            const float by = (float)(1ull << (k * p.slice_bits));
            target_row(p, w, code, k, 1.0f, pos);
            write_row(p, (u32)k, (u32)row, o0, pos);
            if (pairs) {
              target_row(p, w, code, k, -1.0f, neg);
              write_row(p, (u32)(p.slices + k), (u32)row, o0, neg);
            }
            store_row(p, k, pos, neg, -1.0f, by, sum, g + to, count);
            if (noise_var) {
              variance_row(p, pos, var_pos);
              if (pairs) variance_row(p, neg, var_neg);
              store_row(p, k, var_pos, var_neg, 1.0f, by * by, var_sum, noise_var + to, count);
            }
          }
        }
      }
}

i64 count_not_finite(const float* x, i64 count) {
  i64 found = 0;
#pragma omp parallel for reduction(+ : found) schedule(static) if (count >= WORTH_A_THREAD)
  for (i64 e = 0; e < count; ++e) found += (float_bits(x[e]) & INFINITE) == INFINITE;
  return found;
}

// Bits of the largest magnitude: order as the magnitudes do, infinity and NaN last.
u32 largest_bits(const float* x, i64 count) {
  u32 top = 0;
#pragma omp simd reduction(max : top)
  for (i64 e = 0; e < count; ++e) top = std::max(top, float_bits(x[e]) & 0x7FFFFFFFu);
  return top;
}

}  // namespace

extern "C" void gpuxbar_program(const Programming* settings, const float* weight, const float* w_max, float* g,
                                float* noise_var, i64* bad) {
  *bad = count_not_finite(weight, settings->groups * settings->inputs * settings->outputs);
  if (*bad == 0) program_cells(*settings, weight, w_max, g, noise_var);
}

extern "C" void gpuxbar_fingerprint(const float* x, i64 count, i64* fingerprint) {
  u64 sum = 0;
#pragma omp parallel for simd reduction(+ : sum) schedule(static) if (count >= WORTH_A_THREAD)
  for (i64 e = 0; e < count; ++e) sum += fingerprint_term(float_bits(x[e]), (u32)e);
  *fingerprint = (i64)sum;
}

// The step of `settings` is the write step. A full_weight of 0 measures: the largest weight of each output where
// `per_column`, of all otherwise.
extern "C" void gpuxbar_reprogram(const Programming* settings, const float* weight, float* w_max, float* g,
                                  float* noise_var, i64* state, i64 per_column, double full_weight, i64* bad) {
  Programming p = *settings;
  const i64 rows = p.groups * p.outputs;
  i64 fingerprint;
  gpuxbar_fingerprint(weight, rows * p.inputs, &fingerprint);
  const i64 version = (i64)((u64)fingerprint + (u64)p.step);
  *bad = 0;
  if (version == state[0] && version != 0) {
    state[1] = version;
    return;
  }
  std::vector<float> scale(rows, (float)full_weight);
  u32 top = 0;
#pragma omp parallel for schedule(static) reduction(max : top) if (rows * p.inputs >= WORTH_A_THREAD)
  for (i64 row = 0; row < rows; ++row) {
    const u32 bits = largest_bits(weight + row * p.inputs, p.inputs);
    top = std::max(top, bits);
    if (full_weight == 0.0) scale[row] = std::max(bits_float(bits), 1e-30f);
  }
  if (top >= INFINITE) {
    *bad = count_not_finite(weight, rows * p.inputs);
    return;
  }
  if (full_weight == 0.0 && !per_column) std::fill(scale.begin(), scale.end(), std::max(bits_float(top), 1e-30f));
  std::copy(scale.begin(), scale.end(), w_max);
  p.step = version;
  p.scale_count = rows;
  program_cells(p, weight, w_max, g, noise_var);
  state[0] = state[1] = version;
}
