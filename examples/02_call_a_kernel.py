"""Call the read kernels on NumPy arrays, and on CuPy arrays where there is a GPU. Writes read_noise.png."""

import time

import numpy as np
from matplotlib.figure import Figure

import gpuxbar as gx

BATCH, ROWS, COLS, TILE = 256, 1000, 500, 128
SIGMA = 1e-7  # A


def array_modules():
    """NumPy, and CuPy if it is installed and finds a GPU."""
    yield np
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount():
            yield cupy
    except (ImportError, RuntimeError):
        print("cupy: not installed, or no GPU")


rng = np.random.default_rng(0)
x = rng.standard_normal((BATCH, ROWS)).astype(np.float32)
g = rng.uniform(1e-6, 1e-5, (ROWS, COLS)).astype(np.float32)  # S
lsb = float(np.abs(x).max()) / 127  # value of one DAC code
results = {}
for xp in array_modules():
    x_, g_ = xp.asarray(x), xp.asarray(g)
    codes = gx.ops.dac_quantize(x_, lsb=lsb, code_max=127)  # int16
    for _ in range(2):  # the first call compiles
        started = time.perf_counter()
        i = gx.ops.tile_mvm(
            codes, g_, tile_rows=TILE, v_lsb=0.2 / 127, adc_bits=8, adc_lsb=2e-6,
            read_noise=SIGMA, seed=7, step=0,
        )  # fmt: skip
        results[xp.__name__] = np.asarray(i if xp is np else i.get())
        seconds = time.perf_counter() - started
    back = gx.ops.tile_mvm(
        i / 1e-3, g_, tile_cols=TILE, transposed=True
    )  # the same array, driven from its bitlines
    print(
        f"{xp.__name__}: codes {codes.shape} -> currents {i.shape} in {1e3 * seconds:.1f} ms -> back {back.shape}"
    )
for name, i in results.items():
    same = np.mean(i == results["numpy"])
    print(f"{name}: {same:.2%} of the results equal those of numpy")

# Noise is a pure function of seed, step and place: the same pair gives the same draw.
quiet = gx.ops.tile_mvm(x, g, tile_rows=TILE)
first, again, other = (
    gx.ops.tile_mvm(x, g, tile_rows=TILE, read_noise=SIGMA, seed=7, step=step) - quiet for step in (0, 0, 1)
)
tiles = -(-ROWS // TILE)
print(f"same step, same noise: {np.array_equal(first, again)}; another step: {np.array_equal(first, other)}")
print(f"std of {tiles} summed reads: {first.std():.3e} A, expected {SIGMA * tiles**0.5:.3e} A")

figure = Figure(figsize=(5, 3.5), layout="constrained")
axis = figure.subplots()
z = np.linspace(-5, 5, 200)
axis.hist(first.ravel() / (SIGMA * tiles**0.5), bins=200, range=(-5, 5), density=True, label="drawn")
axis.plot(z, np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), "k--", label="normal")
axis.set(yscale="log", ylim=(1e-6, 1), xlabel="noise over its standard deviation", ylabel="density")
axis.legend()
figure.savefig("read_noise.png", dpi=120)
