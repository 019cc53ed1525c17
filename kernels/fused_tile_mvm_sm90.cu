// fused_tile_mvm_sm90: fused_tile_mvm for Hopper (sm_90a): products of whole warpgroups out of shared memory, fed by bulk
// copies of operands packed in panels, or by patches gathered from images. Same counters, same codes.
//
// Axes    G groups, T tiles of K driven lines (padded to a multiple of 64), S planes, N sensed lines, M rows of this
//         call, P passes. In panels of 128 x 64 (panels.cuh), M and N padded to 128: a [P, M, G, T, K],
//         b [S, G, N, T, K] (IMPLICIT: a images [N, height, width, G, C], C padded to a multiple of 8). words
//         [P, S, X, M, G * N] of X splits, not padded; y and gate [rows, G * N], or images [N, G * N, pixels].
// Launch  128 rows by BLOCK_N columns a block, 384 threads: warpgroups 0 and 1 multiply 64 rows each, one thread of the
//         third copies (IMPLICIT: all of them gather); grid (blocks, splits, P S G). Codes are integers: sums over tiles,
//         and over splits of the tiles, have the same bits on any launch. Shared memory (dynamic):
//         1024 + STAGES * (stage_bytes + 16).
//         CLUSTER 2: an even number of row blocks; the two of a cluster copy half of each panel of b, for both
// Random  read noise of (row, column, conversion), the draws of adc_accumulate.cu: normal.cuh
// Macros  CLUSTER 1, or 2 blocks that share panels; BLOCK_N 128, or 256 with two 16-bit sums a register; STAGES of the
//         pipeline; TERMS 1 fp16 conductances, 2 high and low half; NOISE 0 none, 1 exact, 2 fast; VARIANCE
//         state-dependent part (a second product, bf16; BLOCK_N 128); CONVERTERS 0 one LSB for all, 1 an LSB a column;
//         GATE also counts the conversions inside the range, in the high half of each sum; IMPLICIT rows are patches,
//         gathered from images with zeros where they reach over an edge, lines in the order position_channel, C and
//         lines of a tile multiples of 8 (one pass of whole codes; BLOCK_N 128, CLUSTER 1, no VARIANCE)
// Wrapper gpuxbar/ops/fused_tile_mvm_sm90.py      Oracle gpuxbar/reference/tile_mvm.py
#include "gpuxbar/fused.cuh"
#include "gpuxbar/panels.cuh"
#include "gpuxbar/patches.cuh"
#include "gpuxbar/wgmma.cuh"

#ifndef STAGES
#define STAGES 4
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef VARIANCE
#define VARIANCE 0
#endif
#ifndef IMPLICIT
#define IMPLICIT 0
#endif
#if VARIANCE + IMPLICIT + PAIRED > 1
#error "VARIANCE, IMPLICIT and BLOCK_N 256 leave no registers for one another"
#endif
#if IMPLICIT && CLUSTER > 1
#error "IMPLICIT goes without CLUSTER"
#endif

extern __shared__ __align__(1024) unsigned char gx_smem[];

namespace gpuxbar {

constexpr int HALVES = BLOCK_N / PANEL_ROWS;  // panels of b side by side
constexpr u32 PANEL_BYTES = 2 * PANEL;
constexpr u32 STAGE_BYTES = PANEL_BYTES * (1 + HALVES * (TERMS + VARIANCE));
constexpr u32 BULK_BYTES = STAGE_BYTES - (IMPLICIT ? PANEL_BYTES : 0);  // what bulk copies bring of it
constexpr u32 CONSUMERS = 8 * CLUSTER;                                  // warps that free a stage
constexpr u32 GATHERERS = IMPLICIT ? 4 : 0;                             // warps that fill the left panel of a stage
constexpr int PRODUCER_REGISTERS = IMPLICIT ? 40 : 24, CONSUMER_REGISTERS = IMPLICIT ? 232 : 240;
constexpr int SUMS = 64, CODES = PAIRED ? 32 : 64;  // registers of a thread, for each half

// What is the same for all threads of a block.
struct Block : Part {
  alignas(16) ColumnScale scales[BLOCK_N];
#if IMPLICIT
  Patches<BLOCK_M> patches;
#endif

