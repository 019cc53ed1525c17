// streams: outer products on sliced weights, bit by bit of the inputs.
//
// An input is a code of `bits` bits of the largest one's magnitude, and a sign. Stream t drives wordlines with bit t of the
// codes, and bitlines with the digits of what that bit asks for: 2^t times the change for a code of 1. A slice gathers
// the products of bits and its digit. Oracle: gpuxbar/reference/streamed_update.py.
#pragma once
#include "gpuxbar/converter.cuh"
#include "gpuxbar/slices.cuh"

namespace gpuxbar {

// Twin of `Streams` in gpuxbar/ops/streamed_update.py.
struct Streams {
  i32 bits;
  float code_max;  // 2^bits - 1
  float gain;      // units of the lowest digit for a code, an error, a largest input and a full weight of 1
};

GPUXBAR_FN i32 input_code(const Streams& s, float x, float largest) {
  return largest > 0.0f ? (i32)dac_code(x, s.code_max / largest, -s.code_max, s.code_max) : 0;
}

// What stream t drives a wordline with: -1, 0 or 1.
GPUXBAR_FN float input_bit(i32 code, i32 t) { return stream_digit(code, t, 1u, 0); }

// Units of the lowest digit that an error asks for, for an input's code of 1.
GPUXBAR_FN float error_units(const Streams& s, float d, float largest, float w_max) {
  return -d * (s.gain * largest / w_max);
}

// What stream t drives the bitline of slice k with.
GPUXBAR_FN float error_digit(const Slices& slices, float units, i32 t, i32 k) {
  return slice_units(slices, units * power_of_two(t), k);
}

}  // namespace gpuxbar
