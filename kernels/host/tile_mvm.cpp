// tile_mvm on the CPU: tile products with noise, ADC and shift-and-add fused behind them.
//
// A block of ROWS driven vectors meets panels of COLS bitlines; the partial sums of one tile stay in the first
// cache until they are converted, so they never reach memory. Every output is the work of one thread in a fixed
// order: the same bits on any thread count and batch split. Meaning and oracle: gpuxbar/reference/tile_mvm.py.
#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "calls.hpp"
#include "few_rows.hpp"
#include "gpuxbar/converter.cuh"
#include "fold.hpp"
#include "images.hpp"
#include "lanes.hpp"
#include "threads.hpp"

using namespace gpuxbar;

namespace {

constexpr i64 PACKED = 1 << 20;  // floats of packed conductance held at a time
constexpr i64 NEIGHBOURS = 4;    // panels that are packed together
constexpr i64 DRIVEN = 1 << 15;  // floats that drive the groups of a bundle, a part of the second cache

// How many groups are read together, since their outputs lie side by side: as many as fill whole panels. Alone, one of few
// outputs would leave most of a panel, and of what a counter draws, unused.
i64 bundled(const TileMvm& p, const Shape& s) {
  const i64 whole = COLS / std::gcd<i64>(s.sense, COLS), most = DRIVEN / (s.drive * s.products * ROWS);
  return std::clamp<i64>(std::min(whole, most), 1, p.groups);
}

struct Bundle {
  i64 group, groups;    // the first one, and how many
  i64 column, columns;  // their outputs, in the numbering of all
  Bundle(const TileMvm& p, const Shape& s, i64 most, i64 index)
      : group(index * most),
        groups(std::min(most, p.groups - group)),
        column(group * s.sense),
        columns(groups * s.sense) {}
  i64 panels() const { return (column + columns + COLS - 1) / COLS - column / COLS; }
};

// COLS bitlines of a bundle, from a multiple of COLS in the numbering of all outputs; `begin` .. `end` - 1 are real.
struct Panel {
  i64 column, begin, end, local;  // `local`: index within the bundle of the panel's first column, may be negative
  Panel(const Bundle& bundle, i64 index)
      : column((bundle.column / COLS + index) * COLS),
        begin(std::max<i64>(0, bundle.column - column)),
        end(std::min<i64>(COLS, bundle.column + bundle.columns - column)),
        local(column - bundle.column) {}

