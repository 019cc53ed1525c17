"""effective_conductance: the oracle against nodal analysis and closed forms, the host kernel against it, messages."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_shim import FORWARD, REVERSE, ShimDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuxbar import ops, reference
from gpuxbar.ops.effective_conductance_cuda import invert
from gpuxbar.reference.effective_conductance import ports
from gpuxbar.reference.nodal import Wires

RON = 10e3  # ohm
WIRES = {
    "mild": {"r_wordline": 1.0, "r_bitline": 1.0},
    "strong": {"r_wordline": 2.5, "r_bitline": 1.5, "r_source": 100.0, "r_sink": 30.0},
    "ends": {"r_wordline": 0.0, "r_bitline": 0.0, "r_source": 500.0, "r_sink": 200.0},
    "rows": {"r_wordline": 3.0, "r_bitline": 0.0, "r_sink": 50.0},
    "none": {"r_wordline": 0.0, "r_bitline": 0.0},
}
KINDS = [*WIRES, "lines"]  # the last with resistances of every line's own
SHAPES = [(1, 1), (1, 16), (16, 1), (8, 8), (9, 7), (37, 50), (24, 100), (33, 31)]


def wires(name, rows, cols):
    return of_lines(rows, cols) if name == "lines" else WIRES[name]


def of_lines(rows, cols, segment=5, end=300):
    """Resistances of every line's own, ohm at most of a segment and an end."""
    rng = np.random.default_rng(0)
    most = {
        "r_wordline": (segment, rows),
        "r_bitline": (segment, cols),
        "r_source": (end, rows),
        "r_sink": (end, cols),
    }
    return {key: rng.uniform(0, *value).astype(np.float32) for key, value in most.items()}


def tiles(*shape, ron=RON, seed=0, open_cells=0.2):
    rng = np.random.default_rng(seed)
    g = rng.uniform(0, 1 / ron, shape)
    g[rng.random(shape) < open_cells] = 0.0
    g[..., 0, 0] = 0.5 / ron
    return g.astype(np.float32)


def error(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_is_the_nodal_solution(shape, name):
    g, w = tiles(*shape), wires(name, *shape)
    nodal = reference.nodal_conductance(g, **w)
    assert error(reference.effective_conductance(g, **w), nodal) < 1e-12


@pytest.mark.parametrize("method", reference.METHODS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 66), (123, 8), (5, 90)])
def test_host_matches_oracle(shape, name, method):
    g, w = tiles(2, *shape), wires(name, *shape)
    got = ops.effective_conductance(g, method=method, **w)
    expected = reference.effective_conductance(g, method=method, **w)
    assert got.dtype == np.float32
    assert error(got, expected) < 5e-6


@pytest.mark.parametrize(
    ("size", "ends", "bound"), [(64, 1000.0, 5e-6), (128, 0.0, 5e-6), (128, 1000.0, 5e-6), (256, 100.0, 2e-5)]
)
def test_float32_error_of_large_tiles(size, ends, bound):
    g = tiles(size, size, seed=size)
    w = {"r_wordline": 2.5, "r_bitline": 2.5, "r_source": ends, "r_sink": ends}
    assert error(ops.effective_conductance(g, **w), reference.effective_conductance(g, **w)) < bound


def test_closed_forms():
    g = 2e-4
    one = reference.effective_conductance(
        np.full((1, 1), g), r_wordline=9, r_bitline=9, r_source=70, r_sink=30
    )
    assert one[0, 0] == pytest.approx(1 / (1 / g + 100), rel=1e-14)
    line = tiles(1, 40).astype(np.float64)
    w = {"r_wordline": 5.0, "r_bitline": 7.0, "r_source": 60.0}
    alone = reference.effective_conductance(line, method="ladder", **w)
    np.testing.assert_allclose(reference.effective_conductance(line, **w), alone, rtol=1e-13)
    column = np.ascontiguousarray(line.T[::-1])
    turned = reference.effective_conductance(column, r_wordline=7.0, r_bitline=5.0, r_sink=60.0)
    np.testing.assert_allclose(turned[::-1].T, alone, rtol=1e-13)
    # without wires, only ends: Y' = Y (1 + dR Y)^-1 of the ideal network's admittance
    g = tiles(5, 7).astype(np.float64)
    ends = np.r_[np.full(5, 80.0), np.full(7, 30.0)]
    y = np.block([[np.diag(g.sum(1)), -g], [-g.T, np.diag(g.sum(0))]])
    closed = -np.linalg.solve(np.eye(12) + y * ends, y)[:5, 5:]
    got = reference.effective_conductance(g, r_wordline=0, r_bitline=0, r_source=80, r_sink=30)
    np.testing.assert_allclose(got, closed, rtol=1e-13)


