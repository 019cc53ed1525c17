"""What is measured: each case names its contenders, and how the library's result is checked against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gpuxbar import ops, reference
from gpuxbar.bench import updates
from gpuxbar.bench.peers import Trained, aihwkit_steps, lightning_steps
from gpuxbar.bench.plain import Tiles, on_tiles
from gpuxbar.bridge.analog_mvm import driven_gradient, gradient_values
from gpuxbar.experiments.networks import inverted_residuals, network, resnet50
from gpuxbar.launch import host, set_threads
from gpuxbar.mapping.plan import Read
from gpuxbar.nn import AnalogConv2d, AnalogLinear, calibrate, convert
from gpuxbar.ops import ConvGeometry
from gpuxbar.optim import OPTIMIZERS
from gpuxbar.spec import CrossbarSpec, PulseTrain, presets

__all__ = ["CASES", "Case", "Contenders", "OracleMismatch", "threads"]

TILE = 128
V_READ, G_MAX = 0.2, 10e-6  # V, S
NOISE = 0.3  # of an ADC step
RATE = 0.01  # of training steps
SPEC = {
    "tile": {"rows": TILE, "cols": TILE}, "mapping": {"scheme": "subtracted"}, "dac": {"bits": 8}, "adc": {"bits": 8},
    "read_noise": {"sigma": 1e-7},
}  # fmt: skip


class OracleMismatch(Exception):
    """A case's result is not the oracle's: no number of it counts."""


@dataclass(frozen=True)
class Contenders:
    """What is timed in turns, by name; the first is the unit of the ratios. `check`: largest error or mismatch.

    `pieces`: how many pieces of work a call does, where times are to be of one.
    """

    run: dict[str, Callable[[], object]]
    check: Callable[[], float]
    pieces: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A measured setting.

    Attributes:
        size: What one call works on.
        target: Largest ratio of `gpuxbar` to the unit (a speed-up of two threads: the smallest), or None.
        memory_mb: Largest extra memory of one call, or None: not measured.
        target_ms: Largest time of `gpuxbar`, or None.
    """

    name: str
    size: str
    target: float | None
    build: Callable[[], Contenders]
    memory_mb: float | None = None
    speedup: bool = False
    target_ms: float | None = None


def linear(
    batch: int = 256, inputs: int = 1024, outputs: int = 1024, *, transposed: bool = False, noise: float = NOISE,
    generator: str = "exact",
) -> Contenders:  # fmt: skip
    """A product as `ops` computes it: DAC, tiles, noise, ADC; `transposed` drives the bitlines."""
    rng = np.random.default_rng(0)
    g = rng.uniform(-G_MAX, G_MAX, (inputs, outputs)).astype(np.float32)
    x = rng.normal(size=(batch, outputs if transposed else inputs)).astype(np.float32)
    top, w = 4.0, torch.from_numpy(g) if transposed else torch.from_numpy(g.T.copy())
    settings = _settings(top, transposed=transposed, noise=noise, generator=generator)
    per_volt = top / V_READ  # digital value of one ampere over one siemens
    tiles = Tiles(TILE, top, settings["adc_lsb"] * per_volt, noise)

    def ours() -> np.ndarray:
        return ops.tile_mvm(ops.dac_quantize(x, lsb=top / 127, code_max=127), g, **settings)

    def check() -> float:
        codes = reference.dac_quantize(x, lsb=np.full(1, top / 127, np.float32), code_max=127, signed=True)
        expected = reference.tile_mvm(codes, g[None], **_oracle(settings))
        return _codes_error(ours(), expected, settings["adc_lsb"])

    tx, w_t = torch.from_numpy(x), w.t()
    run = {
        "ideal": lambda: functional.linear(tx, w),
        "gpuxbar": ours,
        "plain torch": lambda: tiles.read(tx, w_t),
    }
    return Contenders(run, check)


