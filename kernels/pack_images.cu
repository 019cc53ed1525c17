// pack_images: the codes of a convolution's images -> the left operand of fused_tile_mvm that gathers patches (IMPLICIT).
//
// Axes    images [N, G * channels, pixels] -> a [N, pixels, G, C], channels padded with 0 to C, a multiple of 8, so that
//         16 bytes hold eight channels of one pixel.
// Launch  a 32 x 32 block of (pixel, channel) each, 256 threads; grid (ceil(pixels / 32), ceil(G C / 32), N).
// Wrapper gpuxbar/ops/fused_tile_mvm.py      Oracle gpuxbar/reference/tile_mvm.py (unfold)
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

using Operand = u16;

extern "C" __global__ void __launch_bounds__(256)
    pack_images(const i16* __restrict__ v,  // [N, G * channels, pixels]  codes
                Operand* __restrict__ a,    // [N, pixels, G, C]          the same, fp16
                int groups, int channels, int padded, i64 pixels) {
  __shared__ i16 block[32][33];
  const int x = threadIdx.x & 31, y = threadIdx.x >> 5;
  const i64 pixel0 = (i64)blockIdx.x * 32;
  const int line0 = blockIdx.y * 32, lines = groups * padded;
  for (int i = y; i < 32; i += 8) {
    const int group = (line0 + i) / padded, channel = (line0 + i) % padded;
    const bool real = line0 + i < lines && channel < channels && pixel0 + x < pixels;
    const i64 plane = ((i64)blockIdx.z * groups + group) * channels + channel;
    block[x][i] = real ? v[plane * pixels + pixel0 + x] : (i16)0;
  }
  __syncthreads();
  for (int i = y; i < 32 && pixel0 + i < pixels; i += 8)
    if (line0 + x < lines)
      a[((i64)blockIdx.z * pixels + pixel0 + i) * lines + line0 + x] = half_bits((float)block[i][x]);
}

}  // namespace gpuxbar
