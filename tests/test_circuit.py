"""circuit: netlists solved by ngspice, by a solver of their text and by badcrossbar; node voltages; pictures; messages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import gpuxbar
from gpuxbar import circuit, ops, reference
from gpuxbar.nn import AnalogConv2d, AnalogLinear

# one line a circuit: what ngspice 39 and badcrossbar 1.1.0 found, with all digits they print
CASES = json.loads((Path(__file__).parent / "circuits.json").read_text())
IDS = [f"{case['tool'].replace(' ', '-')}-{n}" for n, case in enumerate(CASES)]


def arrays(case):
    return np.array(case["v"]), np.array(case["g"]), np.array(case["i"])


def solved_text(text, sources):
    """Currents into the named sources of a netlist of resistors and voltage sources (dense nodal analysis)."""
    elements = [line.split() for line in text.splitlines() if re.match("[rv]", line)]
    nodes = sorted({node for _, a, b, *_ in elements for node in (a, b)} - {"0"})
    place = {name: n for n, name in enumerate(nodes)}
    branches = {e[0]: len(nodes) + n for n, e in enumerate(x for x in elements if x[0][0] == "v")}
    size = len(nodes) + len(branches)
    matrix, right = np.zeros((size + 1, size + 1)), np.zeros(size + 1)  # the last row is ground
    for name, a, b, *value in elements:
        i, j = place.get(a, size), place.get(b, size)
        if name[0] == "r":
            y = 1 / float(value[-1])
            matrix[[i, j, i, j], [i, j, j, i]] += [y, y, -y, -y]
        else:
            k = branches[name]
            matrix[[i, k], [k, i]] += 1
            matrix[[j, k], [k, j]] -= 1
            right[k] = float(value[-1])
    solution = np.linalg.solve(matrix[:-1, :-1], right[:-1])
    return np.array([solution[branches[name]] for name in sources])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_others_find_the_same_currents(case):
    v, g, expected = arrays(case)
    scale = np.abs(expected).max()
    assert np.abs(circuit.node_voltages(v, g, **case["wires"]).current - expected).max() < 1e-11 * scale
    merged = v @ reference.effective_conductance(g, **case["wires"])
    assert np.abs(merged - expected).max() < 1e-11 * scale
    host = v @ ops.effective_conductance(g.astype(np.float32), **case["wires"])
    assert np.abs(host - expected).max() < 2e-6 * scale
    assert np.abs(v @ g - expected).max() > 1e-2 * scale


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_netlist_says_the_tile(case):
    v, g, expected = arrays(case)
    text = circuit.netlist(v, g, **case["wires"], title="a tile")
    assert text.startswith("* a tile\n")
    assert text.endswith(".end\n")
    got = solved_text(text, [f"vout{c}" for c in range(g.shape[1])])
    assert np.abs(got - expected).max() < 1e-10 * np.abs(expected).max()


@pytest.mark.skipif(shutil.which("ngspice") is None, reason="ngspice is not installed")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_ngspice_reads_the_netlist(case, tmp_path):
    v, g, expected = arrays(case)
    path = tmp_path / "tile.cir"
    path.write_text(circuit.netlist(v, g, **case["wires"]))
    done = subprocess.run(["ngspice", "-b", path], capture_output=True, text=True, timeout=60, check=True)
    got = [float(value) for value in re.findall(r"i\(vout\d+\) = (\S+)", done.stdout)]
    assert np.abs(got - expected).max() < 1e-11 * np.abs(expected).max()


def test_nodes_obey_ohm_and_kirchhoff():
    rng = np.random.default_rng(0)
    g = rng.uniform(0, 1e-3, (6, 9))
    v = rng.uniform(-1, 1, (2, 3, 6))
    wires = {
        "r_wordline": rng.uniform(1, 5, 6), "r_bitline": 2.0,
        "r_source": 50.0, "r_sink": rng.uniform(1, 90, 9),
    }  # fmt: skip
    nodes = circuit.node_voltages(v, g, **wires)
    assert nodes.wordline.shape == (2, 3, 6, 9)
    device = g * (nodes.wordline - nodes.bitline)
    before = np.concatenate([v[..., None], nodes.wordline[..., :-1]], -1)
    ohms = np.repeat(wires["r_wordline"][:, None], 9, 1)
    ohms[:, 0] = 50.0
    enters = (before - nodes.wordline) / ohms
    leaves = np.concatenate([enters[..., 1:], np.zeros((2, 3, 6, 1))], -1)
    np.testing.assert_allclose(enters - leaves, device, rtol=0, atol=1e-12)
    np.testing.assert_allclose(nodes.current, device.sum(-2), rtol=0, atol=1e-15)
    np.testing.assert_allclose(nodes.bitline[..., -1, :], nodes.current * wires["r_sink"], rtol=1e-11)


def test_picture_shows_the_drops(tmp_path):
    g = np.full((5, 7), 1e-3)
    figure = circuit.draw_ir_drop(np.full(5, 0.2), g, r_wordline=10, r_bitline=10, r_sink=50)
    maps = [axis.images[0].get_array() for axis in figure.axes[:3]]
    lost, rise, left = (np.asarray(shown) for shown in maps)
    np.testing.assert_allclose(lost + rise + left, 200.0, rtol=1e-12)  # mV
    assert (np.diff(lost, axis=1) > 0).all()  # away from the drivers
    assert (np.diff(rise, axis=0) < 0).all()  # towards the sense amplifiers
    figure.savefig(tmp_path / "drop.png")
    assert (tmp_path / "drop.png").read_bytes().startswith(b"\x89PNG")


GOOD = {"v": np.ones(3), "g": np.ones((3, 4)) * 1e-5, "r_wordline": 1.0, "r_bitline": 1.0}
BAD = {
    "tile": ({"g": np.ones((2, 3, 4))}, r"`g` must have the axes \[R, C\] of one tile with a cell, got shape \(2, 3, 4\)"),
    "empty": ({"g": np.ones((3, 0))}, r"got shape \(3, 0\)"),
    "cell": ({"g": np.full((3, 4), -1.0)}, "`g` must be 0 or above and finite, got -1 S in tile 0, wordline 0, bitline 0"),
    "inputs": ({"v": np.ones(4)}, r"`v` must have the axes .* with R = 3, got shape \(4,\); give every wordline a voltage"),
    "nan": ({"v": np.array([0, np.nan, 0])}, "`v` must be finite, got nan V"),
    "wire": ({"r_bitline": -1.0}, "`r_bitline` must be 0 or above and finite, got -1 ohm"),
    "lines": ({"r_sink": np.ones(3)}, r"`r_sink` must have 1 or 4 values, got shape \(3,\); give one, or one per bitline"),
}  # fmt: skip


def test_the_package_brings_it_along():
    assert gpuxbar.__all__.count("circuit") == 1


@pytest.mark.parametrize("function", [circuit.netlist, circuit.node_voltages, circuit.draw_ir_drop])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, function):
    change, text = BAD[name]
    values = {**GOOD, **change}
    with pytest.raises(ValueError, match=f"^{function.__name__}: .*{text}"):
        function(values.pop("v"), values.pop("g"), **values)


def test_netlists_and_pictures_take_one_input():
    values = {**GOOD, "v": np.ones((2, 3))}
    for function in (circuit.netlist, circuit.draw_ir_drop):
        with pytest.raises(ValueError, match=r"`v` must have the axes \[R\] with R = 3, got shape \(2, 3\)"):
            function(**values)
    for title in ("", "two\nlines"):
        with pytest.raises(ValueError, match="netlist: `title` must be one line, got"):
            circuit.netlist(**GOOD, title=title)


def test_only_a_cell_of_0_S_is_left_out():
    text = circuit.netlist(np.ones(1), np.array([[1e-12, 0.0]]), r_wordline=1.0, r_bitline=1.0)
    assert f"rd0_0 w0_0 b0_0 {1 / 1e-12!r}" in text
    assert "rd0_1" not in text


WIRED = {
    "tile": {"rows": 16, "cols": 12},
    "device": {"g_min": 1e-6, "g_max": 1e-4},
    "mapping": {"slices": 2, "slice_bits": 2},
    "parasitics": {"r_wordline": 5.0, "r_bitline": 8.0, "r_source": 40.0, "r_sink": 40.0},
}


def by_circuits(layer, v):
    """Currents of a group's bitlines, A: those of every tile's circuit, of all planes, [groups, N, O]."""
    total = np.zeros((layer.groups_, len(v), layer.outputs))
    for group, plane in np.ndindex(layer.groups_, 4):
        for row, col in np.ndindex(3, 2):
            tile = layer.tile_circuit(plane, row, col, group=group)
            lines = v[:, group, 16 * row : 16 * row + len(tile["g"])]
            digit = (1, 4, -1, -4)[plane]
            current = circuit.node_voltages(lines, **tile).current
            total[group, :, 12 * col : 12 * col + tile["g"].shape[1]] += digit * current
    return total


@pytest.mark.parametrize("way", ["read", "programmed", "in situ"])
def test_circuits_of_a_layers_tiles_make_its_products(way):
    """Of a convolution of 2 groups, 36 lines and 20 columns each: 3 x 2 tiles, with rests along both."""
    extra = {"update": {"law": "soft_bounds"}, "carry": {}} if way == "in situ" else {}
    if way == "programmed":
        extra = {"programming": {"write_noise": 1e-6}}
    torch.manual_seed(0)
    layer = AnalogConv2d(
        8, 40, 3, groups=2, bias=False, spec=gpuxbar.CrossbarSpec.model_validate({**WIRED, **extra})
    )
    if way == "programmed":
        layer.program()
    elif way == "in situ":
        layer.begin_in_situ()
    x = torch.rand(4, 8, 3, 3)
    v = x.view(4, 2, 36).numpy().astype(np.float64)  # V of weight units: reads are linear
    currents = by_circuits(layer, v)
    y = layer(x).detach().view(4, 2, 20).transpose(0, 1).numpy()
    unit = (y * currents).sum() / (currents**2).sum()
    near = {"rtol": 0, "atol": 1e-5 * np.abs(y).max()}  # differences of pairs
    np.testing.assert_allclose(currents * unit, y, **near)
    if way == "read":  # which writes what the weights are by then
        layer.weight.data.mul_(-1)
        np.testing.assert_allclose(by_circuits(layer, v) * unit, -y, **near)


TILES = {
    "plane": ({"plane": 4}, {}, "`plane` must be 0 to 3, got 4"),
    "row": ({"row": 3}, {}, "`row` must be 0 to 2, got 3"),
    "col": ({"col": -1}, {}, "`col` must be 0 to 1, got -1"),
    "group": ({"group": 1}, {}, "`group` must be 0 to 0, got 1"),
    "ideal": ({}, {"parasitics": {}}, "`parasitics` must give .* got ideal wires"),
    "shared": ({}, {"parasitics": {**WIRED["parasitics"], "shared_drivers": True}}, "`parasitics` must give .* got drivers that column tiles share"),
}  # fmt: skip


@pytest.mark.parametrize("name", TILES)
def test_a_tile_that_is_no_circuit_is_refused(name):
    place, change, text = TILES[name]
    layer = AnalogLinear(36, 20, spec=gpuxbar.CrossbarSpec.model_validate({**WIRED, **change}), name="fc")
    with pytest.raises(ValueError, match=f"^fc: {text}"):
        layer.tile_circuit(**place)


def test_resistances_must_be_numbers():
    for function in (circuit.netlist, circuit.node_voltages):
        with pytest.raises(
            TypeError, match="`r_bitline` must be a number or one per line, got 'a'; give ohm"
        ):
            function(**{**GOOD, "r_bitline": "a"})
