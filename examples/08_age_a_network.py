"""Write a trained network to phase-change memory and watch its accuracy for a year, with and without compensation.

Writes age_a_network.png. Argument: epochs of training.
"""

import sys
from statistics import mean

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import gpuxbar as gx

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 15
CHIPS = 5  # each with devices, write noise and drift of its own
AGES = {"1s": 1, "1min": 60, "1h": 3600, "1d": 86400, "30d": 2592000, "1y": 31557600}  # s

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
x, x_test, t, t_test = train_test_split(images, torch.tensor(digits.target), test_size=0.25, random_state=0)

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
    nn.Linear(64, 10),
)  # fmt: skip
spec = gx.presets.pcm().with_overrides({"dac": {"bits": 8}, "adc": {"bits": 8}})
model, _ = gx.convert(network, spec)

# hardware-aware: every step sees devices written anew, so the network learns to bear their noise
gx.calibrate(model, [x[:256]])
optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
for epoch in range(EPOCHS):
    for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[part]), t[part]).backward()
        optimiser.step()
gx.calibrate(model, [x[:256]])


def accuracy():
    model.eval()
    with torch.no_grad():
        return (model(x_test).argmax(1) == t_test).float().mean().item()


curves = {False: {age: [] for age in AGES}, True: {age: [] for age in AGES}}
for chip in range(CHIPS):
    gx.program(model, chip)
    for compensate, curve in curves.items():
        for age in AGES:
            gx.age(model, age, compensate)
            curve[age].append(accuracy())
gx.unprogram(model)

figure = Figure(figsize=(5.5, 3.5), layout="constrained")
axis = figure.subplots()
print(f"{'accuracy after':22}" + "".join(f"{age:>8}" for age in AGES))
for compensate, curve in curves.items():
    label = "drift compensated" if compensate else "as it drifts"
    print(f"{label:22}" + "".join(f"{mean(runs):8.3f}" for runs in curve.values()))
    axis.plot(AGES.values(), [mean(runs) for runs in curve.values()], "-o", markersize=4, label=label)
    low, high = ([f(runs) for runs in curve.values()] for f in (min, max))
    axis.fill_between(list(AGES.values()), low, high, alpha=0.2)
axis.set(xscale="log", xlabel="time since programming, s", ylabel="test accuracy")
axis.grid(alpha=0.3)
axis.legend()
figure.savefig("age_a_network.png", dpi=120)