def conv(
    batch: int = 32, channels: int = 64, size: int = 32, outputs: int = 64, *, flawed: bool = False
) -> Contenders:
    """A 3 x 3 convolution as `ops` computes it; the oracle looks at the first image. `flawed`: DACs err, but not in plain torch."""
    rng = np.random.default_rng(0)
    geometry = ConvGeometry(channels, size, size, (3, 3), padding=(1, 1))
    g = rng.uniform(-G_MAX, G_MAX, (geometry.inputs, outputs)).astype(np.float32)
    x = rng.normal(size=(batch, channels, size, size)).astype(np.float32)
    top = 4.0
    settings = _settings(top, transposed=False, noise=NOISE, generator="exact") | {"conv": geometry}
    if flawed:  # gain, offset in V, curve in steps
        error = rng.normal([[1], [0], [0]], [[0.02], [0.002], [0.5]], (3, geometry.inputs)).astype(np.float32)
        settings["drivers"] = ops.Drivers(V_READ, error)
    layer = nn.Conv2d(channels, outputs, 3, padding=1, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.from_numpy(g.T.reshape(outputs, channels, 3, 3).copy()))
    plain = on_tiles(layer, Tiles(TILE, top, settings["adc_lsb"] * top / V_READ, NOISE))

    def ours() -> np.ndarray:
        return ops.tile_mvm(ops.dac_quantize(x, lsb=top / 127, code_max=127), g, **settings)

    def check() -> float:
        codes = reference.dac_quantize(
            x[:1], lsb=np.full(1, top / 127, np.float32), code_max=127, signed=True
        )
        expected = reference.tile_mvm(codes, g[None], **_oracle(settings))
        return _codes_error(ours()[:1], expected, settings["adc_lsb"])

    tx = torch.from_numpy(x)
    return Contenders({"ideal": lambda: layer(tx), "gpuxbar": ours, "plain torch": lambda: plain(tx)}, check)


def update(build: Callable[..., Any], *settings: Any) -> Contenders:
    """A weight update of `bench.updates`, checked to float32 arithmetic of about ten operations."""
    run, error = build(*settings)

    def check() -> float:
        worst = float(error())
        if not worst < 3e-6:
            raise OracleMismatch(f"update: cells are off by {worst:.1e} of the window; 3e-6 is allowed")
        return worst

    return Contenders(run, check)


def training_step(shape: tuple[int, int, int], batch: int) -> Contenders:
    """Forward, backward and SGD of a network; reads non-ideal in both directions, the update digital."""
    return _beside_others(_network(shape), *_labelled((batch, *shape), batch))


def mlp_step(width: int = 64, layers: int = 6, batch: int = 8) -> Contenders:
    """The same of layers that compute less than it takes to call them, which a compiled model does at less cost."""
    torch.manual_seed(0)
    hidden = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), nn.ReLU())]
    ideal = nn.Sequential(*hidden, nn.Linear(width, 10))
    return _beside_others(ideal, *_labelled((batch, width), batch), compiled=True)


def mlp_in_situ_step(batch: int) -> Contenders:
    """A step of 784-256-128-10 by pulse trains, whose inputs are 0 but for a fifth, as those of digits."""
    torch.manual_seed(0)
    sizes = (784, 256), (256, 128), (128, 10)
    ideal = nn.Sequential(*[part for size in sizes for part in (nn.Linear(*size), nn.Sigmoid())][:-1])
    x, target = _labelled((batch, 784), batch)
    x = x.abs() * (torch.rand(x.shape) < 0.2)
    # ranges that one batch, learnt over and over, does not outgrow
    parts = {
        "device": updates.WINDOW,
        "update": updates.LAW,
        "pulses": EXACT,
        "adc": {"bits": 8, "range": "worst_case"},
    }
    spec = CrossbarSpec.model_validate({**SPEC, **parts})
    return _steps(ideal, x, target, aihwkit_steps(ideal, RATE, updates.LAW, EXACT), spec)


def _beside_others(ideal: nn.Module, x: Tensor, target: Tensor, compiled: bool = False) -> Contenders:
    plain = on_tiles(ideal, Tiles(TILE, noise=NOISE))
    others: Trained = {"plain torch": (plain, torch.optim.SGD(plain.parameters(), RATE))}
    return _steps(ideal, x, target, others | lightning_steps(ideal, RATE), compiled=compiled)


def mobilenet_step(batch: int = 32, size: int = 32) -> Contenders:
    """The same of six inverted residuals, whose depthwise convolutions have nine lines and one output a group."""
    torch.manual_seed(0)
    return _steps(inverted_residuals(10), *_labelled((batch, 3, size, size), batch), {})


