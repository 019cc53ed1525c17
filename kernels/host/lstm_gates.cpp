// lstm_gates on the CPU: what an LSTM makes of the products at its gates, and the gradient.
//
// A sample is the work of one thread, so the bits do not depend on threads. NaN stays NaN.
// Meaning and oracle: gpuxbar/reference/lstm_gates.py.
#include "gpuxbar/portable.cuh"

using namespace gpuxbar;

namespace {

constexpr i64 WORTH_THREADS = 1 << 16;  // values of a state from which threads pay

// Both are off by less than 5e-7 of the result, and branch-free, so that loops vectorise.
inline float sigmoid(float x) {
  const float y = 1.0f / (1.0f + gpuxbar::exp(min(max(-x, -87.0f), 87.0f)));
  return x == x ? y : x;
}

inline float tanh(float x) {
  const float size = gpuxbar::abs(x), x2 = x * x;
  float p = fma(x2, -5.71016819e-3f, 2.06440856e-2f);  // of (tanh(x) - x) / x^3
  p = fma(p, x2, -5.37413855e-2f);
  p = fma(p, x2, 0.133314644f);
  p = fma(p, x2, -0.333332829f);
  const float large = 1.0f - 2.0f / (1.0f + gpuxbar::exp(min(2.0f * size, 87.0f)));
  const float y = size < 0.625f ? fma(p * x2, x, x) : __builtin_copysignf(large, x);
  return x == x ? y : x;
}

}  // namespace

extern "C" void gpuxbar_lstm_gates(const float* x,  // [batch, 4, width]: products of the input, gates i, f, g, o
                                   const float* y,  // the same of the state
                                   const float* c,  // [batch, width]
                                   float* next_h, float* next_c,  // [batch, width]
                                   float* gates,                  // [batch, 5, width]: i, f, g, o, and tanh(next_c)
                                   i64 batch, i64 width) {
#pragma omp parallel for schedule(static) if (batch * width >= WORTH_THREADS)
  for (i64 b = 0; b < batch; ++b) {
    const float *in = x + b * 4 * width, *state = y + b * 4 * width, *cell = c + b * width;
    float *to = gates + b * 5 * width, *to_h = next_h + b * width, *to_c = next_c + b * width;
#pragma omp simd
    for (i64 j = 0; j < 2 * width; ++j) to[j] = sigmoid(in[j] + state[j]);
#pragma omp simd
    for (i64 j = 2 * width; j < 3 * width; ++j) to[j] = tanh(in[j] + state[j]);
#pragma omp simd
    for (i64 j = 0; j < width; ++j) {
      const float o = sigmoid(in[3 * width + j] + state[3 * width + j]);
      const float next = fma(to[j], to[2 * width + j], to[width + j] * cell[j]), t = tanh(next);
      to[3 * width + j] = o;
      to[4 * width + j] = t;
      to_c[j] = next;
      to_h[j] = o * t;
    }
  }
}

extern "C" void gpuxbar_lstm_gates_gradient(const float* grad_h, const float* grad_c,  // [batch, width] each
                                            const float* gates, const float* c,        // as above
                                            float* grad_x,                             // [batch, 4, width]: and of y
                                            float* grad_cell,                          // [batch, width]: of c
                                            i64 batch, i64 width) {
#pragma omp parallel for schedule(static) if (batch * width >= WORTH_THREADS)
  for (i64 b = 0; b < batch; ++b) {
    const float *at = gates + b * 5 * width, *cell = c + b * width, *of_h = grad_h + b * width,
                *of_c = grad_c + b * width;
    float *to = grad_x + b * 4 * width, *to_c = grad_cell + b * width;
#pragma omp simd
    for (i64 j = 0; j < width; ++j) {
      const float i = at[j], f = at[width + j], g = at[2 * width + j], o = at[3 * width + j], t = at[4 * width + j];
      const float d = fma(of_h[j] * o, fma(-t, t, 1.0f), of_c[j]);
      to[j] = d * g * i * (1.0f - i);
      to[width + j] = d * cell[j] * f * (1.0f - f);
      to[2 * width + j] = d * i * fma(-g, g, 1.0f);
      to[3 * width + j] = of_h[j] * t * o * (1.0f - o);
      to_c[j] = d * f;
    }
  }
}
