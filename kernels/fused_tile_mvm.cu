// fused_tile_mvm: tile products on tensor cores with the conversion inside: at the end of a tile the accumulators get
// their noise, are digitised and added to integer sums in registers, so partial sums never leave the chip.
//
// Axes    G groups, T tiles of K driven lines (padded to a multiple of 64, of bytes 128), S planes, N sensed lines, M rows of this
//         call, P passes; a [M, G, T, K] (IMPLICIT: images [N, height, width, G, C], C padded to a multiple of 8),
//         b [S, G, N, T, K], words [P, S, X, M, G * N] of X splits; y and gate [rows, G * N], or images [N, G * N, pixels].
// Launch  128 rows by BLOCK_N columns a block, 256 threads (8 warps of 64 x BLOCK_N / 4); grid (blocks, splits, P S G).
//         Codes are integers: sums over tiles, and over splits of the tiles, have the same bits on any launch.
//         Shared memory (dynamic): STAGES * stage_bytes, stages filled by asynchronous copies.
// Random  read noise of (row, column, conversion), the draws of adc_accumulate.cu: normal.cuh
// Macros  BLOCK_N 128, or 256 with two 16-bit sums a register; STAGES of the pipeline; TERMS 1 fp16 conductances,
//         2 high and low half; NOISE 0 none, 1 exact, 2 fast; VARIANCE state-dependent part (a second product, bf16);
//         STREAMS 0 whole codes, 1 signed digits, 2 two-phase digits (of codes below 1024); CONVERTERS 0 one LSB for
//         all, 1 an LSB a column, 2 also gain and offset of every converter; GATE also counts the conversions inside
//         the range, in the high half of each sum; IMPLICIT rows are patches, gathered from images with zeros where they
//         reach over an edge: 1 lines in the order channel_position, as patches.cuh says, 2 position_channel, C and lines
//         of a tile multiples of 8; INT8 products of bytes, 1 if the sums of a tile stay below 2^22, 2 larger ones:
//         conductances are levels and codes digits, a [P, M, G, T, K] packed for every pass (STREAMS 0); BFLOAT operands
//         are bf16, digits packed so too
// Wrapper gpuxbar/ops/fused_tile_mvm.py      Oracle gpuxbar/reference/tile_mvm.py
#include "gpuxbar/fused.cuh"
#include "gpuxbar/mma.cuh"
#include "gpuxbar/patches.cuh"

#ifndef STAGES
#define STAGES 3
#endif
#ifndef VARIANCE
#define VARIANCE 0
#endif
#ifndef STREAMS
#define STREAMS 0
#endif
#ifndef IMPLICIT
#define IMPLICIT 0
#endif

#if INT8 && (IMPLICIT || VARIANCE || STREAMS || TERMS == 2)
#error "INT8 goes without TERMS 2, VARIANCE, STREAMS and IMPLICIT"
#endif
#if BFLOAT && (IMPLICIT || STREAMS || TERMS == 2 || INT8)
#error "BFLOAT goes without TERMS 2, STREAMS, IMPLICIT and INT8"
#endif

extern __shared__ __align__(1024) unsigned char gx_smem[];

