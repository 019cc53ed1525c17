"""The benchmark: what it records, that it refuses a wrong result, and the README's tables."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import nn
from typer.testing import CliRunner

import gpuxbar as gx
from gpuxbar import ops
from gpuxbar.bench import CASES, Case, OracleMismatch, cases, measure, parasitics, peers, updates
from gpuxbar.bench.__main__ import app
from gpuxbar.bench.cases import Contenders
from gpuxbar.bench.gpu.table import gpu_table
from gpuxbar.bench.measure import extra_memory
from gpuxbar.bench.plain import Tiles, on_tiles
from gpuxbar.bench.record import (
    END,
    START,
    SUMMARY,
    _commit,
    avx2_table,
    readme_tables,
    rewrite_readmes,
    rows_of,
    summary_table,
)
from gpuxbar.bench.study import Study
from gpuxbar.experiments.networks import resnet50
from gpuxbar.nn import AnalogLinear
from gpuxbar.spec import CrossbarSpec, PulseTrain

run = CliRunner().invoke
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples" / "results" / "cpu.jsonl"
SMALL = {
    "linear": partial(cases.linear, 13, 300, 37),
    "linear-clean": partial(cases.linear, 13, 300, 37, noise=0.0),
    "linear-transposed": partial(cases.linear, 13, 37, 300, transposed=True),
    "linear-one": partial(cases.linear, 1, 37, 300),
    "linear-fast": partial(cases.linear, 13, 300, 37, generator="fast"),
    "conv": partial(cases.conv, 2, 17, 9, 5),
    "conv-drivers": partial(cases.conv, 2, 17, 9, 5, flawed=True),
    "mlp-step": partial(cases.mlp_step, 8, 2, 3),
    "lenet5-step": partial(cases.training_step, (1, 28, 28), 3),
    "mobilenet-step": partial(cases.mobilenet_step, 2, 16),
}


def test_times_are_of_a_piece_and_their_percentiles(monkeypatch):
    """By a clock on which the calls of a round take 4, 8, 12, ... ms."""
    clock = (t for k in range(1, 99) for t in (0.0, 4e-3 * ((k + 1) // 2)))  # before and after a call
    timer = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(import_module("gpuxbar.bench.measure"), "time", timer)
    contenders = Contenders({"whole": int, "quarters": int}, lambda: 0.5, pieces={"quarters": 4})
    row = measure(Case("clock", "small", 1.0, lambda: contenders), rounds=11)
    # the first round is not counted: 8, 12, ..., 48 ms
    assert row["ms"] == {"whole": [16.0, 28.0, 40.0], "quarters": [4.0, 7.0, 10.0]}
    assert (row["ratio"], row["error"]) == ({"quarters": 0.25}, 0.5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # within inductor
@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_case_agrees_with_its_oracle_and_with_its_twins(name):
    row = measure(Case(name, "small", 1.0, SMALL[name]), rounds=2)
    assert 0 < row["error"] < 1e-5
    others = set() if name == "mobilenet-step" else {"plain torch"}
    others |= {"gpuxbar, compiled"} if name == "mlp-step" else set()
    assert set(row["ms"]) - {"AIHWKIT-Lightning"} == {"ideal", "gpuxbar"} | others
    assert all(low <= mid <= high for low, mid, high in row["ms"].values())
    if name.endswith("step"):
        return
    # the contenders compute the same product: 8-bit converters and noise of a third of a step leave 2 %
    contenders = SMALL[name]()
    ideal = np.asarray(contenders.run["ideal"]())
    for twin in ("gpuxbar", "plain torch"):
        y = np.asarray(contenders.run[twin]())
        scale = (y * ideal).sum() / (ideal * ideal).sum()  # volts of a digital one
        assert np.std(y / scale - ideal) < 0.05 * np.std(ideal)


@pytest.mark.parametrize(
    "build",
    [
        partial(cases.spec_step, cases.PULSED, batch=3),
        partial(cases.spec_step, cases.PULSED, batch=3, algorithm="agad"),
        partial(cases.spec_step, cases.TXSIM, (1, 8, 8), 3),
        partial(cases.transformer_step, 16, 5, 3),
        partial(cases.lstm_step, 16, 4, 3),
    ],
)
def test_networks_are_trained_against_their_oracle(build):
    row = measure(Case("step", "small", 1.0, build), rounds=2)
    assert 0 < row["error"] < 1e-5
    assert set(row["ms"]) == {"ideal", "gpuxbar"}


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (updates.expected_update, "device_update"),
        (partial(updates.expected_update, sliced=True), "device_update"),
        (updates.in_situ_step, "device_update"),
        (updates.streamed, "streamed_update"),
        (updates.carries, "carry"),
        (partial(updates.pulse_update, updates.CONSTANT, "aggregated", 1.0), "pulse_update"),
        (partial(updates.pulse_update, updates.COUNTED_SOFT, "aggregated", 1.0), "pulse_update"),
        (partial(updates.pulse_update, updates.LAW, "exact", 1.0), "pulse_update"),
    ],
)
def test_updates_agree_with_their_oracle(build, name, monkeypatch):
    """Not those of other devices."""
    case = Case("update", "small", 1.0, partial(cases.update, build, 5, 70, 37))
    row = measure(case, rounds=2)
    assert row["error"] < 3e-6
    assert set(row["ms"]) == {"ideal", "gpuxbar"}
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda pairs, *more, **s: right(replace(pairs, seed=2), *more, **s))
    with pytest.raises(OracleMismatch, match="cells are off by"):
        measure(case, rounds=1)


def test_plain_layers_are_the_layers_of_torch_without_noise_on_fine_converters():
    layer = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0))
    x, y = torch.randn(4, 3, 9, 7, requires_grad=True), None
    grads = []
    for model in (layer, on_tiles(layer, Tiles(8))):
        y = model(x)
        grads.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    for plain, exact in zip(grads[1], grads[0], strict=True):
        assert (plain - exact).std() < 0.03 * exact.std()


def test_a_wrong_result_is_refused_without_a_number(tmp_path, monkeypatch):
    right = ops.tile_mvm
    monkeypatch.setattr(ops, "tile_mvm", lambda v, g, **s: right(v, g, **s | {"step": s["step"] + 1}))
    with pytest.raises(OracleMismatch, match="results are off"):
        measure(Case("linear", "small", 1.0, SMALL["linear"]), rounds=1)
    monkeypatch.setattr("gpuxbar.bench.__main__.CASES", (Case("linear", "small", 1.0, SMALL["linear"]),))
    record = tmp_path / "rows.jsonl"
    result = run(app, ["linear", "--rounds", "1", "--record", str(record)])
    assert result.exit_code == 2
    assert "oracle" in result.output
    assert "results are off" in result.output
    assert not record.exists()


@pytest.mark.parametrize("ranged", ["sample", "tensor"])
def test_layers_are_compared_on_values_off_the_edges_of_codes(ranged):
    spec = {
        "dac": {"bits": 4, "range": ranged},
        "adc": {"bits": 12},
    }
    layer = AnalogLinear(30, 20, spec=CrossbarSpec.model_validate(spec))
    lines = torch.arange(-15, 15) / 2
    x = torch.stack([lines.clamp(-7), 3 * lines.clamp(-7)])  # every other one on an edge
    top = layer.dac_top(x)
    found = cases._off_edges(x, top / 7, layer.plan.forward)
    torch.testing.assert_close(layer.dac_top(found), top)
    codes = found / (top / 7).view(-1, 1)
    assert (codes - codes.round()).abs().max() <= 0.3 + 1e-5
    assert (codes - codes.round()).abs().mean() > 0.1
    gx.calibrate(layer, [x])
    grad = torch.arange(-15, 15)[:20].expand(2, 20) / 2
    assert cases._layer_error(layer, x, grad) < 1e-5


def test_a_wrong_layer_is_refused(monkeypatch):
    contenders = SMALL["lenet5-step"]()
    right = ops.tile_mvm
    calls = []

    def wrong(v, g, **s):  # alternates, so that library and oracle draw apart
        calls.append(0)
        return right(v, g, **s | {"seed": s["seed"] + len(calls)})

    monkeypatch.setattr(ops, "tile_mvm", wrong)
    with pytest.raises(OracleMismatch, match="2e-3 is allowed"):
        contenders.check()


def test_the_command_measures_and_records(tmp_path):
    record = tmp_path / "results" / "rows.jsonl"
    result = run(app, ["linear-clean", "--rounds", "2", "--record", str(record)])
    assert result.exit_code == 0, result.output
    (row,) = rows_of(record)
    assert row["case"] == "linear-clean"
    assert row["rounds"] == 2
    assert row["ratio"]["gpuxbar"] > 0
    assert row["error"] < 1e-6
    assert {"cpu", "cores", "torch", "numpy", "gpuxbar", "commit", "date"} < set(row)
    listed = run(app, ["--list"]).output
    assert all(case.name in listed for case in CASES)
    unknown = run(app, ["lineal"])
    assert unknown.exit_code == 2
    assert "`case` must be a case, got 'lineal'; did you mean `linear`?" in unknown.output


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (partial(parasitics.exact, 24, 3, 5e-6), {"sparse LU", "gpuxbar"}),
        (partial(parasitics.exact, 24, 3, 5e-6, others=False), {"gpuxbar"}),
        (partial(parasitics.approximate, "ladder", 24, 5), {"copy", "gpuxbar"}),
        (partial(parasitics.approximate, "mean_field", 24, 5), {"copy", "gpuxbar"}),
        (partial(parasitics.anchored, 24, 20), {"exact", "gpuxbar"}),
        (partial(parasitics.inputs, 24, 3, 4), {"exact", "gpuxbar"}),
    ],
)
def test_wires_agree_with_their_oracles(build, names, monkeypatch):
    row = measure(Case("wires", "small", None, build, target_ms=1.0), rounds=2)
    assert 0 < row["error"] < 1e-5
    assert set(row["ms"]) - {"badcrossbar"} == names
    right = ops.effective_conductance
    monkeypatch.setattr(ops, "effective_conductance", lambda g, **s: right(g, **s) * np.float32(1.1))
    contenders = build()
    if "exact" not in names:  # the anchored op has its own name for it
        with pytest.raises(OracleMismatch, match=r"are off by 1\.0e-01 of the largest"):
            contenders.check()


def test_the_two_thread_case_times_both():
    assert sorted(cases.scaling().run) == ["gpuxbar", "one thread"]
    row = measure(replace(next(c for c in CASES if c.speedup), build=_two_speeds), rounds=3)
    assert row["ratio"]["gpuxbar"] > 1  # a speed-up, not a ratio of times


def _two_speeds():
    from time import sleep

    return cases.Contenders({"one thread": lambda: sleep(0.02), "gpuxbar": lambda: sleep(0.001)}, lambda: 0.0)


def test_extra_memory_sees_what_a_call_touches():
    linear = CASES[0]
    mb = extra_memory(linear, "ideal")
    if mb is None:
        pytest.skip("needs Linux: /proc/self/clear_refs")
    assert mb >= 1.0  # the result alone is 256 x 1024 floats


HERE = {  # where rows come from, and how it is told
    "cpu": "a CPU", "cores": 2, "torch": "2", "numpy": "2", "gpuxbar": "0", "commit": "abc", "date": "2030-01-02T03:04:05",
}  # fmt: skip
TOLD = "a CPU, 2 cores; torch 2, numpy 2, gpuxbar 0 at abc, 2030-01-02."


def page(root, *kinds):
    """The file of the long tables, with places for these."""
    file = root / "examples" / "README.md"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(place(kind) for kind in kinds))
    return file


def place(kind):
    return f"<!-- gpuxbar.bench {kind}: generated, see `gpuxbar bench --readme` -->\nold\n<!-- /gpuxbar.bench {kind} -->\n"


def test_readme_tables_say_what_is_missed(tmp_path):
    row = {
        "case": "linear", "size": "8 x 8", "threads": 1, "ms": {"ideal": [1, 2, 3], "gpuxbar": [2, 3, 4]}, "target": 1.2,
        "ratio": {"gpuxbar": 1.5, "plain torch": 3.0}, "error": 1e-7, "target_mb": 8, "extra_mb": {"ideal": 1.0, "gpuxbar": 2.0, "plain torch": 4.0},
        **HERE,
    }  # fmt: skip
    better = row | {"ratio": {"gpuxbar": 1.1, "plain torch": 3.0}}
    file, readme = tmp_path / "rows.jsonl", page(tmp_path)
    file.write_text("".join(json.dumps(r) + "\n" for r in (better, row)))
    readme.write_text(f"# head\n{START}\nold\n{END}\n{place('gpu')}tail\n")
    result = run(app, ["--readme", "--record", str(file), "--root", str(tmp_path)])
    assert result.exit_code == 0, result.output
    text = readme.read_text()
    assert "| linear: 8 x 8 | 2.0 | 1.50 (missed) | <= 1.2 | plain torch 3 | 1e-07 |" in text
    assert "| linear | 1.0 | 2.0 | <= 8 | 4.0 |" in text
    assert TOLD in text
    assert text.startswith("# head")
    assert text.endswith("tail\n")
    assert "old" not in text
    assert "(missed)" not in readme_tables([better])
    update = better | {"case": "update", "ratio": {"gpuxbar": 1.1}, "extra_mb": {}}
    assert "| update: 8 x 8 | 2.0 | 1.10 | <= 1.2 |  | 1e-07 |" in readme_tables([update])
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="must have the lines"):
        rewrite_readmes(tmp_path, [row])
    assert run(app, ["--readme", "--record", str(tmp_path / "none")]).exit_code == 2


def test_targets_on_a_gpu_stand_beside_what_was_measured():
    text = gpu_table([])
    for cells in (
        "read, fast: 4096 x 4096 x 4096, 128-row tiles, fp16, noise fast | fused | <= 430 us, 2.6 x cuBLAS + epilogue",
        "update, devices from a map: 16.8 M cells |  | <= 98 us",
        "wires, exact: 6000 tiles of 128 x 128 |  | <= 40000 us",
    ):
        assert f"| {cells} | not yet run on a GPU |" in text
    step = "resnet18-step, non-ideal reads and updates"
    rows = [
        {"case": "fast", "us": {"epilogue": {"read": 1150.2}, "fused": {"read": 421.7}}, "gpu": "an H200"},
        {"case": "fast", "us": {"epilogue": {"read": 1149.9}, "wgmma": {"read": 339.6}}, "gpu": "an H200"},
        {"case": "wires, exact", "us": 31234.0},
        {"case": "resnet18-step, ideal, bf16", "ms": 5.0},
        {"case": step, "ms": 9.0},
    ]
    text = gpu_table(rows)
    assert "| cuBLAS + epilogue | <= 1200 us | 1150 us |" in text
    assert "| fused | <= 430 us, 2.6 x cuBLAS + epilogue | 422 us |" in text
    assert "| wgmma | <= 340 us | 340 us |" in text
    assert "| <= 40000 us | 31234 us |" in text
    assert "| <= 2 of the ideal step in bf16 | 1.80 |" in text
    assert text.endswith("an H200.")


def test_resnet50_has_the_weights_of_the_literature():
    model = resnet50(1000)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) == 53
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert model[:-3](torch.zeros(1, 3, 64, 64)).shape == (1, 2048, 2, 2)


@pytest.mark.aihwkit
@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("aihwkit_lightning", peers.lightning_steps),
        ("aihwkit", lambda model, rate: peers.aihwkit_steps(model, rate, updates.CONSTANT, PulseTrain(length=31))),
    ],
    ids=["lightning", "aihwkit"],
)  # fmt: skip
def test_peers_read_and_train_the_network_of_the_case(module, make):
    pytest.importorskip(module, reason=f"{module} is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 8), nn.ReLU(), nn.Linear(8, 3))
    ((other, optimiser),) = make(model, 0.1).values()
    x = torch.randn(32, 200)
    off, scale = (other(x) - model(x)).std().item(), model(x).std().item()
    assert 1e-4 * scale < off < 0.5 * scale  # quantised and noisy, on tiles
    before = other(x).detach()
    optimiser.zero_grad()
    other(x).square().sum().backward()
    optimiser.step()
    assert (other(x).detach() - before).abs().max() > 0.1 * scale


def test_table_of_updates(tmp_path):
    row = {
        "case": "pulse-constant", "size": "8 x 8", "threads": 1, "ms": {"ideal": [1, 2, 3], "gpuxbar": [2, 3, 4]},
        "target": 5.0, "ratio": {"gpuxbar": 1.5, "aihwkit": 40.2}, "error": 1e-7, "extra_mb": {}, **HERE,
    }  # fmt: skip
    slow = row | {"case": "lenet5-in-situ-step", "ratio": {"gpuxbar": 9.0}, "target": 4.0}
    readme = page(tmp_path, "updates")
    rewrite_readmes(tmp_path, [row, row | {"case": "update"}, row | {"case": "carry", "target": None}, slow])
    text = readme.read_text()
    assert "| pulse-constant: 8 x 8 | 2.0 | 1.50 | <= 5 | aihwkit 40.2 | 1e-07 |" in text
    assert "| lenet5-in-situ-step: 8 x 8 | 2.0 | 9.00 (missed) | <= 4 |  | 1e-07 |" in text
    assert "| update: 8 x 8 |" in text
    assert "| carry: 8 x 8 | 2.0 | 1.50 |  | aihwkit 40.2 | 1e-07 |" in text
    assert "old" not in text


def test_tables_of_wires(tmp_path):
    ms = {"sparse LU": [9, 10, 11], "gpuxbar": [1, 2, 3]}
    row = {
        "case": "wires-exact-64", "size": "4 tiles", "threads": 2, "ms": ms, "ratio": {"gpuxbar": 0.2}, "target": None,
        "target_ms": 1.0, "error": 1e-7, "extra_mb": {}, **HERE,
    }  # fmt: skip
    copied = {"copy": [0.1, 0.2, 0.3], "gpuxbar": [0.4, 0.5, 0.6]}
    ladder = {
        "case": "wires-ladder",
        "ms": copied,
        "ratio": {"gpuxbar": 2.5},
        "target": 3.0,
        "target_ms": None,
    }
    trained = {
        "case": "wires-training: ladder", "trained": "ladder", "epochs": 3, "on_exact_wires": [0.875, 0.925], "ms_a_step": 12.3,
        "estimated_error": 0.01, "threads": 2, "accuracy": 0.95,
    }  # fmt: skip
    long, short = page(tmp_path, "wires"), tmp_path / "README.md"
    short.write_text(place("wires-training"))
    rewrite_readmes(tmp_path, [row, row | ladder, row | trained])
    text = long.read_text() + short.read_text()
    assert "| wires-exact-64: 4 tiles | 2 (missed) | <= 1 ms | sparse LU 5 |  | 1e-07 |" in text
    assert "| wires-ladder: 4 tiles | 0.5 | <= 3 of a copy | copy 0.4 |  | 1e-07 |" in text
    assert "| ladder | 0.950 | 0.900 (0.875, 0.925) | 12 | 1e-02 |" in text
    assert text.count(TOLD) == 2
    assert "old" not in text


def test_table_of_two_machines():
    row = {
        "case": "linear", "threads": 1, "ms": {"ideal": [1, 2, 3], "gpuxbar": [2, 3, 4]}, "ratio": {"gpuxbar": 1.5}, "target": 1.25,
        "target_ms": None, **HERE,
    }  # fmt: skip
    wires = {"case": "wires-exact-64", "threads": 2, "ratio": {}, "target": None, "target_ms": 3.0}
    threads = {"case": "linear-two-threads", "ms": {"one thread": [1, 2, 3]}, "target": 1.7}
    wide = row | {"ratio": {"gpuxbar": 0.8}, "cpu": "another"}
    text = avx2_table([row, row | wires, row | threads], [wide, wide | wires | {"threads": 1}])
    assert "| linear | 1.50 (missed) | 0.80 | <= 1.25 |" in text
    assert "| wires-exact-64 | 3 |  | <= 3 ms |" in text  # measured on as many threads only
    assert "| linear-two-threads | 1.50 (missed) |  | >= 1.7 |" in text
    assert text.endswith(TOLD)


def test_the_summary_is_of_its_cases_alone():
    row = {"ratio": {"gpuxbar": 9.0}, "case": "linear", **HERE}
    rows = [
        row | {"case": case, "ratio": {"gpuxbar": k + 0.5, "aihwkit": 20}} for k, case in enumerate(SUMMARY)
    ]
    text = summary_table([row, *reversed(rows)])
    lines = [f"| {step} | {what} | {k}.50 | aihwkit 20 |" for k, (step, what) in enumerate(SUMMARY.values())]
    assert text.splitlines()[2:-2] == lines
    assert text.endswith(TOLD)


@pytest.mark.skipif(not RESULTS.exists(), reason="an installed package has no recorded rows")
def test_the_readmes_hold_the_recorded_rows(tmp_path, monkeypatch):
    pages = [Path("README.md"), Path("examples/README.md")]
    shutil.copytree(RESULTS.parent, tmp_path / "examples" / "results")
    for each in pages:
        shutil.copy(ROOT / each, tmp_path / each)
    monkeypatch.chdir(tmp_path)
    result = run(app, ["--readme"])
    assert result.exit_code == 0, result.output
    for each in pages:
        assert (tmp_path / each).read_text() == (ROOT / each).read_text()


def test_a_row_tells_code_that_is_not_the_commits(tmp_path):
    """Recorded rows and the README may differ from it."""

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    for name in ("README.md", "code.py"):
        (tmp_path / name).touch()
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "x")
    clean = _commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "README.md").write_text("table")
    assert _commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("change")
    assert _commit(tmp_path) == f"{clean}+dirty"


def test_a_study_makes_each_training_once(tmp_path):
    made = []

    def make(accuracy):
        return lambda advance: made.append(accuracy) or advance(5) or [accuracy]

    for _ in range(2):  # an interrupted study is begun anew
        with Progress(disable=True) as progress:
            study = Study(tmp_path / "rows.jsonl", ROOT, progress)
            assert study.curve({"lr": 0.1}, "first", lambda: 5, make(0.5)) == [0.5]
            for _ in range(2):
                assert study.curve({"lr": 0.2}, "second", lambda: 5, make(0.75)) == [0.75]
    assert made == [0.5, 0.75]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(study.rows) == 2


def test_a_study_tells_of_the_trainings_asked_for(tmp_path):
    """Whatever else its file has, of other data or commits."""
    lines = [
        {"training": {"lr": lr}, "curve": [lr], "cpu": "a CPU", "gpuxbar": "0.1.0", "commit": commit}
        for lr, commit in ((0.1, "0123"), (0.2, "4567"))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    study = Study(tmp_path / "rows.jsonl", ROOT, Progress())
    assert (study.rows, study.where()) == ([], "")
    for _ in range(2):  # as of two algorithms that have it in common
        assert study.curve({"lr": 0.2}, "made", None, None) == [0.2]
    assert (study.rows, study.where()) == (lines[1:], "a CPU; gpuxbar 0.1.0 at 4567")
