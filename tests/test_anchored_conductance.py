"""anchored_conductance: near the exact solution while tiles drift, with an estimate that is true; messages."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_shim import FORWARD, REVERSE, ShimDevice
from test_effective_conductance import RON, WIRES, tiles

from gpuxbar import ops
from gpuxbar.ops import Anchor
from gpuxbar.ops.effective_conductance import corrected_conductance

STRONG = {"r_wordline": 2.5, "r_bitline": 2.5, "r_source": 1000.0, "r_sink": 1000.0}


def drifting(shape, steps, rate=1e-3, seed=0):
    """One of a pair of arrays of normal weights; half of every step is each cell's own, half its lines' together."""
    rng = np.random.default_rng(seed)
    share = np.clip(0.3 * rng.normal(size=shape), 0, 1)
    for _ in range(steps):
        yield (share / RON).astype(np.float32)
        own, rows, cols = (rng.normal(size=s) for s in (shape, (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])))
        share = np.clip(share + rate * np.sqrt(0.5) * (own + rows * cols), 0, 1)


def errors(found, exact):
    off, size = (np.linalg.norm(x.reshape(-1, *x.shape[-2:]), axis=(1, 2)) for x in (found - exact, exact))
    return off / size


@pytest.mark.parametrize(("approximation", "bound"), [("ladder", 2.5e-3), ("mean_field", 1e-3)])
def test_error_stays_small_and_is_known(approximation, bound):
    anchor, worst = Anchor.new((12, 64, 64)), []
    for step, g in enumerate(drifting((12, 64, 64), 24)):
        found = ops.anchored_conductance(
            g, anchor, approximation=approximation, solve_all=step == 0, **STRONG
        )
        off = errors(found, ops.effective_conductance(g, **STRONG))
        if step == 0:
            assert off.max() < 1e-6
        if step > 12:
            worst.append(off.max())
            assert off.max() / 3 < anchor.error.max() < 3 * off.max()
        assert (found >= 0).all()
    assert bound / 10 < max(worst) < bound


@pytest.mark.parametrize("cell", [0, 15, 16, -1])
def test_drift_of_any_cell_counts(cell):
    """Of 35 cells, three of which fill no vector."""
    (g,) = drifting((2, 5, 7), 1)
    start = g.copy()
    start[1].flat[cell] += np.float32(0.3 / RON)
    found, drift = corrected_conductance(g, np.zeros_like(g), start, method="ladder", **STRONG)
    np.testing.assert_array_equal(found, ops.effective_conductance(g, method="ladder", **STRONG))
    np.testing.assert_allclose(drift, errors(g, start), rtol=1e-6)


def test_every_tile_has_its_turn():
    anchor, solved = Anchor.new((20, 8, 8)), []
    for step, g in enumerate(drifting((20, 8, 8), 18, rate=1e-4)):
        ops.anchored_conductance(g, anchor, refresh_interval=5, tolerance=1.0, solve_all=step == 0, **STRONG)
        solved.append(set(np.flatnonzero((anchor.g == g).all((1, 2)))))
    assert [len(s) for s in solved] == [20] + [4] * 17
    for step in range(1, 13):
        assert set.union(*solved[step : step + 5]) == set(range(20))


def test_the_most_urgent_tiles_are_solved_first():
    """Past the tolerance or far away; never more than one of the six an update, and none that is not due."""
    (g,) = drifting((6, 30, 20), 1)
    anchor = Anchor.new(g.shape)
    settings = {"refresh_interval": 100, **STRONG}
    ops.anchored_conductance(g, anchor, solve_all=True, **settings)
    assert list(anchor.age) == [0, 1, 2, 3, 4, 5]
    anchor.slope[:] = 0.1
    g = g.copy()
    g[2] *= 1.05  # an error of 0.005
    g[3] *= 1.2  # 0.02
    g[4] *= 1.5  # 0.05
    ops.anchored_conductance(g, anchor, **settings)
    np.testing.assert_allclose(anchor.error, [0, 0, 0.005, 0.02, 0, 0], rtol=1e-4)
    ops.anchored_conductance(g, anchor, **settings)
    np.testing.assert_allclose(anchor.error, [0, 0, 0.005, 0, 0, 0], rtol=1e-4)
    assert list(anchor.age) == [2, 3, 4, 0, 1, 7]
    anchor.slope[:] = 0.01
    g[4] *= 1.5  # 0.005, but too far
    ops.anchored_conductance(g, anchor, **settings)
    assert anchor.age[4] == 0
    ops.anchored_conductance(g, anchor, solve_all=True, **settings)
    assert list(anchor.age) == [0, 1, 2, 3, 4, 5]
    assert not anchor.error.any()


def test_tiles_never_solved_come_first():
    (g,) = drifting((5, 8, 8), 1)
    anchor = Anchor.new(g.shape)
    for expected in ([0, 1, -1, -1, -1], [1, 2, 2, 0, -1], [2, 3, 3, 1, 1]):
        found = ops.anchored_conductance(g, anchor, refresh_interval=3, tolerance=1.0, **STRONG)
        assert list(anchor.age) == expected
    assert errors(found, ops.effective_conductance(g, **STRONG)).max() < 1e-6


def test_a_tile_that_has_not_moved_is_left_alone():
    """However long ago it was solved; once it moves, it is due."""
    (g,) = drifting((3, 8, 8), 1)
    anchor, settings = Anchor.new(g.shape), {"refresh_interval": 3, "tolerance": 1.0, **STRONG}
    for step in range(6):
        found = ops.anchored_conductance(g, anchor, solve_all=step == 0, **settings)
    assert list(anchor.age) == [5, 6, 7]
    assert errors(found, ops.effective_conductance(g, **STRONG)).max() < 1e-6
    g[1, 4, 4] *= 1.001
    ops.anchored_conductance(g, anchor, **settings)
    assert list(anchor.age) == [6, 0, 8]


def test_a_solved_tile_is_exact_and_reading_changes_nothing():
    """To the rounding of the larger of solution and approximation."""
    anchor = Anchor.new((3, 2, 33, 20))
    for step, g in enumerate(drifting((3, 2, 33, 20), 7)):
        found = ops.anchored_conductance(g, anchor, refresh_interval=2, solve_all=step == 0, **STRONG)
        solved = (anchor.g == g).all((2, 3))
        assert solved.any()
        exact = ops.effective_conductance(g, **STRONG)
        largest = np.maximum(exact, ops.effective_conductance(g, method="ladder", **STRONG))
        assert (np.abs(found - exact) <= 2 * np.spacing(largest))[solved].all()
        before = [part.copy() for part in anchor]
        np.testing.assert_array_equal(found, ops.anchored_conductance(g, anchor, update=False, **STRONG))
        for old, new in zip(before, anchor, strict=True):
            np.testing.assert_array_equal(old, new)


@pytest.mark.usefixtures("backend")
def test_nothing_falls_below_zero():
    """Cells open after the last solution, which found them worth less than the approximation does."""
    g = np.random.default_rng(0).uniform(0, 1 / RON, (4, 32, 32)).astype(np.float32)
    anchor, settings = Anchor.new(g.shape), {"approximation": "mean_field", **STRONG}
    ops.anchored_conductance(g, anchor, **settings)
    opened = np.where(anchor.offset < 0, 0, g).astype(np.float32)
    sum_of_both = ops.effective_conductance(opened, method="mean_field", **STRONG) + anchor.offset
    found = ops.anchored_conductance(opened, anchor, update=False, **settings)
    assert sum_of_both.min() < 0
    np.testing.assert_array_equal(found, np.maximum(sum_of_both, 0))


def test_open_tiles_and_no_tiles():
    g = np.zeros((4, 5, 6), np.float32)
    anchor = Anchor.new(g.shape)
    for step in range(3):
        assert not ops.anchored_conductance(
            g, anchor, refresh_interval=2, solve_all=step == 0, **STRONG
        ).any()
    g[1, 2, 3] = 1e-4  # from nothing, so infinitely far
    found = ops.anchored_conductance(g, anchor, refresh_interval=100, **STRONG)
    assert errors(found[1:2], ops.effective_conductance(g[1:2], **STRONG)).max() < 1e-6
    assert np.isfinite(anchor.slope).all()
    assert ops.anchored_conductance(g[:0], Anchor.new((0, 5, 6)), **STRONG).shape == (0, 5, 6)


@pytest.mark.parametrize(
    ("approximation", "order", "arithmetic"), [("ladder", REVERSE, "3xtf32"), ("mean_field", FORWARD, "fp32")]
)
def test_cuda_kernels_do_the_same(approximation, order, arithmetic):
    """The same choice of tiles, whether they are due by age, by their error, far away, or the reader does not know."""
    shape = (7, 20, 12)
    host, device = Anchor.new(shape), Anchor.new(shape)
    s = {"refresh_interval": 3, "approximation": approximation, **WIRES["strong"]}
    shim, launches = ShimDevice(order), set()
    for step, g in enumerate(drifting(shape, 8)):
        g[step % 4] *= 1.0 + 0.1 * step  # up to 70 % away, out of turn
        g[6] = 3e-5 if step < 6 else g[6]  # at rest, then moved
        moved = np.array([step != 5], np.int32)  # what is on the device decides
        s |= {"solve_all": step == 0, "tolerance": 1e-3 if step > 3 else 1.0}
        expected = ops.anchored_conductance(g, host, update=step != 5, **s)
        before, solved = len(shim.launches), host.age == 0
        found = ops.anchored_conductance(g, device, update=moved, arithmetic=arithmetic, device=shim, **s)
        launches.add(len(shim.launches) - before) if step else None
        np.testing.assert_allclose(found, expected, atol=1e-6 * expected.max())
        np.testing.assert_array_equal(host.age, device.age)
        np.testing.assert_array_equal(host.g, device.g)
        np.testing.assert_allclose(device.error, host.error, rtol=0.02, atol=3e-6)
        if step:
            exact = ops.effective_conductance(g, **WIRES["strong"])
            assert errors(found, exact)[solved].max(initial=0) < 1e-6 or step == 5
    assert len(launches) == 1  # whatever is due


def test_cuda_chooses_among_many_tiles_and_keeps_nan():
    """More tiles than a block of threads; a NaN stays in its tile."""
    shape = (300, 3, 2)
    host, device, shim = Anchor.new(shape), Anchor.new(shape), ShimDevice(11)
    rng = np.random.default_rng(0)
    for step in range(2):
        g = (tiles(*shape) * rng.uniform(0.5, 1.0, (300, 1, 1))).astype(np.float32)
        s = {"refresh_interval": 7, "solve_all": step == 0, **WIRES["strong"]}
        ops.anchored_conductance(g, host, **s)
        ops.anchored_conductance(g, device, device=shim, **s)
        np.testing.assert_array_equal(host.age, device.age)
    g[5, 1, 1] = np.nan
    found = ops.anchored_conductance(g, device, device=shim, **s)
    assert [bool(np.isnan(t).any()) for t in found] == [i == 5 for i in range(300)]


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"refresh_interval": 0}, ValueError, "`refresh_interval` must be 1 or above, got 0"),
        ({"tolerance": 0.0}, ValueError, "`tolerance` must be above 0 and finite, got 0"),
        ({"update": np.ones(1)}, TypeError, "`update` must be an array of int32, got float64"),
        ({"approximation": "exact"}, ValueError, "`approximation` must be one of ladder, mean_field, got 'exact'"),
        ({"r_sink": -1.0}, ValueError, "`r_sink` must be 0 or above and finite, got -1 ohm"),
        ({"anchor": Anchor.new((2, 3, 5))}, ValueError, r"`anchor.offset` must have shape \(2, 3, 4\), got \(2, 3, 5\)"),
        ({"anchor": Anchor.new((2, 3, 4))._replace(age=np.zeros(3, np.int32))}, ValueError, r"`anchor.age` must have shape \(2,\), got \(3,\)"),
        ({"anchor": Anchor.new((2, 3, 4))._replace(slope=np.zeros(2))}, TypeError, "`anchor.slope` must be an array of float32"),
        ({"g": np.full((2, 3, 4), np.nan, np.float32)}, ValueError, "`g` must be 0 or above and finite, got nan S in tile"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_changes_nothing(change, kind, text):
    settings = {
        "g": np.full((2, 3, 4), 1e-4, np.float32),
        "anchor": Anchor.new((2, 3, 4)),
        **STRONG,
        **change,
    }
    anchor = settings.pop("anchor")
    before = [part.copy() for part in anchor]
    with pytest.raises(kind, match=text):
        ops.anchored_conductance(settings.pop("g"), anchor, **settings)
    for old, new in zip(before, anchor, strict=True):
        np.testing.assert_array_equal(old, new)
