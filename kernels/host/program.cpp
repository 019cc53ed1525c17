// program on the CPU: weights [groups, outputs, inputs] to conductances [planes, groups * inputs, outputs], and the
// same again where the weights have changed since.
//
// Blocks of 16 wordlines by 64 bitlines are transposed through the first cache. Every cell is a function of its own
// place, so the bits do not depend on threads. Meaning and oracle: gpuxbar/reference/program.py.
#include <algorithm>
#include <vector>

#include "finite.hpp"
#include "writes.hpp"

using namespace gpuxbar;

namespace {

constexpr int LINES = 16;
constexpr i64 PIECE = 1 << 12;  // weights of a fingerprint that a thread takes at a time

// What a write leaves of the targets of plane `slot`, in place.
void write_row(const Programming p, const WideKeys& keys, u32 slot, u32 row, i64 col0, float* g) {
  const WriteDraws z(p, keys, WRITE, slot, row, col0);
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) g[j] = written(p, g[j], z.spread[j], z.noise[j], z.u[j]);
}

// Targets of slice k on one side of the pairs: w in units of w_max, `code` the bits of all its slices.
void target_row(const Programming p, const float* w, const float* code, i64 k, float side, float* g) {
  if (p.slice_bits) {
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) g[j] = slice_target(p, w[j], float_bits(code[j]), k, side);
  } else if (p.merge == MERGE_OFFSET) {
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) g[j] = offset_target(p, w[j]);
  } else if (p.steps > 0.0f) {
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) g[j] = pair_target(p, w[j], side);
  } else {
    Programming continuous = p;
    continuous.steps = 0.0f;  // known to the compiler: no division
#pragma omp simd
    for (int j = 0; j < WIDE_ROW; ++j) g[j] = pair_target(continuous, w[j], side);
  }
}

// Read noise of the devices of one row.
void variance_row(const Programming p, const float* g, float* variance) {
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) variance[j] = read_variance(p, g[j]);
}

void store(const float* from, float* to, i64 count) {
  if (count == WIDE_ROW)
    std::copy(from, from + WIDE_ROW, to);
  else
    std::copy(from, from + count, to);
}

// Join the sides of slice k (pos + negative neg, times `weight` of the slice) as the mapping says, and store them; `sum`
// is carried from slice to slice.
void store_row(const Programming& p, i64 k, const float* pos, const float* neg, float negative, float weight,
               float* sum, float* out, i64 count) {
  const i64 plane = p.groups * p.inputs * p.outputs;
  if (p.merge == MERGE_OFFSET || p.merge == MERGE_NONE) {
    store(pos, out + k * plane, count);
    if (p.merge == MERGE_NONE) store(neg, out + (p.slices + k) * plane, count);
    return;
  }
  const bool fresh = p.merge == MERGE_SUBTRACT || k == 0;
#pragma omp simd
  for (int j = 0; j < WIDE_ROW; ++j) sum[j] = fma(weight, pos[j] + negative * neg[j], fresh ? 0.0f : sum[j]);
  if (p.merge == MERGE_SUBTRACT)
    store(sum, out + k * plane, count);
  else if (k + 1 == p.slices)
    store(sum, out, count);
}

// Weights of up to 64 bitlines and 16 wordlines, transposed: in units of w_max, and the codes of sliced ones.
void load_block(const Programming& p, const float* weight, const float* w_max, i64 output, i64 i0, i64 lines, i64 count,
                float* block, float* codes) {
  const double top = (double)((1ull << (p.slices * p.slice_bits)) - 1);
  alignas(64) float rows[WIDE_ROW * LINES] = {}, row_codes[WIDE_ROW * LINES] = {};
  for (i64 j = 0; j < count; ++j) {
    const double inverse = 1.0 / (double)w_max[p.scale_count > 1 ? output + j : 0];
    const float* line = weight + (output + j) * p.inputs + i0;
    const float by = (float)inverse;
    alignas(64) float whole[LINES] = {};  // a short line, padded
    if (lines < LINES) line = std::copy(line, line + lines, whole) - lines;
    float *row = rows + j * LINES, *row_code = row_codes + j * LINES;
#pragma omp simd
    for (int i = 0; i < LINES; ++i) row[i] = clip_weight(line[i] * by);
    if (p.slice_bits)
#pragma omp simd
      for (int i = 0; i < LINES; ++i) row_code[i] = bits_float(weight_code(line[i], inverse, top));
  }
  transpose(rows, LINES, WIDE_ROW, LINES, block, WIDE_ROW);
  if (p.slice_bits) transpose(row_codes, LINES, WIDE_ROW, LINES, codes, WIDE_ROW);
}

