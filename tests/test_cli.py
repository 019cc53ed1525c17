"""The commands: a recorded run, bit-for-bit resume, and the messages."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from gpuxbar.cli import app
from gpuxbar.spec import load_spec, presets

run = CliRunner().invoke
QUICK = ["--epochs", "1", "--batch", "512"]


pytestmark = pytest.mark.usefixtures("in_tmp")


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["mode"], r["epoch"], r["loss"], r["accuracy"], r.get("layers")) for r in rows]


def test_the_table_shows_the_last_accuracy_and_the_median_time(monkeypatch):
    records = [
        {"mode": mode, "epoch": k, "loss": 1.0, "accuracy": accuracy, "seconds": seconds}
        for mode in ("ideal", "in-situ")
        for k, (accuracy, seconds) in enumerate([(0.5, 1.0), (0.7, 9.0), (0.9, 2.0)])
    ]
    monkeypatch.setattr("gpuxbar.cli.run_training", lambda settings: records)
    done = run(app, ["train"])
    assert done.exit_code == 0, done.output
    assert re.findall(r"(ideal|in-situ)\W+(\S+)\W+(\S+)", done.output) == [
        ("ideal", "0.900", "2.00"),
        ("in-situ", "0.900", "2.00"),
    ]


def test_the_table_tells_of_modes_that_diverged_or_unlearnt(monkeypatch):
    ends = {"ideal": (1.0, None), "hardware-aware": (0.3, 0.9), "in-situ": (2.3, 0.1)}
    records = [
        {"mode": mode, "epoch": epoch, "loss": loss, "accuracy": accuracy, "seconds": 1.0}
        for mode, (last, reached) in ends.items()
        for epoch, loss, accuracy in ((0, 1.1, 0.7), (1, last, reached))
    ]
    monkeypatch.setattr("gpuxbar.cli.run_training", lambda settings: records)
    done = run(app, ["train"])
    assert done.exit_code == 0, done.output
    assert re.findall(r"│ ([a-z-]+)\W+((?:diverged|0)[^│]*?) +│", done.output) == [
        ("ideal", "diverged in epoch 2; lower --lr"),
        ("hardware-aware", "0.900"),
        ("in-situ", "0.100, loss rose; lower --in-situ-lr"),
    ]


def test_a_network_is_chosen_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr("gpuxbar.cli.run_training", lambda settings: asked.append(settings.network) or [])
    assert run(app, ["train", "--network", "mlp"]).exit_code == run(app, ["train"]).exit_code == 0
    assert asked == ["mlp", None]


def test_a_resumed_run_equals_an_uninterrupted_one(in_tmp):
    whole = run(app, ["train", "--epochs", "2", "--batch", "256", "--name", "whole"])
    assert whole.exit_code == 0, whole.output
    for epochs, extra in (("1", []), ("2", ["--resume"])):
        options = [
            "--epochs",
            epochs,
            "--batch",
            "256",
            "--name",
            "part",
            "--modes",
            "hardware-aware,in-situ",
        ]
        part = run(app, ["train", *options, *extra])
        assert part.exit_code == 0, part.output
    expected = [row for row in metrics(in_tmp / "runs/whole") if row[0] != "ideal"]
    assert len(expected) == 4
    assert sorted(metrics(in_tmp / "runs/part"), key=str) == sorted(expected, key=str)
    assert [{layer["state"] for layer in row[4]} for row in expected[1::2]] == [
        {"hardware-aware"},
        {"in situ"},
    ]
    for name in ("spec.yaml", "curves.png", "checkpoint.pt"):
        assert (in_tmp / "runs/whole" / name).stat().st_size > 0
    again = run(app, ["train", "--name", "whole"])
    assert again.exit_code == 2
    assert "use --resume or another --name" in again.output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--set", "adc.bit=6"], "did you mean `bits`"),
        (["--set", "adc.bits=17"], "must be an integer from 1 to 16"),
        (["--set", "adc.bits=["], "must be an integer from 1 to 16, or null, got '['"),
        (["--set", "device.g_min=1"], "`g_min` must be below"),
        (["--set", "adc.bits"], "`--set` must be KEY=VALUE, got 'adc.bits'"),
        (["--set", "adc.bits.x.y=1"], "must be an integer from 1 to 16"),
        (["--data", "cifar"], "`name` must be one of digits, mnist5k, torchvision:<Name>, got 'cifar'"),
        (["--device", "tpu"], "`device` must be cpu or cuda, got 'tpu'"),
        (["--modes", "magic"], "got 'magic'"),
        (["--optimizer", "agd"], "train: `optimizer` must be an in-situ algorithm, got 'agd'; did you mean"),
        (["--momentum", "1.5"], "InSituSGD: `momentum` must be at least 0 and below 1, got 1.5"),
        (["--optimizer", "mixed-precision", "--set", "pulses.length=10"], "MixedPrecision: "),
        (["--preset", "isac"], "did you mean `isaac`?"),
        (["--spec", "none.yaml"], "`none.yaml` must be a file, got none"),
        (["--spec", "a.yaml", "--preset", "demo"], "`--spec` and `--preset` must not go together"),
        pytest.param(
            ["--device", "cuda"], "got cuda and no usable GPU; train on cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_anything_is_written(options, text, in_tmp):
    result = run(app, ["train", *options])
    assert result.exit_code == 2
    assert text in result.output
    assert not (in_tmp / "runs").exists()


def test_settings_that_belong_together_are_checked_together(in_tmp):
    options = ["--set", "adc.range=fixed", "--set", "adc.i_max=1e-6", "--set", "update.law=agarwal"]
    result = run(app, ["train", *QUICK, "--modes", "ideal", *options, "--set", "update.nu=0.5"])
    assert result.exit_code == 0, result.output
    spec = load_spec(in_tmp / "runs/digits/spec.yaml")
    assert (spec.adc.i_max, spec.update.nu) == (1e-6, 0.5)


def test_a_preset_or_a_file_gives_the_spec(in_tmp):
    result = run(app, ["train", *QUICK, "--modes", "ideal", "--preset", "isaac", "--set", "adc.bits=6"])
    assert result.exit_code == 0, result.output
    saved = in_tmp / "runs/digits/spec.yaml"
    assert load_spec(saved) == presets.isaac().with_overrides({"adc": {"bits": 6}})
    again = run(app, ["train", *QUICK, "--modes", "ideal", "--spec", str(saved), "--name", "again"])
    assert again.exit_code == 0, again.output
    assert (in_tmp / "runs/again/spec.yaml").read_text() == saved.read_text()


def test_mnist5k_trains_lenet5_and_is_resumed_on_the_same_data_only(in_tmp):
    options = ["--modes", "ideal", "--batch", "32", "--threads", "1"]
    result = run(app, ["train", *options, "--data", "mnist5k", "--epochs", "1"])
    assert result.exit_code == 0, result.output
    assert metrics(in_tmp / "runs/mnist5k")[-1][3] > 0.85
    other = run(app, ["train", *options, "--data", "digits", "--name", "mnist5k", "--resume"])
    assert other.exit_code == 2
    assert "`data.name` must be that of the interrupted run, 'mnist5k', got 'digits'" in other.output


def test_doctor_passes():
    result = run(app, ["doctor"])
    assert result.exit_code == 0
    for name in ("reference", "host"):
        assert re.search(rf"self-test, {name} +│ passed, relative error \d", result.output), result.output


def test_doctor_finds_a_broken_kernel(monkeypatch):
    monkeypatch.setattr("gpuxbar.ops.tile_mvm", lambda v, g, **_: v @ g)
    result = run(app, ["doctor"])
    assert result.exit_code == 1
    assert re.search(r"self-test, host +│ FAILED", result.output)


def test_doctor_tells_what_a_gpu_refuses_beside_the_versions(monkeypatch):
    def refuse(v, g):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("gpuxbar.cli.explain_gpu", lambda: ("cuda", "a stand-in"))
    monkeypatch.setattr("gpuxbar.cli._read_on_gpu", refuse)
    result = run(app, ["doctor"])
    assert result.exit_code == 1
    assert re.search(r"self-test, host +│ passed", result.output)
    assert re.search(r"self-test, cuda +│ FAILED, no kernel image is available", result.output)


def test_in_situ_training_by_a_named_algorithm():
    done = run(
        app, ["train", "--preset", "txsim-in-situ", "--modes", "in-situ", *QUICK, "--optimizer", "agad"]
    )
    assert done.exit_code == 0, done.output
    states = torch.load("runs/digits/checkpoint.pt", weights_only=True)["states"]
    assert "parts" in states["in-situ"]["optimiser"]


def test_bench_is_a_command():
    listed = run(app, ["bench", "--list"])
    assert listed.exit_code == 0, listed.output
    assert "lenet5-step" in listed.output
    why = run(app, ["bench", "--explain", "sm_90"])
    assert why.exit_code == 0, why.output
    assert "strategy: wgmma" in why.output


def test_help_keeps_the_units_of_columns():
    shown = run(app, ["fit", "--help"], env={"COLUMNS": "200"})
    assert "g_before [uS], dg [uS], direction (+1 or -1)" in " ".join(shown.output.split())


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "gpuxbar", "train", "--preset", "nope"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "`name` must be a preset, got 'nope'" in " ".join(done.stderr.split())