def resnet50_step(spec: CrossbarSpec | None = None, batch: int = 4) -> Contenders:
    """The same of a network for images of 224 x 224, with 25 million weights."""
    torch.manual_seed(0)
    return _steps(resnet50(10), *_labelled((batch, 3, 224, 224), batch), {}, spec)


def transformer_step(width: int = 256, tokens: int = 64, batch: int = 8) -> Contenders:
    """The same of an encoder layer with four heads, fourfold inside, and a classifier of its tokens."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    ideal = nn.Sequential(encoder, nn.Flatten(0, 1), nn.Linear(width, 10))
    return _steps(ideal, *_labelled((batch, tokens, width), batch * tokens), {})


def lstm_step(width: int = 256, tokens: int = 35, batch: int = 32) -> Contenders:
    """The same of an LSTM and a classifier of its last output."""
    torch.manual_seed(0)
    ideal = Recurrent(width)
    return _steps(ideal, *_labelled((batch, tokens, width), batch), {})


class Recurrent(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.lstm, self.head = nn.LSTM(width, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(x)[0][:, -1])
        return y


def spec_step(
    spec: CrossbarSpec, shape: tuple[int, int, int] = (1, 28, 28), batch: int = 64, algorithm: str = "sgd"
) -> Contenders:
    """The same of a network on the crossbars of a spec, in situ by an algorithm where that has a law."""
    ideal, others = _network(shape), {}
    if spec.update is not None and spec.pulses is not None and algorithm == "sgd":
        others = aihwkit_steps(ideal, RATE, spec.update, spec.pulses)
    return _steps(ideal, *_labelled((batch, *shape), batch), others, spec, algorithm=algorithm)


def _steps(
    ideal: nn.Module, x: Tensor, target: Tensor, others: Trained, spec: CrossbarSpec | None = None, compiled: bool = False,
    algorithm: str = "sgd",
) -> Contenders:  # fmt: skip
    spec = spec or CrossbarSpec.model_validate(SPEC)
    analog, _ = convert(ideal, spec)
    make = torch.optim.SGD if spec.update is None else OPTIMIZERS[algorithm]
    trained: Trained = {
        "ideal": (ideal, torch.optim.SGD(ideal.parameters(), RATE)),
        "gpuxbar": (analog, make(analog.parameters(), RATE)),
    }
    if compiled:
        trained["gpuxbar, compiled"] = (cast(nn.Module, torch.compile(analog)), trained["gpuxbar"][1])
    steps = {
        name: partial(_step, model, optimiser, x, target)
        for name, (model, optimiser) in (trained | others).items()
    }
    calibrate(analog, [x])
    return Contenders(steps, lambda: _layers_error(analog, steps["gpuxbar"]))  # type: ignore[arg-type]


def _network(shape: tuple[int, int, int]) -> nn.Module:
    torch.manual_seed(0)
    return network(shape, 10)[1]


def _labelled(shape: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """Inputs, and labels of ten classes."""
    return torch.randn(shape), torch.randint(10, (count,))


def scaling(calls: int = 20) -> Contenders:
    """The noisy Linear product on one thread and on two, `calls` at a time: a change of threads costs once for all."""
    case = linear()

    def on(count: int) -> None:
        with threads(count):
            for _ in range(calls):
                case.run["gpuxbar"]()

    run: dict[str, Callable[[], object]] = {"one thread": lambda: on(1), "gpuxbar": lambda: on(2)}
    return Contenders(run, case.check, pieces=dict.fromkeys(run, calls))


LINEAR = "1024 x 1024, batch 256, 128 x 128 tiles, 8-bit DAC and ADC"
ONE = "1024 x 1024, one vector, 128 x 128 tiles, 8-bit DAC and ADC"
CONV = "64 -> 64, 3 x 3, 32 x 32, batch 32, 128-row tiles, 8-bit DAC and ADC, noise"
UPDATE = "1024 x 1024, batch 256, soft bounds with every spread and cycle noise"
PULSES = "1024 x 1024, batch 256, 31 slots, every spread"
SPARSE, DENSE = "0.06 coincidences a device and sample", "0.6 coincidences a device and sample"
TXSIM = presets.txsim_in_situ().with_overrides(
    {
        "parasitics": {
            "r_wordline": 2.5, "r_bitline": 2.5, "r_source": 100.0, "r_sink": 100.0, "anchor": "ladder", "refresh_interval": 10,
        }
    }
)  # fmt: skip
SLICES = {"mapping": {"slices": 16, "slice_bits": 2}, "carry": {"scheme": "accumulate"}}
PULSED = CrossbarSpec.model_validate(
    {**SPEC, "device": updates.WINDOW, "update": updates.CONSTANT, "pulses": {"mode": "aggregated"}}
)
EXACT = PulseTrain()
WIRES = "training step with TxSim's law, and wires of 2.5 ohm a segment, a tenth of the tiles solved a step"
PAIR, SLICED = "one pair a weight", "16 slices of 2 bits"
AIHWKIT = 36.0, 43.0  # its exact sequence in outer products: constant step, soft bounds
CASES = (
    Case("linear", f"{LINEAR}, noise", 1.8, linear, memory_mb=8),
    Case("linear-fast", f"{LINEAR}, noise of the fast generator", 1.8, partial(linear, generator="fast")),
    Case("linear-clean", f"{LINEAR}, no noise", 1.25, partial(linear, noise=0.0)),
    Case("linear-transposed", f"{LINEAR}, noise, driven backwards", 1.8, partial(linear, transposed=True)),
    Case("linear-one", f"{ONE}, noise", 2.5, partial(linear, batch=1)),
    Case("conv", CONV, 3.0, conv, memory_mb=32),
    Case("conv-drivers", f"{CONV}, DACs with errors", 3.45, partial(conv, flawed=True)),
    Case("mlp-step", "six layers of 64, batch 8: training step", None, mlp_step),
    Case("lenet5-step", "28 x 28, batch 64: training step", 2.2, partial(training_step, (1, 28, 28), 64)),
    Case("resnet20-step", "32 x 32, batch 32: training step", 3.0, partial(training_step, (3, 32, 32), 32)),
    Case(
        "mobilenet-step", "six inverted residuals, 32 x 32, batch 32: training step", 3.0, mobilenet_step
    ),
    Case("resnet50-step", "224 x 224, batch 4: training step", 2.0, resnet50_step),
    Case("transformer-step", "encoder layer of 256, 8 x 64 tokens: training step", 2.0, transformer_step),
    Case("lstm-step", "LSTM of 256, 35 tokens, batch 32: training step", 2.0, lstm_step),
    Case(
        "txsim-step", "LeNet-5, batch 64: training step, 16 slices, 1-bit streams, exact conversions of TxSim's preset", 2.2,
        partial(spec_step, presets.txsim()),
    ),
    Case(
        "isaac-step", "LeNet-5, batch 64: training step, 8 slices, 1-bit streams, 8-bit conversions of ISAAC's preset, noise", None,
        partial(spec_step, presets.isaac().with_overrides({"read_noise": {"sigma": 1e-7}})),
    ),
    Case("update", f"{UPDATE}: kernel", 2.0, partial(update, updates.expected_update)),
    Case(
        "update-map",
        f"{UPDATE}: kernel, devices from a map of 12 bytes each",
        None,
        partial(update, partial(updates.expected_update, stored=True)),
    ),
    Case(
        "update-sliced", f"{UPDATE}: kernel, 4 slices of 2 bits, all of which take a digit", None,
        partial(update, partial(updates.expected_update, sliced=True)),
    ),
    Case(
        "update-streamed",
        "1024 x 1024, batch 32, every spread and cycle noise: kernels, inputs of 8 bits into 4 slices of 2 bits, all of which "
        "take digits",
        None,
        partial(update, updates.streamed),
    ),
    Case(
        "carry", "1024 x 1024, batch 256, 4 slices of 2 bits: carries with write noise, out of half of the lowest digits", None,
        partial(update, updates.carries),
    ),
    Case(
        "update-step",
        f"{UPDATE}: InSituSGD, with its outer product",
        2.0,
        partial(update, updates.in_situ_step),
    ),
    Case(
        "pulse-constant", f"{PULSES}: constant steps with cycle noise, counted over the batch; {SPARSE}", 5.0,
        partial(update, updates.pulse_update, updates.CONSTANT, "aggregated"),
    ),
    Case(
        "pulse-soft-bounds", f"{PULSES}: one-sided soft bounds, counted over the batch; {SPARSE}", 5.0,
        partial(update, updates.pulse_update, updates.COUNTED_SOFT, "aggregated"),
    ),
    Case(
        "pulse-exact-constant", f"{PULSES}: constant steps with cycle noise, in sequence; {SPARSE}", AIHWKIT[0],
        partial(update, updates.pulse_update, updates.CONSTANT, "exact"),
    ),
    Case(
        "pulse-exact-soft-bounds", f"{PULSES}: soft bounds with cycle noise, in sequence; {SPARSE}", AIHWKIT[1],
        partial(update, updates.pulse_update, updates.LAW, "exact"),
    ),
    Case(
        "pulse-exact-dense", f"{PULSES}: soft bounds with cycle noise, in sequence; {DENSE}", None,
        partial(update, updates.pulse_update, updates.LAW, "exact", 1.0),
    ),
    Case(
        "mlp-in-situ-step", "784-256-128-10, batch 10: training step by pulses, in sequence", None, partial(mlp_in_situ_step, 10)
    ),
    Case("mlp-online-step", "784-256-128-10, one sample: training step by pulses", None, partial(mlp_in_situ_step, 1)),
    Case(
        "lenet5-in-situ-step", "28 x 28, batch 64: training step by pulses, counted over the batch", 4.0,
        partial(spec_step, PULSED),
    ),
    Case(
        "lenet5-agad-in-situ-step", "28 x 28, batch 64: training step by AGAD by pulses, counted over the batch", None,
        partial(spec_step, PULSED, algorithm="agad"),
    ),
    Case(
        "resnet20-in-situ-step", "32 x 32, batch 32: training step by pulses, counted over the batch", 5.0,
        partial(spec_step, PULSED, (3, 32, 32), 32),
    ),
    Case(
        "resnet50-in-situ-step", "224 x 224, batch 4: training step by pulses, counted over the batch", 5.0,
        partial(resnet50_step, PULSED),
    ),
    Case("txsim-in-situ-step", f"LeNet-5, batch 64: {WIRES}: {PAIR}", None, partial(spec_step, TXSIM)),
    Case(
        "txsim-sliced-in-situ-step", f"LeNet-5, batch 64: {WIRES}: {SLICED}", None,
        partial(spec_step, TXSIM.with_overrides(SLICES)),
    ),
    Case(
        "txsim-resnet20-in-situ-step", f"ResNet-20, batch 32: {WIRES}: {PAIR}", 2.0,
        partial(spec_step, TXSIM, (3, 32, 32), 32),
    ),
    Case(
        "txsim-sliced-resnet20-in-situ-step", f"ResNet-20, batch 32: {WIRES}: {SLICED}", None,
        partial(spec_step, TXSIM.with_overrides(SLICES), (3, 32, 32), 32),
    ),
    Case(
        "txsim-resnet50-in-situ-step", f"ResNet-50, 224 x 224, batch 4: {WIRES}: {PAIR}", 2.0, partial(resnet50_step, TXSIM)
    ),
    Case("linear-two-threads", f"{LINEAR}, noise: one thread's time over two's", 1.7, scaling, speedup=True),
)  # fmt: skip


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch and the host kernels on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    set_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        set_threads(before)


def _settings(top: float, *, transposed: bool, noise: float, generator: str) -> dict[str, Any]:
    """Of `ops.tile_mvm`: four standard deviations of a partial sum are the ADC's range."""
    # inputs have variance 1 where `top` drives V_READ; conductances are uniform in +-G_MAX
    deviation = np.sqrt(TILE / 3) * G_MAX * V_READ / top
    lsb = float(4 * deviation / 127)
    return {
        "tile_rows": TILE, "tile_cols": TILE, "transposed": transposed, "v_lsb": V_READ / 127, "adc_bits": 8,
        "adc_lsb": lsb, "read_noise": noise * lsb, "generator": generator, "seed": 2**40 + 1, "step": 3,
    }  # fmt: skip