  // `each(group, line, begin, end)` of what a group of the bundle has of the panel: columns from its output `line` on.
  template <class Each>
  void by_group(const Shape& s, const Each& each) const {
    for (i64 j = begin, last; j < end; j = last) {
      const i64 group = (local + j) / s.sense;
      last = std::min(end, (group + 1) * s.sense - local);
      each(group, local + j - group * s.sense, j, last);
    }
  }
};

// a[i / LANES][k][i % LANES]: what drives wordline k for row `row0 + i` of a matrix. In this order what register tiles share
// fits the first cache; whole rows of ROWS would meet there in few places.
void pack_matrix(const TileMvm& p, const Shape& s, const Digits& digits, i64 group, i64 row0, i64 rows, float* a) {
  const i64 stride = p.groups * s.drive;
  float line[LANES][64];
  for (i64 i = 0; i < rows; i += LANES, a += s.drive * LANES) {
    const i64 n = std::min<i64>(LANES, rows - i);
    for (i64 k = 0; k < s.drive; k += 64) {
      const i64 m = std::min<i64>(64, s.drive - k);
      for (i64 r = 0; r < n; ++r) digits(line[r], (row0 + i + r) * stride + group * s.drive + k, m);
      transpose(line[0], 64, n, m, a + k * LANES, LANES);
    }
  }
}

// b[k][j]: conductance between wordline k and bitline j of a panel. Panels from `first` on lie behind each other, and are
// packed together, since lines of the array are far apart but their parts are neighbours.
void pack_panels(const TileMvm& p, const Shape& s, const float* m, i64 plane, const Bundle& bundle, i64 first, i64 end,
                 float* b) {
  const float* base = m + (plane * p.groups + bundle.group) * p.inputs * p.cols;
  const i64 step = p.transposed ? s.drive : COLS;
  for (i64 k0 = 0; k0 < s.drive; k0 += step)
    for (i64 q = first; q < end; ++q)
      Panel(bundle, q).by_group(s, [&](i64 group, i64 line, i64 begin, i64 last) {
        const float* from = base + group * p.inputs * p.cols;
        float* to = b + (q - first) * s.drive * COLS + begin;
        if (p.transposed) return transpose(from + line * p.cols, p.cols, last - begin, s.drive, to, COLS);
        for (i64 k = k0; k < std::min<i64>(s.drive, k0 + COLS); ++k)
          copy(to + k * COLS, from + k * p.cols + line, last - begin);
      });
}

// Where the sums of a block go: vector v of the rows of column j to `to + j * column + vector[v]`.
struct Way {
  float* to;
  i64 column;
  i64 vector[VECTORS];
};

// Reads one block of rows after the other, for one thread.
class Reader {
 public:
  // `images`: the most whose patches are folded together; `groups`: the most of a bundle; `share` of a gate: see gate_part.
  Reader(const TileMvm& p, const Shape& s, i64 images, i64 groups, float share)
      : p(p),
        s(s),
        drivers(p, p.groups * s.drive),
        keys(p.seed),
        share(share),
        pixels(p.conv ? p.conv->out_h * p.conv->out_w : 1) {
    const bool spread = p.conv && !pointwise(*p.conv);
    if (spread && p.transposed) folded.emplace(*p.conv, images, groups);
    if (spread && !p.transposed) patches.emplace(*p.conv, p.dac_error ? 2 : 1);
    // vectors of patches that are parts of lines need no packing: the lines drive the array from where they lie, unless every
    // line of the array makes something else of them
    direct = patches && p.conv->stride_w == 1 && p.conv->out_w % LANES == 0 && pixels % ROWS == 0 && !p.dac_error;
    size = direct ? patches->size : s.drive * ROWS;
    values = Aligned(groups * s.products * size);
    std::fill_n(values.get(), groups * s.products * size, 0.0f);
    if (s.together > 1) {
      one = Aligned(size);
      std::fill_n(one.get(), size, 0.0f);
    }
    live.resize(groups * s.products);
    if (p.noise_var) squares = Aligned(groups * s.products * size);
    if (!direct) packed.resize(s.drive);
    // vectors lie apart where they are whole, so that what register tiles share fits the first cache; whole rows of ROWS would meet
    // there in few places
    apart = !p.conv || (patches && p.conv->out_w % LANES == 0);
    if (patches && apart) patches->line_step = LANES, patches->vector_step = s.drive * LANES;
    for (i64 k = 0; k < (i64)packed.size(); ++k) packed[k] = k * (apart ? LANES : ROWS);
  }

  // Rows of the block that begins at row0, before `end`.
  i64 count(i64 row0, i64 end) const { return folded ? folded->rows(row0, end) : std::min<i64>(ROWS, end - row0); }

  // Drives the lines of a bundle for `count` rows from row0 on; folded are images from `image0` on.
  void drive(const Bundle& bundle, i64 row0, i64 count, i64 image0) {
    first = row0, rows = count, lanes = (count + LANES - 1) / LANES * LANES;
    const std::vector<Run> runs = p.conv ? runs_of(*p.conv, row0, count) : std::vector<Run>();
    if (folded) folded->start(runs, image0);
    std::fill_n(row_scale, ROWS, 1.0f);
    if (p.row_scale)
      for (i64 i = 0, run; i < count; i += run) {
        run = std::min(count - i, p.rows_per_scale - (row0 + i) % p.rows_per_scale);
        std::fill_n(row_scale + i, run, p.row_scale[(row0 + i) / p.rows_per_scale]);
      }
    const i64 driven = bundle.groups * s.products * size;
    if (count < ROWS) std::fill_n(values.get(), driven, 0.0f);
    for (i64 v = 0; v < VECTORS; ++v) vector[v] = v * (apart ? s.drive : 1) * LANES;
    if (direct)
      for (const Run& run : runs)
        for (i64 i = 0; i < run.count; i += LANES)
          vector[(run.first + i) / LANES] = patches->pixel(runs.front(), run) + i;
    for (i64 part = 0; part < bundle.groups * s.products; ++part) {
      const i64 group = bundle.group + part / s.products;
      float* to = values.get() + part * size;
      if (s.together == 1) {
        drive_pass(group, part % s.products, runs, to);
      } else {
        std::fill_n(to, size, 0.0f);
        for (i64 pass = 0; pass < s.together; ++pass) {
          drive_pass(group, pass, runs, one.get());
          const float weight = weight_within(p, s, pass);
          for (i64 e = 0; e < size; ++e) to[e] = fma(weight, one.get()[e], to[e]);
        }
      }
      live[part] = s.products == 1 || std::any_of(to, to + size, [](float v) { return v != 0.0f; });
    }
    if (p.noise_var)
      for (i64 e = 0; e < driven; ++e) squares.get()[e] = values.get()[e] * values.get()[e];
  }

