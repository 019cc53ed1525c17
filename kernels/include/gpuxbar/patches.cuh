// patches: the order of a tile's driven lines when a convolution's patches are gathered from its images, for lines in the
// order channel_position. (In the order position_channel eight lines are eight channels of a position: nothing to do.)
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

}  // namespace gpuxbar
