"""Learn on asymmetric devices by every in-situ algorithm. Writes in_situ_algorithms.png."""

import sys

import torch
from matplotlib.figure import Figure
from torch import nn

import gpuxbar as gx
from gpuxbar.launch import set_threads

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
torch.set_num_threads(1)  # layers this small gain nothing from more
set_threads(1)

# Up and down steps are alike at 40 % of the window: every pair of opposite writes pulls a weight there. A batch makes one change of
# the wanted size; pulses={"length": 31} would make trains of pulses of it, sample by sample, for all but mixed precision.
spec = gx.CrossbarSpec(
    mapping={"scheme": "subtracted"},
    update={
        "law": "soft_bounds", "up": 1.6, "down": 2.4, "sides": "reference", "pulses": 500, "spread": 0.1, "cycle": 0.3,
    },
)  # fmt: skip
ALGORITHMS = {
    "sgd": {"lr": 0.01},
    "mixed-precision": {"lr": 0.003},
    "tiki-taka": {"lr": 0.003, "zero_shift": 20},
    "tiki-taka-v2": {"lr": 0.003, "zero_shift": 20},
    "chopped-tiki-taka-v2": {"lr": 0.003, "fast_lr": 0.3},
    "agad": {"lr": 0.003, "fast_lr": 0.3},
}
torch.manual_seed(0)
goal = 0.3 * torch.randn(8, 12)


def learn(name):
    """Relative error of the weights after each step of learning a noisy linear map."""
    torch.manual_seed(1)
    layer = gx.nn.AnalogLinear(12, 8, bias=False, spec=spec)
    optimiser = gx.optim.build_optimizer(name, layer, **ALGORITHMS[name])
    errors = []
    for _ in range(STEPS):
        x = torch.randn(4, 12)
        target = x @ goal.T + 0.5 * torch.randn(4, 8)
        optimiser.zero_grad()
        nn.functional.mse_loss(layer(x), target, reduction="sum").mul(1 / 8).backward()
        optimiser.step()
        errors.append(((layer.weight - goal).norm() / goal.norm()).item())
    return torch.tensor(errors)


figure = Figure(figsize=(6, 3.8), layout="constrained")
axis = figure.subplots()
for name in ALGORITHMS:
    curve = learn(name)
    axis.plot(curve.unfold(0, 20, 20).mean(1).repeat_interleave(20), label=name)
    print(f"{name:22} error of the weights {curve[-STEPS // 4 :].mean():.2f}")
axis.set(xlabel="step", ylabel="error of the weights", ylim=(0, 1.2))
axis.grid(alpha=0.3)
axis.legend(fontsize=8)
figure.savefig("in_situ_algorithms.png", dpi=120)
