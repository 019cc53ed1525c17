"""The host kernels as a CPU without AVX-512 runs them, and by clang: what other tests say of them, once more, in a process of its
own. What no CPU at hand runs is compiled at least."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpuxbar.launch.host import FLAGS, compiler
from gpuxbar.launch.sources import kernel_dir

HERE = Path(__file__).parent
TESTS = {
    "random": ["test_normals_depend_on_place_only", "test_normals_have_their_moments_and_tails"],
    "tile_mvm": [
        "test_host_matches_oracle", "test_convolution_matches_oracle", "test_few_vectors_are_read_as_many_are",
        "test_same_bits_for_any_chunk_of_images", "test_dac_codes_match_oracle", "test_groups_read_together_match_oracle",
    ],
    "dac_clip": ["test_backends_match_the_reference"],
    "outer_product": ["test_sums_match_the_oracle"],
    "conv_outer_product": ["test_sums_match_the_oracle_and_torch"],
    "program": ["test_results_do_not_depend_on_threads", "test_moments_of_the_draws"],
    "device_update": ["test_host_matches_oracle"],
    "pulse_update": [
        "test_host_matches_oracle", "test_chunks_of_samples_follow_one_another",
        "test_counted_is_the_sequence_without_noise", "test_the_same_bits_on_any_number_of_threads",
        "test_rare_coincidences_match_the_oracle", "test_rare_coincidences_are_found_as_frequent_ones_are",
    ],
    "effective_conductance": ["test_host_matches_oracle[shape5-strong-exact]", "test_host_matches_oracle[shape7-rows-ladder]"],
    "wires_gradient": ["test_host_matches_oracle[shape5-mild]"],
    "solve_for_inputs": ["test_host_matches_oracle[shape5-strong]"],
}  # fmt: skip


INFO = Path("/proc/cpuinfo")
FEATURES = INFO.read_text().split() if INFO.exists() else []
CLANGS = [
    name for name in ("clang++", *(f"clang++-{version}" for version in range(14, 24))) if shutil.which(name)
]


@pytest.mark.slow
@pytest.mark.skipif("avx512f" not in FEATURES, reason="this CPU has no AVX-512: all tests run these kernels")
def test_kernels_for_avx2():
    """Built for Haswell, of 2013: vectors of 8 floats, and bits counted and events packed without AVX-512."""
    hold_with(GPUXBAR_CXXFLAGS="-march=haswell")


@pytest.mark.slow
@pytest.mark.skipif(not CLANGS, reason="clang++ is not installed")
def test_kernels_by_clang():
    hold_with(CXX=CLANGS[0])


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="for compilers of x86")
@pytest.mark.parametrize(
    ("flag", "mark"),
    [
        ("-march=x86-64", ""),
        ("-march=ivybridge", "__F16C__"),
        ("-march=x86-64-v4", ""),
        ("-fsanitize=undefined", ""),
    ],
)
def test_every_branch_is_legal(flag, mark):
    """Without vectors of AVX, with its fp16 but not AVX2, where that is looked at, and with AVX-512; and to a sanitizer, which
    takes expressions apart before the compiler has seen which are constant."""
    root = kernel_dir()
    command = [compiler(), *FLAGS, flag, "-fsyntax-only", f"-I{root / 'include'}"]
    done = subprocess.run(
        [*command, *reaching(root / "host", mark)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def reaching(folder, mark):
    """The files that have a mark, or a header which has it."""
    texts = {path: path.read_text() for path in folder.glob("*.[ch]pp")}
    found = {path for path, text in texts.items() if mark in text}
    while more := {
        p for p in texts.keys() - found if any(f'"{header.name}"' in texts[p] for header in found)
    }:
        found |= more
    files = [str(path) for path in found if path.suffix == ".cpp"]
    assert files
    return files


def hold_with(**settings):
    names = [f"{HERE / f'test_{file}.py'}::{test}" for file, tests in TESTS.items() for test in tests]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore:gpuxbar found no OpenMP", *names],
        env={**outside, **settings},
        cwd=HERE.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
