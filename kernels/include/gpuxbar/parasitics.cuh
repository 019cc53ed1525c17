// parasitics.cuh: one cell between its wire segments, and one segment of a ladder.
//
// Meaning and proof: gpuxbar/reference/effective_conductance.py. `T` is a number, or a vector of numbers on the host.
#pragma once
#include "gpuxbar/portable.cuh"

namespace gpuxbar {

// A cell as a network of four sides, left, right, top and bottom (upper triangle of a symmetric matrix, S, ohm and
// ratios): the device g with the wordline segment left of it and the bitline segment below it, both ohm.
template <class T>
struct CellPorts {
  T ll, lr, lt, lb, rr, rt, rb, tt, tb, bb;
};

template <class T>
GPUXBAR_FN CellPorts<T> cell_ports(T g, T left, T below) {
  const T drop = 1.0f / (1.0f + g * (left + below));
  const T through = g * drop;  // the device and its segments in series
  const T pass_right = (1.0f + g * below) * drop, pass_up = (1.0f + g * left) * drop;
  return CellPorts<T>{
      through,         -pass_right,      -through * below, -through, -left * pass_right, -through * left * below,
      -through * left, -below * pass_up, -pass_up,         through};
}

// What is left of a voltage behind a segment of `resistance` with an admittance `beyond` after it.
template <class T>
GPUXBAR_FN T ladder_factor(T resistance, T beyond) {
  return 1.0f / (1.0f + resistance * beyond);
}

}  // namespace gpuxbar
