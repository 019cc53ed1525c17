"""What the wires of its tiles leave of a layer's cells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpuxbar import ops
from gpuxbar.bridge.arrays import array, on_device, tensor
from gpuxbar.bridge.lines import by_line, of_lines
from gpuxbar.bridge.operator import gradient, operator, spec_of
from gpuxbar.launch import Device
from gpuxbar.spec import CrossbarSpec, Parasitics

__all__ = ["merged", "refresh_wires", "tiles_shape", "weight_through_wires"]


@operator(
    lambda *_: None,
    mutates_args=("seen", "seen_back", "state", "offset", "start", "age", "slope", "error", "anchored"),
)
def refresh_wires(
    cells: Tensor,
    seen: Tensor,
    seen_back: Tensor | None,
    state: Tensor,
    key: Tensor,
    offset: Tensor | None,
    start: Tensor | None,
    age: Tensor | None,
    slope: Tensor | None,
    error: Tensor | None,
    anchored: Tensor | None,
    solve_all: bool,
    groups: int,
    merge: str,
    spec: str,
) -> None:
    """Solve the wires of every tile (or of those that are due), and merge the planes as the periphery does.

    Args:
        cells: Conductances of all devices, float32 [2 slices, G * I, O], S.
        seen: What a forward read sees of them, float32 [S, G * I, O], S.
        seen_back: What a transposed read sees where that is another matrix, shape of `seen`; None: the same.
        state, key: What was solved and what the cells hold now, int64 [1]. On the CPU nothing is done if they agree;
            on a GPU, where looking would wait for the device, wires are always solved; an anchor moves on there only
            if the cells did.
        offset, start, age, slope, error: `ops.Anchor` of the tiles [D, ..., R, C] and [D, tiles], D 1 for one matrix
            and 2 if the transposed read sees another; None: no anchor.
        anchored: State of the cells that the anchor was last updated to, int64 [1].
        solve_all: With an anchor: solve every tile, whatever it holds.
        groups: Arrays side by side along the wordlines.
        merge: How planes join; see `mapping.Planes`.
        spec: The layer's `CrossbarSpec` as JSON.
    """
    crossbar = spec_of(spec)
    wires = crossbar.parasitics
    with on_device(cells, "wires") as device:
        if device is None and torch.equal(state, key):
            return
        moved = None if anchored is None else array((anchored != key).int())
        blocks = _tiles(_arrays(cells, groups), crossbar)
        base = 2 ** (crossbar.mapping.slice_bits or 0)
        for swap, target in enumerate((seen, seen_back)):
            if target is None:
                continue
            anchor = None
            if offset is not None:
                parts = (offset, start, age, slope, error)
                anchor = ops.Anchor(*(array(part[swap]) for part in parts if part is not None))
            solved = _solve(blocks, wires, bool(swap), device, anchor, moved, solve_all)
            joined = merged(solved.unflatten(0, (-1, groups)), merge, base)
            # `data`: autograd need not know, for the weight that changed the cells is caught, and a GPU solves unchanged cells too
            _untile(joined.flatten(0, 1), into=_arrays(target.data, groups))
        state.copy_(key)
        if anchored is not None:
            anchored.copy_(key)


@operator(lambda weight, *_: torch.empty_like(weight))
def weight_through_wires(
    weight: Tensor, cells: Tensor, w_max: Tensor, groups: int, pairs: bool, spec: str
) -> Tensor:
    """A weight, whose gradient as a read sees it becomes that of its devices behind their wires.

    Args:
        weight: [G * O, ...].
        cells: Conductances that hold it, float32 [2 slices, G * I, O], S.
        w_max: Weight of a full pair, float32 [G * O].
        groups: Arrays side by side along the wordlines.
        pairs: Whether a change moves both devices of a pair by a half, as in-situ training does; else it moves the
            device on the weight's side. All slices move by the same digit.
        spec: The layer's `CrossbarSpec` as JSON.
    """
    return weight.clone()


@operator(lambda grad, *_: torch.empty_like(grad))
def weight_through_wires_gradient(
    grad: Tensor, weight: Tensor, cells: Tensor, w_max: Tensor, groups: int, pairs: bool, spec: str
) -> Tensor:
    """Gradient of the weight, shape and dtype of `grad`."""
    crossbar = spec_of(spec)
    base, slices = 2.0 ** (crossbar.mapping.slice_bits or 0), crossbar.mapping.slices
    digit = 1 / sum(base**k for k in range(slices))  # of every slice, together a full weight
    order = crossbar.mapping.line_order
    full = w_max.view(groups, -1, 1)
    with on_device(grad, "wires backward") as device:
        tiles = _tiles(_arrays(cells, groups), crossbar)
        seen = by_line(grad.detach().float(), groups, order) * full
        seen = _tiles(seen.mT, crossbar).repeat(len(cells), 1, 1, 1, 1)
        try:
            by_tile = ops.effective_conductance_gradient(
                array(tiles), array(seen), **_ohms(crossbar.parasitics, swap=False), device=device
            )
        except ops.NotFiniteError:  # left to be found in the gradient, as of ideal wires
            return torch.full_like(grad, torch.nan)
        by_cell = torch.empty_like(cells)
        _untile(tensor(by_tile), into=_arrays(by_cell, groups))
    moved = by_cell.view(2, slices, groups, -1, cells.shape[2]).mT
    for k in range(slices):
        moved[:, k] *= base**k
    positive, negative = moved.sum(1)
    if pairs:
        out = positive + negative
    else:
        sign = by_line(weight.detach().float(), groups, order).sign()
        out = positive * (1 + sign) + negative * (1 - sign)
    return of_lines(digit / 2 * out / full, grad.shape, order).to(grad.dtype).contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, cells, w_max, *ctx.settings = inputs
    ctx.save_for_backward(
        weight, cells, w_max
    )  # a change of the weight, which alone changes cells, is caught


def _backward(ctx: Any, grad: Tensor) -> Any:
    return weight_through_wires_gradient(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)


gradient(weight_through_wires, _backward, _setup, wrt=(0,))


def merged(planes: Tensor, merge: str, base: int, power: int = 1) -> Tensor:
    """Planes [2 slices, ...] joined: "none" keeps them; differences of pairs, or with `power` 2 sums of variances."""
    if merge == "none":
        return planes
    positive, negative = planes.chunk(2)
    pairs = positive - negative if power == 1 else positive + negative
    if merge == "subtract":
        return pairs
    total = pairs[:1].clone()
    for k in range(1, len(pairs)):
        total.add_(pairs[k], alpha=float(base) ** (power * k))
    return total


def tiles_shape(cells: tuple[int, ...], groups: int, spec: CrossbarSpec) -> tuple[int, ...]:
    """Shape of the tiles of cells [2 slices, G * I, O]: arrays, row tiles, column tiles, rows, columns."""
    t, u, rows, cols = _shape(cells[1] // groups, cells[2], spec)
    return cells[0] * groups, t, u, rows, cols


def _solve(
    blocks: Tensor,
    wires: Parasitics,
    swap: bool,
    device: Device | None,
    anchor: ops.Anchor | None,
    moved: Any,
    solve_all: bool,
) -> Tensor:
    ohms = _ohms(wires, swap)
    if anchor is not None and wires.anchor is not None:
        solved = ops.anchored_conductance(
            array(blocks), anchor, **ohms, approximation=wires.anchor, refresh_interval=wires.refresh_interval,
            tolerance=wires.tolerance, update=moved, solve_all=solve_all, arithmetic=wires.arithmetic, device=device,
        )  # fmt: skip
    else:
        solved = ops.effective_conductance(
            array(blocks), **ohms, method=wires.method, shared_drivers=wires.shared_drivers,
            arithmetic=wires.arithmetic, device=device,
        )  # fmt: skip
    return tensor(solved)


def _ohms(wires: Parasitics, swap: bool) -> dict[str, Any]:
    """The resistances; with `swap`, those of the ends move with driver and sense amplifier."""
    source, sink = (wires.r_sink, wires.r_source) if swap else (wires.r_source, wires.r_sink)
    return {"r_wordline": wires.r_wordline, "r_bitline": wires.r_bitline, "r_source": source, "r_sink": sink}


def _shape(lines: int, outputs: int, spec: CrossbarSpec) -> tuple[int, int, int, int]:
    """(row tiles, column tiles, rows, columns) of arrays [.., lines, outputs]."""
    rows, cols = min(spec.tile.rows, lines), min(spec.tile.cols, outputs)
    return -(-lines // rows), -(-outputs // cols), rows, cols


def _arrays(planes: Tensor, groups: int) -> Tensor:
    """Planes [S, G * I, O] as arrays [S * G, I, O]."""
    return planes.view(-1, planes.shape[1] // groups, planes.shape[2])


def _tiles(arrays: Tensor, spec: CrossbarSpec) -> Tensor:
    """Arrays [n, I, O] cut into tiles [n, T, U, R, C]; an edge tile is filled up with open cells where lines end."""
    t, u, rows, cols = shape = _shape(arrays.shape[1], arrays.shape[2], spec)
    whole = arrays.shape[1:] == (t * rows, u * cols)
    tiles = (arrays.new_empty if whole else arrays.new_zeros)(len(arrays), *shape)
    for part, same in _blocks(arrays, tiles):
        same.copy_(part)
    return tiles


def _untile(tiles: Tensor, into: Tensor) -> None:
    """The inverse, into arrays [n, I, O]."""
    for part, same in _blocks(into, tiles):
        part.copy_(same)


def _blocks(arrays: Tensor, tiles: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The cells of arrays and the same cells in their tiles, both [n, t, u, r, c]: whole tiles, then those at the edges."""
    rows, cols = tiles.shape[3:]
    for down, high in _spans(arrays.shape[1], rows):
        for across, wide in _spans(arrays.shape[2], cols):
            part = arrays[:, down.start * rows : down.stop * rows, across.start * cols : across.stop * cols]
            part = part.unflatten(2, (-1, wide)).unflatten(1, (-1, high)).transpose(2, 3)
            # bitlines end at the top, so the last row tile is filled up there
            yield part, tiles[:, down, across, rows - high :, :wide]


def _spans(lines: int, size: int) -> list[tuple[slice, int]]:
    """The whole tiles along an axis, and one for the rest, each with the lines that it has."""
    whole, rest = divmod(lines, size)
    return [(slice(0, whole), size), (slice(whole, whole + 1), rest)][: 2 if rest else 1]
