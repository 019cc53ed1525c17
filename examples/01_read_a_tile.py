"""Read one tile: what a 5-bit ADC and read noise make of its bitline currents. Writes read_a_tile.png."""

import numpy as np
from matplotlib.figure import Figure

import gpuxbar as gx

ROWS, COLS, BITS = 64, 24, 5
V_READ = 0.2  # V
G_MIN, G_MAX = 1e-6, 1e-5  # S
READ_NOISE = 2e-6  # A, standard deviation of a bitline current

# A wave of conductances along every bitline, and wordline voltages that sweep through the same waves.
place = np.linspace(0, 2 * np.pi, ROWS)
waves = np.sin(np.outer(place, np.linspace(0.5, 3, COLS)))
g = (G_MIN + (G_MAX - G_MIN) * (waves + 1) / 2).astype(np.float32)  # [rows, cols]
v = (V_READ * np.sin(np.outer(np.linspace(0.5, 3, 100), place))).astype(np.float32)  # [batch, rows]

exact = gx.ops.tile_mvm(v, g)  # A, [batch, cols]
lsb = float(np.abs(exact).max()) / (2 ** (BITS - 1) - 1)  # A, the largest current is the largest code
clean = gx.ops.tile_mvm(v, g, adc_bits=BITS, adc_lsb=lsb) / lsb
noisy = gx.ops.tile_mvm(v, g, adc_bits=BITS, adc_lsb=lsb, read_noise=READ_NOISE, seed=0, step=0) / lsb

figure = Figure(figsize=(11, 3.6), layout="constrained")
left, middle, right = figure.subplots(1, 3)
left.set(title="conductances", xlabel="bitline", ylabel="wordline")
figure.colorbar(left.imshow(1e6 * g, aspect="auto"), ax=left, label="µS")
middle.set(title=f"codes of the {BITS}-bit ADC, with noise", xlabel="bitline", ylabel="input vector")
figure.colorbar(middle.imshow(noisy, aspect="auto", cmap="RdBu"), ax=middle, label="code")
right.set(title="conversion", xlabel="bitline current (µA)", ylabel="code")
right.plot(1e6 * exact.ravel(), noisy.ravel(), ".", markersize=2, color="0.7", label="with read noise")
right.plot(1e6 * exact.ravel(), clean.ravel(), ".", markersize=2, label="without")
right.legend(markerscale=4)
figure.savefig("read_a_tile.png", dpi=120)

step = np.abs(clean * lsb - exact).max() / lsb
print(f"{exact.size} conversions of {1e6 * lsb:.2f} µA a code")
print(
    f"largest rounding error {step:.3f} codes; with noise, {np.mean(noisy != clean):.0%} of the codes change"
)
