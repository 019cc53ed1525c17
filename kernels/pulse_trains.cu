// pulse_trains: the pulse trains of every wordline and bitline for every sample, a word each.
//
// Axes    B samples; G groups of I wordlines and O bitlines.
// Launch  256 threads: one sample of one group; grid (B, G). The result does not depend on the launch.
// Random  24 words of (line, sample, step) a train: see pulses.cuh; `step` is read from memory where given.
// Wrapper gpuxbar/ops/pulse_update.py      Oracle gpuxbar/reference/pulse_update.py
#include "gpuxbar/pulses.cuh"

namespace gpuxbar {

// Largest value of a block of 256 threads, for all of them.
GPUXBAR_FN float block_largest(float value, float* scratch) {
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int stride = 128; stride > 0; stride >>= 1) {
    if (threadIdx.x < stride) scratch[threadIdx.x] = max(scratch[threadIdx.x], scratch[threadIdx.x + stride]);
    __syncthreads();
  }
  const float top = scratch[0];
  __syncthreads();
  return top;
}

GPUXBAR_FN u32 fired(const Train& train, i32 length, float value, float per, u32 line, u32 purpose, u32 sample,
                     u32 step, u64 seed) {
  const float probability = abs(value) * per;
  const u32 slots = train.implicit ? implied_slots(length, probability)
                                   : stochastic_slots(chance(probability), length, line, purpose, sample, step, seed);
  return signed_word(slots, value);
}

extern "C" __global__ void __launch_bounds__(256)
    pulse_trains(const float* __restrict__ x,      // [B, G * I]
                 const float* __restrict__ d,      // [B, G * O]
                 const float* __restrict__ scale,  // [G * O]     wanted pulses for an input and an error of 1
                 const float* __restrict__ unit,   // [G]         the least of them
                 const i64* __restrict__ step,     // [1], or null: step_value
                 u32* __restrict__ input_words,    // [B, G * I]
                 u32* __restrict__ error_words,    // [B, G * O]
                 float* __restrict__ length,       // [B, G]      slots of a train
                 Train train, i64 step_value, u64 seed, int groups, int inputs, int outputs) {
  __shared__ float scratch[256];
  const u32 b = blockIdx.x, when = (u32)(step ? *step : step_value);
  const int group = blockIdx.y, x0 = group * inputs, d0 = group * outputs;
  const i64 x_row = (i64)b * groups * inputs + x0, d_row = (i64)b * groups * outputs + d0;
  float top_input = 0.0f, top_error = 0.0f;
  for (int i = threadIdx.x; i < inputs; i += 256) top_input = max(top_input, abs(x[x_row + i]));
  for (int o = threadIdx.x; o < outputs; o += 256) top_error = max(top_error, abs(d[d_row + o] * scale[d0 + o]));
  top_input = block_largest(top_input, scratch);
  top_error = block_largest(top_error, scratch);
  const Sample sample = sample_train(train, top_input, top_error, unit[group]);
  if (threadIdx.x == 0) length[(i64)b * groups + group] = (float)sample.length;
  for (int i = threadIdx.x; i < inputs; i += 256)
    input_words[x_row + i] =
        fired(train, sample.length, x[x_row + i], sample.per_input, (u32)(x0 + i), PULSE_INPUT, b, when, seed);
  for (int o = threadIdx.x; o < outputs; o += 256)
    error_words[d_row + o] = fired(train, sample.length, d[d_row + o] * scale[d0 + o], sample.per_error, (u32)(d0 + o),
                                   PULSE_ERROR, b, when, seed);
}

}  // namespace gpuxbar
