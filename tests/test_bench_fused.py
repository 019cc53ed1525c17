"""The proof of the fused read on a GPU, run over the CPU build of its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from cuda_shim import ShimDevice
from typer.testing import CliRunner

from gpuxbar import ops
from gpuxbar.bench import OracleMismatch, fused
from gpuxbar.bench.__main__ import app
from gpuxbar.bench.fused import CHECKS, READS, Recorder, Subject

run = CliRunner().invoke


def subject(**changes):
    """The emulated GPU; `changes` of the settings befall the fused strategy alone."""

    class Changed(Subject):
        def read(self, codes, g, strategy="fused", **s):
            more = {k: v(s[k]) for k, v in changes.items() if k in s} if strategy == "fused" else {}
            return super().read(codes, g, strategy, **{**s, **more})

    return Changed(ShimDevice(), np.asarray, np.asarray)


def test_the_checks_pass_on_the_cpu_build():
    found = fused.check(subject())
    assert list(found) == list(CHECKS)
    assert found["two runs"] == found["fused and cuBLAS + epilogue"] == "same bits"


FAULTS = {  # check, what is wrong, what it says
    "seed": ("matches the float64 oracle", {"seed": lambda seed: seed ^ 1}, r"results are off \(exact, 3 x 70 x 9\)"),
    "scale": ("matches the float64 oracle", {"v_lsb": lambda v: 1.01 * v}, "results are off"),
    "step": ("fused and cuBLAS + epilogue", {"step": lambda step: step + 1}, "not those of cuBLAS"),
    "sigma": ("noise", {"read_noise": lambda sigma: 1.03 * sigma}, "its variance lies"),
    "same-step": ("noise", {"step": lambda step: 3}, "its steps lies"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_voids_the_table(name):
    which, changes, text = FAULTS[name]
    with pytest.raises(OracleMismatch, match=text):
        CHECKS[which](subject(**changes))


def test_a_read_that_changes_between_runs_is_found():
    steps = iter(range(9))
    with pytest.raises(OracleMismatch, match="not those of a second run"):
        CHECKS["two runs"](subject(step=lambda step: next(steps)))


def test_every_failed_check_is_named(monkeypatch):
    def red(subject):
        raise OracleMismatch("red")

    monkeypatch.setattr(fused, "CHECKS", {"one": red, "two": lambda subject: "fine", "three": red})
    with pytest.raises(OracleMismatch, match=r"^one: red; three: red$"):
        fused.check(subject())


@pytest.mark.parametrize("strategy", ["fused", "epilogue"])
def test_what_is_timed_is_the_read(strategy):
    """A replay multiplies and converts again, from operands packed before, into the same array."""
    read = fused.Read("small", 70, 200, 40)
    recorder = Recorder(ShimDevice(multiprocessors=1))
    codes = np.random.default_rng(0).integers(-127, 128, (70, 200)).astype(np.int16)
    g = (np.random.default_rng(1).integers(-2047, 2048, (200, 40)) * fused.G_STEP).astype(np.float32)
    y = ops.tile_mvm(codes, g, device=recorder, strategy=strategy, **read.settings())
    expected = y.copy()
    y.fill(np.nan)
    recorder.inner.launches.clear()
    recorder.replay()
    np.testing.assert_array_equal(y, expected)
    assert recorder.inner.launches == [{"fused": "fused_tile_mvm", "epilogue": "adc_accumulate"}[strategy]]


def test_explain_gives_the_plan_of_every_read():
    done = run(app, ["--explain", "sm_90"])
    assert done.exit_code == 0, done.output
    assert all(f"{read.name}: {read.size}" in done.output for read in READS)
    assert "strategy: wgmma\n  fused: " in done.output
    assert "rates of sm_90: estimate" in done.output
    few = run(app, ["--explain", "sm_86", "--multiprocessors", "46"])
    assert "rates of sm_86" in few.output
    bad = run(app, ["--explain", "hopper"])
    assert bad.exit_code == 2
    text = "bench: `explain` must name an architecture, got 'hopper'; give one such as sm_90"
    assert text in bad.output


def test_without_a_gpu_it_refuses(tmp_path):
    """In a process that sees no GPU, whatever this machine has."""
    record = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "gpuxbar.bench.fused", "--record", str(record)],
        capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert "bench: `device` must be an NVIDIA GPU, got none" in done.stdout
    assert not record.exists()


def test_a_row_is_recorded_with_its_machine(tmp_path, monkeypatch):
    """The report of a GPU whose clock is a stub: the table and the rows, after the checks."""
    from types import SimpleNamespace

    runtime = SimpleNamespace(getDeviceProperties=lambda number: {"name": b"Emulated"})
    cuda = SimpleNamespace(runtime=runtime, Device=lambda: SimpleNamespace(id=0))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(fused, "CHECKS", {"light": lambda subject: "green"})
    monkeypatch.setattr(fused, "_ceilings", lambda: {"copy GB/s": 1.0})
    monkeypatch.setattr(fused, "_time", lambda read: {"fused": 2.0, "epilogue": 5.0, "whole call": 3.0})
    monkeypatch.setattr(fused, "_gpu", subject)
    done = run(fused.app, ["--checks"])
    assert (done.exit_code, done.output) == (0, "light: green\n")
    path = tmp_path / "rows.jsonl"
    done = run(fused.app, ["--record", str(path)])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["case"] for row in rows] == [read.name for read in READS]
    assert rows[0]["us"]["fused"] == 2.0
    assert rows[0]["gpu"] == "Emulated"
    assert {"commit", "date", "ceilings"} <= set(rows[0])


def test_a_failed_check_leaves_no_number(tmp_path, monkeypatch):
    def red(subject):
        raise OracleMismatch("off by one")

    monkeypatch.setattr(fused, "CHECKS", {"light": red})
    monkeypatch.setattr(fused, "_gpu", subject)
    path = tmp_path / "rows.jsonl"
    done = run(fused.app, ["--record", str(path)])
    assert done.exit_code == 2
    assert "error light: off by one" in done.output
    assert not path.exists()
