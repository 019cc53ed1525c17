// images: the convolution whose patches drive an array.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// Twin of `Conv` in gpuxbar/ops/images.py.
struct Conv {
  i64 channels, height, width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  i64 out_h, out_w;
};

// Where the value of a group's driven line in a patch lies in the images [N, groups * channels, height, width];
// -1 in the padding. Patches are numbered image by image.
GPUXBAR_FN i64 patch_place(const Conv& c, i64 patch, int groups, int group, int line) {
  const int width = (int)c.out_w, pixels = (int)c.out_h * width, taps = (int)(c.kernel_h * c.kernel_w);
  const i64 image = patch / pixels;
  const int pixel = (int)(patch % pixels), channel = line / taps, tap = line % taps;
  const int y = pixel / width * (int)c.stride_h + tap / (int)c.kernel_w * (int)c.dilation_h - (int)c.pad_h;
  const int x = pixel % width * (int)c.stride_w + tap % (int)c.kernel_w * (int)c.dilation_w - (int)c.pad_w;
  if (y < 0 || y >= c.height || x < 0 || x >= c.width) return -1;
  return (((image * groups + group) * c.channels + channel) * c.height + y) * c.width + x;
}

// Where the value of a group's output in a patch lies in the images [N, groups * outputs, out_h, out_w].
GPUXBAR_FN i64 pixel_place(const Conv& c, i64 patch, int groups, int group, int outputs, int output) {
  const i64 pixels = c.out_h * c.out_w;
  return ((patch / pixels * groups + group) * outputs + output) * pixels + patch % pixels;
}

}  // namespace gpuxbar
