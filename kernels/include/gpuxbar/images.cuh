// images: the convolution whose patches drive an array.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// Twin of `Conv` in gpuxbar/ops/images.py. In a patch, a channel at a position of the kernel drives the line
// channel * channel_step + position * position_step of its group; one of the steps is 1.
struct Conv {
  i64 channels, height, width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  i64 out_h, out_w, channel_step, position_step;
};

// Where the value of a group's driven line in a patch lies in the images [N, groups * channels, height, width];
// -1 in the padding. Patches are numbered image by image.
GPUXBAR_FN i64 patch_place(const Conv& c, i64 patch, int groups, int group, int line) {
  const int width = (int)c.out_w, pixels = (int)c.out_h * width, positions = (int)(c.kernel_h * c.kernel_w);
  const i64 image = patch / pixels;
  const int pixel = (int)(patch % pixels), channel = line / (int)c.channel_step % (int)c.channels;
  const int position = line / (int)c.position_step % positions;
  const int y = pixel / width * (int)c.stride_h + position / (int)c.kernel_w * (int)c.dilation_h - (int)c.pad_h;
  const int x = pixel % width * (int)c.stride_w + position % (int)c.kernel_w * (int)c.dilation_w - (int)c.pad_w;
  if (y < 0 || y >= c.height || x < 0 || x >= c.width) return -1;
  return (((image * groups + group) * c.channels + channel) * c.height + y) * c.width + x;
}

// Where the value of a group's output in a patch lies in the images [N, groups * outputs, out_h, out_w].
GPUXBAR_FN i64 pixel_place(const Conv& c, i64 patch, int groups, int group, int outputs, int output) {
  const i64 pixels = c.out_h * c.out_w;
  return ((patch / pixels * groups + group) * outputs + output) * pixels + patch % pixels;
}

}  // namespace gpuxbar
