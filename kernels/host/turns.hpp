// turns: the devices of a block, moved by its events one after the other, every device at its own pace.
#pragma once
#include <algorithm>

#include "events.hpp"

namespace gpuxbar::pulses {

// Devices of a wordline that move, from which on they are moved by themselves: a counter then draws for four neighbours. Fewer are
// gathered from the lines of a block, and each draws for itself.
constexpr i64 OF_A_LINE = 28;

// Devices of one plane both ways, [0] down and [1] up: all that stays the same from pulse to pulse, and where they are.
struct alignas(64) Pulsed {
  float free[WIDE_ROW], low[WIDE_ROW], width[WIDE_ROW], inverse_width[WIDE_ROW];
  float gain[2][WIDE_ROW], shape[2][WIDE_ROW];
  float from[2][WIDE_ROW], by[2][WIDE_ROW], fixed[2][WIDE_ROW], per_square[WIDE_ROW];  // effort of one pulse
  float x[WIDE_ROW];
  i32 more[WIDE_ROW];  // pulses taken in these turns
};

// The first `count` of a row, in whole vectors.
template <class L>
void pulsed_row(const UpdateLaw& s, const Row& row, int count, Pulsed& p) {
  std::copy(row.free, row.free + count, p.free);
  for (int up = 0; up < 2; ++up)
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const Device device = device_under<L>(s, spreads(row.draws, j), up != 0);
      p.low[j] = device.low, p.width[j] = device.width, p.inverse_width[j] = device.inverse_width;
      p.gain[up][j] = device.gain, p.shape[up][j] = device.shape;
      const Effort effort = effort_of<L>(s, device, 1.0f / s.pulses, up != 0);
      p.from[up][j] = effort.reach.from, p.by[up][j] = effort.reach.by;
      p.per_square[j] = effort.per_square, p.fixed[up][j] = effort.fixed;
    }
}

// Loads both: a choice of addresses is slow in vectors.
GPUXBAR_FN float either(bool which, const float (&of)[2][WIDE_ROW], int j) {
  const float down = of[0][j], up = of[1][j];
  return which ? up : down;
}

// Device j, as `device_under` makes it; a struct made in a simd loop itself would keep it from vectorising.
GPUXBAR_FN Device device_at(const Pulsed& p, int j, bool rising) {
  return Device{p.low[j], p.width[j], p.inverse_width[j], either(rising, p.gain, j), either(rising, p.shape, j)};
}

// Whether a vector of events has no device with two coincidences.
GPUXBAR_FN bool all_single(const u32* event) {
  u32 any = 0;
#pragma omp simd reduction(| : any)
  for (int j = 0; j < LANES; ++j) any |= event[j];
  return (any & Events::MANY) == 0;
}

// `lanes` devices of one plane after an event each. What does not wait for the last event comes first: its operations fill
// those of others. Mostly it is one pulse, of which the effort is known.
template <class L>
void pulse_row(const UpdateLaw& s, bool positive, int lanes, const u32* event, const float* z, Pulsed& p) {
  const float each = 1.0f / s.pulses;
  alignas(64) float up[WIDE_ROW], d[WIDE_ROW];
  alignas(64) float from[WIDE_ROW], by[WIDE_ROW], per_square[WIDE_ROW], fixed[WIDE_ROW];
#pragma omp simd
  for (int j = 0; j < lanes; ++j) {
    const float n = p.free[j] * Events::pulses(event[j]);
    const float raise = Events::raises(event[j]) ? n : 0.0f, lower = n - raise;
    up[j] = pulses_up(s.sides, positive, raise, lower);
    const float pulses = up[j] + pulses_down(s.sides, positive, raise, lower);
    d[j] = pulses * each;
    p.more[j] += (i32)pulses;
  }
  for (int k = 0; k < lanes; k += LANES)
    if (all_single(event + k)) {
#pragma omp simd
      for (int j = k; j < k + LANES; ++j) {
        const bool rising = up[j] > 0.0f;
        from[j] = either(rising, p.from, j), by[j] = either(rising, p.by, j);
        per_square[j] = p.per_square[j], fixed[j] = either(rising, p.fixed, j);
      }
    } else {
#pragma omp simd
      for (int j = k; j < k + LANES; ++j) {
        const Effort effort = effort_of<L>(s, device_at(p, j, up[j] > 0.0f), d[j], up[j] > 0.0f);
        from[j] = effort.reach.from, by[j] = effort.reach.by, per_square[j] = effort.per_square,
        fixed[j] = effort.fixed;
      }
    }
#pragma omp simd
  for (int j = 0; j < lanes; ++j) {
    const Effort effort{Reach{from[j], by[j]}, per_square[j], fixed[j]};
    p.x[j] = moved<L>(s, device_at(p, j, up[j] > 0.0f), effort, p.x[j], d[j], up[j] > 0.0f, z[j], s.scatter);
  }
}

