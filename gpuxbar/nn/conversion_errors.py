"""What converters and noise take from a model's products: values and currents that clip, rounding, noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from gpuxbar.bridge.analog_mvm import less_reference
from gpuxbar.bridge.internals import _DisableAutocast
from gpuxbar.mapping.plan import IDEAL, Read
from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.cells import Cells
from gpuxbar.nn.converters import Converter
from gpuxbar.nn.models import crossbar_layers, require_apart, require_whole
from gpuxbar.nn.table import columns
from gpuxbar.nn.watch import Lines, TileSums, passes, require_batches, tile_sums, undisturbed, watch
from gpuxbar.reference import bent

__all__ = ["ConversionErrors", "ReadErrors", "conversion_errors"]

FLOAT32 = 1e-6  # relative errors up to which are those of its sums
KINDS = "dac_clipping", "dac_rounding", "driving", "noise", "adc_clipping", "adc_rounding"


@dataclass(frozen=True)
class ReadErrors:
    """One direction in which a layer is read. Errors are those of its products, forwards with the input and backwards with the
    gradient of the output (of a convolution, before patches are added up), against exact ones with the same conductances: root
    mean square over root mean square.

    Attributes:
        layer: Its name in the model, before this was compiled or wrapped.
        read: "forward" or "backward".
        dac_clipped: Share of the values beyond the DAC's range.
        dac_clipping: Error by what is cut off of these values.
        dac_rounding: Error by rounding to DAC codes.
        driving: Error by gain, offset and non-linearity of the DACs, and by devices that are not ohmic.
        noise: Error by read noise, and by gain, offset and non-linearity of the ADCs.
        adc_clipped: Share of the conversions beyond the ADC's range, as gradients count them (of a converter without sign,
            those above it).
        adc_clipping: Error by what is cut off of these currents.
        adc_rounding: Error by rounding to ADC codes.
    """

    layer: str
    read: str
    dac_clipped: float
    dac_clipping: float
    dac_rounding: float
    driving: float
    noise: float
    adc_clipped: float
    adc_clipping: float
    adc_rounding: float

    @property
    def largest(self) -> str:
        """The kind of error that is largest, "none" where all are those of float32."""
        kind = max(KINDS, key=lambda name: getattr(self, name))
        return _words(kind) if getattr(self, kind) > FLOAT32 else "none"


@dataclass(frozen=True)
class ConversionErrors:
    """Every read of a model, `reads`, a `ReadErrors` each; printed as a table."""

    reads: tuple[ReadErrors, ...]

    def __repr__(self) -> str:
        head = (
            "layer", "read", "DAC clips", "error", "DAC rounding", "driving", "noise", "ADC clips", "error", "ADC rounding", "largest",
        )  # fmt: skip
        rows = (
            (row.layer, row.read, *(f"{share:.2%}" for share in astuple(row)[2:]), row.largest)
            for row in self.reads
        )
        return columns(head, list(rows))

    def draw(self) -> Any:
        """The errors of every read, a `matplotlib.figure.Figure`; `figure.savefig("errors.png")` writes it."""
        from matplotlib.figure import Figure

        ways = list(dict.fromkeys(row.read for row in self.reads))
        figure = Figure(figsize=(6.5, 1 + 2.4 * len(ways)), layout="constrained")
        axes = figure.subplots(len(ways), squeeze=False).ravel() if ways else ()
        for axis, way in zip(axes, ways, strict=True):
            rows = [row for row in self.reads if row.read == way]
            for kind in KINDS:
                # no error has no place on a logarithmic axis
                errors = [100 * getattr(row, kind) or nan for row in rows]
                axis.plot(errors, "o-", label=_words(kind))
            axis.set(yscale="log", ylabel="error (%)", title=f"{way} reads")
            axis.set_xticks(
                range(len(rows)), [row.layer for row in rows], rotation=90 if len(rows) > 6 else 0
            )
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
        return figure


def conversion_errors(
    model: nn.Module,
    loader: Iterable[Any],
    batches: int = 4,
    loss: Callable[[Tensor, Any], Tensor] | None = None,
    step: Callable[[Any], Tensor] | None = None,
) -> ConversionErrors:
    """Tell of every read of a model what clips, and which errors come of clipping, of rounding and of noise.

    Layers read as they do in evaluation, with their ADCs, on some batches. Of a batch and layer, rows are looked at as
    `gpuxbar.calibrate` does, and their errors computed beside the read, in float32, with noise of their own draws.
    Training steps pay nothing for it.

    Noise and rounding that grow backwards as a network learns are those of gradients that lie far below the largest one of their
    batch; `spec.Backward` says how to give each sample a range of its own.

    Args:
        model: A converted model, calibrated; its weights, statistics, gradients and random numbers stay as they are.
        loader, batches, loss, step: As of `gpuxbar.calibrate`; a step that returns an output without gradient leaves transposed
            reads out.

    Returns:
        A row for every read that batches or gradients passed, but for the ideal transposed reads of `backward.mode`.

    Raises:
        TypeError, ValueError: As `gpuxbar.calibrate`, and where a range is not calibrated.

    Example:
        print(gx.conversion_errors(model, loader, loss=loss))
    """
    require_batches("conversion_errors", loader, batches, loss, step)
    names = {layer: name for name, layer in crossbar_layers("conversion_errors", model).items()}
    require_apart("conversion_errors", names)
    if not names:
        return ConversionErrors(())
    require_whole("conversion_errors", model)
    found: dict[tuple[AnalogLayer, bool], _Sums] = {}

    def look(layer: AnalogLayer, backward: bool, lines: Lines) -> None:
        if not (backward and layer.plan.backward.ideal):
            with _DisableAutocast():
                found.setdefault((layer, backward), _Sums(layer, backward)).add(lines)

    with undisturbed(model):
        watch("conversion_errors", model, list(names), loader, batches, loss, step, look)
    return ConversionErrors(
        tuple(
            found[layer, backward].row(name or layer.name)
            for layer, name in names.items()
            for backward in (False, True)
            if (layer, backward) in found
        )
    )


def _words(kind: str) -> str:
    return kind.replace("_", " ").replace("dac", "DAC").replace("adc", "ADC")


class _Sums:
    """Counts and squared errors of a read, over rows and batches."""

    def __init__(self, layer: AnalogLayer, backward: bool):
        self.layer, self.backward = layer, backward
        device = layer.weight.device
        # of DAC and ADC
        self.clipped, self.counts = torch.zeros(2, dtype=torch.float64, device=device), [0, 0]
        # of results, and of errors
        self.squares = torch.zeros(1 + len(KINDS), dtype=torch.float64, device=device)
        self.generator = torch.Generator(device).manual_seed(layer.plan.seed)

    def add(self, lines: Lines) -> None:
        """Look at the rows of a batch."""
        layer, backward = self.layer, self.backward
        converter, cells = layer.converters()[backward], layer.conductances()
        read = converter.read
        codes = lines.driven / lines.lsb
        digits, drivers = passes(codes, read), layer.drivers(backward)
        held = _joined(digits, read) * lines.lsb if read.code_max else lines.driven
        seen = held
        if drivers is not None:
            volts = [drivers.driven(each, read.v_lsb) for each in digits]
            seen = _joined(volts, read) * lines.lsb / read.v_lsb
        errors = [
            self._product(cells, part)
            for part in (lines.values, lines.driven - lines.values, held - lines.driven, seen - held)
        ]
        scales = (
            torch.tensor(scale, dtype=torch.float32, device=codes.device)
            for scale in (_stream_scale(read), layer.plan.slice_scale)
        )
        weights = torch.outer(*scales)
        of_tiles: Any = 0
        for tile, sums in enumerate(tile_sums(layer, cells, read, codes, backward)):
            parts, clipped = self._converted(converter, tile, sums)
            of_tiles = of_tiles + torch.einsum("ps,kpsbo->kbo", weights, parts)
            self.clipped[1] += clipped
            self.counts[1] += sums.current.numel()
        errors += [self._digital(cells, part * lines.lsb / read.v_lsb) for part in of_tiles]
        self.squares += torch.stack([error.square().sum() for error in errors])
        self.clipped[0] += lines.clipped
        self.counts[0] += lines.total

    def _converted(self, converter: Converter, tile: int, sums: TileSums) -> tuple[Tensor, Tensor]:
        """Errors of a tile's conversions, A, by noise, clipping and rounding: [3, passes, planes, rows, sensed lines]; and how many
        clip."""
        read, current = converter.read, sums.current
        z = torch.randn(current.shape, generator=self.generator, dtype=current.dtype, device=current.device)
        arrived = (
            current + z * torch.as_tensor(sums.variance, dtype=current.dtype, device=current.device).sqrt()
        )
        if not read.adc_bits:
            none = torch.zeros_like(current)
            return torch.stack([arrived - current, none, none]), none.sum()
        most, least = read.adc_code_max, -read.adc_code_max if read.adc_signed else 0
        lsb = converter.full / most
        error = self.layer.back_adc_error if self.backward else self.layer.adc_error
        if error is not None:
            gain, offset, *inl = error[:, :, tile, None]
            arrived = arrived * gain + offset
            for largest in inl:
                arrived = bent(arrived / lsb, largest, most) * lsb
        steps = arrived / lsb
        inside = steps.clamp(least - 0.5, most + 0.5)
        code = inside.round().clamp(least, most)
        beyond = steps - inside
        clipped = ((beyond > 0) | ((beyond < 0) & read.adc_signed)).sum()
        return torch.stack([arrived - current, -beyond * lsb, (code - inside) * lsb]), clipped

    def _product(self, cells: Cells, values: Tensor) -> Tensor:
        """What the conductances make of values exactly."""
        (sums,) = tile_sums(self.layer, cells, IDEAL, values, self.backward)
        scale = torch.tensor(self.layer.plan.slice_scale, dtype=torch.float32, device=values.device)
        return self._digital(cells, torch.einsum("s,psbo->bo", scale, sums.current))

    def _digital(self, cells: Cells, y: Tensor) -> Tensor:
        """Results in digital units (to a factor of the layer) of what lines sense in them, reference lines too."""
        plan = self.layer.plan
        y = y if plan.reference == (0, 0) else less_reference(y, plan, self.backward)
        return y if self.backward else y * cells.w_max

    def row(self, name: str) -> ReadErrors:
        """What was found."""
        dac, adc = (
            share / max(count, 1) for share, count in zip(self.clipped.tolist(), self.counts, strict=True)
        )
        of_result, *of_errors = self.squares.sqrt().tolist()
        errors = {
            kind: error / of_result if of_result else 0.0
            for kind, error in zip(KINDS, of_errors, strict=True)
        }
        way = "backward" if self.backward else "forward"
        return ReadErrors(layer=name, read=way, dac_clipped=dac, adc_clipped=adc, **errors)


def _stream_scale(read: Read) -> list[float]:
    """Digital weight of every pass."""
    scale = [2.0 ** (read.stream_bits * k) for k in range(read.streams)]
    return scale + [-each for each in scale] if read.phases == 2 else scale


def _joined(parts: list[Tensor], read: Read) -> Tensor:
    """What passes stand for, in codes."""
    total: Any = 0
    for part, scale in zip(parts, _stream_scale(read), strict=True):
        total = total + scale * part
    return total
