// tile_mvm on the CPU: tile products with noise, ADC and shift-and-add fused behind them.
//
// A block of ROWS driven vectors meets panels of COLS bitlines; the partial sums of one tile stay in the first
// cache until they are converted, so they never reach memory. Every output is the work of one thread in a fixed
// order: the same bits on any thread count and batch split. Meaning and oracle: gpuxbar/reference/tile_mvm.py.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "gpuxbar/converter.cuh"
#include "gpuxbar/normal.cuh"

using namespace gpuxbar;

namespace {

constexpr int ROWS = 48;         // driven vectors of a block
constexpr int MICRO = 6;         // rows of the register tile
constexpr int COLS = 16;         // bitlines of a panel
constexpr int WIDE = 24;         // columns of noise drawn for a panel that does not start on a counter
constexpr i64 PACKED = 1 << 20;  // floats of packed conductance held at a time

typedef float Vec __attribute__((vector_size(32), aligned(4)));

struct Conv {
  i64 channels, height, width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  i64 out_h, out_w;
};

}  // namespace

// Mirrored field by field in gpuxbar/ops/tile_mvm.py.
struct TileMvm {
  const void* v;             // driven values, int16 codes or float32
  const float* g;            // [planes, groups * inputs, cols] S
  const float* noise_var;    // like g, or null: A^2/V^2
  const float* slice_scale;  // [planes]
  const float* adc_lsb;      // [1] or [groups * sense] A
  const float* adc_gain;     // [planes, tiles, groups * sense] or null
  const float* adc_offset;   // [planes, tiles, groups * sense] or null, A
  const float* read_noise;   // [1] A
  const i64* step;           // [1]
  const float* row_scale;    // [batch / rows_per_scale] or null
  const float* col_scale;    // [groups * sense] or null
  const float* bias;         // [groups * sense] or null
  float* y;
  float* gate;       // like y, or null
  const Conv* conv;  // or null
  i64 batch, groups, inputs, cols, planes, tile, rows_per_scale, row_offset;
  i64 is_code, transposed, stream_bits, streams, phases, adc_bits, adc_signed, adc_per_column, fast;
  u64 seed;
  double v_lsb;
};