  // Reads a panel of a plane, whose packed conductances and variances are b and b2, and adds the block's results to y.
  void read(const Panel& panel, const float* b, const float* b2, i64 plane) {
    const Converters<COLS> adc(p, panel.column, panel.begin, panel.end);
    const bool sent = send_to(panel, plane == 0);
    if (s.products > 1 || !p.adc_bits) std::fill_n(sum.at, COLS * ROWS, 0.0f);
    if (p.gate) std::fill_n(gate.at, COLS * ROWS, 0.0f);
    for (i64 product = 0; product < s.products; ++product)
      for (i64 tile = 0; tile < s.tiles; ++tile) {
        sum_currents(panel, b, b2, plane, product, tile);
        convert(panel, adc, plane, product, tile);
      }
    store(panel, plane == 0, sent);
  }

  // Adds folded images to y, or puts the first of them there.
  void fold(const Bundle& bundle, i64 image0, i64 images, bool first_of_all) {
    if (folded) folded->store(p.y, p.groups, bundle.group, bundle.groups, image0, images, first_of_all);
  }

 private:
  // Drives the lines of a group in a pass of the DAC, for the block's rows.
  void drive_pass(i64 group, i64 pass, const std::vector<Run>& runs, float* to) {
    const Digits digits(p, pass_of(p, pass));
    if (!p.conv)
      pack_matrix(p, s, digits, group, first, rows, to);
    else if (!patches)
      pack_pixels<ROWS>(
          *p.conv,
          [&](float* to, i64 from, i64 count) {
            digits.ahead(from + ROWS);
            digits(to, from, count);
          },
          p.groups, group, s.drive, first, rows, to);
    else if (direct)
      patches->fill(digits, AlikeLines(drivers), p.groups, group, runs.front(), runs.back(), to);
    else if (!p.dac_error)
      patches->pack(digits, p.groups, group, runs, to, AlikeLines(drivers));
    else {
      patches->pack(digits, p.groups, group, runs, to, ErringLines{drivers, group * s.drive, patches->kind()});
      drivers.conduct(to, size);
    }
    if (p.bends() && !patches) bend(group, to);
  }

  // Puts what devices see of the lines of a group in the place of digits.
  void bend(i64 group, float* digits) const {
    const i64 together = p.conv ? lanes : LANES;  // rows of a line
    for (i64 k = 0; k < s.drive; ++k)
      for (i64 i = 0; i < lanes; i += together)
        drivers.of_line(digits + packed[k] + vector[i / LANES], together, group * s.drive + k);
  }

  // Decides where sums go: to their place in y or in what is folded, if they are alone there and whole vectors of rows lie
  // together, and true; else to `sum`.
  bool send_to(const Panel& panel, bool first_plane) {
    way = Way{sum.at, ROWS, {}};
    for (i64 v = 0; v < VECTORS; ++v) way.vector[v] = v * LANES;
    const i64 image = first / pixels, pixel = first % pixels;
    if (folded) {
      float* const laid = folded->places(way.vector);
      if (laid) way.to = laid, way.column = folded->column;
      return laid;
    }
    const bool in_place = p.conv && first_plane && !p.bias && lanes == rows && pixel + rows <= pixels;
    if (in_place) way.to = p.y + (image * p.groups * s.sense + panel.column) * pixels + pixel, way.column = pixels;
    return in_place;
  }

  // The partial sums of a tile in a product, with read noise.
  void sum_currents(const Panel& panel, const float* b, const float* b2, i64 plane, i64 product, i64 tile) {
    const i64 k0 = tile * p.tile, length = std::min(p.tile, s.drive - k0);
    panel.by_group(s, [&](i64 group, i64, i64 begin, i64 end) {
      const i64 part = group * s.products + product;
      if (live[part])
        multiply_block(rows, begin, end, length, driven(values, part, k0), b + k0 * COLS, psum);
      else
        std::fill_n(psum.at + begin * ROWS, (end - begin) * ROWS, 0.0f);
    });
    const float sigma = p.sigma();
    if (!(sigma > 0.0f) && !p.noise_var) return;
    const u32 purpose = p.transposed ? READ_TRANSPOSED : READ, row = (u32)(p.row_offset + first);
    if (p.noise_var) {
      panel.by_group(s, [&](i64 group, i64, i64 begin, i64 end) {
        multiply_block(rows, begin, end, length, driven(squares, group * s.products + product, k0), b2 + k0 * COLS,
                       variance);
      });
      for (i64 e = panel.begin * ROWS; e < panel.end * ROWS; ++e)
        variance.at[e] = sqrt_fast(fma(sigma, sigma, max(variance.at[e], 0.0f)));
    }
    for (i64 pass = product * s.together; pass < (product + 1) * s.together; ++pass)
      add_pass_noise(panel, purpose << 24 | (u32)((pass * p.planes + plane) * s.tiles + tile), row,
                     sigma * weight_within(p, s, pass));
  }

