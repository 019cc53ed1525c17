"""Learn digits on non-linear, noisy devices: one pair a weight, or slices with carries, by changes, bit streams or pulse trains.

Writes slice_and_carry.png.
"""

import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import gpuxbar as gx
from gpuxbar.launch import set_threads

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
torch.set_num_threads(1)  # layers this small gain nothing from more
set_threads(1)

# Opposite writes of such a device do not cancel, and each leaves noise: a weight decays and jitters with every write.
# A lower digit does so on a smaller scale, and what it has gathered is moved up exactly.
LAW = {"law": "agarwal", "nu": 5.0, "gamma": 0.1}
SPECS = {
    "ideal pair": {"update": {"law": "ideal"}},
    "pair": {"update": LAW},
    # every slice takes its digit of a change
    "accumulate, 4 x 2 bits": {
        "update": LAW,
        "mapping": {"slices": 4, "slice_bits": 2},
        "carry": {"scheme": "accumulate", "interval": 16, "headroom_bits": 2},
    },
    # the lowest slice takes all of it
    "periodic, 2 x 4 bits": {
        "update": LAW,
        "mapping": {"slices": 2, "slice_bits": 4},
        "carry": {"scheme": "periodic", "interval": 4, "headroom_bits": 3},
    },
    # nobody forms a change: bits of inputs meet digits of errors, and slices gather what each sample asks for
    "streamed, 4 x 2 bits": {
        "update": LAW,
        "mapping": {"slices": 4, "slice_bits": 2},
        "carry": {"scheme": "streamed", "interval": 16, "headroom_bits": 2},
    },
    # the same, moved by coincidences of pulse trains instead of by their mean
    "pair, pulses": {"update": LAW, "pulses": {"length": 31}},
    "periodic, pulses": {
        "update": LAW,
        "pulses": {"length": 31},
        "mapping": {"slices": 2, "slice_bits": 4},
        "carry": {"scheme": "periodic", "interval": 4, "headroom_bits": 3},
    },
}
x, target = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
x = x.float() / 16
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]


def learn(settings):
    """Accuracy after each epoch."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model, _ = gx.convert(network, gx.CrossbarSpec.model_validate(settings))
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.1)
    accuracy = []
    for epoch in range(EPOCHS):
        shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        for batch in train[shuffled].split(8):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), target[batch]).backward()
            optimiser.step()
        with torch.no_grad():
            accuracy.append((model(x[test]).argmax(1) == target[test]).float().mean().item())
    return accuracy


figure = Figure(figsize=(6, 3.8), layout="constrained")
axis = figure.subplots()
for name, settings in SPECS.items():
    curve = learn(settings)
    axis.plot(range(1, EPOCHS + 1), curve, label=name)
    print(f"{name:22} {curve[-1]:.3f}")
axis.set(xlabel="epoch", ylabel="accuracy", ylim=(0.4, 1))
axis.grid(alpha=0.3)
axis.legend(fontsize=8)
figure.savefig("slice_and_carry.png", dpi=120)
