"""How devices follow the pulses of an update: three laws, each with your own numbers. Writes device_laws.png."""

import numpy as np
from matplotlib.figure import Figure

import gpuxbar as gx
from gpuxbar.spec import Agarwal, NeuroSim, SoftBounds

PULSES, DEVICES = 64, 40
G_MIN, G_MAX = 1e-6, 1e-5  # S

# Fit these to your device: measure the conductance over a train of equal pulses up, then down.
LAWS = {
    "linear": Agarwal(),
    "Agarwal, nu = 3": Agarwal(nu=3, gamma=0.1, spread=0.2),
    "NeuroSim, labels 2.4 and 4.9": NeuroSim(
        nonlinearity_ltp=2.4, nonlinearity_ltd=4.9, levels=PULSES, cycle=0.01, spread=0.3
    ),
    "soft bounds, 4 up, 6 down": SoftBounds(up=4, down=6, pulses=PULSES, cycle=0.3, spread=0.2),
}


def staircase(law):
    """Conductance of the positive devices over pulses up and then down, [2 * PULSES + 1, DEVICES]."""
    g = np.empty((2, 1, DEVICES), np.float32)  # a wordline of pairs
    g[0], g[1] = G_MIN, G_MAX
    pairs = gx.ops.Pairs(g, law=law, g_min=G_MIN, g_max=G_MAX, seed=1)
    w_max = np.ones(DEVICES, np.float32)
    one_pulse = 2.0 / PULSES  # half of a weight change goes to each device of a pair
    seen = [g[0, 0].copy()]
    for step in range(2 * PULSES):
        dw = np.full((1, DEVICES, 1), one_pulse if step < PULSES else -one_pulse, np.float32)
        gx.ops.device_update(pairs, dw, w_max=w_max, step=step)
        seen.append(g[0, 0].copy())
    return np.array(seen)


figure = Figure(figsize=(12, 3.2), layout="constrained")
axes = figure.subplots(1, len(LAWS), sharey=True)
for axis, (name, law) in zip(axes, LAWS.items(), strict=True):
    g = staircase(law)
    axis.plot(1e6 * g[:, :8], color="C0", alpha=0.4, linewidth=0.8)
    axis.plot(1e6 * g.mean(1), color="k")
    axis.set(title=name, xlabel="pulse")
    axis.grid(alpha=0.3)
    half, end = (g[k].mean() - G_MIN for k in (PULSES // 2, 2 * PULSES))
    print(
        f"{name:<29} halfway up: {half / (G_MAX - G_MIN):4.0%} of the window; after as many down: {end / (G_MAX - G_MIN):4.0%}"
    )
axes[0].set_ylabel("conductance (µS)")
figure.savefig("device_laws.png", dpi=120)
