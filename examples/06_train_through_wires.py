"""Train through strong wires, seen in six ways, and put every network on tiles whose wires are solved exactly.

Converters are ideal, so that only wires tell the networks apart; no gain is fitted anew where a network moves.
Writes train_through_wires.png. Arguments: epochs, networks of each kind, and a JSON-lines file to append the results to.
"""

import sys
import time
from pathlib import Path
from statistics import mean, median

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import gpuxbar as gx
from gpuxbar.bench.record import append, environment

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 12
SEEDS = int(sys.argv[2]) if len(sys.argv) > 2 else 3
WIRES = {"r_wordline": 3.0, "r_bitline": 3.0, "r_source": 1000.0, "r_sink": 1000.0}  # ohm
EXACT = {**WIRES, "method": "exact"}
TRAINED = {
    "ideal wires": {},
    "first_order": {**WIRES, "method": "first_order"},
    "ladder": {**WIRES, "method": "ladder"},
    "exact, one tile in 10 a step": {**EXACT, "refresh_interval": 10, "anchor": "ladder"},
    "exact": EXACT,
    "exact, with its gradient": {**EXACT, "gradient": "exact"},
}

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
x, x_test, t, t_test = train_test_split(images, torch.tensor(digits.target), test_size=0.25, random_state=0)


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def on_tiles(model, wires):
    """Devices of 10 kohm and above in tiles of 128 x 128."""
    spec = {"device": {"g_min": 1e-6, "g_max": 1e-4}, "parasitics": wires}
    return gx.convert(model, gx.CrossbarSpec.model_validate(spec))[0]


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return (model(x_test).argmax(1) == t_test).float().mean().item()


class Run:
    """One network in training: accuracy after every epoch, seconds of every step, largest estimated error of a tile."""

    def __init__(self, wires, seed):
        self.seed, self.model = seed, on_tiles(network(seed), wires)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=4e-3)
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
        moved = on_tiles(network(self.seed), EXACT)
        names = dict(moved.named_parameters())
        moved.load_state_dict({k: v for k, v in self.model.state_dict().items() if k in names}, strict=False)
        return accuracy(moved)


runs = {name: [Run(wires, seed) for seed in range(SEEDS)] for name, wires in TRAINED.items()}
for epoch in range(EPOCHS):
    for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
        for alike in runs.values():  # in turns, so that a busy machine slows all alike
            for run in alike:
                run.step(x[part], t[part])
    for alike in runs.values():
        for run in alike:
            run.curve.append(accuracy(run.model))

figure = Figure(figsize=(5.5, 3.5), layout="constrained")
axis = figure.subplots()
print(f"{'trained with':30} {'there':>6} {'on exact wires':>15} {'ms a step':>10} {'estimated error':>16}")
for name, alike in runs.items():
    ms = 1e3 * median(second for run in alike for second in run.seconds)
    there = mean(run.curve[-1] for run in alike)
    deployed = [run.on_exact_wires() for run in alike]
    error = max(run.error for run in alike)
    print(f"{name:30} {there:6.3f} {mean(deployed):15.3f} {ms:10.1f} {error:16.1e}")
    curve = torch.tensor([run.curve for run in alike]).mean(0)
    axis.plot(
        curve, "-o", markersize=4, label=f"{name}: {ms:.0f} ms a step, {mean(deployed):.3f} on exact wires"
    )
    if len(sys.argv) > 3:
        row = {
            "case": f"wires-training: {name}", "trained": name, "epochs": EPOCHS, "accuracy": there,
            "on_exact_wires": deployed, "ms_a_step": ms, "estimated_error": error, "threads": torch.get_num_threads(),
            "wires": WIRES,
        }  # fmt: skip
        append(Path(sys.argv[3]), row | environment(Path(__file__).parent.parent))
axis.set(xlabel="epoch", ylabel="test accuracy")
axis.grid(alpha=0.3)
axis.legend(fontsize=7)
figure.savefig("train_through_wires.png", dpi=120)
