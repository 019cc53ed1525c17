"""Builds and runs under bad conditions: compilers, caches, disks, foreign checkpoints, and kills."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import metrics
from torch import nn
from typer.testing import CliRunner

import gpuxbar as gx
from gpuxbar.cli import app
from gpuxbar.launch import cubin, explain, host, sources
from gpuxbar.launch.nvrtc import CompileError
from gpuxbar.nn import AnalogLinear

ROOT = Path(__file__).parent.parent


def in_a_process(script, **environment):
    """Run Python code in a process of its own; a variable given as None is unset."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    kept = {key: value for key, value in merged.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=kept, check=False
    )


# Builds


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty build cache."""
    monkeypatch.setenv("GPUXBAR_CACHE", str(tmp_path / "cache"))
    sources.cache_dir.cache_clear()
    yield tmp_path / "cache"
    sources.cache_dir.cache_clear()


@pytest.fixture
def fake_compiler(tmp_path):
    """A maker of compilers: shell scripts that find "$out", the file to be built, or are `asked` about themselves."""

    def make(name, body, asked="exit 0"):
        path = tmp_path / name
        find_out = 'all="$*"; while [ "$1" != -o ]; do [ $# -gt 0 ] || break; shift; done; out=$2\n'
        path.write_text(f'#!/bin/sh\n{find_out}[ "$out" ] || {{ {asked}; }}\n{body}\n')
        path.chmod(0o755)
        return str(path)

    return make


def test_builds_at_once_leave_one_whole_library(cache, fake_compiler):
    """Each builds aside and swaps its result in."""
    cxx = fake_compiler("cxx", 'printf part > "$out"; sleep 0.05; printf whole > "$out"')
    built = []
    threads = [threading.Thread(target=lambda: built.append(host.build(cxx))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 4
    assert len(set(built)) == 1
    assert built[0].read_text() == "whole"
    assert list(cache.iterdir()) == [built[0]]


def test_an_interrupted_build_is_not_found_by_the_next(cache, fake_compiler):
    flag = cache.parent / "interrupted"
    cxx = fake_compiler("cxx", f'printf part > "$out"; [ -e {flag} ] || kill -9 $$; printf whole > "$out"')
    with pytest.raises(CompileError, match=r"cxx failed with status -9; set CXX to g\+\+ 11"):
        host.build(cxx)
    assert list(cache.iterdir()) == []
    flag.touch()
    assert host.build(cxx).read_text() == "whole"


def test_the_next_build_clears_what_a_killed_one_left(cache, fake_compiler, monkeypatch):
    """Once it is old: a build that goes on looks the same."""
    script = f"from gpuxbar.launch import host; host.build({fake_compiler('slow', 'sleep 60')!r})"
    killed = subprocess.Popen(
        [sys.executable, "-c", script], start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    while not list(cache.glob("unfinished-*")):
        assert killed.poll() is None, "it was to be building"
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    with monkeypatch.context() as dead:
        dead.setattr(os, "replace", lambda *_: None)
        cubin._write(cache / "a.cubin", b"whole")
    left = [*cache.glob("unfinished-*")]
    assert len(left) == 2
    cxx = fake_compiler("cxx", 'printf whole > "$out"')
    first = host.build(cxx)
    assert {*cache.iterdir()} == {first, *left}
    for each in left:
        os.utime(each, (0, 0))
    second = host.build(cxx, ("-DMORE",))
    assert {*cache.iterdir()} == {first, second}


def test_a_build_is_found_again_by_sources_flags_and_compiler_only(cache, fake_compiler):
    log = cache.parent / "log"
    cxx = fake_compiler("cxx", f'echo built >> {log}; touch "$out"')
    built, runs = host.build(cxx), log.read_text()
    assert host.build(cxx) == built
    assert log.read_text() == runs != ""
    assert host.build(cxx, ("-DX",)) != built


def test_a_build_is_not_found_by_another_cpu_that_shares_the_cache(cache, fake_compiler, monkeypatch):
    """What a compiler says of a CPU is what it would use of it: a build for more instructions would end the process."""
    cxx = fake_compiler("cxx", 'touch "$out"', asked='echo "#define __$CPU 1"; exit 0')
    built = []
    for cpu in ("AVX512F__", "AVX2__", "AVX512F__"):
        monkeypatch.setenv("CPU", cpu)
        built.append(host.build(cxx))
    assert built[0] == built[2] != built[1]


def test_flags_of_the_environment_come_last(cache, fake_compiler, monkeypatch):
    log = cache.parent / "log"
    cxx = fake_compiler("cxx", f'echo "$all" >> {log}; touch "$out"')
    before = host.build(cxx)
    monkeypatch.setenv("GPUXBAR_CXXFLAGS", "-march=x86-64-v3 '-DX=a b'")
    log.unlink()
    assert host.build(cxx) != before
    assert all("-fopenmp -march=x86-64-v3 -DX=a b -" in line for line in log.read_text().splitlines())


@pytest.fixture
def only_threads(cache, monkeypatch):
    """The host kernels without any but what is asked about threads, loaded anew."""
    root = cache.parent / "kernels"
    for part in ("host/threads.cpp", "host/threads.hpp", "include/gpuxbar/portable.cuh"):
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        (root / part).write_bytes((sources.kernel_dir() / part).read_bytes())
    monkeypatch.setattr(host, "kernel_dir", lambda: root)
    host.library.cache_clear()
    yield
    host.library.cache_clear()


NO_OPENMP = """for flag in $all; do [ $flag != -fopenmp ] || {{ echo "unsupported option '-fopenmp'" >&2; exit 1; }}; done
exec {cxx} $all"""


@pytest.mark.usefixtures("only_threads")
def test_without_openmp_kernels_run_on_one_thread_after_one_warning(fake_compiler, monkeypatch):
    refusing = NO_OPENMP.format(cxx=host.compiler())
    monkeypatch.setenv("CXX", fake_compiler("cxx", refusing, asked=refusing))
    with pytest.warns(
        RuntimeWarning, match=r"found no OpenMP with .*/cxx: NumPy and CPU tensors run on one thread"
    ):
        host.library()
    host.set_threads(2)
    assert host.threads() == 1
    assert explain() == ("host", f"host kernels built with {host.compiler()}; one thread, for want of OpenMP")


@pytest.mark.usefixtures("only_threads")
def test_what_does_not_load_is_named(fake_compiler, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler("cxx", 'echo text > "$out"'))
    with pytest.raises(
        CompileError,
        match=r"what .*/cxx built must load into this Python, got .*; set CXX to a .*, or GPUXBAR_CACHE to a folder of your own",
    ):
        host.library()


def test_a_full_disk_is_told_from_a_failing_compiler(cache, fake_compiler, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CompileError) as caught:
        host.build(fake_compiler("cxx", "exit 1"))
    assert re.fullmatch(
        rf"gpuxbar: the build cache {cache} must have room for host-\w+\.so, got No space left on device; "
        "free some or set GPUXBAR_CACHE to another folder",
        str(caught.value),
    )
    assert list(cache.iterdir()) == []


def test_a_build_is_found_in_a_cache_that_cannot_be_written(cache, fake_compiler, monkeypatch):
    cxx = fake_compiler("cxx", 'touch "$out"')
    built = host.build(cxx)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "cache_dir", lambda: pytest.fail("asked for a folder to write to"))
        assert host.build(cxx) == built


def test_a_failing_compiler_is_reported_with_its_words(cache, fake_compiler):
    cxx = fake_compiler("cxx", "echo no such header >&2; exit 3")
    with pytest.raises(CompileError) as caught:
        host.build(cxx)
    assert str(caught.value) == (
        f"host kernels: {cxx} failed with status 3; set CXX to g++ 11 or clang++ 14 or later, "
        "GPUXBAR_CXXFLAGS to flags that it lacks\nno such header\n"
    )


@pytest.mark.parametrize("name", ["no-such-compiler", "g++ -O2"])
def test_a_compiler_that_is_asked_for_and_not_there_is_not_replaced(name, monkeypatch):
    monkeypatch.setenv("CXX", name)
    with pytest.raises(CompileError, match="`CXX` must be the name or path of a C\\+\\+ compiler, got '"):
        host.compiler()


def test_the_commands_report_a_failing_compiler(tmp_path, monkeypatch):
    def broken():
        raise CompileError("host kernels: cxx failed with status 1")

    monkeypatch.setattr(host, "library", broken)
    monkeypatch.chdir(tmp_path)
    doctor = CliRunner().invoke(app, ["doctor"])
    assert doctor.exit_code == 1
    assert "none, host kernels: cxx failed" in " ".join(doctor.output.split())
    train = CliRunner().invoke(app, ["train", "--epochs", "1", "--modes", "hardware-aware"])
    assert train.exit_code == 2
    assert "error host kernels: cxx failed with status 1" in train.output


def test_an_unwritable_cache_warns_once_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").touch()
    script = "from gpuxbar.launch.sources import cache_dir; print(cache_dir(), cache_dir().is_dir())"
    done = in_a_process(script, GPUXBAR_CACHE=str(tmp_path / "file" / "cache"), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert f"gpuxbar cannot write its build cache {tmp_path / 'file' / 'cache'} (Not a directory); building in " in done.stderr  # fmt: skip
    folder, there = done.stdout.split()
    assert there == "True"
    assert not Path(folder).exists()


def test_who_wants_a_build_that_another_makes_waits_for_it(tmp_path):
    target, made = tmp_path / "a.so", []

    def make():
        made.append(target.exists())
        time.sleep(0.05)
        target.touch()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: sources.once(target, make), range(4))) == [target] * 4
    assert made == [False]
    assert list(tmp_path.iterdir()) == [target]


def test_beside_a_lock_that_is_not_to_be_had_a_build_is_made(tmp_path):
    (tmp_path / "a.lock").mkdir()  # cannot be opened, as another user's cannot
    target = tmp_path / "a.so"
    assert sources.once(target, target.touch) == target
    assert target.exists()


def test_a_user_without_a_home_builds_in_a_folder_of_the_process():
    script = (
        "import pathlib\n"
        "def none(): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = none\n"
        "from gpuxbar.launch.sources import cache_dir, cached\n"
        "print(cached('a.so').parent == cache_dir())"
    )
    done = in_a_process(script, GPUXBAR_CACHE=None)
    assert done.stdout == "True\n", done.stderr
    assert (
        "cannot write its build cache ~/.cache/gpuxbar (this user has no home folder); building in "
        in done.stderr
    )


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not tell")
@pytest.mark.usefixtures("cache")
def test_as_many_compilers_run_as_the_process_may_use_processors(fake_compiler, monkeypatch):
    workers = []

    def pool(count):
        workers.append(count)
        return ThreadPoolExecutor(count)

    monkeypatch.setattr(host, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 9, 11})
    host.build(fake_compiler("cxx", 'touch "$out"'))
    assert workers == [3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_process_forked_after_a_read_reads_on():
    script = (
        "import multiprocessing, numpy as np\n"
        "from gpuxbar import launch, ops\n"
        "launch.set_threads(2)\n"
        "v, g = np.ones((256, 256), np.float32), np.full((256, 256), 1e-6, np.float32)\n"
        "read = lambda step: float(ops.tile_mvm(v, g, read_noise=1e-7, step=step).sum())\n"
        "here = read(0)\n"
        "with multiprocessing.get_context('fork').Pool(1, initializer=lambda: read(0)) as pool:\n"
        "    there = pool.apply_async(launch.threads).get(60), launch.threads()\n"
        "print(there, read(0) == here)"
    )
    done = in_a_process(script)
    assert done.stdout == "(2, 2) True\n", done.stderr


def test_without_a_compiler_the_reference_serves_after_one_warning(tmp_path):
    script = (
        "import warnings, numpy as np; warnings.simplefilter('always')\n"
        "from gpuxbar import ops, launch\n"
        "v, g = np.full((2, 3), 0.5, np.float32), np.ones((3, 4), np.float32)\n"
        "launch.set_threads(1)\n"
        "print(ops.tile_mvm(v, g).tolist() == ops.tile_mvm(v, g).tolist() == [[1.5] * 4] * 2, launch.backend(v))"
    )
    done = in_a_process(script, CXX=None, PATH="", GPUXBAR_CACHE=str(tmp_path))
    assert done.stdout == "True reference\n", done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "gpuxbar found no C++ compiler" in done.stderr


# Runs

QUICK = ["--batch", "512", "--name", "a"]


def train(*options):
    return CliRunner().invoke(app, ["train", *QUICK, *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train("--epochs", "1", "--modes", "ideal").exit_code == 0
    return folder / "runs" / "a"


@pytest.fixture
def run_folder(finished, in_tmp):
    """A copy of the finished run, to go on from."""
    folder = in_tmp / "runs" / "a"
    folder.mkdir(parents=True)
    for name in ("spec.yaml", "metrics.jsonl", "checkpoint.pt"):
        (folder / name).write_bytes((finished / name).read_bytes())
    return folder


def save_other(content):
    return lambda path: torch.save(content, path)


FOREIGN = {
    "empty": (lambda path: path.write_bytes(b""), "must be a readable checkpoint, got a corrupt file"),
    "text": (lambda path: path.write_text("epoch 3"), "must be a readable checkpoint, got a corrupt file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "got a corrupt file; start anew"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "got a corrupt file"),
    "flipped": (lambda path: path.write_bytes(path.read_bytes().replace(b"gpuxbar-run", b"gpuxbar-rum")), "must be a"),
    "module": (save_other(nn.Linear(2, 2)), "must be a readable checkpoint, got a corrupt file"),
    "tensor": (save_other(torch.zeros(3)), "must be a checkpoint of gpuxbar train, got another file"),
    "weights": (save_other({"0.weight": torch.zeros(3)}), "must be a checkpoint of gpuxbar train, got another file"),
    "older": (save_other({"format": "gpuxbar-run-1"}), "must be a checkpoint of gpuxbar train, got another file"),
    "missing": (lambda path: path.unlink(), "must exist to resume, got none; start the run without --resume, under another --name"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_or_broken_checkpoint_is_named(name, run_folder):
    spoil, text = FOREIGN[name]
    spoil(run_folder / "checkpoint.pt")
    result = train("--epochs", "2", "--modes", "ideal", "--resume")
    assert result.exit_code == 2, result.output
    assert "error train: `runs/a/checkpoint.pt` must" in result.output
    assert text in result.output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--set", "adc.bits=6"], "`spec.adc.bits` must be that of the interrupted run, 8, got 6; repeat its settings"),
        (["--preset", "isaac"], "`spec.mapping.scheme` must be that of the interrupted run, 'subtracted', got 'differential';"),
        (["--set", "update=null"], "`spec.update` must be that of the interrupted run, {'asymmetry': 0.0, "),
        (["--seed", "1"], "`seed` must be that of the interrupted run, 0, got 1;"),
        (["--lr", "1e-3"], "`lr` must be that of the interrupted run, 0.003, got 0.001;"),
        (["--momentum", "0.5"], "`momentum` must be that of the interrupted run, 0.9, got 0.5;"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_settings_is_refused(options, text, run_folder):
    before = (run_folder / "checkpoint.pt").read_bytes()
    result = train("--epochs", "2", "--modes", "ideal", "--resume", *options)
    assert result.exit_code == 2
    assert text in result.output
    assert (run_folder / "checkpoint.pt").read_bytes() == before


def test_a_seed_has_64_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train("--seed", str(2**63))
    assert result.exit_code == 2
    assert f"error train: `seed` must be an int of 64 bits, got {2**63}; try 0" in result.output


def test_a_full_disk_leaves_the_spec_that_is_there(tmp_path):
    path, part = tmp_path / "spec.yaml", tmp_path / ".spec.yaml.part"
    gx.save_spec(gx.CrossbarSpec(), path)
    before = path.read_bytes()
    part.symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"save_spec: cannot write .*/spec\.yaml \(No space left on device\); nothing"
    ):
        gx.save_spec(gx.presets.demo(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["spec.yaml"]


def test_a_spec_that_others_may_not_read_stays_so(tmp_path):
    path = tmp_path / "spec.yaml"
    gx.save_spec(gx.CrossbarSpec(), path)
    path.chmod(0o600)
    gx.save_spec(gx.presets.demo(), path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_spec_in_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"save_spec: cannot write .*/file/spec\.yaml \(Not a directory\); nothing"
    ):
        gx.save_spec(gx.CrossbarSpec(), tmp_path / "file" / "spec.yaml")


def test_a_spec_goes_to_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    gx.save_spec(gx.CrossbarSpec(), pipe)
    assert b"tile:" in os.read(reader, 1 << 16)
    assert pipe.is_fifo()
    os.close(reader)


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl"])
def test_a_full_disk_leaves_what_can_be_resumed(name, run_folder):
    """The file beside the old one leads to /dev/full, whose every write fails for want of space."""
    (run_folder / f".{name}.part").symlink_to("/dev/full")
    result = train("--epochs", "2", "--modes", "ideal", "--resume")
    assert result.exit_code == 2
    assert f"error train: cannot write runs/a/{name} (" in result.output
    assert "the previous one is intact" in result.output
    assert not (run_folder / f".{name}.part").is_symlink()
    assert len(metrics(run_folder)) == 1
    resumed = train("--epochs", "2", "--modes", "ideal", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert [row[1] for row in metrics(run_folder)] == [0, 1]


NOISY = ["--epochs", "2", "--set", "programming.write_noise=2e-8", "--set", "programming.device_spread=0.05", "--set", "programming.stuck_at_g_min=0.01"]  # fmt: skip
KILLED = """
import os, signal, sys, torch
from gpuxbar.optim import InSituSGD
from gpuxbar.cli import app
optimiser = {"adamw": torch.optim.AdamW, "in-situ": InSituSGD}[sys.argv[1]]
step, taken = optimiser.step, []
def counted(self, *more):
    taken.append(0)
    if len(taken) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *more)