  // By all threads, after the same barrier; `weight`: of the plane.
  GPUXBAR_FN void set_scales(const Scales& of, float weight, int sense, int threads) {
#pragma unroll 1
    for (int j = thread_index(); j < BLOCK_N; j += threads)
      scales[j] = ColumnScale(of, weight, column + (n0 + j < sense ? j : 0));
  }

  // The factor of a column, read anew too.
  GPUXBAR_FN float gain(int column) const { return *(const volatile float*)(factor + (CONVERTERS ? column : 0)); }
};

// Where the sums of a consumer's thread lie in the block: rows row() and row() + 8, eight columns from column() + 32 part.
struct Place {
  u32 thread;

  GPUXBAR_FN Place() : thread(thread_index()) {}
  GPUXBAR_FN u32 lane() const { return thread & 31; }
  GPUXBAR_FN u32 warpgroup() const { return thread >> 7; }
  GPUXBAR_FN u32 row() const { return (thread >> 5) * 16 + (lane() >> 2); }
  GPUXBAR_FN u32 column() const { return 8 * (thread & 3); }
};

#if CLUSTER == 1
#define CLUSTERED
// Waits until all threads of the cluster have come here.
GPUXBAR_FN void everyone() { __syncthreads(); }

// Frees a stage, whose empty barrier is given, for the copies that write to it; by whole warps.
GPUXBAR_FN void release(u32 empty) {
  if (Place().lane() == 0) barrier_arrive(empty);
}
GPUXBAR_FN void wait(u32 barrier, u32 parity) { barrier_wait(barrier, parity); }

// A panel of b: of a cluster, each block copies its share of the rows to all.
GPUXBAR_FN void copy_right(u32 to, const void* from, u32 landed) { copy_bulk(to, from, PANEL_BYTES, landed); }
#else
#define CLUSTERED __cluster_dims__(CLUSTER)
GPUXBAR_FN void everyone() { cluster_barrier(); }
GPUXBAR_FN void release(u32 empty) {
  if (Place().lane() < CLUSTER) barrier_arrive_at(empty, Place().lane());
}
GPUXBAR_FN void wait(u32 barrier, u32 parity) { barrier_wait_cluster(barrier, parity); }
GPUXBAR_FN void copy_right(u32 to, const void* from, u32 landed) {
  const u32 bytes = PANEL_BYTES / CLUSTER, share = cluster_rank() * bytes;
  copy_bulk_to((1 << CLUSTER) - 1, to + share, (const u8*)from + share, bytes, landed);
}
#endif

#if IMPLICIT
constexpr u32 UNDER_WAY = STAGES - 2;  // steps whose gathered copies a warp does not wait for

// Makes what a warp has gathered of a step known to the products, and counts it as landed.
GPUXBAR_FN void deliver(u32 landed) {
  async_fence();
  __syncwarp();
  if (Place().lane() == 0) barrier_arrive(landed);
}
#endif

extern "C" __global__ void __launch_bounds__(384, 1) CLUSTERED
    fused_tile_mvm_sm90(const Operand* __restrict__ a,    // [P, M, G, T, K]   digits, or codes of images, fp16
                        const Operand* __restrict__ b,    // [S, G, N, T, K]   conductance times a power of 2, fp16
                        const Operand* __restrict__ low,  // like b, or null: what fp16 leaves of it (TERMS 2)
                        const i16* __restrict__ spread,   // like b, or null: noise variance, bf16 (VARIANCE)
                        const float* __restrict__ slice_scale,  // [S] or null: 1
                        const float* __restrict__ adc_lsb,      // [1] or [G * N], or null: adc_lsb_value   A
                        const float* __restrict__ read_noise,   // [1] or null: read_noise_value            A
                        const i64* __restrict__ step,           // [1] or null: step_value
                        const float* __restrict__ row_scale,    // [all rows / rows_per_scale] or null
                        const float* __restrict__ col_scale,    // [G * N] or null
                        const float* __restrict__ bias,         // [G * N] or null
                        int* __restrict__ words,   // sums of codes, for shift_add; or null: y, P = S = X = 1
                        float* __restrict__ y,     // or null
                        float* __restrict__ gate,  // like y, or null (GATE)
                        float amperes,             // A of a digit 1 and conductance 1 of a and b
                        float adc_lsb_value, float read_noise_value, i64 step_value,
                        RoundKeys keys,  // of the seed
                        i64 row0,        // first row of this call, in the whole product
                        i64 y_row0,      // and in y
                        i64 noise_row0,  // and in the counters
                        int rows, int groups, int sense, int tiles, int planes, int k, int adc_per_column,
                        float code_min, float code_max, int rows_per_scale, int tile_lines,
                        Images images,  // whose patches are the rows (IMPLICIT)
                        int pixels,     // of an image, for y and gate in image layout; or 0
                        u32 purpose) {
  __shared__ Block block;
  const Scales scales{adc_lsb, col_scale, bias, adc_lsb_value, adc_per_column};
  const Adc adc{code_min, code_max};
  const u32 stages = (shared_address(gx_smem) + 1023) & ~1023u;
  const u32 full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;  // a barrier a stage
  const int outputs = groups * sense;
  if (thread_index() == 0) {
    const int high = CLUSTER * BLOCK_M;  // rows of a cluster
    block.locate((rows + high - 1) / high * high, groups, sense, tiles, planes);
    block.measure(amperes, read_noise ? *read_noise : read_noise_value, step ? *step : step_value);
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(full + 8 * stage, 1 + GATHERERS);
      barrier_init(empty + 8 * stage, CONSUMERS);
    }
    barrier_fence();
  }
  everyone();
  block.set_factors(scales, sense, 384);
  const float weight = slice_scale ? slice_scale[block.plane] : 1.0f;
  if (!words) block.set_scales(scales, weight, sense, 384);
#if IMPLICIT
  if (thread_index() < BLOCK_M) {
    const int row = block.m0 + (int)thread_index();
    block.patches.locate(images, thread_index(), row0 + row, block.group, row < rows);
  }
#endif
  __syncthreads();

