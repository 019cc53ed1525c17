// tile_mvm on the CPU: tile products with noise, ADC and shift-and-add fused behind them.
//
// A block of ROWS driven vectors meets panels of COLS bitlines; the partial sums of one tile stay in the first
// cache until they are converted, so they never reach memory. Every output is the work of one thread in a fixed
// order: the same bits on any thread count and batch split. Meaning and oracle: gpuxbar/reference/tile_mvm.py.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "few_rows.hpp"
#include "gpuxbar/converter.cuh"
#include "fold.hpp"
#include "images.hpp"
#include "lanes.hpp"
#include "read.hpp"
#include "threads.hpp"

using namespace gpuxbar;

namespace {

constexpr i64 PACKED = 1 << 20;  // floats of packed conductance held at a time

// COLS bitlines of a group, from a multiple of COLS in the numbering of all outputs; `begin` .. `end` - 1 are real.
struct Panel {
  i64 column, begin, end, local;  // `local`: index within the group of the panel's first column, may be negative
  Panel(const Shape& s, i64 group, i64 index)
      : column((group * s.sense / COLS + index) * COLS),
        begin(std::max<i64>(0, group * s.sense - column)),
        end(std::min<i64>(COLS, (group + 1) * s.sense - column)),
        local(column - group * s.sense) {}
};

// a[k][i]: the voltage of wordline k for row `row0 + i` of a matrix.
void pack_matrix(const TileMvm& p, const Shape& s, const Driver& drive, i64 group, i64 row0, i64 rows, float* a) {
  const i64 stride = p.groups * s.drive;
  for (i64 i = 0; i < rows; i += 8) {  // eight rows at a time, through a transposing buffer
    const i64 n = std::min<i64>(8, rows - i);
    for (i64 k0 = 0; k0 < s.drive; k0 += 64) {
      const i64 m = std::min<i64>(64, s.drive - k0);
      float line[8][64];
      for (i64 r = 0; r < n; ++r) drive(line[r], (row0 + i + r) * stride + group * s.drive + k0, m);
      for (i64 k = 0; k < m; ++k)
        for (i64 r = 0; r < n; ++r) a[(k0 + k) * ROWS + i + r] = line[r][k];
    }
  }
}

// b[k][j]: conductance between wordline k and bitline j of a panel; 0 where the panel leaves the group.
void pack_panel(const TileMvm& p, const Shape& s, const float* m, i64 plane, i64 group, const Panel& panel, float* b) {
  const float* base = m + (plane * p.groups + group) * p.inputs * p.cols;
  const i64 n = panel.end - panel.begin, from = panel.local + panel.begin;
  if (n < COLS) std::fill_n(b, s.drive * COLS, 0.0f);
  b += panel.begin;
  if (!p.transposed) {
    for (i64 k = 0; k < s.drive; ++k) copy(b + k * COLS, base + k * p.cols + from, n);
    return;
  }
  for (i64 k0 = 0; k0 < s.drive; k0 += COLS) {
    const i64 kn = std::min<i64>(COLS, s.drive - k0);
    for (i64 j = 0; j < n; ++j)
      for (i64 k = 0; k < kn; ++k) b[(k0 + k) * COLS + j] = base[(from + j) * p.cols + k0 + k];
  }
}

// Everything one block does with one panel; [COLS][ROWS] each.
struct Block {
  Plane psum, variance, sum, gate;
  alignas(64) i32 codes[COLS * ROWS];
  alignas(64) float row_scale[ROWS];
};

// What one block drives in a pass: voltages and their squares (or null), [drive][ROWS], and whether any is not 0.
struct Driven {
  const float *a, *a2;
  i64 row0, rows;
  bool live;
};

// Converters of a panel's columns.
struct Converters {
  float lsb[COLS], inverse[COLS];
  Converters(const TileMvm& p, const Panel& panel) {
    for (i64 j = 0; j < COLS; ++j) {
      const bool real = j >= panel.begin && j < panel.end;
      lsb[j] = !p.adc_bits ? 1.0f : p.adc_lsb[p.adc_per_column && real ? panel.column + j : 0];
      inverse[j] = 1.0f / lsb[j];
    }
  }
};

// Adds read noise to the partial sums over `length` wordlines from k0.
void noise(const TileMvm& p, const Panel& panel, const Driven& d, u32 slot, i64 k0, i64 length, const float* b2,
           Block& w) {
  const float sigma = p.read_noise[0];
  if (!(sigma > 0.0f) && !p.noise_var) return;
  const u32 purpose = p.transposed ? READ_TRANSPOSED : READ, row = (u32)(p.row_offset + d.row0);
  const Draws draws{purpose << 24 | slot, (u32)*p.step, (u32)p.seed, (u32)(p.seed >> 32)};
  if (p.noise_var) {
    multiply_block(d.rows, panel.begin, panel.end, length, d.a2 + k0 * ROWS, b2 + k0 * COLS, w.variance);
    for (i64 e = panel.begin * ROWS; e < panel.end * ROWS; ++e)
      w.variance.at[e] = sqrt_fast(fma(sigma, sigma, max(w.variance.at[e], 0.0f)));
  }
  const Plane* deviation = p.noise_var ? &w.variance : nullptr;
  if (p.fast)
    add_noise<true>(draws, (u32)panel.column, row, d.rows, panel.begin, panel.end, sigma, deviation, w.psum);
  else
    add_noise<false>(draws, (u32)panel.column, row, d.rows, panel.begin, panel.end, sigma, deviation, w.psum);
}

// Adds all tiles of one pass and plane to the block's sums, which the first pass starts.
void convert_panel(const TileMvm& p, const Shape& s, const Panel& panel, const Converters& adc, const Driven& d,
                   const float* b, const float* b2, i64 plane, i64 pass, float weight, Block& w) {
  const i64 lanes = (d.rows + LANES - 1) / LANES * LANES;
  const float code_max = p.code_max(), code_min = p.code_min(), share = gpuxbar::abs(weight);
  for (i64 t = 0; t < s.tiles; ++t) {
    const bool first = pass == 0 && t == 0;
    const i64 k0 = t * p.tile, length = std::min(p.tile, s.drive - k0);
    if (d.live)
      multiply_block(d.rows, panel.begin, panel.end, length, d.a + k0 * ROWS, b + k0 * COLS, w.psum);
    else
      std::fill_n(w.psum.at + panel.begin * ROWS, (panel.end - panel.begin) * ROWS, 0.0f);
    noise(p, panel, d, (u32)((pass * p.planes + plane) * s.tiles + t), k0, length, b2, w);
    for (i64 j = panel.begin; j < panel.end; ++j) {
      const float* psum = w.psum.at + j * ROWS;
      float *sum = w.sum.at + j * ROWS, *gate = w.gate.at + j * ROWS;
      i32* codes = w.codes + j * ROWS;
      if (first && p.gate) std::fill_n(gate, lanes, 0.0f);
      if (!p.adc_bits) {
        if (first) std::fill_n(sum, lanes, 0.0f);
        for (i64 i = 0; i < lanes; ++i) sum[i] = fma(weight, psum[i], sum[i]);
        if (p.gate)
          for (i64 i = 0; i < lanes; ++i) gate[i] += share;
        continue;
      }
      const i64 converter = (plane * s.tiles + t) * p.groups * s.sense + panel.column + j;
      const float gain = adc.inverse[j] * (p.adc_gain ? p.adc_gain[converter] : 1.0f);
      const float offset = p.adc_offset ? p.adc_offset[converter] * adc.inverse[j] : 0.0f;
      if (t == 0) std::fill_n(codes, lanes, 0);
      if (!p.gate)
        for (i64 i = 0; i < lanes; ++i) codes[i] += (i32)adc_code(fma(psum[i], gain, offset), code_min, code_max);
      else
        for (i64 i = 0; i < lanes; ++i) {
          const float steps = fma(psum[i], gain, offset);
          codes[i] += (i32)adc_code(steps, code_min, code_max);
          gate[i] += in_range(steps, code_min, code_max) ? share : 0.0f;
        }
    }
  }
  if (p.adc_bits)
    for (i64 j = panel.begin; j < panel.end; ++j) {
      const float step = weight * adc.lsb[j];
      float* sum = w.sum.at + j * ROWS;
      const i32* codes = w.codes + j * ROWS;
      if (pass == 0)
        for (i64 i = 0; i < lanes; ++i) sum[i] = fma(step, (float)codes[i], 0.0f);
      else
        for (i64 i = 0; i < lanes; ++i) sum[i] = fma(step, (float)codes[i], sum[i]);
    }
}

// Adds a block's sums to y in its layout: rows of a matrix, images, or folded images.
void store(const TileMvm& p, const Shape& s, i64 group, const Panel& panel, const Driven& d,
           const std::vector<Run>& runs, bool first, float share, Folded* folded, Block& w) {
  const i64 sensed = p.groups * s.sense, lanes = (d.rows + LANES - 1) / LANES * LANES;
  for (i64 j = panel.begin; j < panel.end; ++j) {
    const i64 column = panel.column + j;
    const float scale = p.col_scale ? p.col_scale[column] : 1.0f, bias = p.bias ? p.bias[column] : 0.0f;
    float *sum = w.sum.at + j * ROWS, *gate = w.gate.at + j * ROWS;
    for (i64 i = 0; i < lanes; ++i) sum[i] *= w.row_scale[i] * scale;
    if (p.gate)
      for (i64 i = 0; i < lanes; ++i) gate[i] *= share;
    if (!p.conv) {
      if (first)
        for (i64 i = 0; i < lanes; ++i) sum[i] += bias;
    } else if (folded) {
      folded->place(j, sum);
    } else {
      const i64 pixels = p.conv->out_h * p.conv->out_w;
      for (i64 i = 0; i < d.rows;) {
        const i64 image = (d.row0 + i) / pixels, pixel = (d.row0 + i) % pixels,
                  run = std::min(d.rows - i, pixels - pixel);
        const i64 at = (image * sensed + column) * pixels + pixel;
        for (i64 r = 0; r < run; ++r) p.y[at + r] = (first ? bias : p.y[at + r]) + sum[i + r];
        if (p.gate)
          for (i64 r = 0; r < run; ++r) p.gate[at + r] = (first ? 0.0f : p.gate[at + r]) + gate[i + r];
        i += run;
      }
    }
  }
  if (folded) folded->add(panel.local, panel.begin, panel.end);
  if (p.conv) return;
  for (i64 i = 0; i < d.rows; ++i) {
    const i64 at = (d.row0 + i) * sensed + panel.column;
    for (i64 j = panel.begin; j < panel.end; ++j) p.y[at + j] = (first ? 0.0f : p.y[at + j]) + w.sum.at[j * ROWS + i];
    if (p.gate)
      for (i64 j = panel.begin; j < panel.end; ++j)
        p.gate[at + j] = (first ? 0.0f : p.gate[at + j]) + w.gate.at[j * ROWS + i];
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
  // a unit of work is whole images where results fold, so that no two threads meet in one
  const i64 pixels = p.conv ? p.conv->out_h * p.conv->out_w : 1;
  const bool folds = p.conv && p.transposed;
  const i64 unit_rows = folds ? std::max<i64>(1, ROWS / pixels) * pixels : ROWS;
  const i64 units = (p.batch + unit_rows - 1) / unit_rows;
  float weights = 0.0f;
  for (i64 plane = 0; plane < p.planes; ++plane)
    for (i64 pass = 0; pass < s.passes; ++pass) weights += gpuxbar::abs(p.slice_scale[plane]) * pass_of(p, pass).weight;
  const float share = gpuxbar::gate_part(weights, s.tiles);
  if (!p.conv && p.batch <= FEW) {
    read_few(p, s, share);
    return;
  }

  const i64 panel_size = s.drive * COLS, block_size = s.drive * ROWS;
  // panels and planes packed at a time; a block's voltages are packed once for all of them
  const i64 most = (s.sense + COLS - 1) / COLS + 1, fit = std::max<i64>(1, PACKED / std::max<i64>(1, panel_size));
  const i64 together = std::min(most, fit), held = std::min(p.planes, std::max<i64>(1, fit / together));
  std::unique_ptr<float[]> packed(new float[held * together * panel_size]);
  std::unique_ptr<float[]> packed_var(p.noise_var ? new float[held * together * panel_size] : nullptr);

#pragma omp parallel
  {
    std::unique_ptr<float[]> voltages(new float[block_size * s.passes * (p.noise_var ? 2 : 1)]);
    float* a = voltages.get();
    float* a2 = p.noise_var ? a + block_size * s.passes : nullptr;
    std::unique_ptr<Block> work(new Block);
    std::vector<float> window;
    std::vector<char> live(s.passes);  // a phase of signed inputs, or a high bit, is often silent
    std::unique_ptr<Folded> folded(folds ? new Folded(*p.conv, unit_rows / pixels) : nullptr);
    for (i64 group = 0; group < p.groups; ++group) {
      const i64 panels = ((group + 1) * s.sense + COLS - 1) / COLS - group * s.sense / COLS;
      for (i64 panel0 = 0; panel0 < panels; panel0 += together)
        for (i64 plane0 = 0; plane0 < p.planes; plane0 += held) {
          const i64 end = std::min(panels, panel0 + together), plane_end = std::min(p.planes, plane0 + held);
          const auto place = [&](i64 plane, i64 q) { return ((plane - plane0) * together + q - panel0) * panel_size; };
#pragma omp for collapse(2) schedule(static)
          for (i64 plane = plane0; plane < plane_end; ++plane)
            for (i64 q = panel0; q < end; ++q) {
              const Panel panel(s, group, q);
              pack_panel(p, s, p.g, plane, group, panel, packed.get() + place(plane, q));
              if (p.noise_var) pack_panel(p, s, p.noise_var, plane, group, panel, packed_var.get() + place(plane, q));
            }
          // few units share out their panels too; each packs its voltages anew
          const i64 wanted = 4 * threads_here();
          const i64 parts = folds || threads_here() == 1 ? 1 : std::min(end - panel0, (wanted + units - 1) / units);
#pragma omp for schedule(dynamic, 1)
          for (i64 task = 0; task < units * parts; ++task) {
            const i64 unit = task / parts, part = task % parts;
            const i64 q0 = panel0 + (end - panel0) * part / parts, q1 = panel0 + (end - panel0) * (part + 1) / parts;
            const i64 unit_end = std::min(p.batch, (unit + 1) * unit_rows);
            for (i64 row0 = unit * unit_rows, rows; row0 < unit_end; row0 += rows) {
              rows = folds ? folded->rows(row0, unit_end) : std::min<i64>(ROWS, unit_end - row0);
              const std::vector<Run> runs = p.conv ? runs_of(*p.conv, row0, rows) : std::vector<Run>();
              if (folds) folded->start(runs, unit * unit_rows / pixels);
              for (i64 i = 0; i < ROWS; ++i)
                work->row_scale[i] = p.row_scale && i < rows ? p.row_scale[(row0 + i) / p.rows_per_scale] : 1.0f;
              if (rows < ROWS) std::fill_n(a, block_size * s.passes, 0.0f);
              for (i64 pass = 0; pass < s.passes; ++pass) {
                const Driver drive(p, pass_of(p, pass));
                float* to = a + pass * block_size;
                if (!p.conv)
                  pack_matrix(p, s, drive, group, row0, rows, to);
                else if (p.transposed)
                  pack_pixels<ROWS>(*p.conv, drive, p.groups, group, s.drive, row0, rows, to);
                else
                  pack_patches<ROWS>(*p.conv, drive, p.groups, group, runs, window, to);
                live[pass] = s.passes == 1 || std::any_of(to, to + block_size, [](float v) { return v != 0.0f; });
              }
              if (a2)
                for (i64 e = 0; e < block_size * s.passes; ++e) a2[e] = a[e] * a[e];
              for (i64 plane = plane0; plane < plane_end; ++plane)
                for (i64 q = q0; q < q1; ++q) {
                  const Panel panel(s, group, q);
                  const Converters adc(p, panel);
                  const float* b = packed.get() + place(plane, q);
                  const float* b2 = packed_var ? packed_var.get() + place(plane, q) : nullptr;
                  for (i64 pass = 0; pass < s.passes; ++pass) {
                    const Pass way = pass_of(p, pass);
                    const float weight = (way.phase < 0 ? -way.weight : way.weight) * p.slice_scale[plane];
                    const Driven d{a + pass * block_size, a2 ? a2 + pass * block_size : nullptr, row0, rows,
                                   live[pass] != 0};
                    convert_panel(p, s, panel, adc, d, b, b2, plane, pass, weight, *work);
                  }
                  store(p, s, group, panel, Driven{nullptr, nullptr, row0, rows, true}, runs, plane == 0, share,
                        folded.get(), *work);
                }
            }
            if (folds)
              folded->store(p.y, p.groups, group, unit * unit_rows / pixels, (unit_end - unit * unit_rows) / pixels,
                            plane0 == 0 && panel0 == 0);
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