optimiser.step = counted
app(sys.argv[2:])
"""


def test_a_run_interrupted_in_its_first_epoch_can_be_resumed(in_tmp, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    options = ["--epochs", "1", "--modes", "ideal"]
    with monkeypatch.context() as patch:
        patch.setattr(import_module("gpuxbar.experiments.train"), "_epoch", interrupt)
        assert train(*options).exit_code != 0
    assert train(*options, "--resume").exit_code == 0
    assert len(metrics(in_tmp / "runs/a")) == 1


@pytest.mark.parametrize(("mode", "optimiser"), [("hardware-aware", "adamw"), ("in-situ", "in-situ")])
def test_a_killed_run_resumes_bit_for_bit(mode, optimiser, in_tmp):
    """Three steps an epoch; killed in the second epoch. PyTorch's sums depend on its threads, hence one."""
    options = ["train", *QUICK, *NOISY, "--modes", mode, "--threads", "1"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, optimiser, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    runner = CliRunner()
    resumed = runner.invoke(app, [*options, "--resume"])
    assert resumed.exit_code == 0, resumed.output
    whole = runner.invoke(app, [*options, "--name", "whole"])
    assert whole.exit_code == 0, whole.output
    assert metrics(in_tmp / "runs/a") == metrics(in_tmp / "runs/whole")
    states = [
        torch.load(in_tmp / "runs" / name / "checkpoint.pt", weights_only=True)["states"][mode]
        for name in ("a", "whole")
    ]
    for part in ("model", "optimiser"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0, equal_nan=True)


# Weight versions

WRITTEN = gx.CrossbarSpec.model_validate({"programming": {"write_noise": 1e-7}})


def stepped(layer, x, steps):
    """Train a few steps; the last leaves a weight that nothing has read yet."""
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(steps):
        opt.zero_grad()
        layer(x).square().sum().backward()
        opt.step()
    return layer


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(5, 6)


def test_a_checkpoint_between_a_step_and_its_read_resumes_bit_for_bit(x):
    layer = stepped(AnalogLinear(6, 4, spec=WRITTEN), x, 2)
    fresh = AnalogLinear(6, 4, spec=WRITTEN)
    fresh.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(fresh(x).detach(), layer(x).detach())


def test_a_checkpoint_loads_alike_into_a_layer_that_was_read(x):
    layer = stepped(AnalogLinear(6, 4, spec=WRITTEN), x, 2)
    layer(x)
    used, fresh = (AnalogLinear(6, 4, spec=WRITTEN) for _ in range(2))
    used(x)
    for other in (used, fresh):
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other.conductances()[0], layer.conductances()[0], rtol=0, atol=0)


