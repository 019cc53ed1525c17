"""Training steps of ResNet-18 on a GPU, each captured in one CUDA graph; not yet run on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpuxbar.bench.cases import OracleMismatch
from gpuxbar.bench.gpu.times import median_us
from gpuxbar.experiments.networks import ResNet, resnet18
from gpuxbar.nn import calibrate, convert
from gpuxbar.optim import InSituSGD, capture_step
from gpuxbar.spec import CrossbarSpec

__all__ = ["IDEAL", "STEPS", "STEP_SIZE", "STEP_TARGET", "Step", "check_steps", "time_step"]

BATCH = 128
STEP_SIZE = f"batch {BATCH}, 32 x 32, 128 x 128 tiles, 8-bit DAC and ADC, noise of the fast generator, fp16"
STEP_TARGET = 2.0  # times the ideal step
IDEAL, DIGITAL, IN_SITU = STEPS = ("ideal, bf16", "non-ideal reads", "non-ideal reads and updates")
SPEC = {
    "tile": {"rows": 128, "cols": 128}, "mapping": {"scheme": "subtracted"}, "dac": {"bits": 8}, "adc": {"bits": 8},
    "read_noise": {"sigma": 1e-7}, "generator": "fast", "precision": "fp16",
    "update": {"law": "agarwal", "nu": 1.0, "gamma": 0.01},
}  # fmt: skip


class Step:
    """A network, an optimiser and a batch: one of STEPS."""

    def __init__(self, kind: str, model: nn.Module, batch: int, size: int, device: str):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, 3, size, size, generator=generator).to(device)
        self.batch = x, torch.randint(10, (batch,), generator=generator).to(device)
        self.model, self.kind = model.to(device).train(), kind
        if kind != IDEAL:
            self.model, _ = convert(self.model, CrossbarSpec.model_validate(SPEC))
        make: Callable[..., Any] = InSituSGD if kind == IN_SITU else torch.optim.SGD
        self.optimizer = make(self.model.parameters(), lr=0.01, momentum=0.9)
        if kind != IDEAL:
            calibrate(self.model, [self.batch], loss=functional.cross_entropy)

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(y.float(), target)

    def eager(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.model(self.batch[0]), self.batch[1])
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def captured(self) -> Callable[[], Tensor]:
        model = Autocast(self.model) if self.kind == IDEAL else self.model
        step = capture_step(model, self.optimizer, self.loss, self.batch)
        return lambda: step(*self.batch)


class Autocast(nn.Module):
    """A network in bf16 where PyTorch sees fit."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            y: Tensor = self.model(x)
        return y


def check_steps(device: str = "cuda", steps: int = 3, widths: tuple[int, ...] = (16, 32)) -> str:
    """A small residual network trains in a graph as without one, bit for bit; each step draws noise of its own."""
    for kind in (DIGITAL, IN_SITU):
        runs = []
        for captured in (False, True):
            torch.manual_seed(0)
            step = Step(kind, ResNet(3, 10, blocks=1, widths=widths), 4, 8, device)
            with torch.backends.cudnn.flags(enabled=True, deterministic=True):
                run = step.captured() if captured else step.eager
                losses = [run() for _ in range(steps)]
            runs.append(
                torch.cat([torch.stack(losses), *(p.detach().flatten() for p in step.model.parameters())])
            )
        eager, replayed = runs
        off = int((eager != replayed).sum())
        if off or eager[:steps].unique().numel() < steps or not eager.isfinite().all():
            raise OracleMismatch(
                f"captured steps: {off} of {eager.numel()} losses and weights are not those without capture ({kind})"
            )
    return "same bits as without capture"


def time_step(kind: str) -> float:
    """Median milliseconds of one of STEPS."""
    return 1e-3 * median_us(Step(kind, resnet18(3, 10), BATCH, 32, "cuda").captured())