namespace {

struct Shape {
  i64 drive, sense, tiles, passes, units, unit_rows;
};

// One pass of the DAC: which bits of a code are driven, and their digital weight.
struct Pass {
  int shift, phase;
  float weight;
};

Pass pass_of(const TileMvm& p, i64 index) {
  const int stream = (int)(index % p.streams), shift = (int)(stream * p.stream_bits);
  const float weight = (float)(1ull << shift);
  if (p.phases == 1) return Pass{shift, 0, weight};
  return index < p.streams ? Pass{shift, 1, weight} : Pass{shift, -1, weight};
}

// The voltage of element `e` of the driven array in a pass.
struct Driver {
  const TileMvm& p;
  Pass pass;
  float lsb;
  u32 mask;
  Driver(const TileMvm& p, Pass pass)
      : p(p), pass(pass), lsb((float)p.v_lsb), mask(p.stream_bits ? (1u << p.stream_bits) - 1 : 0xFFFFu) {}
  // `count` values from src, `stride` elements apart, to consecutive places of dst
  void operator()(float* dst, i64 src, i64 count, i64 stride) const {
    if (!p.is_code) {
      const float* x = (const float*)p.v + src;
      for (i64 i = 0; i < count; ++i) dst[i] = x[i * stride] * lsb;
    } else if (p.stream_bits == 0) {
      const i16* x = (const i16*)p.v + src;
      if (stride == 1)
        for (i64 i = 0; i < count; ++i) dst[i] = (float)x[i] * lsb;
      else
        for (i64 i = 0; i < count; ++i) dst[i] = (float)x[i * stride] * lsb;
    } else {
      const i16* x = (const i16*)p.v + src;
      for (i64 i = 0; i < count; ++i) dst[i] = lsb * stream_digit(x[i * stride], pass.shift, mask, pass.phase);
    }
  }
};

// a[k][i]: the voltage of wordline k for row row0 + i of the block; rows beyond `rows` are 0.
void pack_rows(const TileMvm& p, const Shape& s, const Driver& drive, i64 group, i64 row0, i64 rows, float* a) {
  if (rows < ROWS) std::memset(a, 0, sizeof(float) * s.drive * ROWS);
  if (!p.conv) {
    const i64 stride = p.groups * s.drive;
    for (i64 i = 0; i < rows; i += 8) {  // eight rows at a time, through a transposing buffer
      const i64 n = std::min<i64>(8, rows - i);
      for (i64 k0 = 0; k0 < s.drive; k0 += 64) {
        const i64 m = std::min<i64>(64, s.drive - k0);
        float line[8][64];
        for (i64 r = 0; r < n; ++r) drive(line[r], (row0 + i + r) * stride + group * s.drive + k0, m, 1);
        for (i64 k = 0; k < m; ++k)
          for (i64 r = 0; r < n; ++r) a[(k0 + k) * ROWS + i + r] = line[r][k];
      }
    }
    return;
  }
  const Conv& c = *p.conv;
  const i64 pixels = c.out_h * c.out_w;
  for (i64 i = 0; i < rows;) {  // runs of one output line
    const i64 image = (row0 + i) / pixels, pixel = (row0 + i) % pixels;
    if (p.transposed) {
      const i64 run = std::min(rows - i, pixels - pixel);
      for (i64 k = 0; k < s.drive; ++k)
        drive(a + k * ROWS + i, ((image * p.groups + group) * s.drive + k) * pixels + pixel, run, 1);
      i += run;
      continue;
    }
    const i64 oy = pixel / c.out_w, ox = pixel % c.out_w;
    const i64 run = std::min(rows - i, c.out_w - ox);
    i64 k = 0;
    for (i64 channel = 0; channel < c.channels; ++channel) {
      const i64 plane = ((image * p.groups + group) * c.channels + channel) * c.height;
      for (i64 ky = 0; ky < c.kernel_h; ++ky) {
        const i64 iy = oy * c.stride_h + ky * c.dilation_h - c.pad_h;
        for (i64 kx = 0; kx < c.kernel_w; ++kx, ++k) {
          float* dst = a + k * ROWS + i;
          if (iy < 0 || iy >= c.height) {
            std::memset(dst, 0, sizeof(float) * run);
            continue;
          }
          const i64 ix0 = ox * c.stride_w + kx * c.dilation_w - c.pad_w;
          i64 lead = ix0 < 0 ? (-ix0 + c.stride_w - 1) / c.stride_w : 0;
          lead = std::min(lead, run);
          i64 last = ix0 >= c.width ? 0 : (c.width - 1 - ix0) / c.stride_w + 1;
          last = std::max(lead, std::min(last, run));
          for (i64 j = 0; j < lead; ++j) dst[j] = 0.0f;
          if (last > lead) drive(dst + lead, (plane + iy) * c.width + ix0 + lead * c.stride_w, last - lead, c.stride_w);
          for (i64 j = last; j < run; ++j) dst[j] = 0.0f;
        }
      }
    }
    i += run;
  }
}

// b[k][j]: conductance between wordline k and bitline n0 + j; columns beyond the array are 0.
void pack_panel(const TileMvm& p, const Shape& s, const float* m, i64 plane, i64 group, i64 n0, float* b) {
  const i64 n = std::min<i64>(COLS, s.sense - n0);
  const float* base = m + (plane * p.groups + group) * p.inputs * p.cols;
  if (n < COLS) std::memset(b, 0, sizeof(float) * s.drive * COLS);
  if (!p.transposed) {
    for (i64 k = 0; k < s.drive; ++k) std::memcpy(b + k * COLS, base + k * p.cols + n0, sizeof(float) * n);
    return;
  }
  for (i64 k0 = 0; k0 < s.drive; k0 += COLS) {
    const i64 kn = std::min<i64>(COLS, s.drive - k0);
    for (i64 j = 0; j < n; ++j)
      for (i64 k = 0; k < kn; ++k) b[(k0 + k) * COLS + j] = base[(n0 + j) * p.cols + k0 + k];
  }
}

// c[6][16] = a^T b over `length` wordlines.
inline void multiply(i64 length, const float* a, const float* b, float* c) {
  Vec low[MICRO] = {}, high[MICRO] = {};
  for (i64 k = 0; k < length; ++k, a += ROWS, b += COLS) {
    const Vec b0 = *(const Vec*)b, b1 = *(const Vec*)(b + 8);
#pragma GCC unroll 6
    for (int i = 0; i < MICRO; ++i) {
      const Vec ai = a[i] - Vec{};
      low[i] += ai * b0;
      high[i] += ai * b1;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MICRO; ++i) {
    *(Vec*)(c + i * COLS) = low[i];
    *(Vec*)(c + i * COLS + 8) = high[i];
  }
}

void multiply_block(i64 rows, i64 length, const float* a, const float* b, float* c) {
  for (i64 i = 0; i < rows; i += MICRO) multiply(length, a + i, b, c + i * COLS);
}

// z[row][width]: standard normals of the block's rows for columns col0 .. col0 + width - 1; stages split so
// that each loop vectorises.
template <bool FAST>
void draw(const TileMvm& p, u32 purpose, u32 slot, i64 row0, i64 rows, i64 col0, int width, float* z) {
  constexpr int EACH = FAST ? 8 : 4;
  constexpr int MOST = ROWS * WIDE / 4;
  alignas(64) u32 w[4][MOST];
  const u32 per_row = (u32)width / EACH, first = (u32)(col0 / EACH), row_base = (u32)(p.row_offset + row0);
  const u32 key_lo = (u32)p.seed, key_hi = (u32)(p.seed >> 32), step = (u32)*p.step;
  const int count = (int)(rows * per_row);
  for (u32 i = 0, j = 0; i < (u32)rows; ++i)
    for (u32 k = 0; k < per_row; ++k, ++j) {
      w[0][j] = first + k;
      w[1][j] = row_base + i;
    }
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const Counter c = philox<FAST ? 7 : 10>(counter(w[0][j], w[1][j], purpose, slot, step), key_lo, key_hi);
    w[0][j] = c.x;
    w[1][j] = c.y;
    w[2][j] = c.z;
    w[3][j] = c.w;
  }
  if constexpr (FAST) {
    alignas(64) float n[8][MOST / 2];
    for (int q = 0; q < 4; ++q)
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        const Pair pair = normal_pair_fast(w[q][j]);
        n[2 * q][j] = pair.a;
        n[2 * q + 1][j] = pair.b;
      }
    for (int j = 0; j < count; ++j)
      for (int q = 0; q < 8; ++q) z[8 * j + q] = n[q][j];
  } else {
    alignas(64) float n[4][MOST];
    for (int q = 0; q < 2; ++q)
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        const Pair pair = normal_pair(w[2 * q][j], w[2 * q + 1][j]);
        n[2 * q][j] = pair.a;
        n[2 * q + 1][j] = pair.b;
      }
    for (int j = 0; j < count; ++j)
      for (int q = 0; q < 4; ++q) z[4 * j + q] = n[q][j];
  }
}

