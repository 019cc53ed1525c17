"""Data-parallel training: what `DistributedDataParallel` sends beside the gradients."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import gpuxbar as gx

SPEC = {
    "dac": {"bits": 8},
    "adc": {"bits": 8, "range": "worst_case"},
    "precision": "fp16",
    "keep_packed": True,
}


@pytest.fixture
def alone():
    """A process group of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_what_every_process_makes_of_its_weights_is_not_sent(alone):
    """Counters and ranges are, and what else a state dict holds."""
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16)), nn.Linear(16, 4))
    model, _ = gx.convert(model, gx.CrossbarSpec.model_validate(SPEC))
    parallel = DistributedDataParallel(model)
    sent = {id(buffer) for buffer in parallel.modules_buffers}
    saved = {name for name in model.state_dict() if name in dict(model.named_buffers())}
    assert {name for name, buffer in model.named_buffers() if id(buffer) in sent} == saved
    assert sum(buffer.nbytes for buffer in parallel.modules_buffers) < 300
    assert sum(buffer.nbytes for buffer in model.buffers()) > 100_000
    parallel(torch.randn(3, 12)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    alone_too, _ = gx.convert(nn.Linear(3, 2), gx.CrossbarSpec.model_validate(SPEC))
    assert "cells" in alone_too._ddp_params_and_buffers_to_ignore
