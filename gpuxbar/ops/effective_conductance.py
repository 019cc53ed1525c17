"""What resistive wires leave of the conductances of crossbar tiles."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, backend, cuda_device, host_call, is_cupy, library
from gpuxbar.ops.checks import check_array
from gpuxbar.ops.effective_conductance_cuda import effective_conductance_cuda

__all__ = ["Arithmetic", "Method", "effective_conductance"]

OP = "effective_conductance"
Method = Literal["none", "first_order", "ladder", "mean_field", "exact"]
Arithmetic = Literal["fp32", "3xtf32", "tf32"]
ARITHMETICS = ("fp32", "3xtf32", "tf32")
TINY = np.float32(1e-30)  # S**2; far below the square of a conductance


def effective_conductance(
    g: Any,
    *,
    r_wordline: Any,
    r_bitline: Any,
    r_source: Any = 0.0,
    r_sink: Any = 0.0,
    method: Method = "exact",
    shared_drivers: bool = False,
    arithmetic: Arithmetic = "fp32",
    device: Device | None = None,
) -> Any:
    """The conductance matrix of every tile as its periphery sees it: i = v @ G_eff through all the wires.

    Wordlines are driven at column 0 and bitlines sensed at row R - 1, on a virtual ground; the other ends are open.
    Every cell is linear and every line is connected, so G_eff is exact for all inputs at once, amplitude- or
    time-coded. It is 0 for a tile of open cells.

    `method`, with its cost for an n x n tile:
      "exact": block merge, 60 n^3 operations; float32 error about 1e-6.
      "mean_field": the ladder, and the coupling between lines from a coarse tile of 16 x 16 cells; O(n^2).
      "ladder": every line on its own, exact for one line; O(n^2).
      "first_order": g (1 - drops of first order); useless once drops reach tens of percent; O(n^2).
      "none": g.

    Reading backwards (driving bitlines, sensing wordlines at the same ends): the matrix is the transpose of G_eff if
    every line keeps its end resistance when its role changes. If driver and sense resistances move with the role
    instead, it is the transpose of the G_eff computed with `r_source` and `r_sink` exchanged.

    Args:
        g: Conductance, float32 [..., R, C], S; 0 or above, finite.
        r_wordline, r_bitline: Resistance of a wire segment between two cells, ohm; one, or one per line [R], [C].
        r_source, r_sink: Total resistance before the first cell of a wordline and after the last cell of a bitline,
            ohm, with the wire up to there; one, or one per line [R], [C]. Any resistance may be 0.
        method: See above.
        shared_drivers: Tiles along the axis before [R, C] are column tiles on the same physical drivers, so that
            the currents of all flow through one `r_source` a wordline; "exact" only.
        arithmetic: Of the products that merge blocks of 16 x 16 cells and more, on a GPU: "fp32"; "3xtf32", as exact,
            every product on tensor cores in three parts; "tf32", of operands rounded to 11 bits, with relative errors
            (Frobenius norms) of 3e-4 to 8e-4 for tiles of 64 x 64 and 128 x 128, and of 4e-3 for differences of two
            arrays (tests emulate the rounding; neither has run on a GPU yet). Without effect on a CPU.
        device: Where CuPy arrays are allocated and run; None: CuPy's current device and memory pool.

    Returns:
        Effective conductance, float32, shape of `g`, S.

    Raises:
        TypeError: `g` is not float32.
        ValueError: `g` or a resistance is negative or not finite (the message names the first such tile), `g` has
            fewer axes or is not contiguous, or per-line resistances have another length. On a GPU the values of `g`
            are not read back: a NaN stays in its tile.

    Source:
        Redheffer, J. Math. Phys. 41 (1962), for the merge; proofs in gpuxbar/reference/effective_conductance.py.
    """
    check_array(OP, "g", g, "float32", range(3 if shared_drivers else 2, 9))
    if method not in reference.METHODS:
        raise ValueError(
            f"{OP}: `method` must be one of {', '.join(reference.METHODS)}, got {method!r}; choose one of them"
        )
    if arithmetic not in ARITHMETICS:
        raise ValueError(
            f"{OP}: `arithmetic` must be one of {', '.join(ARITHMETICS)}, got {arithmetic!r}; choose one of them"
        )
    if shared_drivers and method != "exact":
        raise ValueError(
            f"{OP}: `method` must be 'exact' with shared_drivers=True, got {method!r}; "
            "the approximations treat every tile on its own"
        )
    where = "cuda" if device is not None else backend(g)
    rows, cols = g.shape[-2:]
    given = {"r_wordline": r_wordline, "r_bitline": r_bitline, "r_source": r_source, "r_sink": r_sink}
    if where == "cuda":
        return _cuda(device or cuda_device(), g, given, method, arithmetic, shared_drivers)
    lines = per_lines(OP, given, rows, cols)
    if not g.size:
        return np.empty_like(g)
    if where == "reference":
        check_conductance(OP, g)
        return reference.effective_conductance(
            g, method=method, shared_drivers=shared_drivers, **lines
        ).astype(np.float32)
    if shared_drivers:
        return _shared(g, lines)
    return _host(g, lines, method)


def corrected_conductance(
    g: np.ndarray, offset: np.ndarray, start: np.ndarray, *, method: Method, **given: Any
) -> tuple[np.ndarray, np.ndarray]:
    """An approximation plus `offset`, down to 0, and how far from `start` every tile is: `relative_distance`, [T].

    For `anchored_conductance` on the CPU, in one pass over memory.
    """
    if backend(g) == "reference" or not g.size:
        found = effective_conductance(g, method=method, **given)
        return np.maximum(found + offset, 0.0), relative_distance(g, start)
    drift = np.empty(g.size // (g.shape[-2] * g.shape[-1]), np.float32)
    return _host(g, per_lines(OP, given, *g.shape[-2:]), method, None, offset, start, drift), drift


def relative_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| / |b| of every tile of [..., R, C], [T]; 0 where both are 0."""
    apart, size = (np.einsum("trc,trc->t", x, x) for x in (x.reshape(-1, *a.shape[-2:]) for x in (a - b, b)))
    return np.sqrt(apart / np.maximum(size, TINY))


