// program on the CPU: weights [groups, outputs, inputs] to conductances [planes, groups * inputs, outputs].
//
// Blocks of 16 wordlines by 64 bitlines are transposed through the first cache. Every cell is a function of its own
// place, so the bits do not depend on threads. Meaning and oracle: gpuxbar/reference/program.py.
#include <algorithm>

#include "draw.hpp"
#include "gpuxbar/programming.cuh"

using namespace gpuxbar;

namespace {

constexpr int LINES = 16;

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
void target_row(const Programming& p, const float* w, const u32* code, i64 k, float sign, float* g) {
  const float range = p.g_max - p.g_min, low = p.g_min;
  if (p.slice_bits) {
    const u32 mask = (1u << p.slice_bits) - 1, shift = (u32)(k * p.slice_bits);
    const float step = range / (float)mask;
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) {
      const float digit = (float)(i32)(code[j] >> shift & mask);
      g[j] = fma(sign * w[j] > 0.0f ? digit : 0.0f, step, low);
    }
  } else if (p.merge == MERGE_OFFSET) {
    const float half = 0.5f * p.steps;
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) g[j] = fma(fma(0.5f, w[j], 0.5f), range, low);
    if (p.steps > 0.0f) {  // the middle level is w = 0; an even number of levels leaves the last one unused
      const float middle = (float)(i64)half;
#pragma omp simd
      for (int j = 0; j < WIDE_ROW; ++j) g[j] = fma((middle + round_even(w[j] * middle)) / p.steps, range, low);
    }
  } else {
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) {
      const float share = max(sign * w[j], 0.0f);
      g[j] = fma(p.steps > 0.0f ? level_share(share, p.steps) : share, range, low);
    }
  }
}

}  // namespace

extern "C" void gpuxbar_program(const Programming* settings, const float* weight, const float* w_max, float* g,
                                i64* bad) {
  const Programming& p = *settings;
  const i64 cells = p.groups * p.inputs * p.outputs, rows = p.groups * p.inputs;
  i64 not_finite = 0;
#pragma omp parallel for reduction(+ : not_finite) schedule(static)
  for (i64 e = 0; e < cells; ++e) not_finite += (float_bits(weight[e]) & 0x7F800000u) == 0x7F800000u;
  *bad = not_finite;
  if (not_finite) return;
  const bool plain = is_ideal(p) && p.steps == 0.0f && p.slice_bits == 0;
  const i64 sides = p.merge == MERGE_OFFSET ? 1 : 2;
  const double top = (double)((1ull << (p.slices * p.slice_bits)) - 1);
  const i64 row_blocks = (p.inputs + LINES - 1) / LINES, col_blocks = (p.outputs + WIDE_ROW - 1) / WIDE_ROW;
#pragma omp parallel for collapse(3) schedule(static)
  for (i64 group = 0; group < p.groups; ++group)
    for (i64 rb = 0; rb < row_blocks; ++rb)
      for (i64 cb = 0; cb < col_blocks; ++cb) {
        const i64 i0 = rb * LINES, o0 = cb * WIDE_ROW;
        const i64 lines = std::min<i64>(LINES, p.inputs - i0), count = std::min<i64>(WIDE_ROW, p.outputs - o0);
        alignas(64) float block[LINES][WIDE_ROW];  // transposed, in units of w_max
        alignas(64) float scale[WIDE_ROW];
        double inverse[WIDE_ROW] = {};
        if (count < WIDE_ROW) std::fill(&block[0][0], &block[0][0] + LINES * WIDE_ROW, 0.0f);
        for (i64 j = 0; j < count; ++j) {
          const i64 output = group * p.outputs + o0 + j;
          scale[j] = w_max[p.scale_count > 1 ? output : 0];
          inverse[j] = 1.0 / (double)scale[j];
          const float* line = weight + output * p.inputs + i0;
          const float by = (float)inverse[j];
          if (lines == LINES)
            for (int i = 0; i < LINES; ++i) block[i][j] = clip_weight(line[i] * by);
          else
            for (i64 i = 0; i < lines; ++i) block[i][j] = clip_weight(line[i] * by);
        }
        for (i64 i = 0; i < lines; ++i) {
          const i64 row = group * p.inputs + i0 + i;
          const float* w = block[i];
          alignas(64) float pos[WIDE_ROW], neg[WIDE_ROW], sum[WIDE_ROW] = {};
          float* out = g + row * p.outputs + o0;
          const i64 plane = rows * p.outputs;
          if (plain) {
            plain_row(p, w, pos, neg);
            std::copy(pos, pos + count, out);
            if (p.merge == MERGE_NONE) std::copy(neg, neg + count, out + plane);
            continue;
          }
          alignas(64) u32 code[WIDE_ROW] = {};
          if (p.slice_bits)
            for (i64 j = 0; j < count; ++j)
              code[j] = weight_code(weight[(group * p.outputs + o0 + j) * p.inputs + i0 + i], inverse[j], top);
          for (i64 k = 0; k < p.slices; ++k) {
            target_row(p, w, code, k, 1.0f, pos);
            write_row(p, (u32)k, (u32)row, o0, pos);
            if (sides == 2) {
              target_row(p, w, code, k, -1.0f, neg);
              write_row(p, (u32)(p.slices + k), (u32)row, o0, neg);
            }
            if (p.merge == MERGE_NONE) {
              std::copy(pos, pos + count, out + k * plane);
              std::copy(neg, neg + count, out + (p.slices + k) * plane);
            } else if (p.merge == MERGE_SUBTRACT) {
              for (i64 j = 0; j < count; ++j) out[k * plane + j] = pos[j] - neg[j];
            } else if (p.merge == MERGE_ALL) {
              const float weight_of_slice = (float)(1ull << (k * p.slice_bits));
#pragma omp simd
              for (int j = 0; j < WIDE_ROW; ++j) sum[j] = fma(weight_of_slice, pos[j] - neg[j], sum[j]);
            } else {
              std::copy(pos, pos + count, out);
            }
          }
          if (p.merge == MERGE_ALL) std::copy(sum, sum + count, out);
        }
      }
}

extern "C" void gpuxbar_fingerprint(const float* x, i64 count, i64* fingerprint) {
  u64 sum = 0;
#pragma omp parallel for simd reduction(+ : sum) schedule(static)
  for (i64 e = 0; e < count; ++e) sum += fingerprint_term(float_bits(x[e]), (u32)e);
  *fingerprint = (i64)sum;
}
