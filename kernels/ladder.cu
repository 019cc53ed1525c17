// ladder: the effective conductances of tiles with every line on its own, or of first order in the resistances.
//
// Lines are cut into pieces of 32 cells from the driven end on, so wordlines are counted from below (`height`). All lines
// are walked through to see what every piece begins with; then squares of 32 x 32 cells are finished, each by a warp, in
// its registers. Cells are read three times, once from memory if the tile stays in a cache, and written once.
//
// Axes    g, g_eff [T, R, C]; starts [T, 2, N]: what lies beyond a piece, S, and what reaches it, 1, of the N = ceil(C / 32) R
//         + ceil(R / 32) C pieces of wordlines and bitlines.
// Launch  one block of 256 threads a tile; grid T.
// Macros  FIRST_ORDER: relative drops are added instead of factors multiplied.
// Wrapper gpuxbar/ops/effective_conductance_cuda.py      Oracle gpuxbar/reference/effective_conductance.py
#include "gpuxbar/parasitics.cuh"

#ifndef FIRST_ORDER
#define FIRST_ORDER 0
#endif

namespace gpuxbar {

constexpr int WARPS = 8, SIDE = 32;
constexpr float ALL = FIRST_ORDER ? 0.0f : 1.0f;  // reach where nothing is lost yet

// A tile; `at` in an array like it, the cell (height, col) and `count` cells upwards from there in a square.
struct Tile {
  int rows, cols;

  template <class T>
  GPUXBAR_METHOD T* at(T* array, int height, int col) const {
    return array + ((i64)blockIdx.x * rows + rows - 1 - height) * cols + col;
  }
  GPUXBAR_METHOD int count(int height, int col) const { return col < cols ? rows - height : 0; }
  GPUXBAR_METHOD void column(const float* g, int height, int col, float* cells) const {  // 0 beyond the tile
    const float* from = at(g, height, col);
    const int there = count(height, col);
#pragma unroll
    for (int i = 0; i < SIDE; ++i, from -= cols) cells[i] = i < there ? *from : 0.0f;
  }
};

// A lane's column of the warp's square becomes its row.
GPUXBAR_FN void turn(float (*square)[SIDE + 1], float* cells) {
  const int lane = threadIdx.x & 31;
  __syncwarp();  // what was there has been read
#pragma unroll
  for (int i = 0; i < SIDE; ++i) square[i][lane] = cells[i];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < SIDE; ++i) cells[i] = square[lane][i];
}

// The pieces of a line, in arrays `apart`.
struct Line {
  float end, segment;
  float *beyond, *reach;
  i64 apart;
  bool real;  // else it lies beyond the tile

  GPUXBAR_METHOD float before(int piece, int i) const { return i || piece ? segment : end; }
  // What all pieces begin with; load(piece, cells) gets the conductances of one. Beyond the last cell nothing flows.
  template <class Load>
  GPUXBAR_METHOD void enter(int pieces, Load load) const {
    float flows = 0.0f, cells[SIDE];
    for (int piece = pieces - 1; piece >= 0; --piece) {
      load(piece, cells);
      if (real) beyond[piece * apart] = flows;
      float passes = ALL;
#pragma unroll
      for (int i = SIDE - 1; i >= 0; --i)
        walk_on<FIRST_ORDER>(walk_back<FIRST_ORDER>(cells[i], before(piece, i), flows), passes);
      if (real) reach[piece * apart] = passes;
    }
    float arrives = ALL;
    for (int piece = 0; real && piece < pieces; ++piece) {
      const float passes = reach[piece * apart];
      reach[piece * apart] = arrives;
      walk_on<FIRST_ORDER>(passes, arrives);
    }
  }
  // Of the drive, what reaches each of a piece's cells, or the drop at each, in their place.
  GPUXBAR_METHOD void finish(int piece, float* cells) const {
    float flows = real ? beyond[piece * apart] : 0.0f, arrives = real ? reach[piece * apart] : ALL;
#pragma unroll
    for (int i = SIDE - 1; i >= 0; --i) cells[i] = walk_back<FIRST_ORDER>(cells[i], before(piece, i), flows);
#pragma unroll
    for (int i = 0; i < SIDE; ++i) cells[i] = walk_on<FIRST_ORDER>(cells[i], arrives);
  }
};

extern "C" __global__ void __launch_bounds__(256, 2)
    ladder(const float* __restrict__ g,           // [T, R, C] S
           const float* __restrict__ r_wordline,  // [R] ohm, or null: wordline_value; the others alike
           const float* __restrict__ r_bitline, const float* __restrict__ r_source, const float* __restrict__ r_sink,
           float* __restrict__ starts,  // scratch
           float* __restrict__ g_eff, float wordline_value, float bitline_value, float source_value, float sink_value,
           int rows, int cols) {
  __shared__ float squares[WARPS][SIDE][SIDE + 1];
  const Wires wires{r_wordline, r_bitline, r_source, r_sink, wordline_value, bitline_value, source_value, sink_value};
  const Tile tile{rows, cols};
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, high = (rows + SIDE - 1) / SIDE,
            wide = (cols + SIDE - 1) / SIDE;
  const i64 pieces = (i64)wide * rows + (i64)high * cols;
  float* const beyond = starts + 2 * blockIdx.x * pieces;
  float (*const square)[SIDE + 1] = squares[warp];
  const auto wordline = [&](int height) {
    const int row = height < rows ? rows - 1 - height : 0;
    return Line{wires.at_source(row), wires.along(row), beyond + height, beyond + pieces + height, rows, height < rows};
  };
  const auto bitline = [&](int c) {
    const int col = c < cols ? c : 0;
    float* const own = beyond + (i64)wide * rows + c;
    return Line{wires.at_sink(col), wires.down(col), own, own + pieces, cols, c < cols};
  };

  for (int strip = warp; strip < high + wide; strip += WARPS) {  // of 32 lines
    const int bottom = strip * SIDE, left = (strip - high) * SIDE + lane;
    if (strip < high)
      wordline(bottom + lane).enter(wide, [&](int piece, float* cells) {
        tile.column(g, bottom, piece * SIDE + lane, cells);
        turn(square, cells);
      });
    else
      bitline(left).enter(high, [&](int piece, float* cells) { tile.column(g, piece * SIDE, left, cells); });
  }
  __syncthreads();
  for (int place = warp; place < high * wide; place += WARPS) {
    const int below = place / wide, before = place % wide, c = before * SIDE + lane;
    float cells[SIDE], shares[SIDE];
    tile.column(g, below * SIDE, c, cells);
#pragma unroll
    for (int i = 0; i < SIDE; ++i) shares[i] = cells[i];
    turn(square, shares);
    wordline(below * SIDE + lane).finish(before, shares);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < SIDE; ++i) square[lane][i] = shares[i], shares[i] = cells[i];
    __syncwarp();
    bitline(c).finish(below, shares);
    float* to = tile.at(g_eff, below * SIDE, c);
    const int there = tile.count(below * SIDE, c);
#pragma unroll
    for (int i = 0; i < SIDE; ++i, to -= cols) {
      const float along = square[i][lane], down = shares[i];
      if (i < there) *to = cells[i] * (FIRST_ORDER ? 1.0f - along - down : along * down);
    }
  }
}

}  // namespace gpuxbar