namespace gpuxbar {

constexpr int WARP_M = 64, WARP_N = BLOCK_N / 4;
constexpr int ROW_PARTS = WARP_M / 16, COLUMN_PARTS = WARP_N / 8, GROUPS_OF_32 = WARP_N / 32;
constexpr int PANELS = TERMS + VARIANCE;                              // right operands of a stage
constexpr int STEP_BYTES = 128, STEP = STEP_BYTES / sizeof(Operand);  // driven lines of a stage
constexpr int CHUNK = 16 / sizeof(Operand), PARTS = STEP_BYTES / 32;  // lines of a copy; products along a stage
constexpr u32 A_BYTES = BLOCK_M * STEP_BYTES, B_BYTES = BLOCK_N * STEP_BYTES, STAGE_BYTES = A_BYTES + PANELS * B_BYTES;
constexpr int UNROLL = VARIANCE && STREAMS ? 1 : PARTS;         // unrolled further, this variant would spill
constexpr int BLOCK_LD = (PAIRED ? BLOCK_N / 2 : BLOCK_N) + 4;  // of the block of results
static_assert(4 * BLOCK_M * BLOCK_LD <= STAGES * STAGE_BYTES, "the results lie where the stages lay");

#if INT8
// Sums of bytes start at a float whose low bits they fill, 1.5 * 2^23, which spares a conversion where they fit.
constexpr i32 ZERO = INT8 == 1 ? 0x4B400000 : 0;
GPUXBAR_FN float value_of(i32 sum) { return INT8 == 1 ? bits_float((u32)sum) - 12582912.0f : (float)sum; }
#else
constexpr float ZERO = 0.0f;
GPUXBAR_FN float value_of(float sum) { return sum; }
#endif

#if BFLOAT
GPUXBAR_FN u32 squares(u32 digits) { return square_bfloats(digits); }
GPUXBAR_FN void multiply_digits(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply_bfloat(c, a, b0, b1); }
#else
GPUXBAR_FN u32 squares(u32 digits) { return square_halves(digits); }
GPUXBAR_FN void multiply_digits(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply_half(c, a, b0, b1); }
#endif

// Where a 16-byte chunk of a row lies in shared memory. The eight rows that one load_matrices reads together fall on
// different banks: eight consecutive rows of a; of b the rows 8 q + e of a group of 32.
GPUXBAR_FN u32 place_a(u32 row, u32 chunk) { return row * STEP_BYTES + ((chunk ^ (row & 7)) << 4); }
GPUXBAR_FN u32 place_b(u32 row, u32 chunk) {
  return row * STEP_BYTES + ((chunk ^ ((row >> 3 & 3) << 1 | (row & 1))) << 4);
}

// The part of the block that a warp multiplies, and where its lane's sums lie in the block: rows row() + 16 i and
// row() + 16 i + 8, eight columns from column() + 32 part.
struct Warp {
  u32 lane, m, n;

  GPUXBAR_FN Warp() {
    const u32 thread = thread_index(), warp = thread >> 5;
    lane = thread & 31, m = warp % 2 * WARP_M, n = warp / 2 * WARP_N;
  }
  GPUXBAR_FN u32 row() const { return m + (lane >> 2); }
  GPUXBAR_FN u32 column() const { return n + 8 * (lane & 3); }
};

// What is the same for all threads of a block.
struct Block : Part {
  int steps;
  u32 a_line, b_line;  // where the first row and line lie in a and b
  // volatile: read at each use, so as not to stay in registers
  volatile u32 keep, flip;  // bits kept of 1024 + |code|; all ones: the positive codes drive
  volatile float level_0;   // what level 0 conducts, in levels (INT8)
#if IMPLICIT
  Patches<BLOCK_M> patches;
#endif

