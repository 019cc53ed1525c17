// effective_conductance on the CPU: the block merge (blocks.hpp), one tile a thread, and the approximations.
//
// Bits do not depend on threads. Meaning and oracle: gpuxbar/reference/effective_conductance.py.
#include <memory>

#include "blocks.hpp"
#include "finite.hpp"
#include "threads.hpp"

using namespace gpuxbar;
using namespace gpuxbar::blocks;

namespace {

// ---------------------------------------------------------------- lines on their own

// The largest of many numbers that are to be finite and not negative, as bits; -0 counts as 0.
struct Largest {
  typedef u32 Bits __attribute__((vector_size(4 * LEAVES)));
  Bits bits = {};
  void see(const Lane& x) {
    const Bits own = (Bits)(x + 0.0f);
    bits = own > bits ? own : bits;
  }
  bool sound() const {
    u32 largest = 0;
    for (int lane = 0; lane < LEAVES; ++lane) largest = std::max(largest, bits[lane]);
    return largest < INFINITE;
  }
};

// g times the shares of voltage and current that the tile's lines let through, each line on its own.
// From the open end on, with 1 V there: the current grows by g u, the voltage by resistance times current; shares are
// ratios to the voltage at the driven end. Every LEAVES cells are scaled anew, so that no line overflows.
class Ladder {
 public:
  // Whether all that was given, and all that was found, is finite and not negative.
  struct Sound {
    bool given, found;
  };

 private:
#if defined(__AVX512F__)
  static constexpr int ABREAST = 8;  // vectors of bitlines at a time, with three values each in registers
#else
  static constexpr int ABREAST = 4;
#endif
  i64 rows, cols, high, wide;  // high, wide: whole squares of LEAVES, filled up with open cells at the open ends
  std::vector<float> wordline, bitline, source, sink;

  static std::vector<float> filled(const float* from, i64 count, i64 whole, i64 at) {
    std::vector<float> out(whole, 0.0f);
    std::copy_n(from, count, out.begin() + at);
    return out;
  }
  bool whole() const { return rows == high && cols == wide; }

  // COUNT vectors of bitlines from the top: what every LEAVES rows start with, and the inverse of what they end with.
  template <int COUNT>
  void bitlines(const float* g, i64 c0, float* start, float* scale, Largest& given) const {
    Lane voltage[COUNT], current[COUNT], below[COUNT];
    for (int i = 0; i < COUNT; ++i) {
      voltage[i] = Lane{} + 1.0f, current[i] = Lane{};
      below[i] = load(&bitline[c0 + i * LEAVES]);
    }
    for (i64 r = 0; r < high; ++r) {
      if (r % LEAVES == 0)
        for (int i = 0; i < COUNT; ++i) store(start + r / LEAVES * wide + c0 + i * LEAVES, current[i]);
      if (r == high - 1)
        for (int i = 0; i < COUNT; ++i) below[i] = load(&sink[c0 + i * LEAVES]);
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) {
        const Lane cells = load(g + r * wide + c0 + i * LEAVES);
        given.see(cells);
        current[i] += cells * voltage[i];
        voltage[i] += below[i] * current[i];
      }
      if ((r + 1) % LEAVES) continue;
      for (int i = 0; i < COUNT; ++i) {
        const Lane inverse = 1.0f / voltage[i];
        store(scale + r / LEAVES * wide + c0 + i * LEAVES, inverse);
        current[i] *= inverse;
        voltage[i] = Lane{} + 1.0f;
      }
    }
  }