struct Panel {
  float inverse[COLS], lsb[COLS], scale[COLS], bias[COLS];
};

// Everything one block does with one panel of bitlines: all tiles of one pass and plane.
struct Block {
  alignas(64) float psum[ROWS * COLS], variance[ROWS * COLS], z[ROWS * WIDE], sum[ROWS * COLS], gate[ROWS * COLS];
  alignas(64) i32 codes[ROWS * COLS];
};

void convert_panel(const TileMvm& p, const Shape& s, const float* a, const float* a2, const float* b, const float* b2,
                   i64 plane, i64 pass, i64 group, i64 n0, i64 row0, i64 rows, const Panel& panel, float weight,
                   Block& w) {
  const i64 count = (rows + MICRO - 1) / MICRO * MICRO * COLS;
  const float sigma = p.read_noise[0];
  const bool noisy = sigma > 0.0f || p.noise_var;
  const i64 column = group * s.sense + n0, sensed = p.groups * s.sense;
  const i64 aligned = column & ~7ll;
  const int width = column == aligned ? COLS : WIDE, shift = (int)(column - aligned);
  const u32 purpose = p.transposed ? READ_TRANSPOSED : READ;
  const float code_max = p.adc_signed ? (float)((1 << (p.adc_bits - 1)) - 1) : (float)((1 << p.adc_bits) - 1);
  const float code_min = p.adc_signed ? -code_max : 0.0f;
  const i64 n = std::min<i64>(COLS, s.sense - n0);
  if (p.adc_bits) std::memset(w.codes, 0, sizeof(i32) * count);
  for (i64 t = 0; t < s.tiles; ++t) {
    const i64 k0 = t * p.tile, length = std::min(p.tile, s.drive - k0);
    multiply_block(rows, length, a + k0 * ROWS, b + k0 * COLS, w.psum);
    if (noisy) {
      const u32 slot = (u32)((pass * p.planes + plane) * s.tiles + t);
      if (p.fast)
        draw<true>(p, purpose, slot, row0, rows, aligned, width, w.z);
      else
        draw<false>(p, purpose, slot, row0, rows, aligned, width, w.z);
      if (p.noise_var) {
        multiply_block(rows, length, a2 + k0 * ROWS, b2 + k0 * COLS, w.variance);
        for (i64 i = 0; i < rows; ++i)
          for (int j = 0; j < COLS; ++j)
            w.psum[i * COLS + j] = fma(sqrt_fast(fma(sigma, sigma, max(w.variance[i * COLS + j], 0.0f))),
                                       w.z[i * width + shift + j], w.psum[i * COLS + j]);
      } else if (width == COLS) {
        for (i64 e = 0; e < rows * COLS; ++e) w.psum[e] = fma(sigma, w.z[e], w.psum[e]);
      } else {
        for (i64 i = 0; i < rows; ++i)
          for (int j = 0; j < COLS; ++j)
            w.psum[i * COLS + j] = fma(sigma, w.z[i * width + shift + j], w.psum[i * COLS + j]);
      }
    }
    if (!p.adc_bits) {
      for (i64 e = 0; e < count; ++e) w.sum[e] = fma(weight, w.psum[e], w.sum[e]);
      if (p.gate)
        for (i64 e = 0; e < count; ++e) w.gate[e] += abs(weight);
      continue;
    }
    float gain[COLS], offset[COLS];
    const i64 converter = (plane * s.tiles + t) * sensed + column;
    for (i64 j = 0; j < COLS; ++j) {
      gain[j] = panel.inverse[j] * (p.adc_gain && j < n ? p.adc_gain[converter + j] : 1.0f);
      offset[j] = p.adc_offset && j < n ? p.adc_offset[converter + j] * panel.inverse[j] : 0.0f;
    }
    if (!p.gate) {
      for (i64 i = 0; i < rows; ++i)
        for (int j = 0; j < COLS; ++j)
          w.codes[i * COLS + j] += (i32)adc_code(fma(w.psum[i * COLS + j], gain[j], offset[j]), code_min, code_max);
    } else {
      const float share = abs(weight);
      for (i64 i = 0; i < rows; ++i)
        for (int j = 0; j < COLS; ++j) {
          const float steps = fma(w.psum[i * COLS + j], gain[j], offset[j]);
          w.codes[i * COLS + j] += (i32)adc_code(steps, code_min, code_max);
          w.gate[i * COLS + j] += min(max(steps, code_min), code_max) == steps ? share : 0.0f;
        }
    }
  }
  if (p.adc_bits)
    for (i64 i = 0; i < rows; ++i)
      for (int j = 0; j < COLS; ++j)
        w.sum[i * COLS + j] = fma(weight * panel.lsb[j], (float)w.codes[i * COLS + j], w.sum[i * COLS + j]);
}

