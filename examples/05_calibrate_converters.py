"""How many ADC bits, and how wide a range, does a trained network need? Writes calibrate_converters.png."""

import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import gpuxbar as gx

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
BITS = (2, 3, 4, 5, 6, 8)
PERCENTILES = (90, 99, 99.9, 100)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
x, x_test, t, t_test = train_test_split(images, torch.tensor(digits.target), test_size=0.25, random_state=0)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(EPOCHS):
    for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[part]), t[part]).backward()
        optimiser.step()


def accuracy(model):
    with torch.no_grad():
        return (model(x_test).argmax(1) == t_test).float().mean().item()


def on_crossbars(bits, percentile):
    """The network with ADCs of some bits, whose largest code is a percentile of the training images' currents."""
    spec = gx.CrossbarSpec.model_validate(
        {
            "tile": {"rows": 32, "cols": 32},
            "mapping": {"scheme": "subtracted"},
            "dac": {"bits": 8},
            "adc": {"bits": bits, "percentile": percentile},
        }
    )
    analog, _ = gx.convert(model, spec)
    gx.calibrate(analog, x.split(256))
    return analog


ideal = accuracy(model)
table = {
    percentile: [accuracy(on_crossbars(bits, percentile)) for bits in BITS] for percentile in PERCENTILES
}

figure = Figure(figsize=(5.5, 3.5), layout="constrained")
axis = figure.subplots()
print("range, percentile" + "".join(f"{bits:>7} bits" for bits in BITS))
for percentile, row in table.items():
    axis.plot(BITS, row, "-o", markersize=4, label=f"range: {percentile} % of the currents")
    print(f"{percentile:>17}" + "".join(f"{value:12.3f}" for value in row))
print(f"no converters: {ideal:.3f}")
for percentile in (90, 100):
    print(f"What converters of 4 bits do, range {percentile} %:")
    print(gx.conversion_errors(on_crossbars(4, percentile), x.split(256)))
axis.axhline(ideal, color="k", linestyle=":", label="no converters")
axis.set(xlabel="ADC bits", ylabel="test accuracy")
axis.grid(alpha=0.3)
axis.legend()
figure.savefig("calibrate_converters.png", dpi=120)
