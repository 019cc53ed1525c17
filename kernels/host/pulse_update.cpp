// pulse_update on the CPU: pulse trains of a batch, their coincidences through the device law, and the weights read out.
//
// A sliced weight is pulsed on its lowest slice. First the trains of every line (pulse_trains.hpp), then blocks of 64
// wordlines by 64 bitlines: exact, samples in sequence, every device at its own pace (events.hpp, turns.hpp); aggregated,
// coincidences are counted over the batch (coincidences.hpp), and the devices move once (at_once.hpp). Every train and cell is a function
// of its own place, so the bits do not depend on threads.
// Meaning and oracle: gpuxbar/reference/pulse_update.py.
#include "pulse_update.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "at_once.hpp"
#include "coincidences.hpp"
#include "finite.hpp"
#include "pulse_trains.hpp"
#include "threads.hpp"
#include "turns.hpp"

using namespace gpuxbar;
using namespace gpuxbar::pulses;

namespace {

// Coincidences of a device and sample below which to go through slots that fire; comparing all words pays sooner where
// vectors are wide.
constexpr double RARE = LANES == 16 ? 0.05 : 0.2;

// Wordlines of a block that moved, up to which their weights alone are read out, and not all of the block.
constexpr i64 BY_LINE = 16;

struct Scratch {
  Events events;
  Gathered few;
  Coincidences together;
  alignas(64) Counts raise, all;  // of a block
  Block block;
};

// A thread's own. Of a template there would be one for each law.
Scratch& scratch() {
  static thread_local const std::unique_ptr<Scratch> own(new Scratch);
  return *own;
}

// The devices of a block, moved by the samples one after the other.
template <class L, bool IMPLICIT>
void pulse_block(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, Scratch& own) {
  Block& block = own.block;
  block.counted = a.pulse_count != nullptr, block.tracked = a.tracked();
  std::fill_n(block.moved, LINES, false);
  pulse_in_sequence<L, IMPLICIT>(u, a, group, i0, o0, own.events, own.few, block);
  const i64 count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  for (u32 side = 0; side < u.sides(); ++side)
    for (i64 i = 0; i < LINES; ++i) {
      if (!block.moved[i]) continue;
      keep_row(u, a, u.place(side, group, i0 + i, o0), count, block.more[side][i], block.before[side][i],
               block.x[side][i]);
    }
}

// The weights of a block; `moved`: wordlines whose devices may have moved.
void read_out(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, const bool* moved) {
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  const i64 output = group * u.outputs + o0;
  float* const w = a.w + output * u.inputs + i0;
  const bool by_line = u.weights_held && std::count(moved, moved + lines, true) <= BY_LINE;
  alignas(64) float weight[LINES][WIDE_ROW];
  for (i64 i = 0; i < lines; ++i) {
    if (by_line && !moved[i]) continue;
    float* sum = weight[i];
    std::fill(sum, sum + count, 0.0f);
    for (i32 slice = 0; slice < u.slices.count; ++slice)
      for (u32 side = 0; side < 2; ++side) {
        const float share = 1.0f / u.range * slice_weight(u.slices, slice), by = side ? -share : share;
        const float* from = a.g + u.cell(side * u.slices.count + slice, group * u.inputs + i0 + i, o0);
        each_cell(count, [=](i64 j) { sum[j] = fma(from[j], by, sum[j]); });
      }
    const float* top = a.w_max + output;
    each_cell(count, [=](i64 j) { sum[j] *= top[j]; });
    if (by_line)
      for (i64 j = 0; j < count; ++j) w[j * u.inputs + i] = sum[j];
  }
  if (!by_line) transpose(weight[0], WIDE_ROW, lines, count, w, u.inputs);
}

// All blocks of rows x cols devices from a corner on, whose coincidences are counted together.
template <class L, bool IMPLICIT>
void update_blocks(const Update& u, const Arrays& a, bool aggregated, i64 group, i64 i0, i64 o0, i64 rows, i64 cols) {
  Scratch& own = scratch();
  Coincidences& together = own.together;
  const bool many_outputs = aggregated && a.errors.held == Held::OVER_LINES,
             many_inputs = a.inputs.held == Held::OVER_LINES;
  if (many_outputs) together.count(a, u.batch, a.inputs, a.errors, group, i0, o0);
  if (many_inputs) together.count(a, u.batch, a.errors, a.inputs, group, o0, i0);
  for (i64 i = i0; i < std::min(i0 + rows, u.inputs); i += LINES)
    for (i64 o = o0; o < std::min(o0 + cols, u.outputs); o += WIDE_ROW) {
      if (many_outputs) {
        for (i64 line = 0; line < LINES; ++line) {
          std::copy_n(together.raise[line] + (o - o0), WIDE_ROW, own.raise[line]);
          std::copy_n(together.all[line] + (o - o0), WIDE_ROW, own.all[line]);
        }
      } else if (many_inputs) {
        transpose(together.raise[0] + (i - i0), ACROSS, WIDE_ROW, LINES, own.raise[0], WIDE_ROW);
        transpose(together.all[0] + (i - i0), ACROSS, WIDE_ROW, LINES, own.all[0], WIDE_ROW);
      } else if (aggregated) {
        count_implied(u, a, group, i, o, own.raise, own.all);
      }
      if (aggregated)
        pulse_at_once<L>(u, a, group, i, o, own.raise, own.all, own.block.moved);
      else
        pulse_block<L, IMPLICIT>(u, a, group, i, o, own);
      read_out(u, a, group, i, o, own.block.moved);
    }
}

double mean_magnitude(const float* values, i64 size) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (i64 e = 0; e < size; ++e) sum += gpuxbar::abs(values[e]);
  return sum / (double)size;
}

