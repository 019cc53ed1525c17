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

// Row and column of a pixel side by side, from the corner of the padding on: sums of two are below 2^15 each.
GPUXBAR_FN u32 pixel(int y, int x) { return (u32)y << 16 | (u32)x; }
constexpr u32 GUARDS = 0x80008000u;  // above each
constexpr int BELOW = 1 << 14;       // a row of pixels below any image: with their padding they are less high

// Eight channels at a position of the kernel, seen from the first pixel of any patch; none, if there is no such position.
struct Tap {
  u32 offset;
  // Pixels past it are so far beyond the first of an image, and left until the last, both above GUARDS where there are any.
  u32 past, left;

  GPUXBAR_FN Tap(const Images& of, int kernel_y, int kernel_x, int channel) {
    const int down = kernel_y * of.dilation_h, right = kernel_x * of.dilation_w;
    offset = (down * of.width + right) * of.pixel_size + channel;
    const bool there = kernel_y * of.kernel_w + kernel_x < of.positions;
    const u32 place = pixel(there ? down : BELOW, right);
    past = place + GUARDS - pixel(of.pad_h, of.pad_w);
    left = pixel(of.pad_h + of.height - 1, of.pad_w + of.width - 1) + GUARDS - place;
  }
};

// The patches of ROWS rows.
template <int ROWS>
struct Patches {
  u32 corner[ROWS];  // where the first pixel lies in the images, modulo 2^32: it may lie over an edge
  u32 first[ROWS];   // that pixel

  // `real`: else a row without a patch, all over the edge.
  GPUXBAR_FN void locate(const Images& of, int i, i64 row, int group, bool real) {
    const int place = (int)(row % of.pixels), y = place / of.out_w * of.stride_h, x = place % of.out_w * of.stride_w;
    first[i] = pixel(real ? y : BELOW, x);
    const u32 line = (u32)(row / of.pixels) * of.height + y - of.pad_h;
    corner[i] = (line * of.width + x - of.pad_w) * of.pixel_size + group * of.channels;
  }
  GPUXBAR_FN bool inside(int i, const Tap& tap) const {
    return !(~((first[i] + tap.past) & (tap.left - first[i])) & GUARDS);
  }
};

}  // namespace gpuxbar
