"""The proof of the fused read on a GPU, run over the CPU build of its kernels."""

from __future__ import annotations

import json
import os
import re
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
from gpuxbar.bench.steps import STEPS

run = CliRunner().invoke


def subject(kernels=fused.FUSED, faulty=fused.FUSED, **changes):
    """The emulated GPU with some fused kernels; `changes` of the settings befall the faulty ones alone."""

    class Changed(Subject):
        @property
        def kernels(self):
            return kernels

        def read(self, codes, g, strategy, **s):
            more = {k: v(s[k]) for k, v in changes.items() if k in s} if strategy in faulty else {}
            return super().read(codes, g, strategy, **{**s, **more})

    return Changed(ShimDevice(), np.asarray, np.asarray)


def test_a_device_is_asked_for_the_kernels_it_has():
    for arch, kernels in (("sm_80", ("fused",)), ("sm_90", ("fused", "wgmma")), ("sm_100", ("fused",))):
        assert Subject(ShimDevice(arch=arch), np.asarray, np.asarray).kernels == kernels


def test_the_checks_pass_on_the_cpu_build(monkeypatch):
    monkeypatch.setattr(fused, "ODD_SHAPES", fused.ODD_SHAPES[:2])  # the others take long here
    found = fused.check(subject())
    assert list(found) == list(CHECKS)
    assert found["two runs"] == found["fused and cuBLAS + epilogue"] == "same bits"


FAULTS = {  # check, what is wrong, what it says
    "seed": ("matches the float64 oracle", {"seed": lambda seed: seed ^ 1}, r"results are off \(KERNEL, exact, 3 x 70 x 9\)"),
    "scale": ("matches the float64 oracle", {"v_lsb": lambda v: 1.01 * v}, "results are off"),
    "step": ("fused and cuBLAS + epilogue", {"step": lambda step: step + 1}, "not those of cuBLAS"),
    "sigma": ("noise", {"read_noise": lambda sigma: 1.03 * sigma}, "its variance lies"),
    "same-step": ("noise", {"step": lambda step: 3}, "its steps lies"),
}  # fmt: skip


@pytest.mark.parametrize("kernel", fused.FUSED)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_kernel_voids_the_table(name, kernel):
    which, changes, text = FAULTS[name]
    with pytest.raises(OracleMismatch, match=text.replace("KERNEL", kernel)):
        CHECKS[which](subject(kernels=(kernel,), **changes))


def test_a_fault_of_one_kernel_is_named():
    with pytest.raises(OracleMismatch, match=r"not those of cuBLAS \+ epilogue \(wgmma, exact\)"):
        CHECKS["fused and cuBLAS + epilogue"](subject(faulty=("wgmma",), seed=lambda seed: seed ^ 1))


def test_a_read_that_changes_between_runs_is_found():
    steps = iter(range(9))
    with pytest.raises(OracleMismatch, match="not those of a second run of fused"):
        CHECKS["two runs"](subject(step=lambda step: next(steps)))


def test_every_failed_check_is_named(monkeypatch):
    def red(subject):
        raise OracleMismatch("red")

    monkeypatch.setattr(fused, "CHECKS", {"one": red, "two": lambda subject: "fine", "three": red})
    with pytest.raises(OracleMismatch, match=r"^one: red; three: red$"):
        fused.check(subject())


@pytest.mark.parametrize("strategy", ["fused", "wgmma", "epilogue"])
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
    kernel = {"fused": "fused_tile_mvm", "wgmma": "fused_tile_mvm_sm90", "epilogue": "adc_accumulate"}[
        strategy
    ]
    assert recorder.inner.launches == [kernel]


def test_explain_gives_the_plan_of_every_read():
    done = run(app, ["--explain", "sm_90"])
    assert done.exit_code == 0, done.output
    assert all(f"{read.name}: {read.size}" in done.output for read in READS)
    assert re.search(
        r"resnet18-layer1: 128 images of 32 x 32.*\nstrategy: implicit\n(.*\n)*?  implicit: ", done.output
    )
    assert "strategy: wgmma\n  fused: " in done.output
    assert "rates of sm_90: estimate" in done.output
    assert re.search(r"adc-only-512: .*, int8, noise none\nstrategy: fused\n", done.output)
    old = run(app, ["--explain", "sm_75"])
    assert re.search(
        r"int8, noise none\nimpossible: tile_mvm: .* got 'int8' where sm_75 has no mma.sync", old.output
    )
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


