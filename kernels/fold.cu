// fold: patches -> images, the adjoint of reading patches; every image element gathers, so no atomics.
//
// Axes    patches [N, out_h, out_w, G, lines], a line of a group as images.cuh says; images [N, planes, height, width];
//         planes = G channels.
// Launch  256 threads a block, which takes every gridDim-th square of 32 pixels by 32 planes; the result does not depend on
//         the launch. Neighbouring threads read neighbouring channels and write neighbouring pixels.
// Wrapper gpuxbar/ops/tile_mvm_cuda.py      Oracle gpuxbar/reference/tile_mvm.py (fold)
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    fold(const float* __restrict__ patches, float* __restrict__ images, int planes, int channels, int height, int width,
         int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w,
         int out_h, int out_w, int channel_step, int position_step,
         i64 size)  // elements of images
{
  __shared__ float block[32][33];
  const int x = threadIdx.x & 31, y = threadIdx.x >> 5, pixels = height * width;
  const int lines = planes * kernel_h * kernel_w;  // of all groups
  const int across = (pixels + 31) / 32, down = (planes + 31) / 32;
  const i64 squares = size / ((i64)planes * pixels) * across * down;
  for (i64 at = blockIdx.x; at < squares; at += gridDim.x) {
    const int pixel0 = (int)(at % across) * 32, plane0 = (int)(at / across % down) * 32;
    const i64 image = at / across / down;
    const int plane = plane0 + x, channel = plane % channels;
    const int line0 = (plane - channel) * kernel_h * kernel_w + channel * channel_step;
#pragma unroll 1  // more would spill
    for (int i = y; i < 32; i += 8) {
      const int pixel = pixel0 + i;
      float sum = 0.0f;
      for (int ky = 0; ky < kernel_h && plane < planes && pixel < pixels; ++ky) {
        const int below = pixel / width + pad_h - ky * dilation_h, oy = below / stride_h;
        if (below < 0 || below % stride_h || oy >= out_h) continue;
        for (int kx = 0; kx < kernel_w; ++kx) {
          const int right = pixel % width + pad_w - kx * dilation_w, ox = right / stride_w;
          if (right < 0 || right % stride_w || ox >= out_w) continue;
          const int line = line0 + (ky * kernel_w + kx) * position_step;
          sum += patches[((image * out_h + oy) * out_w + ox) * lines + line];
        }
      }
      block[x][i] = sum;
    }
    __syncthreads();
    for (int i = y; i < 32; i += 8)
      if (plane0 + i < planes && pixel0 + x < pixels)
        images[(image * planes + plane0 + i) * pixels + pixel0 + x] = block[i][x];
    __syncthreads();
  }
}

}  // namespace gpuxbar
