// What writes of a row of devices draw, for the host kernels that program.
#pragma once
#include <algorithm>

#include "draw.hpp"
#include "gpuxbar/programming.cuh"

namespace gpuxbar {

inline bool has_stuck(const Programming& p) { return p.stuck_low > 0.0f || p.stuck_high < 1.0f; }

// Uniforms that say which of 64 cells from bitline col0 are stuck.
inline void draw_stuck(const Programming& p, const WideKeys& keys, u32 plane, u32 row, i64 col0, float* u) {
  if (has_stuck(p))
    draw_uniforms(Draw{STUCK, plane, 0, keys}, row, col0, u);
  else
    std::fill(u, u + WIDE_ROW, 0.5f);
}

// Of a write for a purpose, whose noise is drawn at the step of the settings.
struct WriteDraws {
  alignas(64) float spread[WIDE_ROW] = {}, noise[WIDE_ROW] = {}, u[WIDE_ROW];

  WriteDraws(const Programming& p, const WideKeys& keys, Purpose purpose, u32 plane, u32 row, i64 col0) {
    if (p.spread > 0.0f) draw_normals(Draw{DEVICE_SPREAD, plane, 0, keys}, row, col0, spread);
    if (p.noise.any()) draw_normals(Draw{(u32)purpose, plane, (u32)p.step, keys}, row, col0, noise);
    draw_stuck(p, keys, plane, row, col0, u);
  }
};

}  // namespace gpuxbar