def _host(
    g: np.ndarray,
    lines: dict[str, np.ndarray],
    method: Method,
    admittance: np.ndarray | None = None,
    *correction: np.ndarray,
) -> np.ndarray:
    """By the kernel; `correction`: offset, start and drift as `corrected_conductance` has them."""
    out = np.empty_like(g)
    bad = np.zeros(2, np.int64)
    rows, cols = g.shape[-2:]
    host_call(
        library(), "gpuxbar_effective_conductance", g, lines["r_wordline"], lines["r_bitline"], lines["r_source"],
        lines["r_sink"], out, admittance, *(correction or (None,) * 3), g.size // (rows * cols), rows, cols,
        reference.METHODS.index(method), bad,
    )  # fmt: skip
    if bad[0] >= 0:
        check_conductance(OP, g)
    if bad[1] >= 0:
        raise ValueError(
            f"{OP}: the result must be finite, got NaN or infinity in tile {tile_name(g, int(bad[1]))}; "
            "conductance times resistance overflows float32: check the units, S and ohm"
        )
    return out


def _shared(g: np.ndarray, lines: dict[str, np.ndarray]) -> np.ndarray:
    """(1 + Y r_source)^-1 G with Y the sum of the tiles' admittances at ideal drivers; see `reference.close`."""
    rows = g.shape[-2]
    admittance = np.empty((*g.shape[:-1], rows), np.float32)
    ideal = {**lines, "r_source": np.zeros_like(lines["r_source"])}
    bare = _host(g, ideal, "exact", admittance)
    together = admittance.astype(np.float64).sum(-3, keepdims=True)
    closing = np.linalg.inv(np.eye(rows) + together * lines["r_source"].astype(np.float64))
    return np.matmul(closing.astype(np.float32), bare)


