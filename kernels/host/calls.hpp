// Kernels that other host kernels call: declared where both look, so that the compiler sees them agree.
#pragma once
#include "read.hpp"

extern "C" {
void gpuxbar_dac_quantize(const float* x, const float* lsb, gpuxbar::i16* codes, gpuxbar::i64 rows,
                          gpuxbar::i64 per_row, gpuxbar::i64 lsb_count, gpuxbar::i64 code_max, gpuxbar::i64 is_signed,
                          gpuxbar::i64* bad);
void gpuxbar_dac_fit(const float* x, const float* scale, gpuxbar::i16* codes, float* lsb, gpuxbar::i64 rows,
                     gpuxbar::i64 channels, gpuxbar::i64 each, gpuxbar::i64 lsb_count, gpuxbar::i64 code_max,
                     gpuxbar::i64 is_signed, double smallest, gpuxbar::i64* bad);
void gpuxbar_tile_mvm(const gpuxbar::TileMvm* params);
void gpuxbar_outer_product(const float* d, const float* gate, const void* x, const float* scale, float* dw,
                           gpuxbar::i64 batch, gpuxbar::i64 outputs, gpuxbar::i64 inputs, gpuxbar::i64 is_code,
                           gpuxbar::i64 scale_count);
}