// Every cell of finite weights.
void program_cells(const Programming& p, const float* weight, const float* w_max, float* g, float* noise_var) {
  const bool pairs = p.merge != MERGE_OFFSET, ideal = p.spread == 0.0f && !p.noise.any() && !has_stuck(p);
  const i64 row_blocks = (p.inputs + LINES - 1) / LINES, col_blocks = (p.outputs + WIDE_ROW - 1) / WIDE_ROW;
  const WideKeys keys(p.seed);
#pragma omp parallel for collapse(3) schedule(static) if (p.groups * p.inputs * p.outputs >= WORTH_A_THREAD)
  for (i64 group = 0; group < p.groups; ++group)
    for (i64 rb = 0; rb < row_blocks; ++rb)
      for (i64 cb = 0; cb < col_blocks; ++cb) {
        const i64 i0 = rb * LINES, o0 = cb * WIDE_ROW, output = group * p.outputs + o0;
        const i64 lines = std::min<i64>(LINES, p.inputs - i0), count = std::min<i64>(WIDE_ROW, p.outputs - o0);
        alignas(64) float block[LINES * WIDE_ROW], pos[WIDE_ROW], neg[WIDE_ROW] = {}, sum[WIDE_ROW];
        alignas(64) float var_pos[WIDE_ROW], var_neg[WIDE_ROW] = {}, var_sum[WIDE_ROW];
        alignas(64) float codes[LINES * WIDE_ROW];
        load_block(p, weight, w_max, output, i0, lines, count, block, codes);
        for (i64 i = 0; i < lines; ++i) {
          const i64 row = group * p.inputs + i0 + i, to = row * p.outputs + o0;
          const float *w = block + i * WIDE_ROW, *code = codes + i * WIDE_ROW;
          for (i64 k = 0; k < p.slices; ++k) {
            const float by = p.merge == MERGE_ALL ? (float)(1ull << (k * p.slice_bits)) : 1.0f;
            target_row(p, w, code, k, 1.0f, pos);
            if (!ideal) write_row(p, keys, (u32)k, (u32)row, o0, pos);
            if (pairs) {
              target_row(p, w, code, k, -1.0f, neg);
              if (!ideal) write_row(p, keys, (u32)(p.slices + k), (u32)row, o0, neg);
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

// The terms of places `first` to `end` of a fingerprint. A loop of its own takes half the time of one that threads share.
u64 fingerprint_part(const float* x, i64 first, i64 end) {
  u64 sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 e = first; e < end; ++e) sum += fingerprint_term(float_bits(x[e]), (u32)e);
  return sum;
}

// Bits of the largest magnitude: order as the magnitudes do, infinity and NaN last.
u32 largest_bits(const float* x, i64 count) {
  u32 top = 0;
#pragma omp simd reduction(max : top)
  for (i64 e = 0; e < count; ++e) {
    const u32 bits = float_bits(x[e]) & 0x7FFFFFFFu;
    top = bits > top ? bits : top;
  }
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
#pragma omp parallel for reduction(+ : sum) schedule(static) if (count >= WORTH_A_THREAD)
  for (i64 first = 0; first < count; first += PIECE) sum += fingerprint_part(x, first, std::min(first + PIECE, count));
  *fingerprint = (i64)sum;
}

// A number that any single change of x changes, as nearly all others do, at the speed of memory. A lane of a chunk is a
// polynomial of its values, whose odd base has an inverse; lanes and chunks are added up times odd numbers of their places. The
// upper bits of a value are mixed into the lower ones: those of round numbers would be zeros, which powers of the base make more.
extern "C" i64 gpuxbar_checksum(const float* x, i64 count) {
  constexpr i64 SIDE = 64, CHUNK = 1 << 14;
  const auto next = [](u32 lane, float value) {
    const u32 bits = float_bits(value);
    return lane * 0x9E3779BBu + (bits ^ bits >> 16);
  };
  u64 sum = 0;
#pragma omp parallel for reduction(+ : sum) schedule(static) if (count >= WORTH_A_THREAD)
  for (i64 first = 0; first < count; first += CHUNK) {
    const i64 end = std::min(first + CHUNK, count);
    u32 lane[SIDE] = {};
    i64 e = first;
    for (; e + SIDE <= end; e += SIDE)
#pragma GCC unroll 64
      for (i64 j = 0; j < SIDE; ++j) lane[j] = next(lane[j], x[e + j]);
    for (i64 j = 0; e < end; ++e, ++j) lane[j] = next(lane[j], x[e]);
    for (i64 j = 0; j < SIDE; ++j) sum += lane[j] * (0x9E3779B97F4A7C15u * (u64)(first + j + 1) | 1u);
  }
  return (i64)sum;
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
