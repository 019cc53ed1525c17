"""Convert a PyTorch model to crossbars and train it on them. Writes convert_and_train.png."""

import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import gpuxbar as gx

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 8

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
x, x_test, t, t_test = train_test_split(images, torch.tensor(digits.target), test_size=0.25, random_state=0)


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return (model(x_test).argmax(1) == t_test).float().mean().item()


def train(model):
    """Any optimiser and loop will do: a crossbar layer is a module with a weight and its gradient."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curve = [accuracy(model)]
    for epoch in range(EPOCHS):
        model.train()
        for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[part]), t[part]).backward()
            optimiser.step()
        curve.append(accuracy(model))
    return curve


torch.manual_seed(0)
ideal = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
    nn.Flatten(), nn.Linear(512, 10),
)  # fmt: skip

# 6-bit ADCs, and arrays in which 6 % of the devices are stuck; the last layer, layer 6, gets finer ADCs.
spec = gx.presets.demo().with_overrides(
    {"adc": {"bits": 6}, "programming": {"stuck_at_g_min": 0.03, "stuck_at_g_max": 0.03}}
)
rules = {"6": {"adc": {"bits": 8}}}
analog, report = gx.convert(ideal, spec, rules)
gx.calibrate(analog, [x[:256]])
print(report)

curves = {"ideal": train(ideal), "trained on crossbars": train(analog)}
moved, _ = gx.convert(ideal, spec, rules)
gx.calibrate(moved, [x[:256]])
late = accuracy(moved)

figure = Figure(figsize=(5.5, 3.5), layout="constrained")
axis = figure.subplots()
for name, curve in curves.items():
    axis.plot(curve, "-o", markersize=4, label=name)
    print(f"{name}: {curve[-1]:.3f}")
axis.axhline(late, color="k", linestyle=":", label="trained ideally, then moved to crossbars")
print(f"trained ideally, then moved to crossbars: {late:.3f}")
axis.set(xlabel="epoch", ylabel="test accuracy")
axis.grid(alpha=0.3)
axis.legend()
figure.savefig("convert_and_train.png", dpi=120)