  // Adds the read noise of a pass, whose draws are those of `third`.
  void add_pass_noise(const Panel& panel, u32 third, u32 row, float sigma) {
    const Draws draws{third, (u32)*p.step, keys};
    const Plane* deviation = p.noise_var ? &variance : nullptr;
    if (p.fast)
      add_noise<true>(draws, (u32)panel.column, row, rows, panel.begin, panel.end, sigma, deviation, psum);
    else
      add_noise<false>(draws, (u32)panel.column, row, rows, panel.begin, panel.end, sigma, deviation, psum);
  }

  // What drives the lines from k0 on of a group in a product, part group * products + product: `of` are values or their squares.
  Rows driven(const Aligned& of, i64 part, i64 k0) const {
    Rows found{of.get() + part * size, (direct ? patches->places : packed).data() + k0, {}};
    std::copy_n(vector, VECTORS, found.vector);
    return found;
  }

  // Converts partial sums; behind the last tile of the last product, sums of all are sent on their way.
  void convert(const Panel& panel, const Converters<COLS>& adc, i64 plane, i64 product, i64 tile) {
    const float weight = weight_of(p, s, product) * p.slice_scale[plane];
    const float code_max = p.code_max(), code_min = p.code_min(), part = gpuxbar::abs(weight);
    const i64 count = lanes;
    const bool begun = tile > 0, last = tile == s.tiles - 1, done = last && product == s.products - 1;
    for (i64 j = panel.begin; j < panel.end; ++j) {
      float* current = psum.at + j * ROWS;
      float *total = sum.at + j * ROWS, *open = gate.at + j * ROWS;
      i32* code_sum = codes + j * ROWS;
      if (!p.adc_bits) {
        const float step = weight * adc.factor[j];
        for (i64 i = 0; i < count; ++i) total[i] = fma(step, current[i], total[i]);
        if (p.gate)
          for (i64 i = 0; i < count; ++i) open[i] += part;
        if (done) send(panel, j, [=](i64 i) { return total[i]; });
        continue;
      }
      const i64 converter = (plane * s.tiles + tile) * p.groups * s.sense + panel.column + j;
      float gain = adc.factor[j] * (p.adc_gain ? p.adc_gain[converter] : 1.0f);
      float offset = p.adc_offset ? p.adc_offset[converter] * p.per_ampere() * adc.factor[j] : 0.0f;
      if (p.adc_inl) {  // beforehand, so that what follows is every converter's
        for (i64 i = 0; i < count; ++i)
          current[i] = bent(fma(current[i], gain, offset), p.adc_inl[converter], code_max);
        gain = 1.0f, offset = 0.0f;
      }
      const float step = weight * adc.lsb[j];
      const auto steps = [=](i64 i) { return fma(current[i], gain, offset); };
      const auto code = [=](i64 i) { return adc_code(steps(i), code_min, code_max); };
      const auto code_of_all = [=](i64 i) { return (float)(code_sum[i] + (i32)code(i)); };
      if (p.gate)
        for (i64 i = 0; i < count; ++i) open[i] += in_range(steps(i), code_min, code_max) ? part : 0.0f;
      const auto add = [&](const auto& codes) {
        if (s.products == 1) return send(panel, j, [=](i64 i) { return fma(step, codes(i), 0.0f); });
        for (i64 i = 0; i < count; ++i) total[i] = fma(step, codes(i), total[i]);
        if (done) send(panel, j, [=](i64 i) { return total[i]; });
      };
      if (last && begun)
        add(code_of_all);
      else if (last)
        add(code);
      else if (begun)
        for (i64 i = 0; i < count; ++i) code_sum[i] += (i32)code(i);
      else
        for (i64 i = 0; i < count; ++i) code_sum[i] = (i32)code(i);
    }
  }

