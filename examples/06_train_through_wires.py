"""Train on tiles with strong wires: solved at every step, every tenth step between anchors, or not at all.

Writes train_through_wires.png. Arguments: epochs, and a JSON-lines file to append the results to.
"""

import json
import sys
import time
from statistics import median

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import gpuxbar as gx

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
WIRES = {"r_wordline": 3.0, "r_bitline": 3.0, "r_source": 250.0, "r_sink": 250.0}  # ohm
EXACT = {**WIRES, "method": "exact"}
TRAINED = {
    "exact, every step": EXACT,
    "exact, one tile in 10 a step": {**EXACT, "refresh_interval": 10, "anchor": "ladder"},
    "ladder": {**WIRES, "method": "ladder"},
    "ideal wires": {},
}

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
x, x_test, t, t_test = train_test_split(images, torch.tensor(digits.target), test_size=0.25, random_state=0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def on_tiles(model, wires):
    """Devices of 10 kohm and above in tiles of 128 x 128, 8-bit converters."""
    spec = {
        "device": {"g_min": 1e-6, "g_max": 1e-4},
        "dac": {"bits": 8},
        "adc": {"bits": 8},
        "parasitics": wires,
    }
    analog, _ = gx.convert(model, gx.CrossbarSpec.model_validate(spec))
    gx.calibrate(analog, [x[:256]])
    return analog


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return (model(x_test).argmax(1) == t_test).float().mean().item()


class Run:
    """One network in training: accuracy after every epoch, seconds of every step, largest estimated error of a tile."""

    def __init__(self, wires):
        self.model = on_tiles(network(), wires)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.curve, self.seconds, self.error = [accuracy(self.model)], [], 0.0

    def step(self, inputs, targets):
        self.model.train()
        start = time.perf_counter()
        self.optimiser.zero_grad()
        nn.functional.cross_entropy(self.model(inputs), targets).backward()
        self.optimiser.step()
        self.seconds.append(time.perf_counter() - start)
        layers = (m for m in self.model if hasattr(m, "wire_error"))
        self.error = max(self.error, *(layer.wire_error() for layer in layers))

    def on_exact_wires(self):
        """Accuracy of the weights in tiles whose wires are solved exactly: what the hardware would do."""
        moved = on_tiles(network(), EXACT)
        names = dict(moved.named_parameters())
        moved.load_state_dict({k: v for k, v in self.model.state_dict().items() if k in names}, strict=False)
        gx.calibrate(moved, [x[:256]])
        return accuracy(moved)


runs = {name: Run(wires) for name, wires in TRAINED.items()}
for epoch in range(EPOCHS):
    for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
        for run in runs.values():  # in turns, so that a busy machine slows all alike
            run.step(x[part], t[part])
    for run in runs.values():
        run.curve.append(accuracy(run.model))

figure = Figure(figsize=(5.5, 3.5), layout="constrained")
axis = figure.subplots()
print(f"{'trained with':30} {'there':>6} {'on exact wires':>15} {'ms a step':>10} {'estimated error':>16}")
for name, run in runs.items():
    ms, there = 1e3 * median(run.seconds), run.on_exact_wires()
    print(f"{name:30} {run.curve[-1]:6.3f} {there:15.3f} {ms:10.1f} {run.error:16.1e}")
    axis.plot(run.curve, "-o", markersize=4, label=f"{name}: {ms:.0f} ms a step, {there:.3f} on exact wires")
    if len(sys.argv) > 2:
        row = {
            "case": f"wires-training: {name}", "trained": name, "epochs": EPOCHS, "accuracy": run.curve[-1],
            "on_exact_wires": there, "ms_a_step": ms, "estimated_error": run.error, "threads": torch.get_num_threads(),
            "wires": WIRES,
        }  # fmt: skip
        with open(sys.argv[2], "a") as file:
            file.write(json.dumps(row) + "\n")
axis.set(xlabel="epoch", ylabel="test accuracy")
axis.grid(alpha=0.3)
axis.legend(fontsize=7)
figure.savefig("train_through_wires.png", dpi=120)
