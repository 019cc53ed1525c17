// update: how one cell answers a wanted change of its conductance.
//
// In shares of the nominal window, x = (g - g_min) / range, d = |dG| / range. A device has a window of its own, steps of
// its own size each way, and a law (laws.cuh). The noise of an update adds variances: of the change itself, of its
// size, of its pulses. Oracle: gpuxbar/reference/device_update.py.
#pragma once
#include "gpuxbar/laws.cuh"

namespace gpuxbar {

enum Sides : i32 { BOTH = 0, REFERENCE = 1, ONE_SIDED = 2 };

// Twin of `Parameters` in gpuxbar/ops/laws.py. Spreads are standard deviations between devices.
struct UpdateLaw {
  float shape_up, shape_down;    // parameters of the law, each way; mirrored downwards
  float spread_up, spread_down;  // of shape
  float second_up, second_down;
  float room_up, room_down;  // of soft bounds: from where steps are alike both ways to the nominal bound
  float node_up[NODES], node_down[NODES];
  float pulses;                          // nominal pulses over the window
  float step_spread;                     // relative, of both steps
  float asymmetry, asymmetry_spread;     // up (1 + asymmetry), down (1 - asymmetry) of the nominal step
  float low_spread, high_spread, floor;  // of the ends of the window; the share where g = 0
  float gamma2;                          // variance of the noise, in shares of the window squared: per change,
  float cycle2;                          //   per change squared,
  float pulse_cycle2;                    //   per change squared and pulse of it,
  float range_cycle2;                    //   and per pulse, for the nominal step
  float write_noise;                     // of what a touched cell shows, in shares of the window
  i32 law, lognormal, integer_pulses, sides;
  float scatter[2][NODES * SCORES];  // of a measured law, up and down: what a pulse deviates by, in nominal steps
};

// What a law can have, as kernels are compiled for it. Twin of `TRAITS` in gpuxbar/ops/laws.py.
enum Trait : u32 {
  STEP_SPREAD = 1,
  ASYMMETRY_SPREAD = 2,
  LOW_SPREAD = 4,
  HIGH_SPREAD = 8,
  SPREAD_UP = 16,
  SPREAD_DOWN = 32,
  GAMMA2 = 64,
  CYCLE2 = 128,
  PULSE_CYCLE2 = 256,
  RANGE_CYCLE2 = 512,
  WRITE_NOISE = 1024,
  LOGNORMAL = 2048,
  INTEGER_PULSES = 4096,
};
constexpr u32 CYCLE_NOISE = GAMMA2 | CYCLE2 | PULSE_CYCLE2 | RANGE_CYCLE2;

// A law that has these traits, so that a compiler leaves out what it has not.
template <u32 HAS>
GPUXBAR_FN UpdateLaw with_traits(UpdateLaw s) {
  const auto only = [](float& value, u32 trait) { value = HAS & trait ? value : 0.0f; };
  only(s.step_spread, STEP_SPREAD), only(s.asymmetry_spread, ASYMMETRY_SPREAD);
  only(s.low_spread, LOW_SPREAD), only(s.high_spread, HIGH_SPREAD);
  only(s.spread_up, SPREAD_UP), only(s.spread_down, SPREAD_DOWN);
  only(s.gamma2, GAMMA2), only(s.cycle2, CYCLE2);
  only(s.pulse_cycle2, PULSE_CYCLE2), only(s.range_cycle2, RANGE_CYCLE2);
  only(s.write_noise, WRITE_NOISE);
  s.lognormal = (HAS & LOGNORMAL) != 0, s.integer_pulses = (HAS & INTEGER_PULSES) != 0;
  return s;
}

// Standard normals of one device, the same for all time.
struct Spreads {
  float step, asymmetry, low, high, up, down;
};

// Those of many devices, where they are stored: fp16, a plane of `cells` for each spread of the law that is not 0, in the
// order of `Spreads`; null: drawn from the seed.
struct DeviceMap {
  const u16* normal;
  i64 cells;
};

struct Window {
  float low, width;
};

GPUXBAR_FN Window device_window(const UpdateLaw& s, const Spreads& z) {
  const float low = max(s.low_spread * z.low, s.floor);
  return Window{low, max(fma(s.high_spread, z.high, 1.0f) - low, 0.01f)};
}

// Step of a device over the nominal one.
GPUXBAR_FN float device_gain(const UpdateLaw& s, const Spreads& z, bool rising) {
  const float a = fma(s.asymmetry_spread, z.asymmetry, s.asymmetry), spread = s.step_spread * z.step;
  const float common = s.lognormal ? exp(spread) : 1.0f + spread;
  return abs(common + (rising ? a : -a));
}

// A device one way: all that a change of it depends on but the place in its window.
struct Device {
  float low, width, inverse_width;
  float gain;   // its step over the nominal one
  float shape;  // its parameter of the law
};

GPUXBAR_FN Device device_of(const UpdateLaw& s, const Spreads& z, bool rising) {
  const Window window = device_window(s, z);
  const float up = fma(s.spread_up, z.up, s.shape_up), down = fma(s.spread_down, z.down, s.shape_down);
  return Device{window.low, window.width, divide_fast(1.0f, window.width), device_gain(s, z, rising),
                rising ? up : down};
}

template <class A, class B>
inline constexpr bool SAME = false;
template <class A>
inline constexpr bool SAME<A, A> = true;

// Laws whose shape depends on where the ends of a device's window are.
template <class L>
inline constexpr bool FITTED = SAME<L, SoftBounds> || SAME<L, ExponentialStep>;

// The shape of a device with ends of its own. Its steps by soft bounds are nominal where the nominal device's are alike
// both ways, and 0 at its own bounds; exponential ones go by the distance from the middle of the nominal window. Other
// laws go by the share of the device's own window alone.
template <class L>
GPUXBAR_FN float fitted_shape(const UpdateLaw& s, const Device& device, bool rising) {
  const float above = device.low + device.width - 1.0f;
  if constexpr (SAME<L, SoftBounds>) {
    const float room = rising ? s.room_up : s.room_down;
    const float own = max(room + (rising ? above : -device.low), min(room, 0.01f));
    return device.shape * (device.width * divide_fast(room, own));
  } else if constexpr (SAME<L, ExponentialStep>) {
    const float off = 0.5f * (device.low + above) * device.inverse_width;  // of the middles, in widths
    return device.shape * exp(min(max((rising ? s.second_up : -s.second_down) * off, -80.0f), 80.0f));
  } else {
    return device.shape;
  }
}

// `device_of` under a law.
template <class L>
GPUXBAR_FN Device device_under(const UpdateLaw& s, const Spreads& z, bool rising) {
  Device device = device_of(s, z, rising);
  device.shape = fitted_shape<L>(s, device, rising);
  return device;
}

// What a device of a pair is asked for, signed, when its weight is to change by `change` of w_max.
GPUXBAR_FN float device_share(i32 sides, bool positive, float change) {
  const float own = positive ? change : -change;
  return sides == BOTH ? 0.5f * own : sides == ONE_SIDED ? max(own, 0.0f) : positive ? own : 0.0f;
}

// Size of a change that pulses can make: at most the window, in whole pulses where they are whole.
GPUXBAR_FN float pulsed(const UpdateLaw& s, float wanted) {
  const float d = min(abs(wanted), 1.0f);
  return s.integer_pulses ? round_even(d * s.pulses) / s.pulses : d;
}

// A change and its variance, in shares of the nominal window.
struct Change {
  float size, variance;
};

// What a wanted change is to a device wherever it is in its window.
struct Effort {
  Reach reach;
  float per_square, fixed;  // variance of the noise: per change squared, and whatever the change
};

GPUXBAR_FN Direction direction(const UpdateLaw& s, float shape, bool rising) {
  return Direction{shape, rising ? s.second_up : s.second_down, rising ? s.node_up : s.node_down};
}

template <class L>
GPUXBAR_FN Effort effort_of(const UpdateLaw& s, const Device& device, float d, bool rising) {
  const float n = d * s.pulses;
  const Reach reach = L(direction(s, device.shape, rising)).reach(d * device.gain * device.inverse_width);
  const float per_pulse = absent(s.pulse_cycle2) ? 0.0f : divide_fast(s.pulse_cycle2, max(n, 1e-30f));
  const float fixed = absent(s.range_cycle2) ? 0.0f : n * s.range_cycle2 * device.gain * device.gain;
  return Effort{reach, absent(s.cycle2) ? per_pulse : s.cycle2 + per_pulse, fixed};
}

// The same for the device at share y of its window.
template <class L>
GPUXBAR_FN Change change_of(const UpdateLaw& s, const Device& device, const Effort& effort, float y, bool rising) {
  const L law(direction(s, device.shape, rising));
  const float size = device.width * law.change(rising ? y : 1.0f - y, effort.reach);
  return Change{size, fma(size, fma(size, effort.per_square, s.gamma2), effort.fixed)};
}

// x after a change of size d; z is the update's normal, `scatter` the law's table where the kernel keeps it.
template <class L>
GPUXBAR_FN float moved(const UpdateLaw& s, const Device& device, const Effort& effort, float x, float d, bool rising,
                       float z, const float (*scatter)[NODES * SCORES]) {
  const float y = min(max((x - device.low) * device.inverse_width, 0.0f), 1.0f);
  const Change change = change_of<L>(s, device, effort, y, rising);
  float noise;
  if constexpr (MEASURED<L>)
    noise = divide_fast(sqrt_fast(d * s.pulses) * device.gain, s.pulses) * scattered(scatter[rising ? 0 : 1], y, z);
  else
    noise = sqrt_fast(change.variance) * z;
  const float to = noise + (fma(y, device.width, device.low) + (rising ? change.size : -change.size));
  return d > 0.0f ? min(max(to, device.low), device.low + device.width) : x;
}

template <class L>
GPUXBAR_FN float moved(const UpdateLaw& s, const Device& device, float x, float d, bool rising, float z,
                       const float (*scatter)[NODES * SCORES]) {
  return moved<L>(s, device, effort_of<L>(s, device, d, rising), x, d, rising, z, scatter);
}

}  // namespace gpuxbar