  // Sends column j of a panel: `value(i)` of row i, times its scales.
  template <class Value>
  void send(const Panel& panel, i64 j, const Value& value) {
    const float scale = p.col_scale ? p.col_scale[panel.column + j] : 1.0f;
    for (i64 i = 0; i < lanes; i += LANES) {
      float* to = way.to + j * way.column + way.vector[i / LANES];
#pragma omp simd
      for (int lane = 0; lane < LANES; ++lane)
        to[lane] = fma(value(i + lane), row_scale[i + lane] * scale, 0.0f);  // 0, never -0
    }
  }

  // Adds a panel's sums, unless they were sent there, and gates to y in its layout: rows of a matrix, images, or folded
  // images.
  void store(const Panel& panel, bool first_plane, bool sent) {
    const i64 sensed = p.groups * s.sense;
    for (i64 j = panel.begin; j < panel.end; ++j) {
      const i64 column = panel.column + j;
      const float bias = first_plane && p.bias ? p.bias[column] : 0.0f;
      float *total = sum.at + j * ROWS, *open = gate.at + j * ROWS;
      if (p.gate)
        for (i64 i = 0; i < lanes; ++i) open[i] *= share;
      if (folded) {
        if (!sent) folded->place(j, total);
      } else if (p.conv) {
        for (i64 i = 0; i < rows;) {
          const i64 image = (first + i) / pixels, pixel = (first + i) % pixels,
                    run = std::min(rows - i, pixels - pixel);
          const i64 at = (image * sensed + column) * pixels + pixel;
          if (!sent)
            for (i64 r = 0; r < run; ++r) p.y[at + r] = (first_plane ? bias : p.y[at + r]) + total[i + r];
          if (p.gate)
            for (i64 r = 0; r < run; ++r) p.gate[at + r] = (first_plane ? 0.0f : p.gate[at + r]) + open[i + r];
          i += run;
        }
      }
    }
    if (folded) folded->add(panel.local, panel.begin, panel.end);
    if (p.conv) return;
    store_rows(panel, sum, first_plane ? p.bias : nullptr, first_plane, p.y);
    if (p.gate) store_rows(panel, gate, nullptr, first_plane, p.gate);
  }

  // Adds values of a panel, and `bias` unless that is null, to the rows of a matrix, or puts the first of them there.
  void store_rows(const Panel& panel, const Plane& values, const float* bias, bool first_plane, float* to) {
    alignas(64) float row[ROWS * COLS];
    transpose(values.at, ROWS, COLS, lanes, row, COLS);
    for (i64 i = 0; i < rows; ++i) {
      float* line = to + (first + i) * p.groups * s.sense + panel.column;
      for (i64 j = panel.begin; j < panel.end; ++j) {
        const float value = row[i * COLS + j] + (bias ? bias[panel.column + j] : 0.0f);
        line[j] = (first_plane ? 0.0f : line[j]) + value;
      }
    }
  }

  const TileMvm& p;
  const Shape& s;
  const Drivers drivers;
  const WideKeys keys;
  const float share;
  const i64 pixels;
  std::optional<PatchLines<ROWS>> patches;
  std::optional<Folded> folded;
  bool direct;                    // lines of images drive, not packed patches
  bool apart;                     // all lines of a vector of packed rows lie together, and the next vector behind them
  i64 size;                       // of the values of a group in a product
  Aligned values{0}, squares{0};  // squares only where noise depends on them
  Aligned one{0};                 // what a pass drives, where it is one of several of a product
  std::vector<char> live;   // of products of groups: a phase of inputs of one sign, or a high bit, often drives nothing
  std::vector<i64> packed;  // where packed lines begin
  i64 first = 0, rows = 0, lanes = 0;  // of the block; lanes: rows in whole vectors
  i64 vector[VECTORS] = {};            // where vectors of rows lie on a driven line
  Way way{};
  Plane psum, variance, sum, gate;  // of a panel, [COLS][ROWS]
  alignas(64) i32 codes[COLS * ROWS];
  alignas(64) float row_scale[ROWS];
};

}  // namespace