  // What the DAC drives of two codes in this pass, times 2^shift.
  GPUXBAR_FN u32 digits(u32 codes) const {
#if STREAMS == 0
    return codes;
#else
    const u32 integers = add_halves(codes & 0x7FFF7FFFu, 0x64006400u);  // 1024 + |code|: the code in the low bits
    const u32 digit = add_halves(integers & keep, 0xE400E400u);
#if STREAMS == 1
    return digit | (codes & 0x80008000u);
#else
    return digit & (negative_halves(codes) ^ flip);
#endif
#endif
  }
};

extern "C" __global__ void __launch_bounds__(256, 1)
    fused_tile_mvm(const Operand* __restrict__ a,      // [M, G, T, K]         codes, fp16, bf16 or int8
                   const Operand* __restrict__ b,      // [S, G, N, T, K]      conductance times a power of 2, or level
                   const Operand* __restrict__ low,    // like b, or null: what fp16 leaves of it (TERMS 2)
                   const i16* __restrict__ spread,     // like b, or null: noise variance, bf16 (VARIANCE)
                   const int* __restrict__ code_sums,  // [P, M, G, T] or null: a summed over a tile (INT8)
                   const float* __restrict__ slice_scale,  // [S] or null: 1
                   const float* __restrict__ adc_lsb,      // [1] or [G * N], or null: adc_lsb_value   A
                   const float* __restrict__ adc_gain,     // [S, T, G * N] or null (CONVERTERS 2)
                   const float* __restrict__ adc_offset,   // [S, T, G * N] or null (CONVERTERS 2)           A
                   const float* __restrict__ read_noise,   // [1] or null: read_noise_value            A
                   const i64* __restrict__ step,           // [1] or null: step_value
                   const float* __restrict__ row_scale,    // [all rows / rows_per_scale] or null
                   const float* __restrict__ col_scale,    // [G * N] or null
                   const float* __restrict__ bias,         // [G * N] or null
                   int* __restrict__ words,                // sums of codes, for shift_add; or null: y, P = S = X = 1
                   float* __restrict__ y,                  // or null
                   float* __restrict__ gate,               // like y, or null (GATE)
                   float amperes,                          // A of a code 1 and conductance 1 of a and b
                   float level_0,                          // what level 0 conducts, in levels (INT8)
                   float adc_lsb_value, float read_noise_value, i64 step_value,
                   RoundKeys keys,  // of the seed
                   i64 row0,        // first row of this call, in the whole product
                   i64 y_row0,      // and in y
                   i64 noise_row0,  // and in the counters
                   int rows, int groups, int sense, int tiles, int planes, int k, int streams, int stream_bits,
                   int adc_per_column, float code_min, float code_max, int rows_per_scale, int tile_lines,
                   Images images,  // whose patches are the rows (IMPLICIT)
                   int chunks,     // of a patch: patches.cuh (IMPLICIT 1)
                   int pixels,     // of an image, for y and gate in image layout; or 0
                   u32 purpose) {
  __shared__ Block block;
  const Scales scales{adc_lsb, col_scale, bias, adc_lsb_value, adc_per_column};
  const Adc adc{code_min, code_max};
  const u32 stages = shared_address(gx_smem);
  const int outputs = groups * sense;
  const u32 b_row = tiles * k, a_row = groups * b_row;
  if (thread_index() == 0) {
    block.locate(rows, groups, sense, tiles, planes);
    block.steps = (block.last_tile - block.first_tile) * (k / STEP);
    const int a_pass = INT8 || BFLOAT ? block.pass * rows : 0;
    block.a_line = (a_pass + block.m0) * a_row + block.group * b_row + block.first_tile * k;
    block.b_line = ((block.plane * groups + block.group) * sense + block.n0) * b_row + block.first_tile * k;
    const int shift = block.pass % streams * stream_bits;
    const u32 bits = ((1u << stream_bits) - 1) << shift;
    block.level_0 = level_0;
    block.keep = 0x64006400u | bits << 16 | bits;
    block.flip = block.pass < streams ? ~0u : 0u;
    const float unit = STREAMS ? bits_float((127u - shift) << 23) : 1.0f;  // 2^-shift
    block.measure(amperes * unit, read_noise ? *read_noise : read_noise_value, step ? *step : step_value);
  }
  __syncthreads();
  block.set_factors(scales, sense, 256);
#if IMPLICIT
  if (thread_index() < BLOCK_M) {
    const int row = block.m0 + (int)thread_index();
    block.patches.locate(images, thread_index(), row0 + row, block.group, row < rows);
  }
  __syncthreads();
#endif

  // Eight threads copy a row of 128 bytes, 32 rows at a time.
  auto fill = [&](int stage, int at) {
    const u32 thread = thread_index(), row = thread >> 3, chunk = thread & 7, line = at * STEP + CHUNK * chunk;
    const u32 to = stages + stage * STAGE_BYTES;
    const u32 b_from = block.b_line + row * b_row + line;
    const int b_rows = sense - block.n0 - (int)row;
#if IMPLICIT
    const int first = (block.first_tile + (int)line / k) * tile_lines, place = (int)line % k;
#if IMPLICIT == 1
    const int position = place / 8 / chunks;
    const int channel = 8 * (first_chunk(first, images.positions) + place / 8 % chunks);
#else
    const int position = (first + place) / images.channels, channel = (first + place) % images.channels;
#endif
    const Tap tap(images, position / images.kernel_w, position % images.kernel_w, channel);
    const bool driven = channel < images.channels;
#pragma unroll
    for (int i = 0; i < BLOCK_M; i += 32) {
      const bool real = driven && block.patches.inside(row + i, tap);
      copy_async(to + place_a(row + i, chunk), a + (real ? block.patches.corner[row + i] + tap.offset : 0), real);
    }
#else
    const int a_rows = rows - block.m0 - (int)row;
    const u32 a_from = block.a_line + row * a_row + line;
#pragma unroll
    for (int i = 0; i < BLOCK_M; i += 32)
      copy_async(to + place_a(row + i, chunk), a + (i < a_rows ? a_from + i * a_row : 0), i < a_rows);
#endif
#pragma unroll
    for (int i = 0; i < BLOCK_N; i += 32) {
      const u32 from = i < b_rows ? b_from + i * b_row : 0, place = to + A_BYTES + place_b(row + i, chunk);
      copy_async(place, b + from, i < b_rows);
      if (TERMS == 2) copy_async(place + B_BYTES, low + from, i < b_rows);
      if (VARIANCE) copy_async(place + TERMS * B_BYTES, spread + from, i < b_rows);
    }
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (stage < block.steps) fill(stage, stage);
    copy_commit();
  }

  Sum sums[ROW_PARTS][COLUMN_PARTS][4];
  [[maybe_unused]] float variances[VARIANCE ? ROW_PARTS : 1][VARIANCE ? COLUMN_PARTS : 1][4];
  u32 codes[ROW_PARTS][COLUMN_PARTS][PAIRED ? 2 : 4];
#pragma unroll
  for (int i = 0; i < ROW_PARTS; ++i)
#pragma unroll
    for (int j = 0; j < COLUMN_PARTS; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[i][j][e] = ZERO;
        if (VARIANCE) variances[VARIANCE ? i : 0][VARIANCE ? j : 0][e] = 0.0f;
        codes[i][j][PAIRED ? e / 2 : e] = 0;
      }

  int stage = 0, tile = block.first_tile;
  for (int at = 0; at < block.steps; ++at) {
    copy_wait<STAGES - 2>();
    __syncthreads();  // this stage has landed for every warp, and every warp has left the stage filled next
    if (at + STAGES - 1 < block.steps) fill(stage == 0 ? STAGES - 1 : stage - 1, at + STAGES - 1);
    copy_commit();

    // Column 8 j + 2 q + e of a group of 32 columns of the product is column 8 q + 2 j + e of b, so that a thread owns
    // eight neighbours: one counter of fast normals, two of exact ones.
    const Warp w;
    const u32 row_a = w.m + (w.lane & 15), chunk_a = w.lane >> 4;
    const u32 row_b = w.n + 8 * (w.lane >> 1 & 3) + (w.lane & 1) + 2 * (w.lane >> 4), chunk_b = w.lane >> 3 & 1;
    const u32 from_a = stages + stage * STAGE_BYTES, from_b = from_a + A_BYTES;
#pragma unroll UNROLL
    for (int part = 0; part < PARTS; ++part) {
      u32 left_part[ROW_PARTS][4];
#pragma unroll
      for (int i = 0; i < ROW_PARTS; ++i) {
        load_matrices(left_part[i], from_a + place_a(row_a + 16 * i, 2 * part + chunk_a));
#pragma unroll
        for (int e = 0; e < 4; ++e) left_part[i][e] = block.digits(left_part[i][e]);
      }
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel) {
        const bool squared = VARIANCE && panel == TERMS;
        if (squared)
#pragma unroll
          for (int i = 0; i < ROW_PARTS; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) left_part[i][e] = squares(left_part[i][e]);
#pragma unroll
        for (int j = 0; j < COLUMN_PARTS; j += 2) {
          u32 right[4];  // of column parts j and j + 1
          load_matrices(right,
                        from_b + panel * B_BYTES + place_b(row_b + 32 * (j / 4) + 2 * (j % 4), 2 * part + chunk_b));
#pragma unroll
          for (int i = 0; i < ROW_PARTS; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e)
#if INT8
              multiply_bytes(sums[i][j + e], left_part[i], right[2 * e], right[2 * e + 1]);
#else
              if (squared)
                multiply_bfloat(variances[VARIANCE ? i : 0][VARIANCE ? j + e : 0], left_part[i], right[2 * e],
                                right[2 * e + 1]);
              else
                multiply_digits(sums[i][j + e], left_part[i], right[2 * e], right[2 * e + 1]);
#endif
        }
      }
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    if (at + 1 < (tile + 1 - block.first_tile) * (k / STEP)) continue;

    // ---- the end of a tile: noise, conversion, integer sum; WIDTH neighbouring columns at a time
    const auto first_row = [&] { return (u32)noise_row0 + block.m0 + Warp().row(); };
    const u32 row = first_row(), column = Warp().column();
#pragma unroll
    for (int part = 0; part < GROUPS_OF_32; ++part)
#pragma unroll
      for (int q = 0; q < 8; q += WIDTH) {
        const int n = column + 32 * part + q;  // first column, in the block
#if NOISE
        const u32 slot = block.slot + tile, now = block.now;
        const float spread = block.spread;
#endif
        float gain[WIDTH], offset[WIDTH];  // ADC steps of a partial sum of 1, and of nothing
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) {
          gain[e] = block.factor[CONVERTERS ? n + e : 0], offset[e] = 0.0f;
#if CONVERTERS == 2
          const i64 converter = ((i64)block.plane * tiles + tile) * outputs + block.column + n + e;
          const bool real = block.n0 + n + e < sense;
          if (adc_offset && real) offset[e] = adc_offset[converter] * block.per_ampere * gain[e];
          if (adc_gain && real) gain[e] *= adc_gain[converter];
#endif
        }
#pragma unroll
        for (int i = 0; i < ROW_PARTS; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {  // rows r and r + 8 of a fragment
#if INT8
            float ground = 0.0f;  // what level 0 conducts, in partial sums
            if (code_sums) {
              const int r = block.m0 + Warp().row() + 16 * i + 8 * h;
              const i64 from = ((i64)block.pass * rows + (r < rows ? r : 0)) * groups + block.group;
              ground = (float)code_sums[from * tiles + tile] * block.level_0;
            }
#endif
#if NOISE
            // row and step are found anew where no register is left for them
            const u32 own = (INT8 ? row : first_row()) + 16 * i + 8 * h;
            const Counter counts =
                counter((block.column + n) / WIDTH, own, purpose, slot, IMPLICIT == 2 ? block.now : now);
            const Counter words4 = philox<ROUNDS>(counts, keys);
#endif
#pragma unroll
            for (int e = 0; e < WIDTH; e += 2) {
#if NOISE
              const Polar noise = polar_of<NOISE == 2>(words4, e / 2);
#if !VARIANCE
              const float deviation = radius(spread, noise);
#endif
#endif
              u32 code[2];
#pragma unroll
              for (int f = 0; f < 2; ++f) {
                Sum& sum = sums[i][4 * part + (q + e) / 2][2 * h + f];
                float current = value_of(sum);
                sum = ZERO;
#if VARIANCE
                float& variance = variances[i][4 * part + (q + e) / 2][2 * h + f];
                const float deviation = radius(fma(SPREAD, max(variance, 0.0f), spread), noise);
                variance = 0.0f;
#endif
#if NOISE
                current = fma(deviation, f ? noise.turn.b : noise.turn.a, current);
#endif
#if INT8
                const float rest = ground * gain[e + f] + offset[e + f];  // the same for all columns of one LSB
#else
                const float rest = offset[e + f];
#endif
                code[f] = counted_code(adc, fma(current, gain[e + f], rest));
              }
              add_codes(codes[i][4 * part + (q + e) / 2], h, code);
            }
          }
      }
    ++tile;
  }

  // ---- results, through shared memory, so that a warp writes neighbours
  __syncthreads();
  u32* const results = (u32*)gx_smem;
  const Warp w;
#pragma unroll
  for (int i = 0; i < ROW_PARTS; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int part = 0; part < GROUPS_OF_32; ++part) {
        u32* const to = results + (w.row() + 16 * i + 8 * h) * BLOCK_LD + (w.column() + 32 * part) / (PAIRED ? 2 : 1);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const u32* const sum = codes[i][4 * part + j];
#if PAIRED
          to[j] = sum[h];
#else
          to[2 * j] = sum[2 * h], to[2 * j + 1] = sum[2 * h + 1];
#endif
        }
      }
  __syncthreads();
  const u32 biases = block.biases(adc);
  const i32 lowest = block.lowest(adc);
  const float weight = slice_scale ? slice_scale[block.plane] : 1.0f, share = abs(weight);
  const float part_of_all = gate_part(share, tiles);
  const auto word_at = [&](int i, int j) {
    return word_of(results[i * BLOCK_LD + (PAIRED ? j / 2 : j)] - biases, j % 2, lowest);
  };
  const auto scale_of = [&](int i) { return row_scale ? row_scale[(row0 + block.m0 + i) / rows_per_scale] : 1.0f; };
  if (pixels && !words) {  // a row a thread: a warp writes pixels of one column
    const int i = thread_index() % BLOCK_M;
    if (block.m0 + i >= rows) return;
    const i64 r = y_row0 + block.m0 + i, image = r / pixels * outputs * pixels + r % pixels;
    const float by_row = scale_of(i);
    for (int j = thread_index() / BLOCK_M; j < BLOCK_N && block.n0 + j < sense; j += 256 / BLOCK_M) {
      const int c = block.column + j, word = word_at(i, j);
      y[image + (i64)c * pixels] = ColumnScale(scales, weight, c).result(code_of(word, code_min), by_row);
      if (GATE) gate[image + (i64)c * pixels] = share * (float)inside_of(word, code_min) * part_of_all;
    }
    return;
  }
  const int j = 4 * (thread_index() % (BLOCK_N / 4)), c = block.column + j;  // four columns a thread
  const int real = sense - block.n0 - j;                                     // columns that exist, from this one on
  const bool vector = sense % 4 == 0;
  const ColumnScale column_scale[4] = {{scales, weight, real > 0 ? c : 0},
                                       {scales, weight, real > 1 ? c + 1 : 0},
                                       {scales, weight, real > 2 ? c + 2 : 0},
                                       {scales, weight, real > 3 ? c + 3 : 0}};
  for (int i = thread_index() / (BLOCK_N / 4); i < BLOCK_M && block.m0 + i < rows; i += 1024 / BLOCK_N) {
    const int word[4] = {word_at(i, j), word_at(i, j + 1), word_at(i, j + 2), word_at(i, j + 3)};
    if (words) {
      int* const to = words + (block.words_before(planes) * rows + block.m0 + i) * outputs + c;
      store<int4>(to, word, real, 1, vector);
      continue;
    }
    const float by_row = scale_of(i);
    float value[4], inside[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      value[q] = column_scale[q].result(code_of(word[q], code_min), by_row);
      inside[q] = share * (float)inside_of(word[q], code_min) * part_of_all;
    }
    const i64 to = (y_row0 + block.m0 + i) * outputs + c;
    store<float4>(y + to, value, real, 1, vector);
    if (GATE) store<float4>(gate + to, inside, real, 1, vector);
  }
}

}  // namespace gpuxbar