// Adds a block's sums to y in its layout: rows of a matrix, images, or folded images.
void store(const TileMvm& p, const Shape& s, i64 group, i64 n0, i64 row0, i64 rows, const Panel& panel, bool first,
           float share, Block& w) {
  const i64 n = std::min<i64>(COLS, s.sense - n0), column = group * s.sense + n0, sensed = p.groups * s.sense;
  for (i64 i = 0; i < rows; ++i) {
    const float row_scale = p.row_scale ? p.row_scale[(row0 + i) / p.rows_per_scale] : 1.0f;
    for (int j = 0; j < COLS; ++j) w.sum[i * COLS + j] *= row_scale * panel.scale[j];
  }
  if (!p.conv) {
    for (i64 i = 0; i < rows; ++i) {
      float* y = p.y + (row0 + i) * sensed + column;
      for (i64 j = 0; j < n; ++j) y[j] = (first ? panel.bias[j] : y[j]) + w.sum[i * COLS + j];
      if (p.gate)
        for (i64 j = 0; j < n; ++j) {
          float& gate = p.gate[(row0 + i) * sensed + column + j];
          gate = (first ? 0.0f : gate) + share * w.gate[i * COLS + j];
        }
    }
    return;
  }
  const Conv& c = *p.conv;
  const i64 pixels = c.out_h * c.out_w;
  if (!p.transposed) {
    for (i64 i = 0; i < rows;) {
      const i64 image = (row0 + i) / pixels, pixel = (row0 + i) % pixels, run = std::min(rows - i, pixels - pixel);
      for (i64 j = 0; j < n; ++j) {
        const i64 at = (image * sensed + column + j) * pixels + pixel;
        for (i64 r = 0; r < run; ++r) p.y[at + r] = (first ? panel.bias[j] : p.y[at + r]) + w.sum[(i + r) * COLS + j];
        if (p.gate)
          for (i64 r = 0; r < run; ++r)
            p.gate[at + r] = (first ? 0.0f : p.gate[at + r]) + share * w.gate[(i + r) * COLS + j];
      }
      i += run;
    }
    return;
  }
  for (i64 j = 0; j < n; ++j) {
    const i64 k = n0 + j, channel = k / (c.kernel_h * c.kernel_w), ky = k / c.kernel_w % c.kernel_h,
              kx = k % c.kernel_w;
    for (i64 i = 0; i < rows;) {  // runs of one output line fall on one input line
      const i64 image = (row0 + i) / pixels, pixel = (row0 + i) % pixels;
      const i64 oy = pixel / c.out_w, ox = pixel % c.out_w, run = std::min(rows - i, c.out_w - ox);
      const i64 iy = oy * c.stride_h + ky * c.dilation_h - c.pad_h;
      if (iy >= 0 && iy < c.height) {
        float* line = p.y + (((image * p.groups + group) * c.channels + channel) * c.height + iy) * c.width;
        const i64 ix0 = ox * c.stride_w + kx * c.dilation_w - c.pad_w;
        for (i64 r = 0; r < run; ++r) {
          const i64 ix = ix0 + r * c.stride_w;
          if (ix >= 0 && ix < c.width) line[ix] += w.sum[(i + r) * COLS + j];
        }
      }
      i += run;
    }
  }
}

}  // namespace

