"""Layers behind which a model works in place, as those with `nn.ReLU(inplace=True)` do, are what they are without."""

import copy

import pytest
import torch
from torch import nn

import gpuxbar as gx

SPEC = {
    "tile": {"rows": 16, "cols": 16},
    "mapping": {"scheme": "subtracted"},
    "dac": {"bits": 8},
    "adc": {"bits": 8},
}
LAW = {"update": {"law": "soft_bounds"}}
MODES = {"hardware-aware": SPEC, "in situ": SPEC | LAW, "pulses": SPEC | LAW | {"pulses": {}}}
NETWORKS = {
    "linear": ((8, 6), lambda relu: [nn.Linear(6, 5), relu, nn.Linear(5, 4)]),
    "tokens": ((3, 8, 6), lambda relu: [nn.Linear(6, 5), relu, nn.Linear(5, 4)]),
    "images": ((2, 3, 7, 7), lambda relu: [nn.Conv2d(3, 5, 3), relu, nn.Conv2d(5, 4, 3)]),
    "one image": ((3, 7, 7), lambda relu: [nn.Conv2d(3, 5, 3), relu, nn.Conv2d(5, 4, 3)]),
    "sequences": ((2, 3, 9), lambda relu: [nn.Conv1d(3, 5, 3), relu, nn.Conv1d(5, 4, 3)]),
    "volumes": ((2, 3, 5, 5, 5), lambda relu: [nn.Conv3d(3, 5, 3), relu, nn.Conv3d(5, 4, 3)]),
    "upwards": ((2, 3, 4, 4), lambda relu: [nn.ConvTranspose2d(3, 5, 3), relu, nn.Conv2d(5, 4, 3)]),
}  # fmt: skip


def trained(model, x, mode):
    """The state after a step, calibration first."""
    model, _ = gx.convert(model, gx.CrossbarSpec.model_validate(MODES[mode]))
    kind = torch.optim.SGD if mode == "hardware-aware" else gx.optim.InSituSGD
    optimiser = kind(model.parameters(), lr=0.1)
    gx.calibrate(model, [x])
    model(x).square().sum().backward()
    optimiser.step()
    return model.state_dict()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_is_the_same(mode, network):
    shape, layers = NETWORKS[network]
    x = torch.randn(shape)
    model = nn.Sequential(*layers(nn.ReLU()))
    other = copy.deepcopy(model)
    other[1] = nn.ReLU(inplace=True)
    torch.testing.assert_close(trained(other, x, mode), trained(model, x, mode), rtol=0, atol=0)