// Of a device and a sample, about.
double coincidences_expected(const Update& u, const float* x, const float* d, const float* scale) {
  return mean_magnitude(x, u.x_size()) * mean_magnitude(d, u.d_size()) * mean_magnitude(scale, u.groups * u.outputs);
}

}  // namespace

// `bad`, [3]: how many values of x and d are not finite, and of w_max not finite or not above 0; nothing moves then.
extern "C" void gpuxbar_pulse_update(float* g, float* g_held, i32* pulse_count, const u16* device_map, const float* x,
                                     const float* d, const float* sign, float* w, const float* w_max,
                                     const Update* update, i64* bad) {
  const Update u = *update;
  const i64 bitlines_of_all = u.groups * u.outputs;
  bad[0] = count_not_finite(x, u.x_size());
  bad[1] = count_not_finite(d, u.d_size());
  bad[2] = std::count_if(w_max, w_max + bitlines_of_all, [](float w) { return !(w > 0.0f) || not_finite(w); });
  if (bad[0] + bad[1] + bad[2]) return;
  const bool aggregated = u.aggregated != 0;
  std::vector<float> scale(bitlines_of_all), unit(u.groups);
  for (i64 j = 0; j < bitlines_of_all; ++j) scale[j] = u.pulses / w_max[j];
  for (i64 group = 0; group < u.groups; ++group)
    unit[group] = *std::min_element(&scale[group * u.outputs], &scale[group * u.outputs] + u.outputs);
  // samples and lines in whole blocks, and room behind them for the bits of more lines than there are
  const auto words_for = [&](i64 lines) {
    return std::unique_ptr<u32[]>(new u32[u.groups * u.samples() * ((lines + WORD - 1) / WORD * WORD) + WORD]);
  };
  const auto input_words = words_for(u.inputs), error_words = words_for(u.outputs);
  u32 *const inputs = input_words.get(), *const errors = error_words.get();
  std::vector<float> length(u.groups * u.samples());
  std::vector<i32> slots(u.groups * u.samples() / SAMPLES);
  const DeviceMap map{device_map, 2 * u.slices.count * u.groups * u.inputs * u.outputs};
  // the side of fewer lines has fewer slots to go through
  const bool bits = aggregated && !u.train.implicit, many_inputs = u.inputs > u.outputs;
  const auto trains = [&](u32* words, i64 count, Held held, i64 across) {
    return Trains{words, count, (count + WORD - 1) / WORD * WORD, u.samples(), held, across};
  };
  const auto counted = [&](u32* words, i64 count, bool many) {
    return trains(words, count, many ? Held::OVER_LINES : Held::OVER_SAMPLES, ACROSS);
  };
  // samples are compared by whole vectors, and gone through one by one
  const double filled = (double)u.batch / (double)whole_vectors(u.batch);
  const bool rare = !aggregated && !u.train.implicit && filled * coincidences_expected(u, x, d, scale.data()) < RARE;
  const Trains wordlines = bits ? counted(inputs, u.inputs, many_inputs) : trains(inputs, u.inputs, Held::WHOLE, 0),
               bitlines = bits ? counted(errors, u.outputs, !many_inputs)
                               : trains(errors, u.outputs, rare ? Held::OVER_LINES : Held::WHOLE, WIDE_ROW);
  const WideKeys keys(u.seed);
  const Arrays a{g,         g_held,   pulse_count,   map,          x,   d, scale.data(), unit.data(), sign, w, w_max,
                 wordlines, bitlines, length.data(), slots.data(), keys};
#pragma omp parallel if (u.groups * u.samples() > SAMPLES)
  {
    Trainer trainer(u, a);
#pragma omp for collapse(2) schedule(static)
    for (i64 group = 0; group < u.groups; ++group)
      for (i64 block = 0; block < u.samples() / SAMPLES; ++block) trainer.fire(group, block);
  }
  i64 rows = bits && many_inputs ? ACROSS : LINES, cols = bits && !many_inputs ? ACROSS : WIDE_ROW;
  const auto blocks = [](i64 lines, i64 size) { return (lines + size - 1) / size; };
  while (rows * cols > LINES * WIDE_ROW &&
         u.groups * blocks(u.inputs, rows) * blocks(u.outputs, cols) < threads_to_come())
    (many_inputs ? rows : cols) /= 2;
  const i64 row_blocks = blocks(u.inputs, rows), col_blocks = blocks(u.outputs, cols);
  with_law(u.law.law, [&](auto law) {
    using L = typename decltype(law)::Type;
#pragma omp parallel for collapse(3) schedule(dynamic) if (u.groups * row_blocks * col_blocks > 1)
    for (i64 group = 0; group < u.groups; ++group)
      for (i64 rb = 0; rb < row_blocks; ++rb)
        for (i64 cb = 0; cb < col_blocks; ++cb)
          if (u.train.implicit)
            update_blocks<L, true>(u, a, aggregated, group, rb * rows, cb * cols, rows, cols);
          else
            update_blocks<L, false>(u, a, aggregated, group, rb * rows, cb * cols, rows, cols);
  });
}