def test_weak_cells_lose_nothing():
    g = tiles(20, 30, ron=1e12)
    got = ops.effective_conductance(g, **WIRES["strong"])
    np.testing.assert_allclose(got, g, rtol=1e-5, atol=1e-18)
    assert not ops.effective_conductance(np.zeros((3, 5), np.float32), **WIRES["strong"]).any()


@st.composite
def cases(draw):
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    resistances = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
    w = {key: draw(resistances) for key in ("r_wordline", "r_bitline", "r_source", "r_sink")}
    ron = draw(st.sampled_from([1e3, 1e4, 1e6]))
    return tiles(
        rows, cols, ron=ron, seed=draw(st.integers(0, 99)), open_cells=draw(st.sampled_from([0, 0.5]))
    ), w


@settings(max_examples=40, deadline=None)
@given(cases())
def test_invariants_of_a_resistor_network(case):
    g, w = case
    got = ops.effective_conductance(g, **w)
    expected = reference.effective_conductance(g, **w)
    top = expected.max() + 1e-300
    assert np.abs(got - expected).max() <= 2e-5 * top
    assert (got >= 0).all()
    network = ports(g.astype(np.float64), Wires.of(*g.shape, *w.values()))
    # what leaves at the bitlines has entered at the wordline
    assert (expected.sum(1) <= network["LL"].sum(1) + 1e-9 * top * len(g)).all()
    whole = np.block([[network["LL"], network["LB"]], [network["LB"].T, network["BB"]]])
    assert np.linalg.eigvalsh(whole).min() >= -1e-9 * top * max(g.shape)
    for name in w:  # a larger resistance lets less through
        more = reference.effective_conductance(g, **{**w, name: w[name] * 1.5 + 0.1})
        assert more.sum() <= expected.sum() * (1 + 1e-9)
    # driving bitlines instead of wordlines is the same network turned around
    turned = ops.effective_conductance(
        np.ascontiguousarray(g[::-1, ::-1].T), r_wordline=w["r_bitline"], r_bitline=w["r_wordline"],
        r_source=w["r_sink"], r_sink=w["r_source"],
    )[::-1, ::-1].T  # fmt: skip
    assert np.abs(turned - got).max() <= 2e-5 * top


def test_open_cells_at_the_open_ends_change_nothing():
    g = tiles(21, 34)
    padded = np.zeros((40, 47), np.float32)
    padded[19:, :34] = g
    got = ops.effective_conductance(padded, **WIRES["strong"])[19:, :34]
    np.testing.assert_allclose(got, ops.effective_conductance(g, **WIRES["strong"]), rtol=2e-5, atol=1e-10)


def test_reading_backwards():
    """Driven bitlines: the transpose with matching ends, and with exchanged ends that of exchanged resistances."""
    g = tiles(12, 17)
    w = {"r_wordline": 2.0, "r_bitline": 3.0, "r_source": 300.0, "r_sink": 50.0}
    got = ops.effective_conductance(g, **w)

    def backwards(r_source, r_sink):
        field = reference.node_voltages(
            np.zeros((17, 12)), g, drive=np.eye(17), **{**w, "r_source": r_source, "r_sink": r_sink}
        )
        cells = g * (field.bitline - field.wordline)  # current from bitline to wordline
        return cells.sum(-1)  # [driven bitline, wordline]

    assert error(got, backwards(300.0, 50.0).T) < 2e-6
    swapped = ops.effective_conductance(g, **{**w, "r_source": 50.0, "r_sink": 300.0})
    assert error(swapped, backwards(50.0, 300.0).T) < 2e-6
    assert error(got, swapped) > 0.05


