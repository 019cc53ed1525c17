// dac_quantize, dac_fit and dac_clip_gradient on the CPU: digital values to DAC codes, by a given step or by the one that fits the
// values, and gradients through the edges of a given range.
//
// Oracle: gpuxbar/reference/dac_quantize.py, dac_clip.py.
#include <algorithm>
#include <vector>

#include "calls.hpp"
#include "finite.hpp"
#include "gpuxbar/converter.cuh"
#include "threads.hpp"

using namespace gpuxbar;

namespace {

// Values [rows, channels, each], those of a channel times its scale; null: as they are.
struct Scaled {
  const float *x, *scale;
  i64 channels, each;

  // Visits a row in runs: `visit(first, count, value)`, where value(i) is that of element first + i.
  template <class Visit>
  void row(i64 row, const Visit& visit) const {
    const i64 begin = row * channels * each;
    if (!scale) {
      visit(begin, channels * each, [x = x + begin](i64 i) { return x[i]; });
      return;
    }
    if (each == 1) {
      visit(begin, channels, [x = x + begin, s = scale](i64 i) { return x[i] * s[i]; });
      return;
    }
    for (i64 c = 0; c < channels; ++c)
      visit(begin + c * each, each, [x = x + begin + c * each, s = scale[c]](i64 i) { return x[i] * s; });
  }
};

}  // namespace

extern "C" void gpuxbar_dac_quantize(const float* x, const float* lsb, i16* codes, i64 rows, i64 per_row, i64 lsb_count,
                                     i64 code_max, i64 is_signed, i64* bad) {
  const float top = (float)code_max, bottom = is_signed ? -top : 0.0f;
  i64 found = 0;
#pragma omp parallel for reduction(+ : found) schedule(static) if (rows * per_row >= WORTH_A_THREAD)
  for (i64 block = 0; block < (rows * per_row + 4095) / 4096; ++block) {
    const i64 end = std::min(rows * per_row, (block + 1) * 4096);
    for (i64 e = block * 4096; e < end;) {
      const i64 row = e / per_row, stop = std::min(end, (row + 1) * per_row);
      const float inverse = 1.0f / lsb[lsb_count > 1 ? row : 0];
      i64 odd = 0;
      for (i64 k = e; k < stop; ++k) {
        odd += not_finite(x[k]);
        codes[k] = (i16)(i32)dac_code(x[k], inverse, bottom, top);
      }
      found += odd;
      e = stop;
    }
  }
  *bad = found;
}

extern "C" void gpuxbar_dac_fit(const float* x,      // [rows, channels, each]
                                const float* scale,  // [channels], or null
                                i16* codes,          // like x
                                float* lsb,          // [lsb_count]: for each row, or one for all
                                i64 rows, i64 channels, i64 each, i64 lsb_count, i64 code_max, i64 is_signed,
                                double smallest, i64* bad) {
  const Scaled values{x, scale, channels, each};
  const float top = (float)code_max, bottom = is_signed ? -top : 0.0f;
  std::vector<u32> largest(rows);  // as bits, which have the order of magnitudes
#pragma omp parallel for schedule(static) if (rows * channels * each >= WORTH_A_THREAD)
  for (i64 row = 0; row < rows; ++row) {
    u32 most = 0;
    values.row(row, [&](i64, i64 count, const auto& value) {
      for (i64 i = 0; i < count; ++i) most = std::max(most, float_bits(value(i)) & 0x7FFFFFFFu);
    });
    largest[row] = most;
  }
  const u32 most = rows ? *std::max_element(largest.begin(), largest.end()) : 0;
  *bad = 0;
  if (most >= INFINITE) {
    for (i64 row = 0; row < rows; ++row)
      values.row(row, [&](i64, i64 count, const auto& value) {
        for (i64 i = 0; i < count; ++i) *bad += not_finite(value(i));
      });
    return;
  }
  for (i64 k = 0; k < lsb_count; ++k)
    lsb[k] = std::max(bits_float(lsb_count > 1 ? largest[k] : most), (float)smallest) / top;
#pragma omp parallel for schedule(static) if (rows * channels * each >= WORTH_A_THREAD)
  for (i64 row = 0; row < rows; ++row) {
    const float inverse = 1.0f / lsb[lsb_count > 1 ? row : 0];
    values.row(row, [&](i64 first, i64 count, const auto& value) {
      for (i64 i = 0; i < count; ++i) codes[first + i] = (i16)(i32)dac_code(value(i), inverse, bottom, top);
    });
  }
}

// Through the edges of a DAC's range: grad_x = grad where x is inside, and the derivative by the step, `*slope`, the sum of
// grad (round(x / lsb) - x / lsb) inside and of grad times the largest or least code beyond (Esser et al., ICLR 2020).
extern "C" void gpuxbar_dac_clip_gradient(const float* grad, const float* x, double top, float* grad_x, i64 size,
                                          i64 code_max, i64 is_signed, double* slope) {
  const float most = (float)code_max, least = is_signed ? -most : 0.0f;
  const float high = (float)top, low = is_signed ? -high : 0.0f;
  const float inverse = most / high;
  const i64 blocks = (size + 4095) / 4096;
  std::vector<double> sums(blocks);  // added up in order, whatever thread made them
#pragma omp parallel for schedule(static) if (size >= WORTH_A_THREAD)
  for (i64 block = 0; block < blocks; ++block) {
    const i64 end = std::min(size, (block + 1) * 4096);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (i64 e = block * 4096; e < end; ++e) {
      const float steps = x[e] * inverse;
      const bool inside = x[e] <= high && x[e] >= low;
      const float by_step = inside ? round_even(steps) - steps : (x[e] > high ? most : least);
      grad_x[e] = inside ? grad[e] : 0.0f;
      sum += grad[e] * by_step;
    }
    sums[block] = sum;
  }
  *slope = 0.0;
  for (const double sum : sums) *slope += sum;
}
