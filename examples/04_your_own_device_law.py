"""How devices follow the pulses of an update: every law, with numbers of your own. Writes device_laws.png."""

import numpy as np
from matplotlib.figure import Figure

import gpuxbar as gx
from gpuxbar import spec

PULSES, DEVICES = 64, 40
G_MIN, G_MAX = 1e-6, 1e-5  # S

# Fit these to your device: measure the conductance over a train of equal pulses up, then down.
NOISY = {"cycle": 0.3, "step_spread": 0.2}
STEPS = NOISY | {"pulses": PULSES}
SCATTER = 3 * [[0.3 * score / 2 for score in range(-8, 9)]]  # of nominal steps, at normal scores of -4 to 4
LAWS = {
    "ideal": spec.Ideal(),
    "constant step": spec.ConstantStep(**STEPS, high_spread=0.1),
    "linear step, slopes 0.4, 0.8": spec.LinearStep(**STEPS, slope_up=0.4, slope_down=0.8),
    "soft bounds, 4 up, 6 down": spec.SoftBounds(**STEPS, up=4, down=6),
    "exponential step": spec.ExponentialStep(**STEPS),
    "power step, 0.5 up, 2 down": spec.PowerStep(**STEPS, exponent_up=0.5, exponent_down=2),
    "piecewise step": spec.PiecewiseStep(**STEPS, up=(3, 1, 0.2), down=(0.5, 1, 1.5)),
    "Agarwal, nu 3": spec.Agarwal(nu=3, gamma=0.02, spread=0.2),
    "Agarwal, symmetric, alpha 4": spec.AgarwalSymmetric(alpha=4, gamma=0.02, spread=0.2),
    "NeuroSim, labels 2.4, 4.9": spec.NeuroSim(
        nonlinearity_ltp=2.4, nonlinearity_ltd=4.9, levels=PULSES, cycle=0.01, spread=0.3
    ),
    "lookup table": spec.LookupTable(
        pulses=PULSES, up=(2, 1, 0.3), down=(0.3, 1, 2), scatter_up=SCATTER, scatter_down=SCATTER
    ),
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


figure = Figure(figsize=(12, 7), layout="constrained")
axes = figure.subplots(3, 4, sharex=True, sharey=True).ravel()
axes[-1].remove()
for axis, (name, law) in zip(axes[:-1], LAWS.items(), strict=True):
    g = staircase(law)
    axis.plot(1e6 * g[:, :8], color="C0", alpha=0.4, linewidth=0.8)
    axis.plot(1e6 * g.mean(1), color="k")
    axis.set_title(name, fontsize="medium")
    axis.grid(alpha=0.3)
    half, end = (g[k].mean() - G_MIN for k in (PULSES // 2, 2 * PULSES))
    print(
        f"{name:<29} halfway up: {half / (G_MAX - G_MIN):4.0%} of the window; after as many down: {end / (G_MAX - G_MIN):4.0%}"
    )
figure.supxlabel("pulse (up, then down)")
figure.supylabel("conductance (µS)")
figure.savefig("device_laws.png", dpi=120)