  if (Place().warpgroup() == 2) {
    registers_release<PRODUCER_REGISTERS>();
    const bool copies = thread_index() == 256;
    if (!IMPLICIT && !copies) return;
    const int tile_panels = k / PANEL_LINES, row_panels = tiles * tile_panels;  // of a row of panels of one group
    const int row_blocks = (rows + PANEL_ROWS - 1) / PANEL_ROWS, column_blocks = (sense + PANEL_ROWS - 1) / PANEL_ROWS;
    const i64 skipped = (i64)block.first_tile * tile_panels;
    const int row_block = block.m0 / PANEL_ROWS;  // past the last one, the second of a cluster copies that again
    const i64 a_row = (i64)block.pass * row_blocks + (row_block < row_blocks ? row_block : row_blocks - 1);
    const Operand* a_from = a + ((a_row * groups + block.group) * row_panels + skipped) * PANEL;
    const i64 b_row = (i64)(block.plane * groups + block.group) * column_blocks + block.n0 / PANEL_ROWS;
    i64 b_at = (b_row * row_panels + skipped) * PANEL;
    // past the last column the first half comes twice: nobody reads those sums
    const i64 next_half = block.n0 / PANEL_ROWS + 1 < column_blocks ? (i64)row_panels * PANEL : 0;
    const u32 steps = (block.last_tile - block.first_tile) * tile_panels;
#if IMPLICIT
    // Eight threads gather a row of 128 bytes, 16 rows at a time; their lines of the panel, and where these lie in a patch.
    const int row = (int)(thread_index() - 256) >> 3, chunk = (int)thread_index() & 7;
    const int line = block.first_tile * tile_lines + 8 * chunk, position = line / images.channels;
    int panel = 0, kernel_y = position / images.kernel_w, kernel_x = position % images.kernel_w;
    int channel = line % images.channels;
#endif
    for (u32 at = 0; at < steps; ++at) {
      const u32 stage = at % STAGES, to = stages + stage * STAGE_BYTES, landed = full + 8 * stage;
      wait(empty + 8 * stage, at / STAGES & 1 ^ 1);
      if (copies) {
        barrier_expect(landed, BULK_BYTES);
        if (!IMPLICIT) copy_bulk(to, a_from, PANEL_BYTES, landed);
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          const i64 from = b_at + half * next_half;
          copy_right(to + (1 + half) * PANEL_BYTES, b + from, landed);
          if (TERMS == 2) copy_right(to + (1 + HALVES + half) * PANEL_BYTES, low + from, landed);
          if (VARIANCE) copy_right(to + (1 + HALVES * TERMS) * PANEL_BYTES, spread + from, landed);
        }
      }
      a_from += PANEL, b_at += PANEL;
#if IMPLICIT
      const Tap tap(images, kernel_y, kernel_x, channel);
      const u32 place = to + 2 * panel_chunk(row, chunk);
#pragma unroll
      for (int i = 0; i < BLOCK_M; i += 16) {
        const bool real = block.patches.inside(row + i, tap);
        copy_async(place + i * 2 * PANEL_LINES, a + (real ? block.patches.corner[row + i] + tap.offset : 0), real);
      }
      const bool next = ++panel == tile_panels;  // of another tile, the last lines of which may be padding here
      channel += next ? tile_lines - (tile_panels - 1) * PANEL_LINES : PANEL_LINES;
      if (next) panel = 0;
      for (; channel >= images.channels; channel -= images.channels)
        if (++kernel_x == images.kernel_w) kernel_x = 0, ++kernel_y;
      copy_commit();
      if (at < UNDER_WAY) continue;
      copy_wait<UNDER_WAY>();
      deliver(full + 8 * ((at - UNDER_WAY) % STAGES));
#endif
    }
#if IMPLICIT
    copy_wait<0>();
    for (u32 at = steps < UNDER_WAY ? 0 : steps - UNDER_WAY; at < steps; ++at) deliver(full + 8 * (at % STAGES));
#endif
    return;
  }

  registers_claim<CONSUMER_REGISTERS>();
  float sums[HALVES][SUMS] = {};  // NVRTC up to 12.8 runs products into sums of no value one after the other