  // COUNT times LEAVES wordlines from r0 on, from the right: of a driver's voltage, what reaches their cells. By squares of cells,
  // one column of squares after the other.
  template <int COUNT>
  void wordlines(const float* g, i64 r0, float* shares, float* scale) const {
    Lane left[COUNT], first[COUNT], amperes[COUNT] = {}, volts[COUNT], square[COUNT][LEAVES];
    for (int n = 0; n < COUNT; ++n)
      left[n] = load(&wordline[r0 + n * LEAVES]), first[n] = load(&source[r0 + n * LEAVES]);
    for (i64 c0 = wide - LEAVES; c0 >= 0; c0 -= LEAVES) {
      for (int n = 0; n < COUNT; ++n) {
        for (int i = 0; i < LEAVES; ++i) square[n][i] = load(g + (r0 + n * LEAVES + i) * wide + c0);
        swap_lanes<1>(square[n]);
        volts[n] = Lane{} + 1.0f;
      }
#pragma GCC unroll 16
      for (int j = LEAVES - 1; j >= 0; --j)
        for (int n = 0; n < COUNT; ++n) {
          store(shares + (n * wide + c0 + j) * LEAVES, volts[n]);
          amperes[n] += square[n][j] * volts[n];
          volts[n] += (c0 + j ? left[n] : first[n]) * amperes[n];
        }
      for (int n = 0; n < COUNT; ++n) {
        const Lane inverse = 1.0f / volts[n];
        amperes[n] *= inverse;
        store(scale + n * wide + c0, inverse);
      }
    }
    for (int n = 0; n < COUNT; ++n) {
      Lane share = Lane{} + 1.0f;
      for (i64 c0 = 0; c0 < wide; c0 += LEAVES) {
        float* const at = shares + (n * wide + c0) * LEAVES;
        share *= load(scale + n * wide + c0);
        for (int j = 0; j < LEAVES; ++j) square[0][j] = share * load(at + j * LEAVES);
        swap_lanes<1>(square[0]);
        for (int i = 0; i < LEAVES; ++i) store(at + i * LEAVES, square[0][i]);
      }
    }
  }

  // LEAVES rows of COUNT vectors of bitlines, from r0 and c0 on: `shares` of the wordlines' voltages times those of the currents
  // that reach the lower ends.
  template <int COUNT>
  void cells(const float* g, float* out, i64 r0, i64 c0, const float* shares, const float* start, const float* scale,
             float* reach, Largest& found) const {
    Lane voltage[COUNT], current[COUNT], below[COUNT];
    for (int k = 0; k < COUNT; ++k) {
      const i64 c = c0 + k * LEAVES, block = r0 / LEAVES * wide + c;
      voltage[k] = load(reach + c) * load(scale + block);
      current[k] = voltage[k] * load(start + block);
      below[k] = load(&bitline[c]);
      store(reach + c, voltage[k]);
    }
    for (int i = 0; i < LEAVES; ++i)
#pragma GCC unroll 8
      for (int k = 0; k < COUNT; ++k) {
        const i64 c = c0 + k * LEAVES;
        const Lane passed = load(g + (r0 + i) * wide + c) * voltage[k];
        const Lane left_over = passed * load(shares + (c + i) * LEAVES);
        found.see(left_over);
        store(out + (r0 + i) * wide + c, left_over);
        current[k] += passed;
        voltage[k] += below[k] * current[k];
      }
  }

  Sound squares(const float* g, float* out, float* work) const {
    Largest given, found;
    float* const start = work;                          // [high / LEAVES, wide] currents of the bitlines
    float* const scale = start + high * wide / LEAVES;  // [high / LEAVES, wide]
    float* const reach = scale + high * wide / LEAVES;  // [wide]
    float* const scale_along = reach + wide;            // [2, wide / LEAVES, LEAVES]
    float* const shares = scale_along + 2 * wide;       // [2, wide, LEAVES]
    i64 c = 0;
    for (; c + ABREAST * LEAVES <= wide; c += ABREAST * LEAVES) bitlines<ABREAST>(g, c, start, scale, given);
    for (; c < wide; c += LEAVES) bitlines<1>(g, c, start, scale, given);
    std::fill(reach, reach + wide, 1.0f);
    for (i64 end = high; end > 0;) {
      const i64 groups = std::min<i64>(2, end / LEAVES), r0 = end - groups * LEAVES;
      if (groups == 2)  // their sums do not wait for each other
        wordlines<2>(g, r0, shares, scale_along);
      else
        wordlines<1>(g, r0, shares, scale_along);
      for (i64 n = groups - 1; n >= 0; --n) {
        const i64 r = r0 + n * LEAVES;
        const float* const own = shares + n * wide * LEAVES;
        for (c = 0; c + ABREAST * LEAVES <= wide; c += ABREAST * LEAVES)
          cells<ABREAST>(g, out, r, c, own, start, scale, reach, found);
        for (; c < wide; c += LEAVES) cells<1>(g, out, r, c, own, start, scale, reach, found);
      }
      end = r0;
    }
    return {given.sound(), found.sound()};
  }