extern "C" void gpuxbar_tile_mvm(const TileMvm* params) {
  const TileMvm& p = *params;
  const Shape s(p);
  // a unit of work is whole images where results fold, so that no two threads meet in one
  const i64 pixels = p.conv ? p.conv->out_h * p.conv->out_w : 1;
  const bool folds = p.conv && p.transposed && !pointwise(*p.conv);
  const i64 unit_images = std::max<i64>(1, ROWS / pixels), unit_rows = folds ? unit_images * pixels : ROWS;
  const i64 units = (p.batch + unit_rows - 1) / unit_rows;
  float weights = 0.0f;
  for (i64 plane = 0; plane < p.planes; ++plane)
    for (i64 k = 0; k < s.products; ++k) weights += gpuxbar::abs(p.slice_scale[plane] * weight_of(p, s, k));
  const float share = gpuxbar::gate_part(weights, s.tiles);
  if (!p.conv && p.batch <= FEW) {
    read_few(p, s, share);
    return;
  }

  // panels, planes and bundles packed at a time; a block drives its lines once for all panels and planes of them
  const i64 most = bundled(p, s), bundles = (p.groups + most - 1) / most;
  const i64 panel_size = s.drive * COLS, fit = std::max<i64>(1, PACKED / std::max<i64>(1, panel_size));
  const i64 together = std::min((most * s.sense + COLS - 1) / COLS + 1, fit);
  const i64 held = std::min(p.planes, std::max<i64>(1, fit / together));
  const i64 stock = std::min(bundles, std::max<i64>(1, fit / (together * held)));
  const i64 packed_size = stock * held * together * panel_size;
  const Aligned packed(packed_size), packed_var(p.noise_var ? packed_size : 0);

#pragma omp parallel
  {
    const std::unique_ptr<Reader> reader(new Reader(p, s, unit_images, most, share));
    for (i64 bundle0 = 0; bundle0 < bundles; bundle0 += stock) {
      const i64 bundle_end = std::min(bundles, bundle0 + stock);
      i64 panels = 0;
      for (i64 n = bundle0; n < bundle_end; ++n) panels = std::max(panels, Bundle(p, s, most, n).panels());
      for (i64 panel0 = 0; panel0 < panels; panel0 += together)
        for (i64 plane0 = 0; plane0 < p.planes; plane0 += held) {
          const i64 end = std::min(panels, panel0 + together), plane_end = std::min(p.planes, plane0 + held);
          const auto place = [&](i64 n, i64 plane, i64 q) {
            return (((n - bundle0) * held + plane - plane0) * together + q - panel0) * panel_size;
          };
#pragma omp for collapse(3) schedule(static)
          for (i64 n = bundle0; n < bundle_end; ++n)
            for (i64 plane = plane0; plane < plane_end; ++plane)
              for (i64 q = panel0; q < end; q += NEIGHBOURS) {
                const Bundle bundle(p, s, most, n);
                const i64 last = std::min({end, bundle.panels(), q + NEIGHBOURS});
                pack_panels(p, s, p.g, plane, bundle, q, last, packed.get() + place(n, plane, q));
                if (p.noise_var)
                  pack_panels(p, s, p.noise_var, plane, bundle, q, last, packed_var.get() + place(n, plane, q));
              }
          // little work shares out its panels too; each part drives its lines anew
          const i64 wanted = 4 * threads_here(), blocks = (bundle_end - bundle0) * units;
          const i64 parts = folds || threads_here() == 1 ? 1 : std::min(end - panel0, (wanted + blocks - 1) / blocks);
#pragma omp for schedule(dynamic, 1)
          for (i64 task = 0; task < blocks * parts; ++task) {
            const i64 n = bundle0 + task / parts / units, unit = task / parts % units, part = task % parts;
            const Bundle bundle(p, s, most, n);
            const i64 all = std::min(end, bundle.panels()) - panel0, image0 = unit * unit_rows / pixels;
            const i64 q0 = panel0 + all * part / parts, q1 = panel0 + all * (part + 1) / parts;
            const i64 unit_end = std::min(p.batch, (unit + 1) * unit_rows);
            for (i64 row0 = unit * unit_rows, rows; row0 < unit_end; row0 += rows) {
              rows = reader->count(row0, unit_end);
              reader->drive(bundle, row0, rows, image0);
              for (i64 plane = plane0; plane < plane_end; ++plane)
                for (i64 q = q0; q < q1; ++q) {
                  const i64 at = place(n, plane, q);
                  reader->read(Panel(bundle, q), packed.get() + at, p.noise_var ? packed_var.get() + at : nullptr,
                               plane);
                }
            }
            reader->fold(bundle, image0, (unit_end - unit * unit_rows) / pixels, plane0 == 0 && panel0 == 0);
          }
        }
    }
  }
}
