"""`effective_conductance_gradient` on a CUDA device: the levels of the block merge undone, from the tile to its cells.

A merge is undone by fourteen batched products on what its level kept, the columns of its joined sides; leaves by
one kernel in shared memory, which merges them anew. Of a whole tile, gradients between its left and lower ports alone are
not 0: its own merge, a third of the work, takes less than half of it. Everything is float32, the number of launches depends on the
tile's size only, and nothing waits for the device. Not yet run on a GPU.

With D the gradient of a merged block, B = [[B1, 0], [0, B2]] the joined sides' columns of its parts and T = [[A F, -F'],
[-F, -F Z]], the joined sides see B T of the merged block's ports. Their gradients are T' (B' D B) T among themselves and
D B T with the other ports; among the others it is D. For a level of blocks of n x n cells that is about 2.2 times the
operations of its merge.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from gpuxbar.launch import Device, In, Kernel, Out, Scalar
from gpuxbar.ops.effective_conductance_cuda import (
    LEAF,
    LINES,
    VALUES,
    Level,
    Operand,
    grid,
    leaf_bits,
    leaves,
    merge_ways,
    product,
    wire_values,
)

__all__ = ["KERNELS", "effective_conductance_gradient_cuda"]

_INT, _LONG = Scalar("int32"), Scalar("int64")

TILE = Kernel(
    "conductance_gradient.cu", name="conductance_gradient_tile", grad=In("float32", "T R C"), whole=Out("float32"),
    rows=_INT, cols=_INT, high=_INT, wide=_INT, size=_LONG,
)  # fmt: skip
PARTS = Kernel(
    "conductance_gradient.cu", name="conductance_gradient_parts", whole=In("float32"), parts=Out("float32"),
    cross=Out("float32"), block_rows=_INT, block_cols=_INT, along_rows=_INT, next_along_rows=_INT, alternate=_INT,
    size=_LONG,
)  # fmt: skip
TURN = Kernel(
    "conductance_gradient.cu", name="conductance_gradient_turn", f=In("float32"), t=Out("float32"), k=_INT, size=_LONG
)  # fmt: skip
CONDUCTANCE_LEAF_GRADIENT = Kernel(
    "conductance_leaf_gradient.cu", g=In("float32", "T R C"), **LINES, grad_q=In("float32"),
    grad_g=Out("float32", "T R C"), **VALUES, rows=_INT, cols=_INT, high_bits=_INT, wide_bits=_INT,
)  # fmt: skip
KERNELS = (TILE, PARTS, TURN, CONDUCTANCE_LEAF_GRADIENT)

LEAF_BYTES = 4 * (3 * 5120 + 2048)  # of shared memory: two levels of blocks, one of gradients, products
CHUNK = 4  # workspaces of the device for a chunk of tiles (23 of 128 x 128 in 256 MB): batches are small near the tile


def effective_conductance_gradient_cuda(device: Device, g: Any, grad: Any, lines: dict[str, Any]) -> Any:
    """`ops.effective_conductance_gradient` on tiles [T, R, C], checked; `lines` are numbers, or arrays on the device."""
    rows, cols = g.shape[1:]
    bits = leaf_bits(rows, cols)
    out, wires = device.empty(g.shape, "float32"), wire_values(lines)
    chunk = max(CHUNK * device.workspace // _bytes(*bits), 1)
    for first in range(0, len(g), chunk):
        part = slice(first, first + chunk)
        _tiles(device, g[part], grad[part], out[part], wires, bits)
    return out


def _bytes(high_bits: int, wide_bits: int) -> int:
    """Memory of a tile: its kept levels, and the gradients and products of the level at hand."""
    rows = cols = LEAF
    blocks, kept = 1 << (high_bits + wide_bits), 0
    for along_rows in merge_ways(high_bits, wide_bits):
        kept += blocks * (2 * (rows + cols)) ** 2
        blocks //= 2
        rows, cols = (rows, 2 * cols) if along_rows else (2 * rows, cols)
    return 4 * (kept + 4 * (2 * (rows + cols)) ** 2)


def _tiles(
    device: Device, g: Any, grad: Any, out: Any, wires: dict[str, Any], bits: tuple[int, int]
) -> None:  # fmt: skip
    tiles, rows, cols = g.shape
    high, wide = (LEAF << b for b in bits)
    levels = _levels(device, g, wires, bits)
    whole = device.empty((tiles * 4 * (high + wide) ** 2,), "float32")
    device.launch(
        TILE, grid(whole.size), (256,),
        {"grad": grad, "whole": whole, "rows": rows, "cols": cols, "high": high, "wide": wide, "size": whole.size},
    )  # fmt: skip
    above = None
    while levels:
        level = levels.pop()
        whole, above = _parts(level, whole, above), level
    device.launch(
        CONDUCTANCE_LEAF_GRADIENT, (tiles << sum(bits),), (128,),
        {"g": g, **wires, "grad_q": whole, "grad_g": out, "rows": rows, "cols": cols, "high_bits": bits[0],
         "wide_bits": bits[1]},
        shared=LEAF_BYTES,
    )  # fmt: skip


def _levels(device: Device, g: Any, wires: dict[str, Any], bits: tuple[int, int]) -> list[Level]:
    """All levels above the cells of leaves, from the leaves on; the last is that of a tile's two halves."""
    ways = merge_ways(*bits)
    if not ways:
        return []
    q = leaves(device, g, wires, bits)
    levels = [Level(device, "fp32", q, len(g) << sum(bits), LEAF, LEAF, ways[0])]
    for _, after in pairwise(ways):
        levels.append(levels[-1].merged(after))
    return levels