def _oracle(settings: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in settings.items() if key not in ("tile_rows", "tile_cols")}
    return rest | {"tile": TILE}


def _codes_error(y: np.ndarray, expected: np.ndarray, step: float) -> float:
    """Largest relative error, but for codes on a rounding edge: those may differ, by whole steps and rarely."""
    top = np.abs(expected).max()
    off = np.abs(y - expected)
    flipped = off > 1e-5 * top
    steps = off[flipped] / step
    wrong = (np.abs(steps - np.rint(steps)) > 0.02) | (steps > 2.5)
    if not np.isfinite(y).all() or wrong.any() or flipped.mean() > 2e-3:
        raise OracleMismatch(
            f"{flipped.sum()} of {off.size} results are off, {wrong.sum()} of them by more than two codes or by parts of one; "
            f"the largest by {off.max() / top:.1e} of the range"
        )
    return float(off[~flipped].max() / top)


def _step(model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, target: Tensor) -> Tensor:
    optimiser.zero_grad()
    loss = functional.cross_entropy(model(x), target)
    loss.backward()
    optimiser.step()
    return loss.detach()


def _layers_error(model: nn.Module, step: Callable[[], object]) -> float:
    """Each crossbar layer on two samples of a step, forwards and backwards, by the library and by the oracle."""
    layers = [m for m in model.modules() if isinstance(m, (AnalogLinear, AnalogConv2d))]
    seen: dict[nn.Module, dict[str, Tensor]] = {layer: {} for layer in layers}

    def watch(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        def rows(values: Tensor) -> Tensor:  # as the layer drives them
            found = values.detach()[:2]
            return found if isinstance(layer, AnalogConv2d) else found.reshape(-1, found.shape[-1])

        seen[layer]["x"] = rows(args[0])
        y.register_hook(lambda grad: seen[layer].update(grad=rows(grad)))

    hooks = [layer.register_forward_hook(watch) for layer in layers]
    step()
    for hook in hooks:
        hook.remove()
    return max(_layer_error(layer, **seen[layer]) for layer in layers)


def _layer_error(layer: AnalogLinear | AnalogConv2d, x: Tensor, grad: Tensor) -> float:
    """Error that 98 % of a result's and the gradients' values stay below, relative to their root mean square.

    DACs drive values off the edges of their codes, where a difference in the last place would become one of a code. The other
    2 % are left to ADC codes on an edge.
    """
    _, lsb = layer.dac_inputs(x, layer.dac_top(x))
    x = _off_edges(x, lsb, layer.plan.forward)
    w_max = layer.conductances().w_max
    driven, lsb = driven_gradient(gradient_values(grad, w_max, layer.plan), w_max, layer.plan)
    scale = (w_max * layer.plan.unit).view(-1, *[1] * (grad.dim() - 2))
    grad = _off_edges(driven, lsb, layer.plan.backward) / scale

    def results() -> tuple[Tensor, ...]:
        layer.read_step.fill_(7)  # the same draws
        driven = x.clone().requires_grad_()
        y = layer(driven)
        # pulse trains need no weight gradient; their update is checked by itself
        found = torch.autograd.grad(y, (driven,) if layer.keeps_operands else (driven, layer.weight), grad)
        layer.streams.forget()
        return y.detach(), *found

    found = results()
    with _reference_backend():
        oracle = results()
    worst = max(
        float((a - b).abs().flatten().quantile(0.98) / b.square().mean().sqrt())
        for a, b in zip(found, oracle, strict=True)
    )
    if not worst < 2e-3:
        raise OracleMismatch(
            f"layer {layer.name}: 2 % of its values are off by {worst:.1e} of their root mean square or more; "
            "2e-3 is allowed"
        )
    return worst


def _off_edges(values: Tensor, lsb: Tensor, read: Read) -> Tensor:
    """Values of the same codes of a DAC, each at most 0.3 of a code from its middle; the largest code, which sets `lsb`, on it."""
    if not read.code_max:
        return values
    unit = lsb.view(-1, *[1] * (values.dim() - 1))
    codes = (values / unit).round()
    off = 0.6 * torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) - 0.3
    return (codes + off * (codes.abs() < read.code_max)) * unit


@contextmanager
def _reference_backend() -> Iterator[None]:
    before, host.WANTED = host.WANTED, "reference"
    try:
        yield
    finally:
        host.WANTED = before
