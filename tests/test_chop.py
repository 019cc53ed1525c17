"""chop: both backends against the oracle, how often signs flip, and the operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_shim import FORWARD, REVERSE, ShimDevice

import gpuxbar as gx
from gpuxbar import ops, reference
from gpuxbar.bridge.chop import chop
from gpuxbar.nn import AnalogLinear

SEED = 2**40 + 7


def chopped(sign, lines, device=None, **settings):
    sign = sign.copy()
    ops.chop(sign, lines, **{"flip": 0.3, "step": 5, "seed": SEED, **settings}, device=device)
    return sign


@pytest.mark.parametrize("device", [None, ShimDevice(FORWARD), ShimDevice(REVERSE)])
@pytest.mark.parametrize(
    ("groups", "inputs", "count"), [(1, 1, 1), (3, 50, 17), (2, 700, 700), (0, 5, 2), (3, 4, 0)]
)
def test_backends_match_the_oracle(groups, inputs, count, device):
    rng = np.random.default_rng(0)
    sign = rng.choice([-1.0, 1.0], (groups, inputs)).astype(np.float32)
    lines = rng.permutation(inputs)[:count]
    for flip in (0.0, 0.02, 0.5, 1.0):
        expected = reference.chop(sign, lines, flip=flip, step=2**32 + 5, seed=SEED)
        by_value = chopped(sign, lines, device, flip=flip, step=2**32 + 5)
        np.testing.assert_array_equal(by_value, expected)
        np.testing.assert_array_equal(
            chopped(sign, lines, device, flip=flip, step=np.array([2**32 + 5])), expected
        )
        changed = by_value != sign
        assert not np.delete(changed, lines, axis=1).any()
        assert flip < 1 or changed[:, lines].all()


@pytest.mark.parametrize("flip", [0.02, 0.5])
def test_flips_come_as_often_as_asked(flip):
    sign, lines = np.ones((4, 2000), np.float32), np.arange(2000)
    first, other = (chopped(sign, lines, flip=flip, step=step) < 0 for step in (1, 2))
    deviation = np.sqrt(flip * (1 - flip) / sign.size)
    for flips in (first, other):
        assert flips.mean() == pytest.approx(flip, abs=4 * deviation)
    assert (first & other).mean() == pytest.approx(flip**2, abs=4 * np.sqrt(flip**2 / sign.size))
    assert (first[0] & first[1]).mean() == pytest.approx(flip**2, abs=4 * np.sqrt(flip**2 / 2000))


def test_opcheck():
    sign, step = torch.ones(2, 9), torch.ones(1, dtype=torch.int64)
    torch.library.opcheck(chop, (sign, torch.arange(4), step, 0.5, SEED))


BAD = {
    "dtype": ({"sign": np.ones((2, 5))}, TypeError, "`sign` must be an array of float32, got float64"),
    "lines": ({"lines": np.zeros(2, np.int32)}, TypeError, "`lines` must be an array of int64, got int32"),
    "rank": ({"sign": np.ones(5, np.float32)}, ValueError, "`sign` must have 2 axes, got 1"),
    "flip": ({"flip": 1.5}, ValueError, "`flip` must be 0 to 1, got 1.5; it is a probability"),
    "beyond": ({"lines": np.array([1, 5])}, ValueError, r"`lines` must be different ones of 5 wordlines, got \[1 5\]"),
    "twice": ({"lines": np.array([1, 1])}, ValueError, r"`lines` must be different ones of 5 wordlines, got \[1 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    change, error, text = BAD[name]
    values = {"sign": np.ones((2, 5), np.float32), "lines": np.arange(3), "flip": 1.0, **change}
    before = values["sign"].copy()
    with pytest.raises(error, match=f"chop: {text}"):
        ops.chop(values.pop("sign"), values.pop("lines"), step=1, **values)
    np.testing.assert_array_equal(before, change.get("sign", np.ones((2, 5))))


def test_every_transfer_draws_anew():
    layer = AnalogLinear(40, 8, spec=gx.CrossbarSpec.model_validate({"update": {"law": "constant_step"}}))
    optimiser = gx.optim.ChoppedTikiTakaV2([layer.weight], lr=0.1, lines=40, flip=0.3)
    fast = optimiser.parts[layer.weight]
    for _ in range(2):
        layer.weight.grad = torch.ones(8, 40)
        optimiser.step()
    assert 0 < (fast.sign < 0).sum() < 40  # the same draws would take back what they flipped
