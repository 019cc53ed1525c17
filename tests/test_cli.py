"""The commands: a recorded run, bit-for-bit resume, and the messages."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gpuxbar.cli import app

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["mode"], r["epoch"], r["loss"], r["accuracy"]) for r in rows]


def test_a_resumed_run_equals_an_uninterrupted_one(in_tmp):
    whole = run(app, ["train", "--epochs", "2", "--batch", "256", "--name", "whole"])
    assert whole.exit_code == 0, whole.output
    for epochs, extra in (("1", []), ("2", ["--resume"])):
        part = run(
            app,
            [
                "train",
                "--epochs",
                epochs,
                "--batch",
                "256",
                "--name",
                "part",
                "--modes",
                "hardware-aware",
                *extra,
            ],
        )
        assert part.exit_code == 0, part.output
    expected = [row for row in metrics(in_tmp / "runs/whole") if row[0] == "hardware-aware"]
    assert metrics(in_tmp / "runs/part") == expected
    for name in ("spec.yaml", "curves.png", "checkpoint.pt"):
        assert (in_tmp / "runs/whole" / name).stat().st_size > 0
    again = run(app, ["train", "--name", "whole"])
    assert again.exit_code == 2
    assert "use --resume or another --name" in again.output
    (in_tmp / "runs/part/checkpoint.pt").write_bytes(b"not a checkpoint")
    corrupt = run(app, ["train", "--name", "part", "--resume"])
    assert corrupt.exit_code == 2
    assert "corrupt file" in corrupt.output


def test_a_full_disk_leaves_the_previous_checkpoint(in_tmp, monkeypatch):
    assert (
        run(app, ["train", "--epochs", "1", "--batch", "512", "--modes", "ideal", "--name", "a"]).exit_code
        == 0
    )
    before = (in_tmp / "runs/a/checkpoint.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    again = run(
        app, ["train", "--epochs", "2", "--batch", "512", "--modes", "ideal", "--name", "a", "--resume"]
    )
    assert again.exit_code == 2
    assert "the previous one is intact" in again.output
    assert (in_tmp / "runs/a/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("adc.bit=6", "did you mean `bits`"),
        ("adc.bits=17", "less than or equal to 16"),
        ("device.g_min=1", "`g_min` must be below"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(option, text, in_tmp):
    result = run(app, ["train", "--set", option])
    assert result.exit_code == 2
    assert text in result.output
    assert not (in_tmp / "runs").exists()


def test_unknown_mode():
    result = run(app, ["train", "--modes", "magic"])
    assert result.exit_code == 2
    assert "got 'magic'" in result.output


def test_doctor_passes():
    result = run(app, ["doctor"])
    assert result.exit_code == 0
    assert "passed" in result.output
