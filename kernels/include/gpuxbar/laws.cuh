// laws: how far one device moves one way, each law a small struct.
//
// In shares of the device's own window every law is a flow: with v the share already gone in the direction of the
// change (v = y upwards, v = 1 - y downwards), dv/dt = f(v), where f = 1 is the nominal step. A wanted change is the
// time t the flow runs; `change(v, reach(t))` is the distance covered, in closed form. So pulses of one direction add up
// exactly: n pulses are one change of n times the time.
//
// Source: Agarwal et al., IJCNN 2016 (asymmetric, symmetric); Peng et al., DNN+NeuroSim V2.0, IEEE TCAD 2021; Fusi and
// Abbott, Nature Neuroscience 2007 (soft bounds); Rasch et al., aihwkit, AICAS 2021 (linear, exponential, power and
// piecewise step). Oracle: gpuxbar/reference/laws.py.
#pragma once
#include "gpuxbar/normal.cuh"

namespace gpuxbar {

enum Law : i32 {
  LINEAR_STEP = 0,
  SOFT_BOUNDS = 1,
  AGARWAL = 2,
  AGARWAL_SYMMETRIC = 3,
  NEUROSIM = 4,
  EXPONENTIAL_STEP = 5,
  POWER_STEP = 6,
  PIECEWISE_STEP = 7,
  LOOKUP_TABLE = 8,
};

constexpr int NODES = 9;    // of a piecewise step, evenly spaced
constexpr int SCORES = 17;  // normal scores of a measured scatter: -4, -3.5 .. 4

// One direction of one device: `shape` is the parameter with a device's own spread, `second` the law's other one,
// `node` the f of a piecewise step at v = 0, 1/8, .. 1.
struct Direction {
  float shape, second;
  const float* node;
};

// exp(-y) and 1 - exp(-y), both to float precision for small and large y too: with exp(-y) = 2^-k exp(-r),
// |r| <= ln(2) / 2.
struct Decay {
  float rest, gone;
};

GPUXBAR_FN Decay decay(float y) {
  const float bounded = min(max(y, -80.0f), 80.0f);
  const float high = fma(bounded, 1.442695041f, 12582912.0f), k = high - 12582912.0f;  // up there floats are integers
  const float r = fma(k, 2.12194440e-4f, fma(k, -0.693359375f, bounded));
  float p = fma(r, 1.9841270e-4f, -1.3888889e-3f);
  p = fma(p, r, 8.3333333e-3f);
  p = fma(p, r, -4.1666667e-2f);
  p = fma(p, r, 0.16666667f);
  p = fma(p, r, -0.5f);
  p = fma(p, r, 1.0f);
  const float scale = bits_float(0x3F800000u - (float_bits(high) << 23));
  return Decay{fma(-scale, r * p, scale), fma(scale, r * p, 1.0f - scale)};
}

GPUXBAR_FN float gone(float y) { return decay(y).gone; }

// (1 - exp(-y)) / y
GPUXBAR_FN float decay_share(float y) { return abs(y) < 1e-30f ? 1.0f : divide_fast(gone(y), y); }

// -ln(1 - q) for q < 1, to float precision for small q too; beyond, as large as it gets.
GPUXBAR_FN float minus_log_rest(float q) {
  const float s = divide_fast(q, 2.0f - q), s2 = s * s;  // -ln(1 - q) = 2 artanh(s)
  float p = fma(s2, 0.22222222f, 0.28571429f);
  p = fma(p, s2, 0.4f);
  p = fma(p, s2, 0.66666667f);
  p = fma(p, s2, 2.0f);
  const float large = -0.6931471806f * log2_fast(max(1.0f - q, 1e-30f));
  return abs(q) < 0.3f ? s * p : large;
}

// What a law makes of a time wherever the device is. Where f is linear in v, the distance covered is from - by v.
struct Reach {
  float from, by;
};

// Of dv/dt = start - pull v.
GPUXBAR_FN Reach approach(float t, float start, float pull) {
  return Reach{start * t * decay_share(pull * t), gone(pull * t)};
}
GPUXBAR_FN float covered(const Reach& reach, float v) { return fma(-reach.by, v, reach.from); }

// f = 1 + slope - 2 slope v: the nominal step in mid-window. Slope 0 is a constant step.
struct LinearStep {
  float slope;
  GPUXBAR_METHOD explicit LinearStep(const Direction& d) : slope(d.shape) {}
  GPUXBAR_METHOD Reach reach(float t) const { return approach(t, 1.0f + slope, 2.0f * slope); }
  GPUXBAR_METHOD float change(float v, const Reach& reach) const { return covered(reach, v); }
};

// f = rate (1 - v)
struct SoftBounds {
  float rate;
  GPUXBAR_METHOD explicit SoftBounds(const Direction& d) : rate(max(d.shape, 0.0f)) {}
  GPUXBAR_METHOD Reach reach(float t) const {
    const float share = gone(rate * t);
    return Reach{share, share};
  }
  GPUXBAR_METHOD float change(float v, const Reach& reach) const { return reach.by * (1.0f - v); }
};

// f = nu / (1 - exp(-nu)) - nu v, so that t = 1 just spans the window
struct Agarwal {
  float nu;
  GPUXBAR_METHOD explicit Agarwal(const Direction& d) : nu(max(d.shape, 0.0f)) {}
  GPUXBAR_METHOD Reach reach(float t) const { return approach(t, divide_fast(1.0f, decay_share(nu)), nu); }
  GPUXBAR_METHOD float change(float v, const Reach& reach) const { return covered(reach, v); }
};

// u = sigmoid(alpha (2v - 1)) grows logistically, u' = 2 alpha u (1 - u); v = a u + b spans 0 .. 1 as t does
struct AgarwalSymmetric {
  float alpha;
  GPUXBAR_METHOD explicit AgarwalSymmetric(const Direction& d) : alpha(max(d.shape, 1e-3f)) {}
  GPUXBAR_METHOD Reach reach(float t) const {  // what is left, and what is gone
    const Decay share = decay(2.0f * alpha * t);
    return Reach{share.rest, share.gone};
  }
  GPUXBAR_METHOD float change(float v, const Reach& reach) const {
    const float b = exp(-alpha), a = divide_fast(1.0f + b, 1.0f - b);  // v = a u - b / (1 - b)
    const float u = divide_fast(v + divide_fast(b, 1.0f - b), a);
    return divide_fast(a * u * (1.0f - u) * reach.by, fma(reach.by, u, reach.from));
  }
};

// Rate of a NeuroSim label, -9.5 .. 9.5: inverts label = 10.10153 max_x[(1 - e^(-rate x)) / (1 - e^-rate) - x].
// A fit in -ln(1 - y^2); relative error below 1e-5.
GPUXBAR_FN float rate_of_label(float label) {
  const float y = 0.098994905f * min(max(label, -9.5f), 9.5f);
  const float t = -0.6931471806f * log2_fast(1.0f - y * y);
  float q = fma(t, -4.60775393e-3f, 6.38640455e-2f);
  q = fma(q, t, -3.81968451e-1f);
  q = fma(q, t, 1.28456019f);
  q = fma(q, t, -2.64175699f);
  q = fma(q, t, 3.35389963f);
  q = fma(q, t, -2.46649840f);
  q = fma(q, t, 8.43307307e-1f);
  q = fma(q, t, -1.12948504e-1f);
  q = fma(q, t, 2.85505228e-1f);
  q = fma(q, t, 8.88260823e-1f);
  return 8.0f * y * exp(q * t);
}

// Agarwal's flow under NeuroSim's name for its rate; a negative label speeds up on its way
struct NeuroSim {
  float rate;
  GPUXBAR_METHOD explicit NeuroSim(const Direction& d) : rate(rate_of_label(d.shape)) {}
  GPUXBAR_METHOD Reach reach(float t) const { return approach(t, divide_fast(1.0f, decay_share(rate)), rate); }
  GPUXBAR_METHOD float change(float v, const Reach& reach) const { return covered(reach, v); }
};

// f = max(1 - amplitude exp(rate v), 0)
struct ExponentialStep {
  float amplitude, rate;
  GPUXBAR_METHOD explicit ExponentialStep(const Direction& d) : amplitude(d.shape), rate(d.second) {}
  GPUXBAR_METHOD Reach reach(float t) const { return Reach{0.0f, gone(rate * t)}; }
  GPUXBAR_METHOD float change(float v, const Reach& reach) const {
    const float f = max(fma(-amplitude, exp(min(rate * v, 80.0f)), 1.0f), 0.0f);
    return divide_fast(minus_log_rest(f * reach.by), rate);
  }
};

// f = (1 - v)^exponent
struct PowerStep {
  float exponent;
  GPUXBAR_METHOD explicit PowerStep(const Direction& d) : exponent(max(d.shape, 0.0f)) {}
  GPUXBAR_METHOD Reach reach(float t) const { return Reach{t, 0.0f}; }
  GPUXBAR_METHOD float change(float v, const Reach& reach) const {
    const float rest = max(1.0f - v, 1e-6f);
    float d = 1.0f - exponent;  // rest^d falls by d t
    d = abs(d) < 1e-7f ? 1e-7f : d;
    const float q = d * reach.from * exp(min(-d * 0.6931471806f * log2_fast(rest), 80.0f));
    const float y = divide_fast(minus_log_rest(min(q, 1.0f)), d);
    return rest * gone(y);
  }
};

// f is linear between its nodes; shape is a factor of all of them
struct PiecewiseStep {
  const float* node;
  float factor;
  GPUXBAR_METHOD explicit PiecewiseStep(const Direction& d) : node(d.node), factor(max(d.shape, 0.0f)) {}
  GPUXBAR_METHOD Reach reach(float t) const { return Reach{t * factor, 0.0f}; }
  GPUXBAR_METHOD float change(float v, const Reach& reach) const {
    constexpr float WIDTH = 1.0f / (NODES - 1);
    float at = v, left = reach.from;
#pragma unroll
    for (int k = 0; k < NODES - 1; ++k) {
      const float end = (float)(k + 1) * WIDTH, pull = (node[k] - node[k + 1]) * (NODES - 1);
      const float f = fma(pull, end - at, node[k + 1]);  // at `at`; node[k + 1] at the segment's end
      // time to the end: ln(f / f_end) / pull
      const float q = divide_fast(pull * (end - at), max(f, 1e-9f));
      const float rest = end - at, x = min(q, 1.0f);
      const float full = abs(x) < 1e-6f ? divide_fast(rest, max(f, 1e-9f)) : divide_fast(minus_log_rest(x), pull);
      const float taken = rest > 0.0f ? min(left, full) : 0.0f;
      at += rest > 0.0f ? min(approach(taken, f, pull).from, rest) : 0.0f;
      left -= taken;
    }
    return at - v;
  }
};

// A piecewise step whose noise is measured, not Gaussian
struct LookupTable : PiecewiseStep {
  GPUXBAR_METHOD explicit LookupTable(const Direction& d) : PiecewiseStep(d) {}
};

// Value of a table [NODES, SCORES] of a device at share y of its window whose normal is z: linear between entries.
GPUXBAR_FN float scattered(const float* table, float y, float z) {
  const float at = y * (NODES - 1), score = 2.0f * (min(max(z, -4.0f), 4.0f) + 4.0f);
  const int node = min((int)at, NODES - 2), k = min((int)score, SCORES - 2);
  const float* low = table + node * SCORES + k;
  const float along = score - (float)k, between = at - (float)node;
  const float first = fma(along, low[1] - low[0], low[0]);
  const float second = fma(along, low[SCORES + 1] - low[SCORES], low[SCORES]);
  return fma(between, second - first, first);
}

template <class L>
inline constexpr bool MEASURED = false;
template <>
inline constexpr bool MEASURED<LookupTable> = true;

template <int INDEX, class First, class... Rest>
struct Pick : Pick<INDEX - 1, Rest...> {};
template <class First, class... Rest>
struct Pick<0, First, Rest...> {
  using Type = First;
};
template <class... L>
struct LawList {
  static constexpr int COUNT = sizeof...(L);
  template <int KIND>
  using At = typename Pick<KIND, L...>::Type;
};
// In the order of `enum Law`.
using Laws = LawList<LinearStep, SoftBounds, Agarwal, AgarwalSymmetric, NeuroSim, ExponentialStep, PowerStep,
                     PiecewiseStep, LookupTable>;
template <int KIND>
using LawOf = Laws::At<KIND>;

}  // namespace gpuxbar
