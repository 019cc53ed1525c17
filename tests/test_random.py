"""The generator against its published vectors, and its two twins against each other."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gpuxbar.reference.random import Purpose, normals, philox, uniforms

HEADERS = Path(__file__).parent.parent / "kernels" / "include" / "gpuxbar"


# Random123, tests/kat_vectors: philox4x32 with 10 and 7 rounds
@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (
            10,
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            10,
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            10,
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
        (
            7,
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "5f6fb709 0d893f64 4f121f81 4f730a48",
        ),
        (
            7,
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "5207ddc2 45165e59 4d8ee751 8c52f662",
        ),
        (
            7,
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_philox_gives_the_vectors_of_random123(rounds, counter, key, expected):
    low, high = (int(word, 16) for word in key.split())
    words = np.array([int(word, 16) for word in counter.split()], dtype=np.uint32)
    got = philox(words, low | high << 32, rounds)
    assert [f"{word:08x}" for word in got] == expected.split()


def test_purposes_are_the_same_in_python_and_cuda():
    body = re.search(r"enum Purpose : u32 \{(.*?)\};", (HEADERS / "philox.cuh").read_text(), re.DOTALL)
    pairs = re.findall(r"^\s*(\w+) = (\d+),", body[1], re.MULTILINE)
    assert {name: int(value) for name, value in pairs} == {p.name: p.value for p in Purpose}


@pytest.mark.parametrize("generator", ["exact", "fast"])
def test_normals_depend_on_place_only(generator):
    """Any part of a matrix of draws is the part of the whole; any other purpose, slot, step or seed is not."""
    where = {"purpose": Purpose.READ, "slot": 3, "step": 2**32 + 5, "seed": 2**63 + 1, "generator": generator}
    whole = normals(np.arange(13), 23, **where)
    np.testing.assert_array_equal(normals(np.arange(5, 11), 17, **where), whole[5:11, :17])
    for change in ({"purpose": Purpose.WRITE}, {"slot": 4}, {"step": 6}, {"seed": 2**62}):
        assert np.abs(normals(np.arange(13), 23, **{**where, **change}) - whole).min() > 0


@pytest.mark.parametrize(("generator", "largest"), [("exact", 6.77), ("fast", 4.86)])
def test_normals_have_their_moments_and_tails(generator, largest):
    n = 1 << 20
    z = normals(np.arange(n // 64), 64, purpose=Purpose.READ, seed=1, generator=generator)
    # five standard errors of n draws of a standard normal
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(z**power) - mean) < 5 * np.sqrt(variance / n)
    share = np.mean(np.abs(z) > 3)
    assert abs(share - 0.0026998) < 5 * np.sqrt(0.0027 / n)
    assert np.abs(z).max() < largest
    neighbours = [np.mean(z[:, 1:] * z[:, :-1]), np.mean(z[1:] * z[:-1]), np.mean(z[:, 4:] * z[:, :-4])]
    assert np.abs(neighbours).max() < 5 / np.sqrt(n / 2)


def test_kernels_make_the_uniforms_of_a_radius_in_single_precision():
    """As normal.cuh does: exactly of 16 bits, which become the low bits of a float at 128; never above 1 of 32 bits."""
    radius = np.arange(2**16, dtype=np.uint32)
    u = (radius | np.uint32(0x43000000)).view(np.float32) - np.float32(127.99999237060546875)
    np.testing.assert_array_equal(u, (radius + 0.5) / 2**16)
    words = np.array([0, 1, 2**32 - 129, 2**32 - 128, 2**32 - 1], np.uint32)
    u = (words.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
    assert u[0] == 2.0**-33
    assert u[1] > u[0]
    assert (u[2:] <= 1).all()
    assert u[-1] == 1


def test_uniforms_are_uniform_and_open():
    u = uniforms(np.arange(1 << 14), 64, purpose=Purpose.STUCK, seed=1)
    assert u.min() > 0
    assert u.max() < 1
    # Kolmogorov-Smirnov at one in a million: sqrt(-ln(5e-7) / 2) = 2.69
    order = np.sort(u.ravel())
    assert np.abs(order - (np.arange(u.size) + 0.5) / u.size).max() < 2.69 / np.sqrt(u.size)
