// fold: patches -> images, the adjoint of reading patches; every image element gathers, so no atomics.
//
// Axes    patches [N, out_h, out_w, G, lines], a line of a group as images.cuh says; images [N, planes, height, width];
//         planes = G channels.
// Launch  256 threads a block, which takes every gridDim-th square of 32 pixels by 32 planes; the result does not depend on
//         the launch. Neighbouring threads read neighbouring channels and write neighbouring pixels.
// Wrapper gpuxbar/ops/tile_mvm_cuda.py      Oracle gpuxbar/reference/tile_mvm.py (fold)
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// Which result a place of the padded image is read for at a position of the kernel: `at` + `beyond` / stride.
struct Reached {
  int at, beyond;  // below the stride; 0: it is read for result `at`

  GPUXBAR_METHOD bool is_one_of(int results) const { return beyond == 0 && (u32)at < (u32)results; }
};

// Results along an axis lie `stride` apart, positions of the kernel `dilation`: what divides them is divided once.
struct Stride {
  int stride, whole, part;  // dilation = whole * stride + part

  GPUXBAR_METHOD Stride(int stride, int dilation)
      : stride(stride), whole(dilation / stride), part(dilation - whole * stride) {}
  GPUXBAR_METHOD Reached first(int place) const {
    const int at = place / stride;
    return Reached{at, place - at * stride};
  }
  // At the next position of the kernel.
  GPUXBAR_METHOD Reached next(const Reached& from) const {
    const int beyond = from.beyond - part;
    return beyond < 0 ? Reached{from.at - whole - 1, beyond + stride} : Reached{from.at - whole, beyond};
  }
};

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
  const int squares = (int)(size / ((i64)planes * pixels)) * across * down;
  const Stride high(stride_h, dilation_h), wide(stride_w, dilation_w);
  __shared__ Reached first_y[32], first_x[32];  // of the pixels of a square, at the kernel's first position
  for (int at = blockIdx.x; at < squares; at += gridDim.x) {
    const int strip = at / across, image = strip / down;
    const int pixel0 = (at - strip * across) * 32, plane0 = (strip - image * down) * 32;
    const int plane = plane0 + x, channel = plane % channels;
    const i64 line0 =
        (i64)image * out_h * out_w * lines + (plane - channel) * kernel_h * kernel_w + channel * channel_step;
    if (y == 0) {
      const int row = (pixel0 + x) / width;
      first_y[x] = high.first(row + pad_h), first_x[x] = wide.first(pixel0 + x - row * width + pad_w);
    }
    __syncthreads();
#pragma unroll 1  // more would spill
    for (int i = y; i < 32; i += 8) {
      float sum = 0.0f;
      Reached oy = first_y[i];
      for (int ky = 0; ky < kernel_h && plane < planes && pixel0 + i < pixels; ++ky, oy = high.next(oy)) {
        if (!oy.is_one_of(out_h)) continue;
        const float* from = patches + line0 + (i64)oy.at * out_w * lines + ky * kernel_w * position_step;
        Reached ox = first_x[i];
        for (int kx = 0; kx < kernel_w; ++kx, from += position_step, ox = wide.next(ox))
          if (ox.is_one_of(out_w)) sum += from[(i64)ox.at * lines];
      }
      block[x][i] = sum;
    }
    __syncthreads();
    for (int i = y; i < 32; i += 8)
      if (plane0 + i < planes && pixel0 + x < pixels)
        images[((i64)image * planes + plane0 + i) * pixels + pixel0 + x] = block[i][x];
    __syncthreads();
  }
}

}  // namespace gpuxbar