def _cuda(
    device: Device, g: Any, given: dict[str, Any], method: Method, arithmetic: Arithmetic, shared_drivers: bool
) -> Any:  # fmt: skip
    rows, cols = g.shape[-2:]
    lines = device_lines(OP, device, given, rows, cols)
    if method == "none" or not g.size:
        out = device.empty(g.shape, "float32")
        out[...] = g
        return out
    shared = g.shape[-3] if shared_drivers else 0
    found = effective_conductance_cuda(device, g.reshape(-1, rows, cols), lines, method, arithmetic, shared)
    return found.reshape(g.shape)


def device_lines(op: str, device: Device, given: dict[str, Any], rows: int, cols: int) -> dict[str, Any]:
    """Resistances for a device: a number, or an array of one per line there."""
    lines: dict[str, Any] = {}
    for name, value in given.items():
        if is_cupy(value) or np.ndim(value):  # on the device, and not read back
            check_array(op, name, value, "float32", range(2))
            count = _check_count(op, name, value, rows, cols)
            value = value.reshape(-1)
            lines[name] = value if value.size == count else device.empty((count,), "float32")
            if lines[name] is not value:
                lines[name][...] = value
        else:
            lines[name] = float(per_line(op, name, value, rows, cols)[:1].sum())
    return lines


_LINE = {"r_wordline": "wordline", "r_bitline": "bitline", "r_source": "wordline", "r_sink": "bitline"}


def _check_count(op: str, name: str, value: Any, rows: int, cols: int) -> int:
    """Lines that a resistance is given for; refuses another number of values than one or one per line."""
    count = rows if _LINE[name] == "wordline" else cols
    if value.size not in (1, count) or value.ndim > 1:
        raise ValueError(
            f"{op}: `{name}` must have 1 or {count} values, got shape {tuple(value.shape)}; "
            f"give one, or one per {_LINE[name]}"
        )
    return count


def per_line(op: str, name: str, value: Any, rows: int, cols: int) -> np.ndarray:
    """A resistance for every line, float32 [R] or [C], from one number or one per line."""
    try:
        resistance = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: `{name}` must be a number or one per line, got {value!r}; give ohm") from None
    count = _check_count(op, name, resistance, rows, cols)
    wrong = ~(np.isfinite(resistance) & (resistance >= 0))
    if wrong.any():
        raise ValueError(
            f"{op}: `{name}` must be 0 or above and finite, got {resistance[wrong].flat[0]:g} ohm; "
            "0 is an ideal conductor"
        )
    return np.ascontiguousarray(np.broadcast_to(resistance.reshape(-1), (count,)))


def per_lines(op: str, given: dict[str, Any], rows: int, cols: int) -> dict[str, np.ndarray]:
    """Every resistance for every line."""
    return {name: per_line(op, name, value, rows, cols) for name, value in given.items()}


def check_conductance(op: str, g: np.ndarray) -> None:
    """Refuse negative or non-finite conductances, naming the first such cell."""
    wrong = ~(np.isfinite(g) & (g >= 0))
    if wrong.any():
        rows, cols = g.shape[-2:]
        first = int(wrong.argmax())
        tile, row, col = first // (rows * cols), first // cols % rows, first % cols
        raise ValueError(
            f"{op}: `g` must be 0 or above and finite, got {g.flat[first]:g} S in tile {tile_name(g, tile)}, "
            f"wordline {row}, bitline {col}; look at what programmed it"
        )


def tile_name(g: np.ndarray, tile: int) -> str:
    """A tile of a stack [..., R, C] by its indices."""
    return str(tuple(int(i) for i in np.unravel_index(tile, g.shape[:-2])) if g.ndim > 2 else 0)
