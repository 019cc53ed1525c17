// outer_product on the CPU: dw[o][i] = sum_b d[b][o] gate[b][o] scale[b] x[b][i].
//
// Outputs and inputs are packed in panels that a block's register tiles find in the caches, and the batch in pieces whose
// sums are added, so that no sum is longer than a piece. Every weight is summed in one order, so the bits do not depend on
// threads. Oracle: gpuxbar/reference/outer_product.py.
#include <algorithm>

#include "calls.hpp"
#include "threads.hpp"
#include "wide.hpp"

using namespace gpuxbar;

namespace {

constexpr int TILE = 6;  // outputs of a register tile
#if defined(__AVX512F__)
constexpr int DEEP = 4;  // vectors of inputs of a register tile
#else
constexpr int DEEP = 2;
#endif
constexpr i64 TALL = 24;            // outputs of a panel
constexpr i64 WIDE = DEEP * LANES;  // inputs of a panel
constexpr i64 PIECE = 256;          // samples whose products are summed in registers
static_assert(TALL % TILE == 0);

constexpr i64 panels(i64 lines, i64 size) { return (lines + size - 1) / size; }

// Panel `p` of SIZE lines of samples [batch, lines], which `value` gives by sample and place; zeros behind the last line.
template <i64 SIZE, class Value>
void pack(const Value& value, i64 batch, i64 lines, i64 p, float* to) {
  const i64 count = std::min(SIZE, lines - p * SIZE);
  for (i64 b = 0; b < batch; ++b, to += SIZE) {
    const i64 at = b * lines + p * SIZE;
    if (count == SIZE)  // known while compiling
      for (i64 j = 0; j < SIZE; ++j) to[j] = value(b, at + j);
    else
      for (i64 j = 0; j < SIZE; ++j) to[j] = j < count ? value(b, at + j) : 0.0f;
  }
}

// Products of `depth` samples of two panels, added to `rows` rows of a block, `stride` apart, or, the first of them, put there;
// also to what follows in the same register tile.
void multiply(i64 depth, const float* d, const float* x, i64 rows, bool first, float* block, i64 stride) {
  for (i64 i = 0; i < rows; i += TILE) {
    float* to = block + i * stride;
    register_tile<LANES, TILE, DEEP>(depth, d + i, TALL, x, WIDE, first ? nullptr : to, stride, 1.0f, to, stride);
  }
}

}  // namespace

extern "C" void gpuxbar_outer_product(const float* d,      // [B, O]
                                      const float* gate,   // [B, O], or null
                                      const void* x,       // codes or float32 [B, I]
                                      const float* scale,  // [1] or [B]: value of one unit of x
                                      float* dw,           // [O, I]
                                      i64 batch, i64 outputs, i64 inputs, i64 is_code, i64 scale_count) {
  const i64 tall = panels(outputs, TALL), wide = panels(inputs, WIDE);
  const Aligned left(tall * TALL * batch), right(wide * WIDE * batch);
  const auto unit = [=](i64 b) { return scale[scale_count > 1 ? b : 0]; };
#pragma omp parallel if (batch * outputs * inputs >= PRODUCTS_WORTH_A_THREAD)
  {
#pragma omp for schedule(static) nowait
    for (i64 p = 0; p < tall; ++p) {
      float* to = left.get() + p * TALL * batch;
      if (gate)
        pack<TALL>([=](i64, i64 e) { return d[e] * gate[e]; }, batch, outputs, p, to);
      else
        pack<TALL>([=](i64, i64 e) { return d[e]; }, batch, outputs, p, to);
    }
#pragma omp for schedule(static)
    for (i64 p = 0; p < wide; ++p) {
      float* to = right.get() + p * WIDE * batch;
      if (is_code)
        pack<WIDE>([=](i64 b, i64 e) { return (float)((const i16*)x)[e] * unit(b); }, batch, inputs, p, to);
      else
        pack<WIDE>([=](i64 b, i64 e) { return ((const float*)x)[e] * unit(b); }, batch, inputs, p, to);
    }
#pragma omp for collapse(2) schedule(static)
    for (i64 p = 0; p < tall; ++p)
      for (i64 q = 0; q < wide; ++q) {
        const i64 rows = std::min(TALL, outputs - p * TALL), columns = std::min(WIDE, inputs - q * WIDE);
        const bool whole = rows == TALL && columns == WIDE;  // else by way of a block that is
        alignas(64) float block[TALL * WIDE];
        float* corner = dw + p * TALL * inputs + q * WIDE;
        float* to = whole ? corner : block;
        const i64 stride = whole ? inputs : WIDE;
        i64 b = 0;
        do  // at least once: without samples the sums are 0
          multiply(std::min(PIECE, batch - b), left.get() + (p * batch + b) * TALL,
                   right.get() + (q * batch + b) * WIDE, rows, b == 0, to, stride);
        while ((b += PIECE) < batch);
        for (i64 i = 0; i < rows && !whole; ++i) std::copy_n(block + i * WIDE, columns, corner + i * inputs);
      }
  }
}