 public:
  Ladder(i64 rows, i64 cols, Lines lines)
      : rows(rows),
        cols(cols),
        high((rows + LEAVES - 1) / LEAVES * LEAVES),
        wide((cols + LEAVES - 1) / LEAVES * LEAVES),
        wordline(filled(lines.wordline, rows, high, high - rows)),
        bitline(filled(lines.bitline, cols, wide, 0)),
        source(filled(lines.source, rows, high, high - rows)),
        sink(filled(lines.sink, cols, wide, 0)) {}

  // Floats that `solve` takes.
  i64 work() const { return 2 * high * wide / LEAVES + wide * (2 * LEAVES + 3) + (whole() ? 0 : high * wide); }

  Sound solve(const float* g, float* out, float* work) const {
    if (whole()) return squares(g, out, work);
    float* const cells = work;
    float* const own = cells + (high - rows) * wide;
    std::fill(cells, cells + high * wide, 0.0f);
    for (i64 r = 0; r < rows; ++r) std::copy_n(g + r * cols, cols, own + r * wide);
    const Sound sound = squares(cells, cells, cells + high * wide);
    for (i64 r = 0; r < rows; ++r) std::copy_n(own + r * wide, cols, out + r * cols);
    return sound;
  }
};

i64 first_order_work(i64 rows, i64 cols) { return std::max(rows, cols) + cols; }

// out = g (1 - the drops of first order in the resistances).
void first_order(const float* g, i64 rows, i64 cols, Lines lines, float* out, float* work) {
  float* const beyond = work;
  float* const drop = beyond + std::max(rows, cols);
  std::fill(beyond, beyond + cols, 0.0f);
  std::fill(drop, drop + cols, 0.0f);
  for (i64 r = 0; r < rows; ++r)
    for (i64 c = 0; c < cols; ++c) {
      beyond[c] += g[r * cols + c];
      out[r * cols + c] = beyond[c] * (r + 1 < rows ? lines.bitline[c] : lines.sink[c]);
    }
  for (i64 r = rows - 1; r >= 0; --r)
    for (i64 c = 0; c < cols; ++c) {
      drop[c] += out[r * cols + c];
      out[r * cols + c] = drop[c];
    }
  for (i64 r = 0; r < rows; ++r) {
    float total = 0.0f, along = 0.0f;
    for (i64 c = cols - 1; c >= 0; --c) {
      total += g[r * cols + c];
      beyond[c] = total * (c ? lines.wordline[r] : lines.source[r]);
    }
    for (i64 c = 0; c < cols; ++c) {
      along += beyond[c];
      out[r * cols + c] = g[r * cols + c] * (1.0f - along - out[r * cols + c]);
    }
  }
}

// ---------------------------------------------------------------- lines and a coarse tile

constexpr i64 SIDE = 16;  // the most cells along a side of the coarse tile

// Merges k x k cells into one, so that the coupling between lines is read off a small tile.
struct Coarse {
  i64 k, rows, cols, pad;  // of the coarse tile; open cells added at the top
  std::vector<float> wordline, bitline, source, sink;
  i64 fine_rows, fine_cols;
  std::unique_ptr<const Ladder> ladder;  // of the coarse tile

  Coarse(i64 rows, i64 cols, Lines lines) : fine_rows(rows), fine_cols(cols) {
    k = (std::max(rows, cols) + SIDE - 1) / SIDE;
    this->rows = (rows + k - 1) / k, this->cols = (cols + k - 1) / k;
    pad = this->rows * k - rows;
    merge_lines(rows, pad, lines.wordline, lines.source, wordline, source);
    merge_lines(cols, 0, lines.bitline, lines.sink, bitline, sink);
    ladder = std::make_unique<const Ladder>(this->rows, this->cols, this->lines());
  }
  // k lines side by side and k segments in a row.
  void merge_lines(i64 count, i64 before, const float* segment, const float* end, std::vector<float>& segments,
                   std::vector<float>& ends) const {
    for (i64 block = 0; block * k < count + before; ++block) {
      const i64 from = std::max<i64>(0, block * k - before), to = std::min(count, (block + 1) * k - before);
      double wire = 0, last = 0;
      for (i64 i = from; i < to; ++i) wire += segment[i], last += end[i];
      wire /= (double)(to - from), last /= (double)(to - from);
      segments.push_back((float)wire);
      ends.push_back((float)coarse_end(last, wire, (int)k));
    }
  }
  Lines lines() const { return {wordline.data(), bitline.data(), source.data(), sink.data()}; }
  i64 work() const { return rows * cols * 3 + rows + cols + fine_rows + fine_cols * (1 + rows) + ladder->work(); }