def test_tiles_on_shared_drivers():
    """Two column tiles on one source resistance, against one network of both: the far tile on ideal wires."""
    g = tiles(2, 9, 6)
    w = {"r_wordline": 0.0, "r_bitline": 2.0, "r_source": 120.0, "r_sink": 20.0}
    both = reference.nodal_conductance(np.concatenate(list(g), axis=1), **w)
    expected = np.stack([both[:, :6], both[:, 6:]])
    assert error(reference.effective_conductance(g, shared_drivers=True, **w), expected) < 1e-12
    assert error(ops.effective_conductance(g, shared_drivers=True, **w), expected) < 3e-6
    assert error(ops.effective_conductance(g, **w), expected) > 0.02
    one = ops.effective_conductance(g[:, None], shared_drivers=True, **WIRES["strong"])
    assert error(one[:, 0], ops.effective_conductance(g, **WIRES["strong"])) < 3e-6


def test_shared_drivers_may_differ_from_line_to_line():
    g = tiles(2, 9, 6)
    source = np.random.default_rng(0).uniform(0, 300, 9).astype(np.float32)
    w = {"r_wordline": 0.0, "r_bitline": 2.0, "r_source": source, "r_sink": 20.0}
    both = reference.nodal_conductance(np.concatenate(list(g), axis=1), **w)
    expected = np.stack([both[:, :6], both[:, 6:]])
    assert error(reference.effective_conductance(g, shared_drivers=True, **w), expected) < 1e-12
    assert error(ops.effective_conductance(g, shared_drivers=True, **w), expected) < 3e-6


@pytest.mark.parametrize(("method", "bound"), [("first_order", 0.5), ("ladder", 0.05), ("mean_field", 3e-3)])
def test_approximations_are_as_good_as_said(method, bound):
    g = tiles(128, 128, open_cells=0)
    exact = reference.effective_conductance(g, r_wordline=1.0, r_bitline=1.0)
    got = ops.effective_conductance(g, method=method, r_wordline=1.0, r_bitline=1.0)
    off = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert bound / 4 < off < bound


@pytest.mark.parametrize("method", reference.METHODS)
def test_same_bits_for_threads_and_batches(method, same_on_threads):
    g = tiles(5, 40, 24)
    many = same_on_threads(lambda: ops.effective_conductance(g, method=method, **WIRES["strong"]))
    np.testing.assert_array_equal(many[3], ops.effective_conductance(g[3], method=method, **WIRES["strong"]))


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_do(shape):
    assert ops.effective_conductance(np.zeros(shape, np.float32), r_wordline=1, r_bitline=1).shape == shape


def with_cell(value):
    g = tiles(2, 3, 5, 4)
    g[1, 2, 3, 1] = value
    return g