def test_weights_changed_behind_autograd_are_programmed(x):
    layer = AnalogLinear(6, 4, spec=gx.CrossbarSpec())
    layer(x)
    layer.weight.data.mul_(-2.0)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_weights_that_are_not_finite_are_refused(x):
    layer = AnalogLinear(6, 4, spec=WRITTEN)
    with torch.no_grad():
        layer.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"`weight` must be finite"):
        layer(x)


def test_a_backend_of_another_name_is_refused(monkeypatch):
    monkeypatch.setattr("gpuxbar.launch.host.WANTED", "refrence")
    message = "gpuxbar: `GPUXBAR_BACKEND` must be reference or host, got 'refrence'"
    with pytest.raises(ValueError, match=message):
        gx.ops.tile_mvm(np.ones((2, 3), np.float32), np.ones((3, 2), np.float32))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert f"none, {message}" in " ".join(re.sub("[│\n]", "", result.output).split())


@pytest.mark.parametrize("name", ["_disable_dynamo", "_C._will_engine_execute_node"])
def test_a_torch_without_what_the_library_takes_of_it_is_refused_at_once(name):
    done = in_a_process(f"import torch; del torch.{name}; import gpuxbar")
    short = name.rpartition(".")[2]
    assert re.search(
        rf"ImportError: gpuxbar: torch must have what 2\.11 to 2\.14 have, got {re.escape(torch.__version__)}: cannot import name "
        rf"'{short}'.*; install one of these, or a later gpuxbar",
        done.stderr,
    ), done.stderr


def test_what_is_private_to_torch_is_imported_in_one_place():
    private = re.compile(
        r"\btorch\.(\w+\.)*_(?!_|dynamo)\w+|from torch\b.* import .*\b_[a-zA-Z]|from torch(\.\w+)*\._"
    )
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gpuxbar").rglob("*.py")
        if private.search(path.read_text())
    }
    assert found == {"gpuxbar/bridge/internals.py"}