  // g_eff holds the ladder of g; adds the coupling.
  void add_coupling(const float* g, float* g_eff, Builder& builder, float* work) const {
    float* const coarse = work;
    float* const alone = coarse + rows * cols;
    float* const smooth = alone + rows * cols;
    float* const p_coarse = smooth + rows * cols;
    float* const q_coarse = p_coarse + rows;
    float* const p = q_coarse + cols;
    float* const q = p + fine_rows;
    float* const across = q + fine_cols;  // [coarse rows, fine cols]
    std::memset(coarse, 0, sizeof(float) * rows * cols);
    std::memset(p_coarse, 0, sizeof(float) * (rows + cols + fine_rows + fine_cols));
    for (i64 i = 0; i < fine_rows; ++i) {
      float* const into = coarse + (i + pad) / k * cols;
      for (i64 c = 0; c < cols; ++c) {
        const i64 end = std::min(fine_cols, (c + 1) * k);
        float sum = 0.0f, strength = 0.0f;
        for (i64 j = c * k; j < end; ++j) {
          sum += g[i * fine_cols + j];
          strength += g_eff[i * fine_cols + j];
          q[j] += g_eff[i * fine_cols + j];
        }
        into[c] += sum;
        p[i] += strength;
      }
      p_coarse[(i + pad) / k] += p[i];
    }
    for (i64 j = 0; j < fine_cols; ++j) q_coarse[j / k] += q[j];
    ladder->solve(coarse, alone, across);
    builder.g = coarse;
    const Block<float> exact = builder.tile();
    for (i64 r = 0; r < rows; ++r)
      for (i64 c = 0; c < cols; ++c) {
        const float strength = p_coarse[r] * q_coarse[c];
        const float coupling = -exact.part(L, B)[(r + builder.pad) * exact.ld + c] - alone[r * cols + c];
        smooth[r * cols + c] = strength > 0.0f ? coupling / strength : 0.0f;
      }
    for (i64 j = 0; j < fine_cols; ++j) {
      const Between c = between((int)j, (int)k, (int)cols);
      const i64 next = std::min<i64>(c.low + 1, cols - 1);
      for (i64 r = 0; r < rows; ++r)
        across[r * fine_cols + j] =
            q[j] * ((1.0f - c.share) * smooth[r * cols + c.low] + c.share * smooth[r * cols + next]);
    }
    for (i64 i = 0; i < fine_rows; ++i) {
      const Between r = between((int)(i + pad), (int)k, (int)rows);
      const i64 next = std::min<i64>(r.low + 1, rows - 1);
      const float low = p[i] * (1.0f - r.share), high = p[i] * r.share;
      for (i64 j = 0; j < fine_cols; ++j)
        g_eff[i * fine_cols + j] += low * across[r.low * fine_cols + j] + high * across[next * fine_cols + j];
    }
  }
};

// ---------------------------------------------------------------- tiles

// Whether all numbers are finite, and (with `signs`) none negative; -0 counts as 0.
bool sound(const float* x, i64 count, bool signs) {
  const u32 mask = signs ? 0xFFFFFFFFu : 0x7FFFFFFFu;
  u32 largest = 0;
  for (i64 e = 0; e < count; ++e) largest = std::max(largest, float_bits(x[e] + 0.0f) & mask);
  return largest < INFINITE;
}

// Adds to a tile's approximation what it was off by at its last exact solution, down to 0.
void correct(float* g_eff, const float* offset, i64 count) {
  for (i64 e = 0; e < count; ++e) {
    const float x = g_eff[e] + offset[e];
    g_eff[e] = x < 0.0f ? 0.0f : x;
  }
}

