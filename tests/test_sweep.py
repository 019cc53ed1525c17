"""Sweeps of settings: which runs they are, what they write, and that an interrupted one loses nothing."""

from __future__ import annotations

import csv
import re
from importlib import import_module
from math import nan

import pytest
from test_train import BATCHES, data  # noqa: F401
from typer.testing import CliRunner

from gpuxbar.cli import app
from gpuxbar.experiments import Run, sweep, train
from gpuxbar.spec import CrossbarSpec, SpecError, nested

pytestmark = pytest.mark.usefixtures("data", "no_curves")
SPEC = CrossbarSpec(read_noise={"sigma": 1e-6})
VARY = {"adc.bits": [2, 8], "seed": [0, 1]}
COMMON = {"epochs": 1, "batch": 64}
SLICED = {
    "update.law": ["linear_step"], "mapping.scheme": ["subtracted"], "mapping.slices": [2], "mapping.slice_bits": [2],
}  # fmt: skip


@pytest.fixture
def no_curves(monkeypatch):
    """The pictures of single runs, which take longer than these: `test_train.py` looks at them."""
    monkeypatch.setattr(import_module("gpuxbar.experiments.train"), "_plot", lambda *_: None)


def table(folder):
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_is_a_run_for_every_combination_and_one_that_is_ideal(tmp_path):
    heard = []
    rows = sweep(Run(tmp_path / "all", SPEC, **COMMON), VARY, heard.append)
    names = ["ideal", *(f"adc.bits={bits},seed={seed}" for bits in (2, 8) for seed in (0, 1))]
    assert heard == [f"{name} ({k + 1} of 5)" for k, name in enumerate(names)]
    for name, row in zip(names, rows, strict=True):
        bits, seed = row.get("adc.bits"), row.get("seed", 0)
        spec = SPEC.with_overrides({"adc": {"bits": bits}, "seed": seed})
        alone = Run(tmp_path / f"alone {name}", spec, modes=(row["mode"],), **COMMON)
        assert row["mode"] == ("ideal" if name == "ideal" else "hardware-aware")
        (found,) = train(alone)
        assert {key: found[key] for key in ("mode", "loss", "accuracy")}.items() <= row.items()
    assert len({row["loss"] for row in rows}) == 5
    written = [{key: value for key, value in row.items() if value} for row in table(tmp_path / "all")]
    assert written == [{key: str(value) for key, value in row.items()} for row in rows]
    assert (tmp_path / "all/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    run = Run(tmp_path / "cut", SPEC, modes=("hardware-aware",), **COMMON)

    def interrupt(name):
        if "(3 of 4)" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(run, VARY, interrupt)
    assert len(table(run.folder)) == 2
    BATCHES.clear()
    resumed = sweep(Run(**vars(run) | {"resume": True}), VARY)
    trained = [part for part in BATCHES if len(part) < 150]  # not what converters are calibrated by
    assert len(trained) == 2 * 3
    assert resumed == sweep(Run(**vars(run) | {"folder": tmp_path / "whole"}), VARY)
    more = sweep(Run(**vars(run) | {"resume": True}), {**VARY, "adc.bits": [2, 8, 4]})
    assert more[:4] == resumed
    assert [row["adc.bits"] for row in more[4:]] == [4, 4]


@pytest.mark.parametrize(
    ("vary", "modes", "message"),
    [
        ({"adc.bits": [6, 99]}, None, "CrossbarSpec: `adc.bits` must be"),
        ({"adc.bitz": [6]}, None, "CrossbarSpec: `adc.bitz` must be a known key"),
        ({"adc.bits": [6, 8, 6]}, None, r"sweep: `vary` must hold values that differ, got \[6, 8, 6\] for adc.bits"),
        ({"train.lrr": [0.1]}, None, r"sweep: `vary` must hold options of a training behind train\., got train\.lrr; did you mean `train\.lr`"),
        ({"train.lr": [0.1, -1]}, None, "train: `lr` must be a finite float of at least 0, got -1; try 0.01"),
        ({"train.lr": ["fast"]}, None, "train: `lr` must be a finite float of at least 0, got 'fast'"),
        ({"train.batch": [2.5]}, None, "train: `batch` must be an int of at least 1, got 2.5"),
        ({"train.epochs": [0]}, None, "train: `epochs` must be an int of at least 1, got 0"),
        ({"train.seed": ["a"]}, None, "train: `seed` must be an int of 64 bits, got 'a'"),
        ({"train.momentum": ["a"]}, None, "train: `momentum` must be a float, got 'a'"),
        ({"train.optimizer": ["agadd"]}, None, "train: `optimizer` must be an in-situ algorithm, got 'agadd'"),
        ({"train.network": ["mlp", "resnet19"]}, None, "network: `name` must be a network, got 'resnet19'"),
        ({"adc.bits": [6], "tile.rows+adc.bits": [8]}, None, r"sweep: `vary` must name a key once, got adc.bits in adc.bits, tile.rows\+adc.bits"),
        ({"tile.rows+train.lrr": [8]}, None, "sweep: `vary` must hold options of a training behind train., got train.lrr"),
        ({"tile.rows+tile.colz": [8]}, None, "CrossbarSpec: `tile.colz` must be a known key"),
        ({"adc.bits": []}, None, r"sweep: `vary` must hold values that differ, got \[\] for adc.bits"),
        ({"adc.bits": [6]}, ("in-situ",), "`update` of the spec must be an update law"),
        ({"update": [{"law": "ideal"}, None]}, ("in-situ",), "`update` of the spec must be an update law"),
        ({**SLICED, "carry.scheme": ["accumulate", "streamed"]}, ("in-situ",), "`spec.carry.scheme` must be accumulate"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_anything_is(vary, modes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep(Run(tmp_path / "refused", SPEC, modes=modes, optimizer="agad", **COMMON), vary)
    assert not (tmp_path / "refused").exists()
    assert not BATCHES


def test_a_folder_is_begun_or_resumed_as_wanted(tmp_path):
    run = Run(tmp_path / "there", SPEC, **COMMON)
    with pytest.raises(ValueError, match="must exist to resume, got none; leave out --resume"):
        sweep(Run(**vars(run) | {"resume": True}), VARY)
    run.folder.mkdir()
    with pytest.raises(ValueError, match="must not exist yet, got a folder; use --resume or another --name"):
        sweep(run, VARY)


def test_settings_are_varied_together(tmp_path):
    vary = {"tile.rows+tile.cols": [16, 64], "train.seed+seed": [0, 1]}
    rows = sweep(Run(tmp_path / "all", SPEC, **COMMON), vary)
    assert [(row["mode"], *(row.get(key) for key in vary)) for row in rows] == [
        ("ideal", None, 0), ("hardware-aware", 16, 0), ("ideal", None, 1), ("hardware-aware", 16, 1),
        ("hardware-aware", 64, 0), ("hardware-aware", 64, 1),
    ]  # fmt: skip
    spec = SPEC.with_overrides({"tile": {"rows": 64, "cols": 64}, "seed": 1})
    (found,) = train(Run(tmp_path / "alone", spec, modes=("hardware-aware",), seed=1, **COMMON))
    assert {key: found[key] for key in ("mode", "loss", "accuracy")}.items() <= rows[-1].items()


@pytest.mark.parametrize("seed", ["seed", "train.seed", "train.seed+seed"])
def test_the_picture_has_a_line_for_every_combination_of_what_is_not_along_it(seed, tmp_path, monkeypatch):
    """Means over seeds that did not diverge; where all did there is a gap; the ideal accuracy all along."""
    module, drawn = import_module("gpuxbar.experiments.sweep"), []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    vary = {seed: [0, 1], "adc.bits": [2, 4, 8], "dac.bits": [6, 8, None]}
    diverged = {(2, 0, 8), (4, 0, None), (4, 1, None)}
    rows = [{"mode": "ideal", "accuracy": 0.9}]
    rows += [
        {"adc.bits": a, seed: s, "dac.bits": d, "mode": "in-situ", "accuracy": None if (a, s, d) in diverged else a / 10 + s / 50}
        for s in (0, 1) for a in (2, 4, 8) for d in (6, 8, None)
    ]  # fmt: skip
    module._plot(rows, vary, tmp_path / "sweep.png")
    (axis,) = drawn[0].axes
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"ideal", "in-situ, dac.bits=6", "in-situ, dac.bits=8", "in-situ, dac.bits=null"}
    assert list(lines["ideal"].get_ydata()) == [0.9] * 3
    assert list(lines["in-situ, dac.bits=6"].get_ydata()) == pytest.approx([0.21, 0.41, 0.81])
    assert list(lines["in-situ, dac.bits=8"].get_ydata()) == pytest.approx([0.22, 0.41, 0.81])
    gap = list(lines["in-situ, dac.bits=null"].get_ydata())
    assert gap == pytest.approx([0.21, nan, 0.81], nan_ok=True)
    assert axis.get_xlabel() == "adc.bits"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["2", "4", "8"]


def test_values_are_varied_on_the_command_line(in_tmp):
    command = ["train", "--epochs", "1", "--batch", "512", "--modes", "hardware-aware"]
    done = CliRunner().invoke(app, [*command, "--vary", "adc.bits=2,8", "--vary", "read_noise.sigma=0,1e-7"])
    assert done.exit_code == 0, done.output
    found = re.findall(r"│ (\d)\s+│ (\S+)\s+│ hardware-aware │ (0\.\d+)", done.output)
    assert [row[:2] for row in found] == [("2", "0"), ("2", "1e-07"), ("8", "0"), ("8", "1e-07")]
    assert [f"{float(row['accuracy']):.3f}" for row in table(in_tmp / "runs/digits")] == [
        row[2] for row in found
    ]


def test_values_are_read_as_settings_are(monkeypatch):
    got, ended = {}, {"adc.bits": None, "mode": "in-situ", "accuracy": None}
    monkeypatch.setattr("gpuxbar.cli.sweep", lambda run, vary, announce: got.update(vary) or [ended])
    varied = [
        "--vary",
        "read_noise.sigma=0,1e-7",
        "--vary",
        "adc.bits=null,8",
        "--vary",
        "update.up=[1, 2],[2e-1, 1]",
    ]
    done = CliRunner().invoke(
        app, ["train", *varied, "--vary", "dac.signed=true", "--vary", "update.law=soft_bounds"]
    )
    assert done.exit_code == 0, done.output
    assert got == {
        "read_noise.sigma": [0, 1e-7], "adc.bits": [None, 8], "update.up": [[1, 2], ["2e-1", 1]], "dac.signed": [True],
        "update.law": ["soft_bounds"],
    }  # fmt: skip
    assert re.search(r"│ null\s.*│ in-situ │ diverged", done.output)


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        (["adc.bits"], "`--vary` must be KEY=VALUES, got 'adc.bits'; for instance adc.bits=4,6,8"),
        (["adc.bits=4", "adc.bits=6"], "must be values separated by commas, all of a key at once, got 'adc.bits=6'; for instance"),
        (["adc.bits=4,,6"], "must be values separated by commas, all of a key at once, got 'adc.bits=4,,6'; for instance"),
        (["adc.bits="], "`vary` must hold values that differ, got [] for adc.bits"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_told_apart_are_refused(varied, message, in_tmp):
    options = [part for text in varied for part in ("--vary", text)]
    wrong = CliRunner().invoke(app, ["train", *options])
    assert wrong.exit_code == 2
    assert message in " ".join(wrong.output.split())


def test_runs_are_named_by_what_a_command_line_has(tmp_path):
    vary = {"adc.bits": [None], "dac.signed": [True], "dac.range": ["tensor"]}
    sweep(Run(tmp_path / "names", SPEC, modes=("hardware-aware",), **COMMON), vary)
    assert (tmp_path / "names/adc.bits=null,dac.signed=true,dac.range=tensor/spec.yaml").exists()
    (row,) = table(tmp_path / "names")
    assert (row["adc.bits"], row["dac.signed"]) == ("null", "true")


def test_a_law_that_only_points_have_trains_in_situ(tmp_path):
    vary = {"update.law": ["ideal", "soft_bounds"]}
    run = Run(tmp_path / "laws", CrossbarSpec(mapping={"scheme": "subtracted"}), modes=("in-situ",), **COMMON)
    assert [(row["update.law"], row["mode"]) for row in sweep(run, vary)] == [
        ("ideal", "in-situ"),
        ("soft_bounds", "in-situ"),
    ]


def test_options_of_the_training_are_varied_behind_a_word(tmp_path):
    """The ideal mode runs once for each combination of those that change it."""
    vary = {"train.lr": [1e-3, 1e-2], "train.in_situ_lr": [0.1, 0.2]}
    run = Run(tmp_path / "all", SPEC, **COMMON)
    rows = sweep(run, vary)
    assert [row["mode"] for row in rows] == ["ideal", "hardware-aware", "hardware-aware"] * 2
    assert [row.get("train.in_situ_lr") for row in rows] == [None, 0.1, 0.2] * 2
    (found,) = train(Run(tmp_path / "alone", SPEC, modes=("hardware-aware",), lr=1e-2, **COMMON))
    assert {"train.lr": 1e-2, "loss": found["loss"]}.items() <= rows[4].items()
    assert rows[1]["loss"] == rows[2]["loss"] != rows[4]["loss"]
    folders = {path.name for path in run.folder.iterdir() if path.is_dir()}
    assert {"ideal,train.lr=0.001", "ideal,train.lr=0.01", "train.lr=0.01,train.in_situ_lr=0.2"} < folders
    assert len(folders) == 6
    # in another order, of which the ideal runs know nothing
    again = sweep(Run(**vars(run) | {"resume": True}), {**vary, "train.in_situ_lr": [0.2, 0.1]})
    assert sorted(map(str, again)) == sorted(map(str, rows))


def test_networks_are_varied(tmp_path):
    rows = sweep(Run(tmp_path / "nets", SPEC, **COMMON), {"train.network": ["mlp", "cnn"]})
    assert [(row["train.network"], row["mode"]) for row in rows] == [
        (name, mode) for name in ("mlp", "cnn") for mode in ("ideal", "hardware-aware")
    ]
    alone = train(Run(tmp_path / "alone", SPEC, modes=("ideal",), network="mlp", **COMMON))
    assert rows[0]["loss"] == alone[-1]["loss"] != rows[2]["loss"]
    with pytest.raises(ValueError, match="`network` must be that of the interrupted run, 'mlp', got 'cnn'"):
        train(Run(tmp_path / "alone", SPEC, modes=("ideal",), resume=True, **COMMON))


def test_first_weights_are_varied_apart_from_devices(tmp_path):
    rows = sweep(Run(tmp_path / "seeds", SPEC, **COMMON), {"train.seed": [0, 1], "seed": [0, 1]})
    assert [(row["mode"], row["train.seed"], row.get("seed")) for row in rows] == [
        (mode, at, seed) for at in (0, 1) for mode, seed in (("ideal", None), ("hardware-aware", 0), ("hardware-aware", 1))
    ]  # fmt: skip
    assert len({row["loss"] for row in rows}) == 6


def test_rows_of_another_sweep_stay_in_the_table(tmp_path):
    run = Run(tmp_path / "kept", SPEC, modes=("hardware-aware",), **COMMON)
    sweep(run, {"adc.bits": [2, 8]})
    before = table(run.folder)
    sweep(Run(**vars(run) | {"resume": True}), {"adc.bits": [8, 4]})
    again = table(run.folder)
    assert [row["adc.bits"] for row in again] == ["2", "8", "4"]
    assert again[:2] == before
    sweep(Run(**vars(run) | {"resume": True}), {"adc.bits": [8], "dac.bits": [6]})
    more = table(run.folder)
    assert list(more[0]) == ["adc.bits", "dac.bits", "mode", "loss", "accuracy"]
    assert [(row["adc.bits"], row["dac.bits"]) for row in more] == [
        ("2", ""),
        ("8", ""),
        ("4", ""),
        ("8", "6"),
    ]


def test_data_is_loaded_once(tmp_path, monkeypatch):
    module, names = import_module("gpuxbar.experiments.train"), []
    load = module.load_data
    monkeypatch.setattr(module, "load_data", lambda name, *more: names.append(name) or load(name, *more))
    sweep(Run(tmp_path / "once", SPEC, modes=("hardware-aware",), **COMMON), {"adc.bits": [6, 8]})
    train(Run(tmp_path / "alone", SPEC, modes=("hardware-aware",), **COMMON))
    assert names == ["digits", "digits"]


def test_many_lines_can_be_told_apart(tmp_path, monkeypatch):
    module, drawn = import_module("gpuxbar.experiments.sweep"), []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    vary = {"adc.bits": [6, 8], "dac.bits": [*range(2, 15)]}
    rows = [
        {"adc.bits": a, "dac.bits": d, "mode": "in-situ", "accuracy": d / 20}
        for a in vary["adc.bits"] for d in vary["dac.bits"]
    ]  # fmt: skip
    module._plot(rows, vary, tmp_path / "sweep.png")
    (axis,) = drawn[0].axes
    lines = [line for line in axis.lines if not line.get_label().startswith("_")]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 13
    (legend,) = drawn[0].legends
    assert len(legend.get_texts()) == 13


def test_dotted_keys_are_nested():
    assert nested({"adc.bits": 6, "adc.range": "fixed", "seed": 1}) == {
        "adc": {"bits": 6, "range": "fixed"},
        "seed": 1,
    }
    with pytest.raises(SpecError, match=r"`adc\.bits` must not follow a value of adc"):
        nested({"adc": None, "adc.bits": 6})
