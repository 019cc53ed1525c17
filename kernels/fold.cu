// fold: patches -> images, the adjoint of reading patches; every image element gathers, so no atomics.
//
// Axes    patches [N, out_h, out_w, planes, kernel_h, kernel_w]; images [N, planes, height, width]; planes = G channels.
// Launch  1-D grid-stride over image elements; the result does not depend on the launch.
// Wrapper gpuxbar/ops/tile_mvm_cuda.py      Oracle gpuxbar/reference/tile_mvm.py (fold)
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

extern "C" __global__ void __launch_bounds__(256)
    fold(const float* __restrict__ patches, float* __restrict__ images, int planes, int height, int width, int kernel_h,
         int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, int out_h,
         int out_w,
         i64 size)  // elements of images
{
  const i64 stride = (i64)gridDim.x * blockDim.x;
  for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < size; e += stride) {
    const int x = (int)(e % width), y = (int)(e / width % height);
    const i64 plane = e / ((i64)width * height) % planes, image = e / ((i64)width * height * planes);
    float sum = 0.0f;
    for (int ky = 0; ky < kernel_h; ++ky) {
      const int down = y + pad_h - ky * dilation_h, oy = down / stride_h;
      if (down < 0 || down % stride_h || oy >= out_h) continue;
      for (int kx = 0; kx < kernel_w; ++kx) {
        const int right = x + pad_w - kx * dilation_w, ox = right / stride_w;
        if (right < 0 || right % stride_w || ox >= out_w) continue;
        sum += patches[((((image * out_h + oy) * out_w + ox) * planes + plane) * kernel_h + ky) * kernel_w + kx];
      }
    }
    images[e] = sum;
  }
}

}  // namespace gpuxbar