#if VARIANCE
  float variances[SUMS] = {};
  u32 squares[PANEL_LINES / 16][4];  // of the digits of a step, bf16
#endif
  u32 codes[HALVES][CODES];
#pragma unroll
  for (int half = 0; half < HALVES; ++half)
#pragma unroll
    for (int e = 0; e < CODES; ++e) codes[half][e] = 0;

  // The same for all threads of a warp, which the compiler sees of a shuffle, and keeps out of the vector registers.
  const u32 rows_at = __shfl_sync(0xFFFFFFFFu, Place().warpgroup(), 0) * (PANEL_BYTES / 2);
  u32 at = 0;  // step of the pipeline
  for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
    for (const u32 first = at; at < first + k / PANEL_LINES; ++at) {
      const u32 stage = at % STAGES, from = stages + stage * STAGE_BYTES;
      wait(full + 8 * stage, at / STAGES & 1);
      const u64 left = descriptor(from + rows_at);
      products_fence();
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
#pragma unroll
        for (int part = 0; part < PANEL_LINES / 16; ++part)
#pragma unroll
          for (int term = 0; term < TERMS; ++term) {
            const u64 right = descriptor(from + (1 + term * HALVES + half) * PANEL_BYTES);
            multiply_warpgroup(sums[half], left + 2 * part, right + 2 * part, at != first || part || term);
          }
        products_commit();
      }
      products_wait<HALVES>();  // the products of the step before are done
      if (at != first) release(empty + 8 * ((at - 1) % STAGES));
#if VARIANCE
      // the squares are made while the tensor cores multiply the digits
      const Place place;
      const int row = (place.thread >> 5) * 16 + (place.lane() & 15);
#pragma unroll
      for (int part = 0; part < PANEL_LINES / 16; ++part) {
        load_matrices(squares[part], from + 2 * panel_chunk(row, 2 * part + (place.lane() >> 4)));
#pragma unroll
        for (int e = 0; e < 4; ++e) squares[part][e] = square_halves(squares[part][e]);
      }
      const u64 right = descriptor(from + (1 + TERMS) * PANEL_BYTES);
      products_fence();
#pragma unroll
      for (int part = 0; part < PANEL_LINES / 16; ++part)
        multiply_warpgroup_bfloat(variances, squares[part], right + 2 * part, at != first || part);
      products_commit();
      async_fence();  // the digits have been read: bulk copies may follow