GOOD = {"g": tiles(2, 3, 5, 4), **WIRES["strong"]}
BAD = {
    "dtype": ({"g": np.zeros((2, 2))}, TypeError, "`g` must be an array of float32, got float64"),
    "axes": ({"g": np.zeros(2, np.float32)}, ValueError, "`g` must have 2 or .* axes, got 1"),
    "stride": ({"g": tiles(4, 3).T}, ValueError, "`g` must be C-contiguous"),
    "method": ({"method": "best"}, ValueError, "`method` must be one of none, first_order, .* got 'best'"),
    "arithmetic": ({"arithmetic": "fp16"}, ValueError, "`arithmetic` must be one of fp32, 3xtf32, tf32, got 'fp16'; choose"),
    "negative": ({"g": with_cell(-1e-6)}, ValueError, r"`g` must be 0 or above and finite, got -1e-06 S in tile \(1, 2\), wordline 3, bitline 1"),
    "nan": ({"g": with_cell(np.nan)}, ValueError, r"got nan S in tile \(1, 2\), wordline 3"),
    "infinite": ({"g": with_cell(np.inf)}, ValueError, r"got inf S in tile \(1, 2\)"),
    "resistance": ({"r_sink": -2.0}, ValueError, "`r_sink` must be 0 or above and finite, got -2 ohm"),
    "open-line": ({"r_bitline": np.inf}, ValueError, "`r_bitline` must be 0 or above and finite, got inf ohm"),
    "lines": ({"r_source": np.ones(4)}, ValueError, r"`r_source` must have 1 or 5 values, got shape \(4,\); give one, or one per wordline"),
    "units": ({"g": np.full((5, 4), 1e30, np.float32), "r_source": 1e20}, ValueError, "the result must be finite, got NaN or infinity in tile 0"),
    "shared": ({"shared_drivers": True, "method": "ladder"}, ValueError, "`method` must be 'exact' with shared_drivers=True, got 'ladder'"),
    "shared-axes": ({"shared_drivers": True, "g": tiles(5, 4)}, ValueError, "`g` must have 3 or .* axes, got 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, backend):
    if (name, backend) == ("units", "reference"):
        pytest.skip("float64 does not overflow")
    change, kind, text = BAD[name]
    values = {**GOOD, **change}
    with pytest.raises(kind, match=text):
        ops.effective_conductance(values.pop("g"), **values)


@pytest.mark.parametrize("method", reference.METHODS)
@pytest.mark.parametrize(
    ("shape", "order"),
    [((1, 1), FORWARD), ((16, 16), REVERSE), ((16, 20), 11), ((20, 16), 12), ((37, 50), FORWARD), ((12, 70), 13), ((70, 30), REVERSE), ((5, 90), 14)],
)  # fmt: skip
def test_cuda_kernels_match_oracle(shape, order, method):
    g, w = tiles(3, *shape), wires("lines", *shape)
    device = ShimDevice(order, workspace=1 << (16 if method == "mean_field" else 19))  # several chunks
    got = ops.effective_conductance(g, method=method, device=device, **w)
    expected = reference.effective_conductance(g, method=method, **w)
    assert error(got, expected) < 5e-6


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_cuda_inverts_by_halves(size):
    """1 + Z A with both positive semidefinite, as between two blocks."""
    rng = np.random.default_rng(size)
    z, a = ((x @ np.swapaxes(x, 1, 2)) / size for x in rng.normal(size=(2, 3, size, size)))
    stride, ld = size * (size + 5) + 3, size + 5
    m = np.full(3 * stride, np.nan, np.float32)
    square = np.lib.stride_tricks.as_strided(m, (3, size, size), (4 * stride, 4 * ld, 4))
    square[...] = z @ a
    invert(ShimDevice(), m, size, ld, stride, 3, 0, diagonal=1.0)
    expected = np.linalg.inv(np.eye(size) + z @ a)
    assert error(square, expected) < 2e-6
    assert np.isnan(m[size:ld]).all()


def test_cuda_launches_do_not_grow_with_tiles():
    counts = []
    for count in (1, 5):
        device = ShimDevice()
        ops.effective_conductance(tiles(count, 33, 20), device=device, **WIRES["strong"])
        counts.append(len(device.launches))
    assert counts[0] == counts[1]
    # leaf, output, three joints (of which two with a merge)
    assert counts[0] == 2 + 3 + 2


@pytest.mark.parametrize(
    ("shape", "order"), [((2, 3, 9, 6), FORWARD), ((2, 2, 40, 17), REVERSE), ((1, 3, 17, 50), 11)]
)
def test_cuda_tiles_on_shared_drivers(shape, order):
    """Chunks hold whole groups; a group of one is a tile with drivers of its own."""
    g, w = tiles(*shape), wires("lines", *shape[-2:])
    for each in (w, {**w, "r_source": 70.0}):
        device = ShimDevice(order, workspace=1)
        got = ops.effective_conductance(g, shared_drivers=True, device=device, **each)
        expected = reference.effective_conductance(g, shared_drivers=True, **each)
        assert error(got, expected) < 5e-6
        assert error(ops.effective_conductance(g, device=device, **each), expected) > 0.01
    alone = ops.effective_conductance(g[0, :, None], shared_drivers=True, device=device, **w)
    assert error(alone[:, 0], reference.effective_conductance(g[0], **w)) < 5e-6


@pytest.mark.parametrize(("arithmetic", "low", "high"), [("3xtf32", 0, 2e-6), ("tf32", 1e-4, 1e-3)])
def test_cuda_arithmetics_are_as_exact_as_said(arithmetic, low, high):
    """Against nodal analysis, with the operands of products rounded as tensor cores do."""
    g, w = tiles(40, 70), WIRES["strong"]
    exact = reference.nodal_conductance(g, **w)
    got = ops.effective_conductance(g, arithmetic=arithmetic, device=ShimDevice(REVERSE), **w)
    assert low <= np.linalg.norm(got - exact) / np.linalg.norm(exact) < high
    np.testing.assert_array_equal(
        ops.effective_conductance(g, arithmetic=arithmetic, **w), ops.effective_conductance(g, **w)
    )
