"""solve_for_inputs and its gradient: the oracle against finite differences, the kernels against it, messages."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from cuda_shim import FORWARD, REVERSE, ShimDevice
from test_effective_conductance import RON, WIRES, error, of_lines, tiles

from gpuxbar import ops, reference

SHAPES = [(1, 1, 1), (1, 1, 9), (3, 9, 1), (4, 12, 7), (16, 8, 8), (21, 37, 50)]  # lanes of 1, 4, 16, 16 + 16


def case(batch, rows, cols, ron=RON):
    rng = np.random.default_rng(batch)
    v, grad_i = rng.uniform(-0.2, 0.3, (2, batch, rows)), rng.normal(size=(2, batch, cols))
    return v.astype(np.float32), tiles(2, rows, cols, ron=ron), grad_i.astype(np.float32)


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("shape", SHAPES)
def test_host_matches_oracle(shape, name):
    v, g, grad_i = case(*shape)
    assert (
        error(ops.solve_for_inputs(v, g, **WIRES[name]), reference.solve_for_inputs(v, g, **WIRES[name]))
        < 3e-6
    )
    got = ops.solve_for_inputs_gradient(v, g, grad_i, **WIRES[name])
    expected = reference.solve_for_inputs_gradient(v, g, grad_i, **WIRES[name])
    for mine, oracle in zip(got, expected, strict=True):
        assert mine.dtype == np.float32
        assert error(mine, oracle) < 3e-6


# one cell, one line, more columns than a warp has at a time, more rows than warps, several blocks of threads
@pytest.mark.parametrize(
    ("shape", "name", "order"),
    [((1, 1, 1), "mild", FORWARD), ((1, 1, 9), "ends", REVERSE), ((3, 9, 1), "rows", 11), ((5, 12, 7), "strong", 12),
     ((2, 5, 130), "strong", REVERSE), ((2, 8, 8), "none", 13), ((3, 37, 50), "strong", 14), ((1, 19, 260), "rows", 15)],
)  # fmt: skip
def test_cuda_matches_oracle(shape, name, order):
    v, g, grad_i = case(*shape)
    device = ShimDevice(order)
    got = ops.solve_for_inputs(v, g, device=device, **WIRES[name])
    assert error(got, reference.solve_for_inputs(v, g, **WIRES[name])) < 3e-6
    got = ops.solve_for_inputs_gradient(v, g, grad_i, device=device, **WIRES[name])
    expected = reference.solve_for_inputs_gradient(v, g, grad_i, **WIRES[name])
    for mine, oracle in zip(got, expected, strict=True):
        assert error(mine, oracle) < 3e-6
    assert device.launches == ["wire_currents", "wire_currents_gradient", "wire_currents_sum"]


def both(v, g, grad_i, device, **wires):
    """Currents, and both gradients."""
    currents = ops.solve_for_inputs(v, g, device=device, **wires)
    return currents, *ops.solve_for_inputs_gradient(v, g, grad_i, device=device, **wires)


def test_cuda_lines_of_their_own():
    v, g, grad_i = case(3, 9, 14, ron=1e3)
    wires = of_lines(9, 14, 10, 1000)
    currents, *grads = both(v, g, grad_i, ShimDevice(11), **wires)
    assert error(currents, reference.solve_for_inputs(v, g, **wires)) < 3e-6
    for mine, oracle in zip(grads, reference.solve_for_inputs_gradient(v, g, grad_i, **wires), strict=True):
        assert error(mine, oracle) < 3e-6
    one = {**WIRES["strong"], "r_sink": np.full(1, 30, np.float32)}
    for mine, same in zip(both(v, g, grad_i, ShimDevice(), **one),
                          both(v, g, grad_i, ShimDevice(), **WIRES["strong"]), strict=True):  # fmt: skip
        np.testing.assert_array_equal(mine, same)


def test_cuda_bits_do_not_depend_on_the_launch():
    """Nor on the memory there is, on the chip or off it, on the order of threads, or on the inputs beside; a gradient is summed in
    their order."""
    values = case(5, 20, 11)
    first = both(*values, ShimDevice(), **WIRES["strong"])
    cells = 4 * 20 * 11
    for device in (
        ShimDevice(11, workspace=1),
        ShimDevice(12, workspace=-(-3 * cells // 8)),
        ShimDevice(FORWARD, multiprocessors=1),
        ShimDevice(REVERSE, multiprocessors=7),
        ShimDevice(14, arch="sm_75"),
    ):
        for mine, same in zip(both(*values, device, **WIRES["strong"]), first, strict=True):
            np.testing.assert_array_equal(mine, same)
    v, g, grad_i = values
    total = np.zeros_like(g)
    for b in range(5):
        at = np.s_[:, b : b + 1]
        alone = both(v[at].copy(), g, grad_i[at].copy(), ShimDevice(), **WIRES["strong"])
        np.testing.assert_array_equal(alone[0], first[0][at])
        np.testing.assert_array_equal(alone[1], first[1][at])
        total += alone[2]
    np.testing.assert_array_equal(total, first[2])


@pytest.mark.parametrize("device", [None, ShimDevice()], ids=["host", "cuda"])
def test_inputs_of_any_size(device):
    """Squares of which are no floats: results are those of others, times a power of two."""
    v, g, grad_i = case(4, 12, 7)
    v *= np.float32(2.0 ** (1 - np.frexp(np.abs(v).max())[1]))  # the largest from 1 to 2
    first = both(v, g, grad_i, device, **WIRES["strong"])
    for much, more in ((2.0**-80, 2.0**100), (2.0**90, 2.0**-99), (2.0**127, 2.0**-99)):
        currents, grad_v, grad_g = both(
            v * np.float32(much), g, grad_i * np.float32(more), device, **WIRES["strong"]
        )
        np.testing.assert_array_equal(currents, first[0] * np.float32(much))
        np.testing.assert_array_equal(grad_v, first[1] * np.float32(more))
        np.testing.assert_array_equal(grad_g, first[2] * np.float32(much * more))


HARD = {"r_wordline": 10.0, "r_bitline": 10.0, "r_source": 1000.0, "r_sink": 1000.0}


@pytest.mark.parametrize("device", [None, ShimDevice()], ids=["host", "cuda"])
def test_directions_are_conjugate(device, monkeypatch):
    """Eight iterations; by steepest descent more than forty."""
    monkeypatch.setattr(sys.modules["gpuxbar.ops.solve_for_inputs"], "ITERATIONS", 9)
    v, g, grad_i = case(2, 40, 40, ron=1e3)
    found = both(v[:1].copy(), g[:1].copy(), grad_i[:1].copy(), device, **HARD)
    assert not any(np.isnan(each).any() for each in found)


def test_host_says_which_tile_does_not_converge(monkeypatch):
    values = case(3, 12, 7, ron=1e3)
    values[0][0], values[2][0] = 0, 0
    monkeypatch.setattr(sys.modules["gpuxbar.ops.solve_for_inputs"], "ITERATIONS", 1)
    text = (
        r"`tolerance` must be reached in 1 iterations, got more than 1e-06 in tile \(1,\); use a larger one"
    )
    with pytest.raises(ArithmeticError, match=f"solve_for_inputs: {text}"):
        ops.solve_for_inputs(*values[:2], **WIRES["strong"])
    with pytest.raises(ArithmeticError, match=f"solve_for_inputs_gradient: {text}"):
        ops.solve_for_inputs_gradient(*values, **WIRES["strong"])


def test_cuda_gives_nan_where_it_does_not_converge(monkeypatch):
    """Input by input: one that is 0 needs no iteration, another more than one."""
    values = case(3, 12, 7, ron=1e3)
    values[0][0, 1], values[2][0, 1] = 0, 0
    first = both(*values, ShimDevice(), **WIRES["strong"])
    assert not any(np.isnan(found).any() for found in first)
    assert not first[0][0, 1].any()
    monkeypatch.setattr(sys.modules["gpuxbar.ops.solve_for_inputs"], "ITERATIONS", 1)
    currents, grad_v, grad_g = both(*values, ShimDevice(), **WIRES["strong"])
    assert np.isnan(grad_g).all()
    for found, whole in ((currents, first[0]), (grad_v, first[1])):
        np.testing.assert_array_equal(found[0, 1], whole[0, 1])
        found[0, 1] = np.nan
        assert np.isnan(found).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_cuda_keeps_what_is_not_finite_where_it_is(wrong):
    values = case(3, 12, 8)
    values[1][:] += 1e-6  # no products of 0 with infinity, which are NaN
    first = both(*values, ShimDevice(), **HARD)
    values[0][0, 1, 5], values[2][1, 2, 0] = wrong, wrong
    currents, grad_v, grad_g = both(*values, ShimDevice(), **HARD)
    assert np.isnan(currents[0, 1]).all()
    assert np.isnan(grad_v[1, 2]).all()
    assert np.isnan(grad_g).all()
    currents[0, 1], grad_v[1, 2] = first[0][0, 1], first[1][1, 2]
    np.testing.assert_array_equal(currents, first[0])
    np.testing.assert_array_equal(grad_v, first[1])


@pytest.mark.parametrize("name", WIRES)
def test_oracle_is_the_derivative(name):
    v, g, grad_i = (x[0].astype(np.float64) for x in case(3, 5, 4))
    g += 1e-6

    def loss(v, g):
        return (grad_i * reference.solve_for_inputs(v, g, **WIRES[name])).sum()

    grad_v, grad_g = reference.solve_for_inputs_gradient(v, g, grad_i, **WIRES[name])
    for x, grad, step in ((v, grad_v, 1e-3), (g, grad_g, 1e-8)):
        for at in np.ndindex(x.shape):
            up, down = x.copy(), x.copy()
            up[at] += step
            down[at] -= step
            slope = (loss(up, g) - loss(down, g)) if x is v else (loss(v, up) - loss(v, down))
            # truncation, (step / g)^2 of the drop
            assert slope / (2 * step) == pytest.approx(grad[at], rel=2e-6, abs=1e-6 * np.abs(grad).max())


def test_gradient_of_the_effective_conductance():
    """The identity as inputs gives the gradient of `effective_conductance`, against its own differences."""
    _, g, grad = case(6, 6, 8)
    g, grad = g[0].astype(np.float64), grad[0].astype(np.float64)
    _, got = ops.solve_for_inputs_gradient(
        np.eye(6, dtype=np.float32), g.astype(np.float32), grad.astype(np.float32), **WIRES["strong"]
    )
    for at in [(0, 0), (5, 7), (2, 3), (5, 0), (0, 7)]:
        up, down = g.copy(), g.copy()
        up[at] += 1e-7
        down[at] = g[at] - 1e-7 if g[at] else 0.0
        change = reference.effective_conductance(up, **WIRES["strong"]) - reference.effective_conductance(
            down, **WIRES["strong"]
        )
        slope = (grad * change).sum() / (up[at] - down[at])
        assert got[at] == pytest.approx(slope, rel=1e-4, abs=1e-4 * float(np.abs(got).max()))


@pytest.mark.parametrize(("device", "size"), [(None, 128), (ShimDevice(11), 64)], ids=["host", "cuda"])
def test_strong_wires_converge(device, size):
    """Most cells see less than a hundredth of what drives their lines: sums of such differences would be 1e-5 off."""
    v, g, grad_i = case(2, size, size, ron=1e3)
    g_eff = reference.effective_conductance(g, **HARD)
    currents, grad_v, _ = both(v, g, grad_i, device, **HARD)
    assert error(currents, v @ g_eff) < 3e-6
    assert error(grad_v, grad_i @ g_eff.swapaxes(1, 2)) < 3e-6


@pytest.mark.parametrize(("device", "size"), [(None, 64), (ShimDevice(), 32)], ids=["host", "cuda"])
def test_tolerance_is_kept(device, size):
    v, g, _ = case(4, size, size)
    exact = reference.solve_for_inputs(v, g, **WIRES["strong"])
    off = [
        error(ops.solve_for_inputs(v, g, tolerance=tolerance, device=device, **WIRES["strong"]), exact)
        for tolerance in (1e-1, 1e-2, 1e-4)
    ]
    assert off[0] > off[2]
    assert all(got < tolerance for got, tolerance in zip(off, (1e-1, 1e-2, 1e-4), strict=True))


def test_same_bits_for_threads(same_on_threads):
    values = case(21, 24, 40)
    same_on_threads(lambda: both(*values, None, **WIRES["strong"]))


@pytest.mark.parametrize("device", [None, ShimDevice()], ids=["host", "cuda"])
@pytest.mark.parametrize(("batch", "rows", "cols"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(batch, rows, cols, device):
    v, g = np.zeros((5, batch, rows), np.float32), np.zeros((5, rows, cols), np.float32)
    got, grad_v, grad_g = both(v, g, np.zeros((5, batch, cols), np.float32), device, **WIRES["mild"])
    assert got.shape == (5, batch, cols)
    assert (grad_v.shape, grad_g.shape) == (v.shape, g.shape)
    assert not any(found.any() for found in (got, grad_v, grad_g))


@pytest.mark.parametrize("device", [None, ShimDevice()], ids=["host", "cuda"])
def test_open_cells_and_axes(device):
    """Of tiles without axes of their own, and with two."""
    v, g, grad_i = case(2, 6, 5)
    whole = both(v, g, grad_i, device, **WIRES["strong"])
    one = both(v[1], g[1], grad_i[1], device, **WIRES["strong"])
    many = both(v[:, None], g[:, None], grad_i[:, None], device, **WIRES["strong"])
    for found, alone, nested in zip(whole, one, many, strict=True):
        np.testing.assert_array_equal(found[1], alone)
        np.testing.assert_array_equal(found[:, None], nested)
    nothing = both(v, np.zeros_like(g), grad_i, device, **WIRES["strong"])
    assert not nothing[0].any()
    assert not nothing[1].any()
    # of an open cell the voltage is what drives its lines
    np.testing.assert_allclose(nothing[2], np.einsum("tbr,tbc->trc", v, grad_i), rtol=0, atol=1e-6)


GOOD = dict(zip(("v", "g", "grad_i"), case(4, 3, 5), strict=True))
BAD = {
    "dtype": ({"v": np.zeros((2, 4, 3))}, TypeError, "`v` must be an array of float32, got float64"),
    "axes": ({"g": np.zeros((3, 5), np.float32)}, ValueError, "`v` must have 2 axes, got 3"),
    "rows": ({"v": np.zeros((2, 4, 5), np.float32)}, ValueError, r"`v` must have the axes \[2, 'B', 3\] of the tiles, got shape \(2, 4, 5\)"),
    "nan": ({"v": np.full((2, 4, 3), np.nan, np.float32)}, ValueError, "`v` must be finite, got nan V"),
    "cell": ({"g": np.full((2, 3, 5), -1, np.float32)}, ValueError, r"`g` must be 0 or above and finite, got -1 S in tile \(0,\)"),
    "wire": ({"r_sink": -1.0}, ValueError, "`r_sink` must be 0 or above and finite, got -1 ohm"),
    "tolerance": ({"tolerance": 0.0}, ValueError, "`tolerance` must be from 1e-7 to 0.1, got 0; float32 allows no less"),
}  # fmt: skip


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, kind, text = BAD[name]
    values = {**GOOD, **WIRES["mild"], **change}
    v, g, grad_i = (values.pop(key) for key in ("v", "g", "grad_i"))
    with pytest.raises(kind, match=text):
        ops.solve_for_inputs(v, g, **values)
    with pytest.raises(kind, match=text):
        ops.solve_for_inputs_gradient(v, g, grad_i, **values)


@pytest.mark.parametrize("name", ["dtype", "axes", "rows", "wire", "tolerance"])
def test_bad_input_is_named_before_a_launch(name):
    """On a device, all that does not take its values."""
    change, kind, text = BAD[name]
    device = ShimDevice()
    values = {**GOOD, **WIRES["mild"], **change, "device": device}
    grad_i = values.pop("grad_i")
    with pytest.raises(kind, match=f"solve_for_inputs: {text}"):
        ops.solve_for_inputs(**values)
    with pytest.raises(kind, match=f"solve_for_inputs_gradient: {text}"):
        ops.solve_for_inputs_gradient(grad_i=grad_i, **values)
    assert not device.launches


def test_bad_gradients_are_named():
    with pytest.raises(ValueError, match=r"`grad_i` must have shape \(2, 4, 5\) for `v` \(2, 4, 3\), got"):
        ops.solve_for_inputs_gradient(GOOD["v"], GOOD["g"], GOOD["grad_i"][:, :1].copy(), **WIRES["mild"])
    with pytest.raises(ValueError, match="`grad_i` must be finite, got inf 1/A"):
        ops.solve_for_inputs_gradient(
            GOOD["v"], GOOD["g"], np.full_like(GOOD["grad_i"], np.inf), **WIRES["mild"]
        )