class Ports(NamedTuple):
    """Some neighbours among a block's other ports: which block of a pair, the first of them, and how many."""

    block: int
    at: int
    size: int


def _related(level: Level, whole_tile: bool) -> list[tuple[Ports, tuple[Ports, ...]]]:
    """Other ports of a pair, with those that they have gradients with: at most one group of a block, block 0 first.

    Of a block's ports those come first that have most.
    """
    p, q, e = level.rows, level.cols, level.rest
    if not whole_tile:
        all_ports = Ports(0, 0, e), Ports(1, 0, e)
        return [(ports, all_ports) for ports in all_ports]
    left: tuple[Ports, ...] = (Ports(0, 0, p),)
    if level.along_rows:  # left, top, bottom | right, and right, top, bottom | left
        bottom: tuple[Ports, ...] = (Ports(0, p + q, q), Ports(1, p + q, q))
    else:  # left, right, bottom | top, and left, right, top | bottom
        left, bottom = (*left, Ports(1, 0, p)), (Ports(0, 2 * p, q),)
    pairs = [(ports, bottom) for ports in left] + [(ports, left) for ports in bottom]
    return sorted(pairs, key=lambda pair: -len(pair[1]))


def _parts(level: Level, whole: Any, above: Level | None) -> Any:
    """Gradients of a level's blocks from those of its pairs `whole`, which are about to be joined as `above`."""
    device, pairs, k, e = level.device, level.pairs, level.joined, level.rest
    parts, cross = level.new(2 * level.ports, level.ports), level.new(2 * e, e)
    related = _related(level, whole_tile=above is None)
    if above is None:
        parts[0].fill(0.0)  # between the joined side and ports without a gradient
    device.launch(
        PARTS, grid(whole.size // 16), (256,),  # four squares a block
        {"whole": whole, "parts": parts[0], "cross": cross[0], "block_rows": level.rows, "block_cols": level.cols,
         "along_rows": int(level.along_rows), "next_along_rows": int(above is not None and above.along_rows),
         "alternate": int(above is not None), "size": whole.size},
    )  # fmt: skip
    t, h, g = (level.new(2 * k, 2 * k) for _ in range(3))
    f, u = level.solved, level.new(2 * e, 2 * k)
    device.launch(
        TURN, grid(pairs * k * k), (256,), {"f": f[0], "t": t[0], "k": k, "size": pairs * k * k}
    )  # fmt: skip

    def multiply(m: int, n: int, depth: int, a: Operand, b: Operand, c: Operand, beta: float = 0.0) -> None:
        product(device, "fp32", (pairs, m, n, depth), a, b, c, 1.0, beta)

    def grad(block: int, row: int, col: int) -> Operand:
        array, _, stride, ld = parts
        return array, level.at(block, row, col), stride, ld

    multiply(k, k, k, level.block(1, e, e), f, t)
    multiply(k, k, k, f, level.block(0, e, e), _at(t, k, k))
    width = [0, 0]  # of D B in the rows of a block: the rest of it is 0
    for own, others in related:
        row = own.block * e + own.at
        for other in others:
            d = grad(own.block, own.at, other.at) if own.block == other.block else _at(cross, row, other.at)
            to = _at(u, row, other.block * k)
            multiply(own.size, k, other.size, d, level.block(other.block, other.at, e), to)
        wide, more = len(others) * k, width[own.block] > 0
        rows, to = level.block(own.block, e, own.at), _at(h, own.block * k, 0)
        multiply(k, wide, own.size, rows, _at(u, row, 0), to, float(more))
        multiply(own.size, k, wide, _at(u, row, 0), _at(t, 0, own.block * k), grad(own.block, own.at, e))
        width[own.block] = max(wide, width[own.block])
    for block in range(2):
        multiply(k, 2 * k, width[block], _at(h, block * k, 0), t, _at(g, block * k, 0))
    for block in range(2):
        multiply(k, k, 2 * k, _at(t, block * k, 0), _at(g, 0, block * k), grad(block, e, e))
    return parts[0]


def _at(x: Operand, row: int, col: int) -> Operand:
    array, offset, stride, ld = x
    return array, offset + row * ld + col, stride, ld
