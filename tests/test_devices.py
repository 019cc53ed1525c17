"""Published devices against the figures of their sources, their staircases, and the commands that show them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from typer.testing import CliRunner

from gpuxbar.cli import app
from gpuxbar.experiments.fit import fit_table
from gpuxbar.experiments.measured import read_pulses
from gpuxbar.experiments.staircase import plot_staircases, staircase
from gpuxbar.reference.device_update import Cells
from gpuxbar.reference.laws import moved
from gpuxbar.spec import CrossbarSpec, Device, Ideal, NeuroSim, SoftBounds, SpecError, save_spec
from gpuxbar.spec.devices import DEVICES, published_device

# normalised steps at weight 0, up and down, and the window: figures of the sources
PUBLISHED = {
    "capacitor": (0.005, 0.005, -1, 1),
    "ecram": (0.002, 0.002, -0.8276, 1.1724),
    "ecram-mo": (2.8214e-4, 2.8214e-4, -0.8286, 1.1714),
    "gokmen-vlasov": (0.0016, 0.0016, -1, 1),
    "idealized": (0.0002, 0.0002, -1, 1),
    "reram-array-hfo2": (0.4622, 0.4622, -1, 1),
    "reram-array-om": (0.0949, 0.0949, -1, 1),
    "reram-sb": (0.002, 0.002, -0.75, 1.25),
    # 1 - A exp(+-5 z) at weight 0, where z = -0.5
    "reram-es": (0.00135 * (1 + 1.18445 * np.exp(-2.5)), 0.00135 * 0.740641 * (1 + 0.081404 * np.exp(2.5)), -1, 1),
    "pcm": (0.01 * (1 + 27.235), 0.01 * (1 + 2.235), 0, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_at_weight_0_are_the_published_ones(name):
    up, down, low, high = PUBLISHED[name]
    if name != "pcm":  # which moves one way
        assert published_device(name).reference_at == -low / (high - low)
    law = published_device(name).law.model_dump()
    width = high - low
    small = (
        1 if name.startswith("reram-array") else 1e-3
    )  # of a pulse: whole ones of few, else the rate of the flow
    for size, way in ((up, 1), (down, -1)):
        t = way * small * (1 + way * law["asymmetry"]) / law["pulses"]
        y = np.array(-low / width)
        step = abs(moved(law, y, np.array(t)) - y) * width / small
        if name == "pcm" and way < 0:  # at its lower bound: the flow's rate there, whatever the bound
            step = abs(moved(law, np.array(1e-3), np.array(t)) - 1e-3) * width / small
        assert step == pytest.approx(size, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "labels", "levels", "r_on", "on_off"),
    [
        ("ag-asi", (2.4, -4.88), 97, 26e6, 12.5),
        ("alox-hfo2", (1.94, -0.61), 40, 16.9e3, 4.43),
        ("pcmo", (3.68, -6.76), 50, 23e6, 6.84),
        ("taox-tio2", (1.85, -1.79), 102, 5e6, 2),
        ("fefet", (1.75, 1.46), 32, 559.28e3, 45),
    ],
)
def test_neurosims_devices_bend_as_their_labels_say(name, labels, levels, r_on, on_off):
    """Chen, Peng and Yu, IEEE TCAD 2018, Table I; Jerry et al., IEDM 2017, whose FeFET is alike both ways.

    A label of 10.1 would leave a line by the whole window. Labels of both directions bend the same curve of the conductance
    over pulses up, so that a depression with a positive one goes back along it.
    """
    device = published_device(name)
    low, high = device.window.g_min, device.window.g_max
    assert (1 / high, high / low) == (pytest.approx(r_on), pytest.approx(on_off))
    quiet = device.law.model_copy(update={"cycle": 0.0})
    y = (staircase(quiet, device.window, devices=1)[:, 0].astype(float) - low) / (high - low)
    line = np.arange(levels + 1) / levels
    for label, path in zip(labels, (y[: levels + 1], y[levels:][::-1]), strict=True):
        off = path - line
        assert off[np.abs(off).argmax()] == pytest.approx(label / 10.1, rel=0.01)


def symmetry_point(law):
    """Share of the window where a small step up and one down are alike, for a device without spread."""
    asymmetry, small = law.get("asymmetry", 0.0), 1e-6
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        up = moved(law, np.array(middle), np.array(small * (1 + asymmetry))) - middle
        down = middle - moved(law, np.array(middle), np.array(-small * (1 - asymmetry)))
        low, high = (middle, high) if up > down else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize("name", ["capacitor", "ecram", "ecram-mo", "reram-sb"])
def test_devices_shifted_to_their_symmetry_point_have_it_at_weight_0(name):
    low, high = PUBLISHED[name][2:]
    assert symmetry_point(published_device(name).law.model_dump()) == pytest.approx(
        -low / (high - low), abs=1e-3
    )


@pytest.mark.parametrize(
    ("name", "spread"),
    [("reram-sb", 0.02), ("reram-array-om", 0.02), ("reram-array-hfo2", 0.02), ("reram-es", 0.14)],
)
def test_ends_of_a_device_do_not_move_its_symmetry_point(name, spread):
    """In units of the weight: as many devices of aihwkit's presets have 0.02, 0.02, 0.02 and 0.13, their references left out."""
    law = published_device(name).law.model_copy(update={"cycle": 0.0, "write_noise": 0.0}).model_dump()
    low, width = (-0.75, 2) if name == "reram-sb" else (-1, 2)
    cells = Cells.draw(law, np.arange(60), 60, 0, 3, -1 / 9)
    shape = cells.low.shape
    w = np.linspace(-0.9, 0.9, 181)
    small = np.full(shape, 1e-3 / law["pulses"])
    x = [np.full(shape, (at - low) / width) for at in w]
    net = np.stack([(cells.flow(y, small) - y) - (y - cells.flow(y, -small)) for y in x])
    found = w[np.abs(net).argmin(0)]
    inside = (cells.low < x[0].min()) & (cells.high > x[-1].max())  # of a window that holds all of w
    assert inside.sum() > 100
    assert np.std(found[inside]) < spread + 0.01


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_makes_a_spec_and_a_staircase(name):
    device = published_device(name)
    spec = device.spec(seed=3)
    assert (spec.update, spec.device, spec.seed) == (device.law, device.window, 3)
    assert device.name == name
    assert re.search(r"\b(19|20)\d\d\b", device.source)
    steps = staircase(device.law, device.window, pulses=8, devices=200)
    assert steps.shape == (17, 200)
    share = (steps - device.window.g_min) / (device.window.g_max - device.window.g_min)
    assert share[8].mean() > share[0].mean()