// |g - anchor| / |anchor|; 0 where both are 0.
float moved(const float* g, const float* anchor, i64 count) {
  Lane apart{}, size{};
  i64 e = 0;
  for (; e + LEAVES <= count; e += LEAVES) {
    const Lane b = load(anchor + e), off = load(g + e) - b;
    apart += off * off;
    size += b * b;
  }
  for (int lane = 0; e < count; ++e, ++lane) {
    const float off = g[e] - anchor[e];
    apart[lane] += off * off;
    size[lane] += anchor[e] * anchor[e];
  }
  float away = 0.0f, whole = 0.0f;
  for (int lane = 0; lane < LEAVES; ++lane) away += apart[lane], whole += size[lane];
  return sqrt_fast(away / std::max(whole, 1e-30f));  // far below the square of a conductance
}

}  // namespace

enum Method { NONE, FIRST_ORDER, LADDER, MEAN_FIELD, EXACT };

// Effective conductances of tiles; `admittance` [tiles, rows, rows] or null: of the drivers' ends (exact only).
// offset, anchor [tiles, rows, cols], drift [tiles] or null: an approximation is corrected by `offset`, and `drift` is how
// far, relatively, the tile is from `anchor`.
// bad[0]: first tile with a conductance that is negative or not finite, bad[1]: whose result is not finite; or -1.
extern "C" void gpuxbar_effective_conductance(const float* g, const float* r_wordline, const float* r_bitline,
                                              const float* r_source, const float* r_sink, float* g_eff,
                                              float* admittance, const float* offset, const float* anchor, float* drift,
                                              i64 tiles, i64 rows, i64 cols, i64 method, i64* bad) {
  const Lines lines{r_wordline, r_bitline, r_source, r_sink};
  const Coarse coarse(rows, cols, lines);
  const Ladder alone(rows, cols, lines);
  if (method == MEAN_FIELD && coarse.k == 1) method = EXACT;
  const Builder plan = method == MEAN_FIELD ? Builder(coarse.rows, coarse.cols, coarse.lines(), false)
                                            : Builder(rows, cols, lines, admittance != nullptr);
  const bool solves = method == EXACT || method == MEAN_FIELD;
  const Memory<Builder> memory(plan);
  bad[0] = bad[1] = -1;
#pragma omp parallel
  {
    const i64 own = solves ? memory.floats() : 0;
    const i64 others = std::max({alone.work(), coarse.work(), first_order_work(rows, cols)});
    const Aligned block(own + others);
    float* const work = block.get() + own;
    Builder builder(plan);
    if (solves) memory.give(builder, block.get());
#pragma omp for schedule(dynamic, 1)
    for (i64 tile = 0; tile < tiles; ++tile) {
      const float* const from = g + tile * rows * cols;
      float* const to = g_eff + tile * rows * cols;
      if (drift) drift[tile] = moved(from, anchor + tile * rows * cols, rows * cols);
      if (method == LADDER) {
        const Ladder::Sound sound = alone.solve(from, to, work);
        if (!sound.given)
          note_first(bad, tile);
        else if (!sound.found)
          note_first(bad + 1, tile);
        if (offset) correct(to, offset + tile * rows * cols, rows * cols);
        continue;
      }
      if (!sound(from, rows * cols, true)) {
        note_first(bad, tile);
        continue;
      }
      if (method == NONE) std::memcpy(to, from, sizeof(float) * rows * cols);
      if (method == FIRST_ORDER) first_order(from, rows, cols, lines, to, work);
      if (method == MEAN_FIELD) {
        alone.solve(from, to, work);
        coarse.add_coupling(from, to, builder, work);
      }
      if (method == EXACT) {
        builder.g = from;
        const Block<float> q = builder.tile();
        for (i64 r = 0; r < rows; ++r)
          for (i64 c = 0; c < cols; ++c) to[r * cols + c] = -q.part(L, B)[(builder.pad + r) * q.ld + c];
        if (admittance)
          for (i64 r = 0; r < rows; ++r)
            std::memcpy(admittance + (tile * rows + r) * rows, q.part(L, L) + (builder.pad + r) * q.ld + builder.pad,
                        sizeof(float) * rows);
      }
      if (offset) correct(to, offset + tile * rows * cols, rows * cols);
      if (!sound(to, rows * cols, false)) note_first(bad + 1, tile);
    }
  }
}
