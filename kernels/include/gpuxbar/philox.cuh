// Philox4x32: the counter-based generator behind every random number of the library.
//
// A draw is a pure function of (seed, purpose, slot, row, column group, step): no state, so a result does not
// depend on launch shape, thread count, chunking or device, and backward can recompute what forward drew.
//
//   key     = 64-bit seed
//   counter = { column group, row, purpose << 24 | slot, step }
//
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// What a draw is for; the Python twin is gpuxbar/reference/random.py (a test compares them).
enum Purpose : u32 {
  READ = 1,             // read noise of a forward read; slot: conversion (stream, plane, tile)
  READ_TRANSPOSED = 2,  // read noise of a transposed read
  WRITE = 3,            // write noise of programming; slot: plane
  DEVICE_SPREAD = 4,    // device-to-device spread of programming; slot: plane
  STUCK = 5,            // stuck cells; slot: plane
  // gain error of a converter; slot: conversion, row: 0 forwards, 1 backwards; 2 and 3: non-linearity; of DACs, slot 0, row 4, 5
  // and 6: gain, offset and non-linearity forwards, 7, 8 and 9 backwards
  ADC_GAIN = 6,
  ADC_OFFSET = 7,  // offset error of a converter; slot: conversion
  TEST_READ = 8,   // inputs of a test read; row: sample
  CYCLE = 16,      // cycle-to-cycle noise of an update; slot: plane
  // device-to-device spread of an update, two parameters a draw by the fast generator; slot: plane, row: wordline,
  // columns 2 bitline and 2 bitline + 1
  UPDATE_SPREAD_SHAPE = 17,   // of the law's parameter upwards and downwards
  UPDATE_SPREAD_STEP = 18,    // of both steps, and of their difference
  UPDATE_SPREAD_WINDOW = 19,  // of the window's lower and upper end
  UPDATE_WRITE = 23,          // write noise of a touched cell; slot: plane
  // after programming; slot: plane, step: write
  DRIFT = 24,      // exponent of a device
  FLICKER = 25,    // low-frequency noise; the step depends on the age too
  RETENTION = 26,  // time constant of a device; slot: plane
  ENDURANCE = 27,  // pulses that a device bears; slot: plane
  WEAR = 28,       // rounding of parts of a pulse; slot: plane
  CARRY = 29,      // write noise of a carry; slot: plane, step: updates before it
  CHOPPER = 32,    // sign flips of a chopped transfer; row: wordline
  // pulse trains
  PULSE_INPUT = 33,  // slots of wordlines; group: slot of the train, row: eight lines, slot: sample
  PULSE_ERROR = 34,  // slots of bitlines
  // noise of a sample's pulses, by the fast generator; slot: sample, columns 2 bitline and 2 bitline + 1: the two devices
  PULSE_CYCLE = 35,
};

struct Counter {
  u32 x, y, z, w;
};

GPUXBAR_FN Counter counter(u32 group, u32 row, u32 purpose, u32 slot, u32 step) {
  return Counter{group, row, purpose << 24 | slot, step};
}

GPUXBAR_FN Counter philox_round(Counter c, u32 key_lo, u32 key_hi) {
  const u64 p0 = (u64)0xD2511F53u * c.x;
  const u64 p1 = (u64)0xCD9E8D57u * c.z;
  return Counter{(u32)(p1 >> 32) ^ c.y ^ key_lo, (u32)p1, (u32)(p0 >> 32) ^ c.w ^ key_hi, (u32)p0};
}

template <int ROUNDS>
GPUXBAR_FN Counter philox(Counter c, u32 key_lo, u32 key_hi) {
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    c = philox_round(c, key_lo, key_hi);
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
  return c;
}

// The keys of all rounds, made once: as a kernel parameter they are operands that need neither instructions nor
// registers. Twin of `RoundKeys` in gpuxbar/ops/round_keys.py.
struct RoundKeys {
  u32 low[10], high[10];
};

template <int ROUNDS>
GPUXBAR_FN Counter philox(Counter c, u64 seed) {
  return philox<ROUNDS>(c, (u32)seed, (u32)(seed >> 32));
}

template <int ROUNDS>
GPUXBAR_FN Counter philox(Counter c, const RoundKeys& keys) {
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) c = philox_round(c, keys.low[round], keys.high[round]);
  return c;
}

}  // namespace gpuxbar