def test_a_staircase_is_the_closed_form():
    window = Device(g_min=1e-6, g_max=5e-6)
    y = (staircase(SoftBounds(pulses=40, up=2, down=3), window, devices=1)[:, 0] - 1e-6) / 4e-6
    n = np.arange(41) / 40
    np.testing.assert_allclose(y[:41], 1 - np.exp(-2 * n), atol=1e-5)
    np.testing.assert_allclose(y[40:], y[40] * np.exp(-3 * n), atol=1e-5)
    assert len(staircase(NeuroSim(levels=32), window)) == 65
    # an ideal device crosses the window in as many changes as are drawn
    np.testing.assert_allclose(
        staircase(Ideal(), window, pulses=4, devices=1)[:5, 0] * 1e6, [1, 2, 3, 4, 5], rtol=1e-5
    )
    with pytest.raises(ValueError, match="staircase: `pulses` must be 1 to 100000, got 0; draw fewer"):
        staircase(Ideal(), window, pulses=0)


def test_an_unknown_device_is_answered_with_the_nearest():
    with pytest.raises(SpecError, match=r"must be a device, got 'reram-eS2'; did you mean `reram-es`\?"):
        published_device("reram-eS2")


def test_devices_are_listed_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("gpuxbar.experiments.staircase.MOST", 8)
    every, plot = tmp_path / "every.png", tmp_path / "ecram.png"
    listed = CliRunner().invoke(app, ["devices", "--plot", str(every)])
    assert listed.exit_code == 0, listed.output
    assert all(name in listed.output for name in DEVICES)
    assert every.read_bytes()[:4] == b"\x89PNG"
    nameless = CliRunner().invoke(app, ["devices", "--out", str(tmp_path / "spec.yaml")])
    assert nameless.exit_code == 2
    assert "`name` must be a device with --out, got none" in nameless.output
    shown = CliRunner().invoke(app, ["devices", "ecram", "--plot", str(plot)])
    assert shown.exit_code == 0, shown.output
    assert "Tang et al., IEDM 2018" in shown.output
    assert "weight 0 at 0.4138 of the window" in shown.output
    weightless = CliRunner().invoke(app, ["devices", "pcmo"])
    assert "weight 0" not in weightless.output
    assert plot.read_bytes()[:4] == b"\x89PNG"
    wrong = CliRunner().invoke(app, ["devices", "ecramm"])
    assert wrong.exit_code == 2
    assert "did you mean `ecram`?" in wrong.output


