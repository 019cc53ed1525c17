"""Every example runs from an empty folder, prints its result and leaves its picture; the README's snippets run too."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import nn

from gpuxbar.bench.study import Study
from gpuxbar.launch import set_threads
from gpuxbar.launch import threads as kernel_threads

ROOT = Path(__file__).parent.parent
EXPECTED = {
    "01_read_a_tile.py": ([], "read_a_tile.png", r"largest rounding error 0\.[45]\d* codes"),
    "02_call_a_kernel.py": ([], "read_noise.png", r"same step, same noise: True; another step: False"),
    "03_convert_and_train.py": (["1"], "convert_and_train.png", r"6 +Linear +analog +rule 6"),
    "04_your_own_device_law.py": ([], "device_laws.png", r"linear +halfway up:  50% of the window; .* 0%"),
    "05_calibrate_converters.py": (["1"], "calibrate_converters.png", r"(?ms)^ +99\.9( +0\.\d{3}){6}$.*ADC rounding$"),
    "06_train_through_wires.py": (["1", "1"], "train_through_wires.png", r"ladder +0\.\d{3} +0\.\d{3} +\d"),
    "07_in_situ_algorithms.py": (["200"], "in_situ_algorithms.png", r"agad +error of the weights 0\.\d\d"),
    "08_age_a_network.py": (["1"], "age_a_network.png", r"drift compensated( +0\.\d{3}){6}"),
    "09_look_at_ir_drop.py": ([], "ir_drop.png", r"nodal solution agree to \de-0[67]\n"),
    "10_slice_and_carry.py": (["1"], "slice_and_carry.png", r"periodic, pulses +0\.\d{3}"),
    "11_sequences.py": (["1"], "sequences.png", r"Recurrent: ideal 0\.\d{3}, trained on crossbars 0\.\d{3}"),
    "12_your_own_algorithm.py": (["1"], "your_own_algorithm.png", r"residual +0\.\d{3}"),
    "mnist_in_situ.py": (
        ["--data", "digits", "--epochs", "1", "--seeds", "1", "--tries", "2", "--try-epochs", "1", "--batch", "64",
         "--devices", "reram-es", "--algorithms", "agad", "--record", "rows.jsonl"],
        "mnist_in_situ.png",
        r"agad \| not measured \| \d+\.\d % \| not measured",
    ),
    "sensitivity.py": (
        ["--data", "digits", "--epochs", "1", "--seeds", "1", "--axes", "spread of nu between devices", "--record", "rows.jsonl"],
        "sensitivity.png",
        r"spread of nu between devices \| 0: \d+\.\d, .* 3: \d+\.\d \|",
    ),
    "against_aihwkit.py": (
        ["--data", "digits", "--epochs", "1", "--seeds", "2", "--algorithms", "agad", "--record", "rows.jsonl"],
        "against_aihwkit.png",
        r"agad, reram-sb( \| \d+\.\d \+- \d+\.\d){3} \| [+-]\d+\.\d \+- \d+\.\d \|",
    ),
}  # fmt: skip


def test_every_example_is_tried():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == EXPECTED.keys()


@pytest.fixture
def threads():
    """As many threads after an example as before it."""
    of_torch, of_kernels = torch.get_num_threads(), kernel_threads()
    yield
    torch.set_num_threads(of_torch)
    set_threads(of_kernels)


def trial(name):
    """The example, where what it needs is installed."""
    missing = pytest.mark.skipif(find_spec("aihwkit") is None, reason="aihwkit is not installed")
    return pytest.param(name, marks=[pytest.mark.aihwkit, missing] if name == "against_aihwkit.py" else [])


@pytest.mark.parametrize("name", [trial(name) for name in EXPECTED])
def test_example(name, tmp_path, monkeypatch, capsys, threads):
    """As a script; the first in a process of its own, the others in this one, which has imported what takes longest."""
    arguments, picture, text = EXPECTED[name]
    script = str(ROOT / "examples" / name)
    if name.startswith("01"):
        done = subprocess.run(
            [sys.executable, "-W", "error", script, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        said = done.stdout
    else:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.chdir(tmp_path)
        runpy.run_path(script, run_name="__main__")
        said = capsys.readouterr().out
    assert re.search(text, said), said
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_study_against_aihwkit_says_where_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["against_aihwkit.py"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples/against_aihwkit.py"), run_name="__main__")
    assert "aihwkit must be installed, got none; pip install aihwkit" in capsys.readouterr().err


def test_the_table_against_aihwkit_is_that_of_its_rows():
    study = Study(ROOT / "examples/results/against-aihwkit.jsonl", ROOT, Progress())
    script = runpy.run_path(str(ROOT / "examples/against_aihwkit.py"))
    text = "\n\n".join([script["START"], script["table"](study.rows, study.where()), script["END"]])
    assert text in (ROOT / "examples/README.md").read_text()


def test_snippets_of_the_readme():
    layers = {
        "layer1": nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20)),
        "classifier": nn.Linear(20, 3),
    }
    names = {
        "torch": torch,
        "model": nn.Sequential(OrderedDict(layers)),
        "images": torch.randn(8, 20),
        "loader": [(torch.randn(8, 20), torch.randint(3, (8,)))],
        "loss": nn.functional.cross_entropy,
        "v": np.full((5, 200), 0.2, np.float32),
        "g": np.full((200, 7), 1e-6, np.float32),
    }
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 3
    pairs = {"g": np.full((2, 4, 3), 5e-6, np.float32), "dw": np.full((1, 3, 4), 0.01, np.float32)}
    for snippet in snippets:
        names |= pairs | {"w_max": np.ones(3, np.float32)} if "Pairs" in snippet else {}
        exec(snippet, names)
    assert [row.runs for row in names["report"].rows] == ["analog", "analog", "digital"]
    assert names["model"].layer1[0].spec.adc.bits == 6
    assert (names["weights"] > 0).all()
    # 200 cells of 0.2 V and 1 uS, in steps of 0.5 uA, noise far below one
    np.testing.assert_allclose(names["i"], 4e-5, rtol=0, atol=2 * 5e-7)
