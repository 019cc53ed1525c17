"""Look into a tile: what its wires take from an input, as a picture, as voltages, and as a netlist for ngspice.

Writes ir_drop.png and tile.cir.
"""

from pathlib import Path

import numpy as np

from gpuxbar import circuit, ops

ROWS, COLS = 64, 48
WIRES = {"r_wordline": 2.5, "r_bitline": 2.5, "r_source": 100.0, "r_sink": 100.0}  # ohm

rng = np.random.default_rng(0)
g = rng.uniform(1e-6, 1e-4, (ROWS, COLS)).astype(np.float32)  # S
v = rng.uniform(0, 0.2, ROWS).astype(np.float32)  # V

nodes = circuit.node_voltages(v, g, **WIRES)
left = (nodes.wordline - nodes.bitline) / v[:, None]
near, far = left[-1, 0], left[0, -1]
print(
    f"share of its voltage that a cell sees: {near:.0%} near driver and sense amplifier, {far:.0%} farthest"
)

ideal, current = v @ g, nodes.current
lost = 1 - current / ideal
print(f"current lost: {lost.min():.0%} in the best bitline, {lost.max():.0%} in the worst")

# the tile is linear, so one matrix says it all, for every input
seen = v @ ops.effective_conductance(g, **WIRES)
print(f"effective conductance and nodal solution agree to {np.abs(seen / current - 1).max():.0e}")

circuit.draw_ir_drop(v, g, **WIRES).savefig("ir_drop.png", dpi=120)
netlist = circuit.netlist(v, g, **WIRES)
Path("tile.cir").write_text(netlist)
print(f"tile.cir holds the same circuit in {len(netlist.splitlines())} lines: ngspice -b tile.cir")
