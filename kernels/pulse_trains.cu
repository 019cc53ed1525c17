// pulse_trains: the pulse trains of every wordline and bitline for every sample, a word each.
//
// Axes    B samples; G groups of I wordlines and O bitlines.
// Launch  256 threads: eight samples of one group, the trains of eight lines of a sample a thread; grid (ceil(B / 8), G).
//         The result does not depend on the launch.
// Random  a counter a slot for eight lines of a sample: see pulses.cuh; `step` is read from memory where given.
// Macros  CONV  x are the images of a convolution whose patches are the samples, d images of its outputs; else matrices
// Wrapper gpuxbar/ops/pulse_update.py      Oracle gpuxbar/reference/pulse_update.py
#include "gpuxbar/images.cuh"
#include "gpuxbar/pulses.cuh"

#ifndef CONV
#define CONV 0
#endif

namespace gpuxbar {

constexpr int SAMPLES = 8, WORKERS = 32;  // samples of a block, and threads of each

// Values of one side of an array.
struct Side {
  const float* values;  // [B, G * lines], or images
  const float* factor;  // [G * lines], or null: 1
  bool outputs;         // whether images are of these, a pixel a sample; else a patch is one
  int lines, group, groups;

  GPUXBAR_FN float value(const Conv& conv, i64 sample, int line) const {
    i64 at = (sample * groups + group) * lines + line;
    if (CONV)
      at = outputs ? pixel_place(conv, sample, groups, group, lines, line)
                   : patch_place(conv, sample, groups, group, line);
    if (at < 0) return 0.0f;
    return factor ? values[at] * factor[(i64)group * lines + line] : values[at];
  }

  // Largest magnitude of what every WORKERS-th thread sees of a sample.
  GPUXBAR_FN float largest(const Conv& conv, i64 sample, int worker) const {
    float top = 0.0f;
    for (int line = worker; line < lines; line += WORKERS) top = max(top, abs(value(conv, sample, line)));
    return top;
  }

  GPUXBAR_FN void fire(const Conv& conv, const Train& train, i32 length, float per, u32 purpose, i64 sample, int worker,
                       u32 step, u64 seed, u32* words) const {
    const int eights = (lines + 7) / 8;
    for (int eight = worker; eight < eights; eight += WORKERS) {
      float x[8];
      u32 chances[8], slots[8];
#pragma unroll
      for (int l = 0; l < 8; ++l) {
        x[l] = 8 * eight + l < lines ? value(conv, sample, 8 * eight + l) : 0.0f;
        chances[l] = chance(abs(x[l]) * per);
        slots[l] = implied_slots(length, abs(x[l]) * per);
      }
      if (!train.implicit)
        stochastic_slots(chances, length, (u32)(group * eights + eight), purpose, (u32)sample, step, seed, slots);
      u32* to = words + (sample * groups + group) * lines + 8 * eight;
#pragma unroll
      for (int l = 0; l < 8; ++l)
        if (8 * eight + l < lines) to[l] = signed_word(slots[l], x[l]);
    }
  }
};

// Largest value of a sample's threads, for all of them; 256 values of scratch.
GPUXBAR_FN float sample_largest(float value, float* scratch) {
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int stride = 128; stride >= SAMPLES; stride >>= 1) {
    if (threadIdx.x < stride) scratch[threadIdx.x] = max(scratch[threadIdx.x], scratch[threadIdx.x + stride]);
    __syncthreads();
  }
  const float top = scratch[threadIdx.x % SAMPLES];
  __syncthreads();
  return top;
}

extern "C" __global__ void __launch_bounds__(256, 1)
    pulse_trains(const float* __restrict__ x,      // [B, G * I], or images [N, G * channels, height, width]
                 const float* __restrict__ d,      // [B, G * O], or images [N, G * O, out_h, out_w]
                 const float* __restrict__ scale,  // [G * O]     wanted pulses for an input and an error of 1
                 const float* __restrict__ unit,   // [G]         the least of them
                 const float* __restrict__ sign,   // [G * I], or null: 1   what an input is driven with
                 const i64* __restrict__ step,     // [1], or null: step_value
                 u32* __restrict__ input_words,    // [B, G * I]
                 u32* __restrict__ error_words,    // [B, G * O]
                 float* __restrict__ length,       // [B, G]      slots of a train
                 Train train, Conv conv, i64 step_value, u64 seed, int batch, int groups, int inputs, int outputs) {
  __shared__ float scratch[256];
  const int group = blockIdx.y, worker = threadIdx.x / SAMPLES;
  const u32 when = (u32)(step ? *step : step_value);
  const i64 sample = (i64)blockIdx.x * SAMPLES + threadIdx.x % SAMPLES;
  const Side input{x, sign, false, inputs, group, groups}, error{d, scale, true, outputs, group, groups};
  const bool inside = sample < batch;
  const float top_input = sample_largest(inside ? input.largest(conv, sample, worker) : 0.0f, scratch);
  const float top_error = sample_largest(inside ? error.largest(conv, sample, worker) : 0.0f, scratch);
  if (!inside) return;
  const Sample s = sample_train(train, top_input, top_error, unit[group]);
  if (worker == 0) length[sample * groups + group] = (float)s.length;
  input.fire(conv, train, s.length, s.per_input, PULSE_INPUT, sample, worker, when, seed, input_words);
  error.fire(conv, train, s.length, s.per_error, PULSE_ERROR, sample, worker, when, seed, error_words);
}

}  // namespace gpuxbar
