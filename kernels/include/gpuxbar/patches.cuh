// patches: where the rows of a product lie in the images whose patches they are, and the order of a tile's driven lines when
// they are gathered, for lines in the order channel_position. (In the order position_channel eight lines are eight channels
// of a position: nothing to do.)
//
// A read drives the lines d = channel * positions + position of a patch, `tile` of them a tile, so a tile ends amid the
// positions of a channel. What a tile needs is gathered eight channels at a time: at every position the same `chunks`
// of eight channels, from the chunk of the tile's first line on. Lines among them that belong to another tile are
// driven here too, against conductances of 0: which lines share a tile does not change.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// The first chunk of eight channels of the tile that starts with the driven line `first`.
GPUXBAR_FN int first_chunk(int first, int positions) { return first / (8 * positions); }

// The driven line at a place among the gathered ones of a tile, or -1 behind the last position.
GPUXBAR_FN int patch_line(int place, int first, int positions, int chunks) {
  const int chunk = place / 8, position = chunk / chunks;
  const int channel = 8 * (first_chunk(first, positions) + chunk % chunks) + place % 8;
  return position < positions ? channel * positions + position : -1;
}

// Images of codes [N, height, width, G, channels], the channels of a group padded to a multiple of 8, and the convolution that
// reads them. Twin of `Images` in gpuxbar/ops/images.py.
struct Images {
  int channels, height, width, positions, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, out_w;
  int pixels;      // of a result
  u32 pixel_size;  // G * channels
};

// Eight channels at a position of the kernel, seen from the first pixel of any patch.
struct Tap {
  int down, right;
  u32 offset;

  GPUXBAR_FN Tap(const Images& of, int position, int channel)
      : down(position / of.kernel_w * of.dilation_h), right(position % of.kernel_w * of.dilation_w) {
    offset = (down * of.width + right) * of.pixel_size + channel;
  }
};

// The patches of ROWS rows.
template <int ROWS>
struct Patches {
  u32 corner[ROWS];      // where the first pixel lies in the images, modulo 2^32: it may lie over an edge
  i16 y[ROWS], x[ROWS];  // of that pixel

  GPUXBAR_FN void locate(const Images& of, int i, i64 row, int group) {
    const int pixel = (int)(row % of.pixels), top = pixel / of.out_w * of.stride_h - of.pad_h;
    const int left = pixel % of.out_w * of.stride_w - of.pad_w;
    y[i] = (i16)top, x[i] = (i16)left;
    corner[i] = (((u32)(row / of.pixels) * of.height + top) * of.width + left) * of.pixel_size + group * of.channels;
  }
  GPUXBAR_FN bool inside(const Images& of, int i, const Tap& tap) const {
    return (u32)(y[i] + tap.down) < (u32)of.height && (u32)(x[i] + tap.right) < (u32)of.width;
  }
};

}  // namespace gpuxbar
