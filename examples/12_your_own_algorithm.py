"""An in-situ algorithm of your own: residual learning on two arrays, beside SGD and AGAD. Writes your_own_algorithm.png.

Asymmetric devices pull weights to the place where steps up and down are alike. Of two arrays whose sum is the weight, the residual
one may be pulled to 0, if the main one learns what is left in it (Wu et al., NeurIPS 2025, arXiv:2502.06309).
"""

import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import gpuxbar as gx
from gpuxbar.launch import set_threads

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
torch.set_num_threads(1)  # layers this small gain nothing from more
set_threads(1)

digits = load_digits(return_X_y=True)
x, x_test, t, t_test = train_test_split(
    torch.tensor(digits[0], dtype=torch.float32) / 16, torch.tensor(digits[1]), test_size=0.25, random_state=0
)


class Residual(nn.Module):
    """y = W x + share P x, each on an array of its own."""

    def __init__(self, inputs, outputs, share=0.5):
        super().__init__()
        self.share = share
        self.main = nn.Linear(inputs, outputs)
        self.residual = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(self.residual.weight)

    def forward(self, x):
        return self.main(x) + self.share * self.residual(x)


class ResidualLearning(gx.optim.InSituOptimizer):
    """W <- W + transfer P;  P <- P - lr grad, both through the law of their devices."""

    rules = gx.optim.InSituOptimizer.rules | {
        "transfer": gx.optim.Rule("above 0 and at most 1", lambda value: 0 < value <= 1, "0.02")
    }

    def __init__(self, model, lr, transfer=0.02):
        pairs = [module for module in model.modules() if isinstance(module, Residual)]
        self.residual_of = {module.main: module.residual for module in pairs}
        super().__init__(model.parameters(), lr, transfer=transfer)

    def _write(self, layer, weight, group):
        residual = self.residual_of.get(layer)
        if residual is None:
            layer.change_cells(weight.grad, -group["lr"])
        else:
            layer.change_cells(residual.weight.detach(), group["transfer"])


ALGORITHMS = {
    "sgd": (nn.Linear, lambda model: gx.optim.InSituSGD(model.parameters(), lr=0.1)),
    "agad": (nn.Linear, lambda model: gx.optim.AGAD(model.parameters(), lr=0.02, fast_lr=0.3)),
    "residual": (Residual, lambda model: ResidualLearning(model, lr=0.2)),
}
law = {"law": "soft_bounds", "up": 1.6, "down": 2.4, "sides": "reference", "pulses": 200, "cycle": 0.3}
spec = gx.CrossbarSpec(mapping={"scheme": "subtracted"}, dac={"bits": 8}, update=law)


def learn(layer, build):
    """Test accuracy after each epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(64, 32), nn.ReLU(), layer(32, 10))
    # an array of zeros has no largest weight to take its range from
    rules = {"*.residual": {"mapping": {"w_max": 0.5}}} if layer is Residual else None
    model, _ = gx.convert(model, spec, rules)
    optimiser, curve = build(model), []
    for epoch in range(EPOCHS):
        model.train()
        for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(16):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[part]), t[part]).backward()
            optimiser.step()
        model.eval()
        with torch.no_grad():
            curve.append((model(x_test).argmax(1) == t_test).float().mean().item())
    return curve


axis = (figure := Figure(figsize=(5, 3.5), layout="constrained")).subplots()
for name, (layer, build) in ALGORITHMS.items():
    curve = learn(layer, build)
    axis.plot(range(1, EPOCHS + 1), curve, marker="o", label=name)
    print(f"{name:9} {curve[-1]:.3f}")
axis.set(xlabel="epoch", ylabel="test accuracy")
axis.grid(alpha=0.3)
axis.legend()
figure.savefig("your_own_algorithm.png", dpi=120)