// Move devices by their events, one after the other, of samples from b0 on; `rows`, `columns`: where they lie.
template <class L, class E>
void turn_by_turn(const Update& u, const Arrays& a, i64 b0, const E& events, const Lines& rows, const Lines& columns,
                  Pulsed (&devices)[2]) {
  const UpdateLaw s = u.law;
  alignas(64) float z[2][WIDE_ROW] = {};
  alignas(64) Lines samples, word;
  i64 active = whole_vectors(events.moving);
  for (u32 side = 0; side < u.sides(); ++side) std::fill(devices[side].more, devices[side].more + active, 0);
  for (i64 turn = 0; turn < events.found[events.order[0]]; ++turn) {
    while (events.found[events.order[active - LANES]] <= turn) active -= LANES;
    const u32* event = events.in_turn[turn];
    if (noisy(s)) {
      for (i64 k = 0; k < active; ++k) samples[k] = (u32)b0 + E::sample(event[k]);
      draw_words_at<7>(PULSE_CYCLE, (u32)u.step, a.keys, active, rows, columns, samples, word);
      make_pairs(word, (int)active, z[0], z[1]);
    }
    for (u32 side = 0; side < u.sides(); ++side) pulse_row<L>(s, side == 0, (int)active, event, z[side], devices[side]);
  }
}

// Those of line `i` of a block.
template <class L>
void take_turns(const Update& u, const Arrays& a, i64 group, i64 i0, i64 i, i64 o0, i64 b0, Events& events,
                Block& block) {
  events.line_up();
  block.load(u, a, group, i0, i, o0);
  const u32* order = events.order;
  const i64 moving = whole_vectors(events.moving), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  const Chosen chosen{order, (int)moving};
  alignas(64) Lines rows, columns;
  Pulsed devices[2];
  for (u32 side = 0; side < u.sides(); ++side) {
    Pulsed& p = devices[side];
    pulsed_row<L>(u.law, Row(u, a, u.place(side, group, i0 + i, o0), count, block.failures(side, i), &chosen),
                  (int)moving, p);
    chosen.pick(block.x[side][i], p.x);
  }
  for (i64 k = 0; k < moving; ++k) rows[k] = (u32)(group * u.inputs + i0 + i), columns[k] = (u32)o0 + order[k];
  turn_by_turn<L>(u, a, b0, events, rows, columns, devices);
  for (u32 side = 0; side < u.sides(); ++side) {
    const Pulsed& p = devices[side];
    for (i64 k = 0; k < moving; ++k) block.x[side][i][order[k]] = p.x[k];
    if (block.tracked)
      for (i64 k = 0; k < moving; ++k) block.more[side][i][order[k]] += p.more[k];
  }
  events.clear();
}

// Those gathered from the lines of a block, of which none can fail.
template <class L>
void take_turns(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, i64 b0, Gathered& few, Block& block) {
  if (!few.count) return;
  few.events.line_up();
  u32 pair[WIDE_ROW];
  for (i64 k = 0; k < few.count; ++k) pair[k] = few.pair[few.events.order[k]];
  PairsOfBlock at(u, group, i0, o0, pair, few.count);
  Pulsed devices[2];
  for (u32 side = 0; side < u.sides(); ++side) {
    at.lie_in(u, side);
    pulsed_row<L>(u.law, Row(u, a, at), at.count, devices[side]);
    for (i64 k = 0; k < at.count; ++k) devices[side].x[k] = k < few.count ? block.of_side(side)[pair[k]] : 0.0f;
  }
  turn_by_turn<L>(u, a, b0, few.events, at.rows, at.columns, devices);
  for (u32 side = 0; side < u.sides(); ++side)
    for (i64 k = 0; k < few.count; ++k) {
      block.of_side(side)[pair[k]] = devices[side].x[k];
      if (block.tracked) block.more[side][pair[k] / WIDE_ROW][pair[k] % WIDE_ROW] += devices[side].more[k];
    }
  few.clear();
}

template <class L, bool IMPLICIT>
void pulse_in_sequence(const Update& u, const Arrays& a, i64 group, i64 i0, i64 o0, Events& events, Gathered& few,
                       Block& block) {
  events.clear();
  few.clear();
  const i64 lines = std::min<i64>(LINES, u.inputs - i0), count = std::min<i64>(WIDE_ROW, u.outputs - o0);
  const Trains &inputs = a.inputs, &errors = a.errors;
  const bool rare = errors.held == Held::OVER_LINES;
  const i64 stretch = rare ? STRETCH : CHUNK;
  for (i64 b0 = 0; b0 < u.batch; b0 += stretch) {
    const auto take_few = [&] { take_turns<L>(u, a, group, i0, o0, b0, few, block); };
    for (i64 i = 0; i < lines; ++i) {
      const i64 end = std::min(b0 + stretch, u.batch);
      const auto take_line = [&] { take_turns<L>(u, a, group, i0, i, o0, b0, events, block); };
      for (i64 b = b0; b < end; b += CHUNK) {
        const u32* input = inputs.of_line(group, i0 + i) + b;
        const i64 samples = whole_vectors(std::min<i64>(CHUNK, end - b));  // those behind the batch have no pulses
        if (rare)
          events.find_rare(input, errors.over_lines(group, o0, b), errors.row_words(o0), (u32)(b - b0), samples, count);
        else
          events.find<IMPLICIT>(input, errors.of_line(group, o0) + b, u.samples(), a.length + group * u.samples() + b,
                                (u32)(b - b0), samples, count);
        if (events.most() > CHUNK) take_line();
      }
      const i32 most = events.most();
      if (!most) continue;
      block.ask_for(u, a, group, i0, i, o0);
      if (block.counted || most > Gathered::MOST || events.how_many() >= OF_A_LINE) {
        take_line();
      } else {
        block.load(u, a, group, i0, i, o0);
        few.add(events, (u32)i, take_few);
      }
    }
    take_few();
  }
}

}  // namespace gpuxbar::pulses