extern "C" void gpuxbar_tile_mvm(const TileMvm* params) {
  const TileMvm& p = *params;
  Shape s;
  s.drive = p.transposed ? p.cols : p.inputs;
  s.sense = p.transposed ? p.inputs : p.cols;
  s.tiles = (s.drive + p.tile - 1) / p.tile;
  s.passes = p.streams * p.phases;
  // a unit of work is whole images, so that folding never meets another thread's image
  const i64 pixels = p.conv ? p.conv->out_h * p.conv->out_w : 1;
  const bool whole_images = p.conv && p.transposed;
  s.unit_rows = whole_images ? std::max<i64>(1, (ROWS + pixels - 1) / pixels) * pixels : ROWS;
  s.units = (p.batch + s.unit_rows - 1) / s.unit_rows;
  if (whole_images) {
    const Conv& c = *p.conv;
    std::memset(p.y, 0, sizeof(float) * (p.batch / pixels) * p.groups * c.channels * c.height * c.width);
  }
  float weights = 0.0f;
  for (i64 plane = 0; plane < p.planes; ++plane)
    for (i64 pass = 0; pass < s.passes; ++pass) weights += abs(p.slice_scale[plane]) * pass_of(p, pass).weight;
  const float share = 1.0f / (weights * (float)s.tiles);

  const i64 panels = (s.sense + COLS - 1) / COLS;
  const i64 panel_size = s.drive * COLS, together = std::max<i64>(1, PACKED / std::max<i64>(1, panel_size));
  std::unique_ptr<float[]> packed(new float[std::min(panels, together) * panel_size]);
  std::unique_ptr<float[]> packed_var(p.noise_var ? new float[std::min(panels, together) * panel_size] : nullptr);

#pragma omp parallel
  {
    std::unique_ptr<float[]> rows_buffer(new float[s.drive * ROWS * s.passes * (p.noise_var ? 2 : 1)]);
    float* a = rows_buffer.get();
    float* a2 = p.noise_var ? a + s.drive * ROWS * s.passes : nullptr;
    std::unique_ptr<Block> work(new Block);
    for (i64 group = 0; group < p.groups; ++group)
      for (i64 panel0 = 0; panel0 < panels; panel0 += together)
        for (i64 plane = 0; plane < p.planes; ++plane) {
          const i64 end = std::min(panels, panel0 + together);
#pragma omp for schedule(static)
          for (i64 q = panel0; q < end; ++q) {
            pack_panel(p, s, p.g, plane, group, q * COLS, packed.get() + (q - panel0) * panel_size);
            if (p.noise_var)
              pack_panel(p, s, p.noise_var, plane, group, q * COLS, packed_var.get() + (q - panel0) * panel_size);
          }
#pragma omp for schedule(dynamic, 1)
          for (i64 unit = 0; unit < s.units; ++unit) {
            const i64 unit_end = std::min(p.batch, (unit + 1) * s.unit_rows);
            for (i64 row0 = unit * s.unit_rows; row0 < unit_end; row0 += ROWS) {
              const i64 rows = std::min<i64>(ROWS, unit_end - row0), block_size = s.drive * ROWS;
              for (i64 pass = 0; pass < s.passes; ++pass) {
                pack_rows(p, s, Driver(p, pass_of(p, pass)), group, row0, rows, a + pass * block_size);
                if (a2)
                  for (i64 e = 0; e < block_size; ++e)
                    a2[pass * block_size + e] = a[pass * block_size + e] * a[pass * block_size + e];
              }
              for (i64 q = panel0; q < end; ++q) {
                Panel panel;
                const i64 column = group * s.sense + q * COLS;
                for (i64 j = 0; j < COLS; ++j) {
                  const bool real = q * COLS + j < s.sense;
                  panel.lsb[j] = !p.adc_bits        ? 1.0f
                                 : p.adc_per_column ? (real ? p.adc_lsb[column + j] : 1.0f)
                                                    : p.adc_lsb[0];
                  panel.inverse[j] = 1.0f / panel.lsb[j];
                  panel.scale[j] = p.col_scale && real ? p.col_scale[column + j] : 1.0f;
                  panel.bias[j] = p.bias && real ? p.bias[column + j] : 0.0f;
                }
                std::memset(work->sum, 0, sizeof work->sum);
                if (p.gate) std::memset(work->gate, 0, sizeof work->gate);
                for (i64 pass = 0; pass < s.passes; ++pass) {
                  const Pass way = pass_of(p, pass);
                  const float weight = (way.phase < 0 ? -way.weight : way.weight) * p.slice_scale[plane];
                  const i64 at = (q - panel0) * panel_size;
                  convert_panel(p, s, a + pass * block_size, a2 ? a2 + pass * block_size : nullptr, packed.get() + at,
                                p.noise_var ? packed_var.get() + at : nullptr, plane, pass, group, q * COLS, row0, rows,
                                panel, weight, *work);
                }
                store(p, s, group, q * COLS, row0, rows, panel, plane == 0, share, *work);
              }
            }
          }
        }
  }
}

extern "C" void gpuxbar_dac_quantize(const float* x, const float* lsb, i16* codes, i64 rows, i64 per_row, i64 lsb_count,
                                     i64 code_max, i64 is_signed, i64* bad) {
  const float top = (float)code_max, bottom = is_signed ? -top : 0.0f;
  i64 not_finite = 0;
#pragma omp parallel for reduction(+ : not_finite) schedule(static)
  for (i64 block = 0; block < (rows * per_row + 4095) / 4096; ++block) {
    const i64 end = std::min(rows * per_row, (block + 1) * 4096);
    for (i64 e = block * 4096; e < end;) {
      const i64 row = e / per_row, stop = std::min(end, (row + 1) * per_row);
      const float inverse = 1.0f / lsb[lsb_count > 1 ? row : 0];
      i64 odd = 0;
      for (i64 k = e; k < stop; ++k) {
        odd += (float_bits(x[k]) & 0x7F800000u) == 0x7F800000u;
        codes[k] = (i16)(i32)dac_code(x[k], inverse, bottom, top);
      }
      not_finite += odd;
      e = stop;
    }
  }
  *bad = not_finite;
}