def test_a_device_of_ones_own_is_shown_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("gpuxbar.experiments.staircase.MOST", 8)
    mine, lawless, plot = tmp_path / "mine.yaml", tmp_path / "lawless.yaml", tmp_path / "mine.png"
    save_spec(CrossbarSpec(device=Device(g_min=2e-6, g_max=9e-6), update=SoftBounds(up=1.7)), mine)
    save_spec(CrossbarSpec(), lawless)
    shown = CliRunner().invoke(app, ["devices", "--spec", str(mine), "--plot", str(plot)])
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines() == ["window 2e-06 to 9e-06 S", "law SoftBounds(up=1.7)"]
    assert plot.read_bytes()[:4] == b"\x89PNG"
    for arguments, text in (
        (["--spec", str(lawless)], "`update` must be a law to show a device, got None"),
        (["ecram", "--spec", str(mine)], "`name` must be left out with --spec, got ecram"),
        (["--spec", str(mine), "--out", str(plot)], "`--out` must be left out with --spec"),
    ):
        refused = CliRunner().invoke(app, ["devices", *arguments])
        assert refused.exit_code == 2
        assert text in refused.output


def test_a_measurement_is_fitted_reported_and_saved(tmp_path):
    rng = np.random.default_rng(5)
    y, rising = rng.uniform(0, 1, 4000), rng.random(4000) < 0.5
    step = np.where(rising, 1 - y, -y) / 50 + 0.004 * rng.normal(size=4000)
    rows = np.column_stack([1 + 9 * y, 9 * step, np.where(rising, 1, -1)])
    csv, out, plot = tmp_path / "m.csv", tmp_path / "m.yaml", tmp_path / "m.png"
    np.savetxt(csv, rows, delimiter=",", header="g_before [uS],dg [uS],direction", comments="")
    done = CliRunner().invoke(app, ["fit", str(csv), "--bins", "5", "--out", str(out), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    held_out = fit_table(read_pulses(csv), bins=5).held_out.rising
    found = dict(re.findall(r"(potentiation|depression)\W+(\d+)", done.output))
    assert found == {"potentiation": str(held_out.sum()), "depression": str((~held_out).sum())}
    assert plot.read_bytes()[:4] == b"\x89PNG"
    from gpuxbar import load_spec

    assert load_spec(out).update.law == "lookup_table"
    law = CliRunner().invoke(app, ["fit", str(csv), "--law", "soft_bounds", "--out", str(out)])
    assert law.exit_code == 0, law.output
    assert re.search(r"law SoftBounds\(.*pulses=", law.output)
    assert load_spec(out).update.law == "soft_bounds"
    steps = CliRunner().invoke(
        app, ["fit", str(csv), "--law", "piecewise_step", "--bins", "3", "--out", str(out)]
    )
    assert steps.exit_code == 0, steps.output
    assert len(load_spec(out).update.up) == 3
    wrong = CliRunner().invoke(app, ["fit", str(csv), "--bins", "4"])
    assert wrong.exit_code == 2
    assert "must be 2, 3, 5 or 9, got 4" in wrong.output
    plot_staircases({"fitted": (load_spec(out).update, load_spec(out).device)}, plot, pulses=10)