#endif
    }

    const float factor = block.factor[0];
#if NOISE
    const float spread = block.spread;
    const u32 slot = block.slot + tile, now = block.now;  // VARIANCE leaves no registers for them
#endif

    // ---- the end of a tile: noise, conversion, integer sum; WIDTH neighbouring columns at a time. The first half is
    // converted while the tensor cores multiply the second, and for the other warpgroup.
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      if (half + 1 < HALVES)
        products_wait<1>();
      else
        products_wait<0>();
      if (half + 1 == HALVES) release(empty + 8 * ((at - 1) % STAGES));
#pragma unroll
      for (int part = 0; part < 4; ++part)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int q = 0; q < 8; q += WIDTH) {
            const int column = Place().column() + 128 * half + 32 * part + q;  // the first, in the block
#if NOISE
            const u32 row = (u32)noise_row0 + block.m0 + Place().row() + 8 * h;
            const u32 group = (block.column + column) / WIDTH;
            const Counter counts = VARIANCE ? counter(group, row, purpose, block.slot + tile, block.now)
                                            : counter(group, row, purpose, slot, now);
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
              const int j = 4 * part + (q + e) / 2;
              u32 code[2];
#pragma unroll
              for (int f = 0; f < 2; ++f) {
                float current = sums[half][4 * j + 2 * h + f];
#if VARIANCE
                const float deviation = radius(fma(SPREAD, max(variances[4 * j + 2 * h + f], 0.0f), spread), noise);
#endif
#if NOISE
                current = fma(deviation, f ? noise.turn.b : noise.turn.a, current);
#endif
                current = fma(current, CONVERTERS ? block.gain(column + e + f) : factor, 0.0f);
                code[f] = counted_code(adc, current);
              }
              add_codes(codes[half] + (PAIRED ? 2 : 4) * j, h, code);
            }
          }
    }
  }

  // ---- results: a thread's eight neighbours fill a sector of memory; both its rows go by the same scales of columns
  const u32 biases = block.biases(adc);
  const i32 lowest = block.lowest(adc);
  const float share = abs(weight), part_of_all = gate_part(share, tiles);
  const bool vector = sense % 4 == 0, by_pixels = pixels && !words;
  const i64 stride = by_pixels ? pixels : 1;
  const int row = block.m0 + Place().row();
  i64 start[2];     // of both rows, in words or y
  float by_row[2];  // their scales
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int own = row + 8 * h;
    const i64 r = words ? block.words_before(planes) * rows + own : y_row0 + own;
    start[h] = by_pixels ? r / pixels * outputs * pixels + r % pixels : r * outputs;
    by_row[h] = row_scale && own < rows ? row_scale[(row0 + own) / rows_per_scale] : 1.0f;
  }
#pragma unroll
  for (int half = 0; half < HALVES; ++half)
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int column = Place().column() + 128 * half + 32 * part;
      const int real = sense - block.n0 - column;  // columns that exist, from this one on
      const i64 across = (block.column + column) * stride;
      ColumnScale scale[8];
#pragma unroll
      for (int q = 0; q < 8; ++q) scale[q] = block.scales[column + q];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (row + 8 * h >= rows) continue;
        const i64 to = start[h] + across;
        int word[8];  // sums of codes, under GATE with counts in the high half
#pragma unroll
        for (int q = 0; q < 8; ++q) {
          const int j = 4 * part + q / 2;
          word[q] = word_of(codes[half][PAIRED ? 2 * j + h : 4 * j + 2 * h + q % 2] - biases, q % 2, lowest);
        }
        if (words) {
          store<int4>(words + to, word, real, 1, vector);
          continue;
        }
        float value[8], inside[8];
#pragma unroll
        for (int q = 0; q < 8; ++q) {
          value[q] = scale[q].result(code_of(word[q], code_min), by_row[h]);
          inside[q] = share * (float)inside_of(word[q], code_min) * part_of_all;
        }
        store<float4>(y + to, value, real, stride, vector && !pixels);
        if (GATE) store<float4>(gate + to, inside, real, stride, vector && !pixels);
      }
    }
  if (CLUSTER > 1) everyone();  // the other block may still arrive at barriers of this one
}

}  // namespace gpuxbar
