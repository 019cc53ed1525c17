// streamed_lines: what the lines of an array carry when a batch is streamed into sliced weights, as operands of products.
//
// Axes    n samples of B from `first` on, T bits of an input; G groups of I wordlines and O bitlines; S slices.
// Launch  256 threads. streamed_bits: 32 samples x 8 wordlines, grid (ceil(n / 32), ceil(I / 8), G); streamed_digits: 8
//         samples x 32 bitlines, grid (ceil(n / 8), ceil(O / 32), G). The result does not depend on the launch.
// Random  none
// Macros  CONV  x are the images of a convolution whose patches are the samples, d images of its outputs; else matrices
// Wrapper gpuxbar/ops/streamed_update.py      Oracle gpuxbar/reference/streamed_update.py
#include "gpuxbar/images.cuh"
#include "gpuxbar/streams.cuh"

#ifndef CONV
#define CONV 0
#endif

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    streamed_bits(const float* __restrict__ x,        // [B, G * I], or images [N, G * channels, height, width]
                  const float* __restrict__ largest,  // [G]             largest magnitude of an input
                  float* __restrict__ bits,           // [G, I, n * T]   -1, 0 or 1
                  Streams streams, Conv conv, i64 first, int samples, int groups, int inputs) {
  const int group = blockIdx.z;
  const int sample = blockIdx.x * 32 + (threadIdx.x & 31), line = blockIdx.y * 8 + (threadIdx.x >> 5);
  if (sample >= samples || line >= inputs) return;
  const i64 place = CONV ? patch_place(conv, first + sample, groups, group, line)
                         : ((first + sample) * groups + group) * inputs + line;
  const i32 code = place < 0 ? 0 : input_code(streams, x[place], largest[group]);
  float* to = bits + (((i64)group * inputs + line) * samples + sample) * streams.bits;
  for (i32 t = 0; t < streams.bits; ++t) to[t] = input_bit(code, t);
}

extern "C" __global__ void __launch_bounds__(256)
    streamed_digits(const float* __restrict__ d,        // [B, G * O], or images [N, G * O, out_h, out_w]
                    const float* __restrict__ largest,  // [G]                 largest magnitude of an input
                    const float* __restrict__ w_max,    // [G * O]             weight of a full pair
                    float* __restrict__ digits,         // [S, G, n * T, O]    units
                    Streams streams, Slices slices, Conv conv, i64 first, int samples, int groups, int outputs) {
  const int group = blockIdx.z;
  const int sample = blockIdx.x * 8 + (threadIdx.x >> 5), line = blockIdx.y * 32 + (threadIdx.x & 31);
  if (sample >= samples || line >= outputs) return;
  const i64 place = CONV ? pixel_place(conv, first + sample, groups, group, outputs, line)
                         : ((first + sample) * groups + group) * outputs + line;
  const float units = error_units(streams, d[place], largest[group], w_max[(i64)group * outputs + line]);
  const i64 slice = (i64)groups * samples * streams.bits * outputs;
  float* to = digits + (((i64)group * samples + sample) * streams.bits) * outputs + line;
  for (i32 t = 0; t < streams.bits; ++t, to += outputs)
    for (i32 k = 0; k < slices.count; ++k) to[k * slice] = error_digit(slices, units, t, k);
}

}  // namespace gpuxbar