@pytest.fixture
def emulated(monkeypatch):
    """A GPU whose checks and clock are stubs."""
    from types import SimpleNamespace

    runtime = SimpleNamespace(getDeviceProperties=lambda number: {"name": b"Emulated"})
    cuda = SimpleNamespace(runtime=runtime, Device=lambda: SimpleNamespace(id=0))
    us = {"fused": {"read": 400.0, "call": 450.0}, "wgmma": {"read": 350.0, "call": 390.0}}
    us |= {"epilogue": {"read": 1000.0}, "cuBLAS": {"read": 200.0}}
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(fused, "CHECKS", {"light": lambda subject: "green"})
    monkeypatch.setattr(fused, "check_steps", lambda: "replayed")
    monkeypatch.setattr(fused, "_ceilings", lambda: {"copy GB/s": 1.0})
    monkeypatch.setattr(
        fused, "_time", lambda read, kernels: {k: us[k] for k in (*kernels, "epilogue", "cuBLAS")}
    )
    monkeypatch.setattr(fused, "time_steps", lambda: dict(zip(STEPS, (10.0, 15.0, 25.0), strict=True)))
    monkeypatch.setattr(fused, "_gpu", subject)


def test_a_row_is_recorded_with_its_machine(tmp_path, emulated):
    done = run(fused.app, ["--checks"])
    assert (done.exit_code, done.output) == (0, "light: green\ncaptured steps: replayed\n")
    path = tmp_path / "rows.jsonl"
    done = run(fused.app, ["--record", str(path)], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["case"] for row in rows] == [*(read.name for read in READS), "resnet18-step"]
    assert rows[0]["us"]["wgmma"] == {"read": 350.0, "call": 390.0}
    assert rows[0]["targets"]["fused"] == {"us": 430, "speedup": 2.6}
    assert rows[-1]["ms"][STEPS[2]] == 25.0
    assert all(row["gpu"] == "Emulated" for row in rows)
    assert all({"commit", "date", "ceilings"} <= set(row) for row in rows)
    lines = [" ".join(line.replace("│", " ").split()) for line in done.output.splitlines()]
    size = READS[0].size
    # met in us but not in speed; missed in us
    assert f"fast {size} fused 400 (missed) <= 430, 2.6 x 2.50 0.50 450 wgmma" in lines
    assert f"fast {size} wgmma 350 (missed) <= 340 2.86 0.57 390 wgmma" in lines
    assert f"transformer {READS[-2].size} fused 400 2.50 0.50 450 wgmma" in lines
    assert f"{STEPS[1]} 15.00 1.50 <= 2" in lines
    assert f"{STEPS[2]} 25.00 2.50 (missed) <= 2" in lines


@pytest.mark.parametrize("which", ["read", "step"])
def test_a_failed_check_voids_the_table(tmp_path, emulated, monkeypatch, which):
    def red(*_):
        raise OracleMismatch("off by one")

    if which == "read":
        monkeypatch.setattr(fused, "CHECKS", {"light": red})
    else:
        monkeypatch.setattr(fused, "check_steps", red)
    path = tmp_path / "rows.jsonl"
    done = run(fused.app, ["--record", str(path)])
    assert done.exit_code == 2
    assert f"error {'light: ' * (which == 'read')}off by one" in done.output
    assert not path.exists()


TARGETS = {  # H200: us of a kernel's read of 4096 x 4096 x 4096, by generator, precision and rows of a tile
    "wgmma": {("none", "fp16", 256): 240, ("fast", "fp16", 64): 640, ("fast", "fp16", 128): 340, ("fast", "fp16", 256): 260,
              ("fast", "fp16", 512): 245, ("exact", "fp16", 128): 390, ("fast", "fp16x2", 128): 620},
    "fused": {("fast", "fp16", 128): 430, ("exact", "fp16", 128): 520, ("fast", "fp16x2", 128): 620},
}  # fmt: skip


def test_every_target_has_its_read():
    for kernel, targets in TARGETS.items():
        cubes = {
            (r.noise, r.precision, r.tile): r for r in READS if (r.rows, r.inputs, r.outputs) == (4096,) * 3
        }
        assert {key: r.targets[kernel].us for key, r in cubes.items() if kernel in r.targets} == targets
        for noise in ("none", "exact", "fast"):
            assert {(noise, "fp16", tile) for tile in (64, 128, 256, 512)} <= set(cubes)
        assert all(kernel == r.plan("sm_90", 132, kernel).strategy for r in READS)
