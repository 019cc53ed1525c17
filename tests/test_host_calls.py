"""What layers call on the CPU by address against the same calls of the ops on arrays, whose oracle is the reference."""

import pytest
import torch
from torch import nn

import gpuxbar as gx
from gpuxbar.bridge import host

TILES = {
    "tile": {"rows": 16, "cols": 8},
    "dac": {"bits": 6},
    "adc": {"bits": 7},
    "read_noise": {"sigma": 2e-8},
}
ERRORS = {"bits": 7, "per": "column", "gain_std": 0.02, "offset_std": 1e-8}
SOFT = {"law": "soft_bounds", "spread": 0.2, "cycle": 0.1, "pulses": 200}
SPECS = {
    "pairs": TILES,
    "subtracted": {**TILES, "mapping": {"scheme": "subtracted"}, "adc": ERRORS, "backward": {"adc": ERRORS}},
    "offset": {**TILES, "mapping": {"scheme": "offset"}},
    "streams": {
        **TILES,
        "dac": {"bits": 6, "stream_bits": 2, "polarity": "two_phase"},
        "mapping": {"slices": 2, "slice_bits": 3},
    },
    "samples": {
        **TILES,
        "dac": {"bits": 6, "range": "sample"},
        "backward": {"dac": {"bits": 6, "range": "sample"}},
    },
    "running": {**TILES, "dac": {"bits": 6, "range": "ema", "signed": False}},
    "states": {**TILES, "read_noise": {"sigma_g": 1e-7}, "generator": "fast"},
    "no converters": {"tile": {"rows": 16, "cols": 8}, "read_noise": {"sigma": 1e-8}},
    "written": {**TILES, "programming": {"write_noise": 1e-7, "stuck_at_g_min": 0.02}},
    "in situ": {**TILES, "update": SOFT},
    "held": {**TILES, "update": {**SOFT, "write_noise": 1e-8}, "endurance": {"pulses": 1e4, "spread": 0.1}},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1, stride=2, groups=2)
        self.linear = nn.Linear(8 * 16, 12)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).flatten(1))


def trained(parts, steps=2):
    """All that two steps leave: outputs, gradients of inputs, and the state of the layers."""
    torch.manual_seed(3)
    x, found = torch.randn(5, 2, 8, 8), []
    model, _ = gx.convert(Net(), gx.CrossbarSpec(**parts))
    optimiser = (gx.optim.InSituSGD if "update" in parts else torch.optim.SGD)(model.parameters(), lr=0.05)
    if "adc" in parts:
        gx.calibrate(model, [x], loss=lambda y, _: y.square().mean())
    for _ in range(steps):
        image = x.clone().requires_grad_()
        y = model(image)
        optimiser.zero_grad()
        y.square().mean().backward()
        optimiser.step()
        found += [y.detach(), image.grad]
    return found + list(model.state_dict().values())


@pytest.mark.parametrize("case", SPECS)
def test_calls_by_address_give_the_bits_of_the_ops(case, monkeypatch):
    by_address = trained(SPECS[case])
    calls = []
    monkeypatch.setattr(host, "serves", lambda device: calls.append(device) and False)
    on_arrays = trained(SPECS[case])
    assert calls
    assert all(map(torch.equal, by_address, on_arrays))
    assert by_address[0].abs().max() > 0


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3), torch.zeros(4).double(), torch.zeros(8)[::2]], ids=["size", "type", "strides"]
)
def test_what_would_leave_a_tensors_memory_is_refused(wrong):
    with pytest.raises(
        ValueError,
        match=r"`g` must be a contiguous tensor of 4 values of torch\.float32 on the CPU, got shape",
    ):
        host.address("g", wrong, 4)
