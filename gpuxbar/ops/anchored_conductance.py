"""Effective conductances of tiles that drift slowly: exact now and then, corrected approximations between."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from gpuxbar.launch import Device, backend, cuda_device
from gpuxbar.ops.anchored_conductance_cuda import apply_cuda, update_cuda
from gpuxbar.ops.checks import check_array, check_integers, check_shape, check_written
from gpuxbar.ops.effective_conductance import (
    Arithmetic,
    Method,
    corrected_conductance,
    effective_conductance,
    relative_distance,
)

__all__ = ["Anchor", "Approximation", "anchored_conductance"]

OP = "anchored_conductance"
Approximation = Literal["ladder", "mean_field"]
CHUNK = 256  # tiles solved or compared at a time
FAR = 0.3  # relative drift beyond which no estimate is trusted
LEAST = 1e-5  # below which an error is one of rounding
APPROXIMATIONS = ("ladder", "mean_field")


class Anchor(NamedTuple):
    """What is remembered of tiles between exact solutions; the caller keeps the arrays, T tiles in all.

    Attributes:
        offset: The exact solution less the approximation where a tile was last solved, float32 [..., R, C], S.
        g: Conductances there, float32 [..., R, C], S.
        age: Updates since, int32 [T]; negative: never solved.
        slope: Relative error found at the last solution, per relative drift, float32 [T].
        error: Estimated relative error now, float32 [T].
    """

    offset: Any
    g: Any
    age: Any
    slope: Any
    error: Any

    @staticmethod
    def new(shape: tuple[int, ...]) -> Anchor:
        """For tiles [..., R, C] of which none is solved, on the CPU."""
        tiles = int(np.prod(shape[:-2]))
        return Anchor(
            np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.full(tiles, -1, np.int32),
            np.ones(tiles, np.float32), np.zeros(tiles, np.float32),
        )  # fmt: skip


def anchored_conductance(
    g: Any,
    anchor: Anchor,
    *,
    r_wordline: Any,
    r_bitline: Any,
    r_source: Any = 0.0,
    r_sink: Any = 0.0,
    approximation: Approximation = "ladder",
    refresh_interval: int = 10,
    tolerance: float = 1e-2,
    update: Any = True,
    solve_all: bool = False,
    arithmetic: Arithmetic = "fp32",
    device: Device | None = None,
) -> Any:
    """The effective conductances of tiles close to where they were last solved exactly.

    G_eff = max(M(g) + (G_exact - M)(g_0), 0)

    with M the approximation and g_0 the tile's conductances at its last exact solution; right after it G_eff is exact.
    An update solves tiles anew, at most ceil(T / refresh_interval) of the T, so that no step costs more than another: of
    those that are due, the most urgent. A tile that has moved is due `refresh_interval` updates after it was solved, or
    when its estimated error passes `tolerance`, or 30 % away from g_0 whatever the estimate; how urgent it is says the
    largest of the three ratios, equal ones go by number, and tiles never solved come first. What has to wait keeps its
    estimate, and a tile that is where it was solved is left alone.
    The estimate costs no solution of its own: where a tile is solved, the relative error before (Frobenius norms) over
    the drift |g - g_0| / |g_0| is its slope, and slope times drift its error from then on. A difference of two arrays
    has an error 3 to 10 times that of the tiles.

    On a GPU tiles are chosen there, and nothing is read back: an update may be captured into a CUDA graph. As many
    tiles are solved as may be due, and those that are not stay as they were.

    The arrays of `anchor` say all there is: kept with a checkpoint, they continue bit for bit.

    Args:
        g, r_wordline, r_bitline, r_source, r_sink, arithmetic, device: See `effective_conductance`.
        anchor: Changed in place by an update.
        approximation: M: "ladder" or "mean_field".
        refresh_interval: Updates after which a tile is solved again, 1 or above.
        tolerance: Relative error of a tile that is let pass, above 0.
        update: Whether the tiles have moved: a bool, or int32 [1], which is not read back from a GPU. Otherwise the
            anchor is only read (every tile must have been solved).
        solve_all: Solve every tile at this update, as at the first, or when all were written over.

    Returns:
        Effective conductance, float32, shape of `g`, S.

    Raises:
        TypeError, ValueError: As `effective_conductance`, and for settings or arrays of `anchor` that do not fit.
    """
    _check(g, anchor, approximation, refresh_interval, tolerance, update)
    if solve_all or update is not False:
        check_written(OP, **{f"anchor.{name}": array for name, array in anchor._asdict().items()})
    lines = {"r_wordline": r_wordline, "r_bitline": r_bitline, "r_source": r_source, "r_sink": r_sink}
    tiles, offset, start = (a.reshape(-1, *g.shape[-2:]) for a in (g, anchor.offset, anchor.g))
    most = len(tiles) if solve_all else -(-len(tiles) // refresh_interval)

    def solve(part: Any, method: Method = "exact") -> Any:
        return effective_conductance(part, method=method, arithmetic=arithmetic, device=device, **lines)

    if device is not None or backend(g) == "cuda":
        where, found = device or cuda_device(), solve(g, approximation)
        if not g.size:
            return found
        out = found.reshape(tiles.shape)
        if solve_all or update is not False:
            moved = None if solve_all or update is True else update
            update_cuda(
                where, tiles, out, (offset, start, *anchor[2:]), moved, most, interval=refresh_interval,
                tolerance=tolerance, far=FAR, least=LEAST, every=solve_all, chunk=CHUNK, solve=solve,
            )  # fmt: skip
        apply_cuda(where, out, offset)
        return found
    found, drift = corrected_conductance(g, anchor.offset, anchor.g, method=approximation, **lines)
    out = found.reshape(tiles.shape)
    if g.size and (solve_all or np.any(update)):
        anchor.error[...] = anchor.slope * drift
        anchor.age[...] = np.where((anchor.age < 0) | solve_all, -1, anchor.age + 1)
        due = _due(anchor, drift, most, refresh_interval, tolerance)
        for first in range(0, len(due), CHUNK):
            part = due[first : first + CHUNK]
            exact, alone = solve(tiles[part]), solve(tiles[part], approximation)
            learns = (anchor.age[part] >= 0) & (drift[part] > LEAST)
            slope = relative_distance(out[part], exact) / np.maximum(drift[part], LEAST)
            anchor.slope[part] = np.where(learns, slope, anchor.slope[part])
            offset[part], start[part] = exact - alone, tiles[part]
            out[part] = np.maximum(alone + offset[part], 0.0)
            anchor.error[part] = 0.0
            # at first all are solved at once; then 1 / refresh_interval of them at every update
            anchor.age[part] = np.where(anchor.age[part] < 0, part % refresh_interval, 0)
    return found


def _due(anchor: Anchor, drift: Any, most: int, refresh_interval: int, tolerance: float) -> Any:
    """The tiles to solve, `most` or fewer: those of urgency 1 or above, from the most urgent on."""
    ages = anchor.age.astype(np.float32) / np.float32(refresh_interval)
    worst = np.maximum(anchor.error / np.float32(tolerance), drift / np.float32(FAR))
    urgency = np.where(anchor.age < 0, np.inf, np.where(drift > 0, np.maximum(ages, worst), 0.0))
    first = np.argsort(-urgency, kind="stable")[:most]
    return first[urgency[first] >= 1]


def _check(
    g: Any, anchor: Anchor, approximation: str, refresh_interval: int, tolerance: float, update: Any
) -> None:  # fmt: skip
    check_array(OP, "g", g, "float32", range(2, 9))
    if approximation not in APPROXIMATIONS:
        raise ValueError(
            f"{OP}: `approximation` must be one of {', '.join(APPROXIMATIONS)}, got {approximation!r}; choose one of them"
        )
    check_integers(OP, refresh_interval=refresh_interval)
    if refresh_interval < 1:
        raise ValueError(
            f"{OP}: `refresh_interval` must be 1 or above, got {refresh_interval}; 1 solves every tile at every update"
        )
    if not 0 < tolerance < np.inf:
        raise ValueError(
            f"{OP}: `tolerance` must be above 0 and finite, got {tolerance:g}; it is a relative error"
        )
    if not isinstance(update, bool):
        check_array(OP, "update", update, "int32", 1)
    tiles = int(np.prod(g.shape[:-2]))
    for name, array in anchor._asdict().items():
        shape = g.shape if name in ("offset", "g") else (tiles,)
        check_array(OP, f"anchor.{name}", array, "int32" if name == "age" else "float32", len(shape))
        check_shape(OP, f"anchor.{name}", array, shape, "make it with Anchor.new(g.shape)")
