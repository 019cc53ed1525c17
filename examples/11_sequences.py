"""A transformer and an LSTM that read digits line by line, on crossbars. Writes sequences.png."""

import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import gpuxbar as gx

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 10

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16  # 8 lines of 8 pixels
x, x_test, t, t_test = train_test_split(images, torch.tensor(digits.target), test_size=0.25, random_state=0)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Linear(8, 32), nn.Parameter(0.1 * torch.randn(8, 32))
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.place).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return (model(x_test).argmax(1) == t_test).float().mean().item()


def train(model):
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    curve = []
    for epoch in range(EPOCHS):
        model.train()
        for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[part]), t[part]).backward()
            optimiser.step()
        curve.append(accuracy(model))
    return curve


# Projections of the attention and both products of the LSTM become layers on arrays, with the names that the report gives;
# what attention multiplies with each other changes with every input and stays digital.
spec = gx.presets.demo().with_overrides(
    {"adc": {"bits": 5}, "programming": {"stuck_at_g_min": 0.02, "stuck_at_g_max": 0.02}}
)
figure = Figure(figsize=(8, 3.5), layout="constrained")
for axis, network in zip(figure.subplots(1, 2, sharey=True), (Transformer, Recurrent), strict=True):
    torch.manual_seed(0)
    ideal = network()
    analog, report = gx.convert(ideal, spec, example=x[:1])
    gx.calibrate(analog, [x[:256]])
    print(report)
    curves = {"ideal": train(ideal), "trained on crossbars": train(analog)}
    moved, _ = gx.convert(ideal, spec)
    gx.calibrate(moved, [x[:256]])
    late = accuracy(moved)
    for name, curve in curves.items():
        axis.plot(range(1, EPOCHS + 1), curve, "-o", markersize=4, label=name)
    axis.axhline(late, color="k", linestyle=":", label="trained ideally, then moved to crossbars")
    axis.set(title=network.__name__, xlabel="epoch")
    axis.grid(alpha=0.3)
    results = ", ".join(f"{name} {curve[-1]:.3f}" for name, curve in curves.items())
    print(f"{network.__name__}: {results}, moved there {late:.3f}\n")
figure.axes[0].set_ylabel("test accuracy")
figure.axes[0].legend(fontsize="small")
figure.savefig("sequences.png", dpi=120)
