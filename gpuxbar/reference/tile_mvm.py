"""Reading a stack of tiles, in NumPy float64: the oracle of `ops.tile_mvm`.

    i[p, s, t, b, o] = sum_{r in tile t} v[p, b, r] g[s, r, o] + noise, v of digits as `Drivers` has it
    n                = (i gain[s, t, o] + offset[s, t, o]) / adc_lsb[o],  u = clip(n / code_max) within +-1
    code             = clip(round(n + 3 sqrt(3) / 2 inl[s, t, o] (u - u**3)))
    y[b, o]          = row_scale[b] col_scale[o] sum_{p, s} stream_scale[p] slice_scale[s] adc_lsb[o] sum_t code
                       + bias[o]

Source: Shafiee et al., ISAAC, ISCA 2016 (tiles, streams, slices).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import sinh, sqrt
from typing import Any

import numpy as np

from gpuxbar.reference.random import Purpose, normals

__all__ = [
    "LINE_ORDERS",
    "ConvGeometry",
    "Drivers",
    "bent",
    "by_group",
    "fold",
    "stream_digits",
    "tile_mvm",
    "tile_spans",
    "unfold",
]

LINE_ORDERS = ("channel_position", "position_channel")


@dataclass(frozen=True)
class ConvGeometry:
    """Shape of a convolution read: input [N, groups * channels, height, width], zero padding.

    `line_order`: of a patch on the wordlines of a group, "channel_position" (all positions of the kernel for one channel, then
    for the next) or "position_channel" (all channels at one position, then at the next).
    """

    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    line_order: str = "channel_position"

    def __post_init__(self) -> None:
        if self.line_order not in LINE_ORDERS:
            raise ValueError(
                f"ConvGeometry: `line_order` must be one of {', '.join(LINE_ORDERS)}, got {self.line_order!r}; choose one"
            )
        for name, low in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            if min(getattr(self, name)) < low:
                raise ValueError(
                    f"ConvGeometry: `{name}` must be at least {low}, got {getattr(self, name)}; see torch.nn.Conv2d"
                )
        if min(self.out) < 1:
            raise ValueError(
                f"ConvGeometry: `kernel` must fit into the padded image, got {self.kernel} for {self.height} x {self.width} "
                f"with padding {self.padding} and dilation {self.dilation}; pad more or take a smaller kernel"
            )

    @cached_property
    def out(self) -> tuple[int, int]:
        """Output height and width."""
        size = (self.height, self.width)
        h, w = (
            (size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return h, w

    @cached_property
    def pixels(self) -> int:
        """Output pixels of one image."""
        return self.out[0] * self.out[1]

    @cached_property
    def inputs(self) -> int:
        """Wordlines of one group."""
        return self.channels * self.kernel[0] * self.kernel[1]


def _taps(conv: ConvGeometry) -> Iterator[tuple[int, int, slice, slice]]:
    """(ky, kx, rows, columns) of the padded image that every kernel tap sees."""
    (kh, kw), (sh, sw), (dh, dw), (oh, ow) = conv.kernel, conv.stride, conv.dilation, conv.out
    for ky in range(kh):
        for kx in range(kw):
            y, x = ky * dh, kx * dw
            yield ky, kx, slice(y, y + (oh - 1) * sh + 1, sh), slice(x, x + (ow - 1) * sw + 1, sw)


def unfold(x: np.ndarray, conv: ConvGeometry) -> np.ndarray:
    """Patches [N * pixels, groups * inputs] of images [N, groups * channels, height, width]."""
    n, planes = x.shape[:2]
    (ph, pw), (kh, kw), (oh, ow) = conv.padding, conv.kernel, conv.out
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    patches = np.empty((n, oh, ow, planes, kh, kw), dtype=x.dtype)
    for ky, kx, rows, cols in _taps(conv):
        patches[..., ky, kx] = padded[:, :, rows, cols].transpose(0, 2, 3, 1)
    if conv.line_order == "position_channel":
        groups = planes // conv.channels
        patches = np.moveaxis(patches.reshape(n, oh, ow, groups, conv.channels, kh, kw), 4, 6)
    return patches.reshape(n * oh * ow, planes * kh * kw)


def fold(patches: np.ndarray, n: int, conv: ConvGeometry) -> np.ndarray:
    """Adjoint of `unfold`: images [n, groups * channels, height, width]."""
    (ph, pw), (kh, kw), (oh, ow) = conv.padding, conv.kernel, conv.out
    planes = patches.shape[1] // (kh * kw)
    if conv.line_order == "position_channel":
        groups = planes // conv.channels
        patches = np.moveaxis(patches.reshape(n, oh, ow, groups, kh, kw, conv.channels), 6, 4)
    cells = patches.reshape(n, oh, ow, planes, kh, kw)
    padded = np.zeros((n, planes, conv.height + 2 * ph, conv.width + 2 * pw), dtype=patches.dtype)
    for ky, kx, rows, cols in _taps(conv):
        padded[:, :, rows, cols] += cells[..., ky, kx].transpose(0, 3, 1, 2)
    return padded[:, :, ph : ph + conv.height, pw : pw + conv.width]


def by_group(a: np.ndarray, groups: int) -> np.ndarray:
    """Lines of groups side by side, [B, G * lines, ...], as [B, G, lines, ...]."""
    return a.reshape(len(a), groups, a.shape[1] // groups, *a.shape[2:])


def tile_spans(length: int, tile: int | None) -> list[slice]:
    """The slices of an axis that the tiles take; the last may be short."""
    tile = tile or length
    return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]


def stream_digits(codes: np.ndarray, stream_bits: int, streams: int, phases: int) -> list[np.ndarray]:
    """What the DAC drives in every pass; pass index = phase * streams + stream."""
    mask = 2**stream_bits - 1
    magnitude = np.abs(codes.astype(np.int64))
    digits = [(magnitude >> (k * stream_bits) & mask) for k in range(streams)]
    if phases == 1:
        return [np.sign(codes) * d for d in digits]
    return [np.where(codes > 0, d, 0) for d in digits] + [np.where(codes < 0, d, 0) for d in digits]


def bent(steps, inl, code_max):
    """Steps as a converter finds them, or makes them, whose curve is `inl` steps off at most; arrays of NumPy or tensors."""
    u = (steps / code_max).clip(-1, 1)
    return steps + 1.5 * sqrt(3) * inl * (u - u**3)


@dataclass(frozen=True)
class Drivers:
    """What lines are driven with for digits, and what devices make of it: DACs with errors, devices that are not ohmic.

        volts = (bent(digit, inl, v_read / v_lsb) v_lsb) gain + offset
        v     = v_read sinh(volts / v_sinh) / sinh(v_read / v_sinh)

    with v the voltage at which a device of conductance g, that at `v_read`, would carry the same current if it were ohmic. Every
    line has one DAC, which drives it in all tiles, planes and passes; what drives nothing (a digit of 0, padding of images)
    is driven with `offset`.

    Attributes:
        v_read: Voltage of the largest digit, V.
        error: Gain, offset in V, and integral non-linearity in steps of the DAC of every line, as of `ops.tile_mvm`'s ADCs; float32
            [3, lines]. None: they have none.
        v_sinh: Voltage over which the current of a device bends, V; None: devices are ohmic.

    Source: the current of filaments with a gap, I0 exp(-gap / g0) sinh(v / v_sinh): Guan, Yu, Wong, IEEE Electron Device Letters
    33, 1405 (2012), doi:10.1109/LED.2012.2210856, as in the Verilog-A model of Jiang, Wong (2014), doi:10.4231/D37H1DN48.
    """

    v_read: float
    error: Any = None
    v_sinh: float | None = None

    def driven(self, digits, v_lsb):
        """The voltages v for digits [..., lines], arrays of NumPy or tensors; `v_lsb`: voltage of one digit, V."""
        volts = digits * v_lsb
        if self.error is not None:
            gain, offset, inl = self.error
            volts = bent(digits, inl, self.v_read / v_lsb) * v_lsb * gain + offset
        if self.v_sinh is None:
            return volts
        bend = volts / self.v_sinh
        # not by exponentials, which cancel in float32
        of_devices = bend.sinh() if hasattr(bend, "sinh") else np.sinh(bend)
        return self.v_read / sinh(self.v_read / self.v_sinh) * of_devices


def tile_mvm(
    v,
    g,
    *,
    groups=1,
    tile=None,
    transposed=False,
    v_lsb=1.0,
    stream_bits=0,
    streams=1,
    phases=1,
    slice_scale=None,
    adc_bits=0,
    adc_signed=True,
    adc_lsb=None,
    adc_gain=None,
    adc_offset=None,
    adc_inl=None,
    read_noise=0.0,
    noise_var=None,
    generator="exact",
    seed=0,
    step=0,
    row_offset=0,
    row_scale=None,
    col_scale=None,
    bias=None,
    conv=None,
    want_gate=False,
    drivers=None,
):
    """See `gpuxbar.ops.tile_mvm`; float64 throughout. Returns y, or (y, gate) with `want_gate`."""
    g = np.asarray(g, dtype=np.float64)
    planes, rows, cols = g.shape
    inputs = rows // groups
    n_images = v.shape[0]
    if conv is not None:
        v = v.transpose(0, 2, 3, 1).reshape(-1, v.shape[1]) if transposed else unfold(v, conv)
    drive, sense = (cols, inputs) if transposed else (inputs, cols)
    spans = tile_spans(drive, tile)
    batch = v.shape[0]
    passes = stream_digits(v, stream_bits, streams, phases) if stream_bits else [v]
    stream_scale = [2.0 ** (stream_bits * k) for k in range(streams)]
    stream_scale += [-s for s in stream_scale] if phases == 2 else []
    slice_scale = np.ones(planes) if slice_scale is None else np.asarray(slice_scale, dtype=np.float64)
    purpose = Purpose.READ_TRANSPOSED if transposed else Purpose.READ
    code_max = 2 ** (adc_bits - 1) - 1 if adc_signed else 2**adc_bits - 1
    code_min = -code_max if adc_signed else 0
    lsb = np.asarray(adc_lsb, np.float64).ravel() if adc_bits else None

    y = np.zeros((batch, groups * sense))
    gate = np.zeros((batch, groups * sense))
    row_index = row_offset + np.arange(batch)
    for p, digits in enumerate(passes):
        digits = np.asarray(digits, np.float64)
        volts = digits * v_lsb if drivers is None else drivers.driven(digits, v_lsb)
        for s in range(planes):
            for t, span in enumerate(spans):
                current = np.empty((batch, groups * sense))
                variance = np.full((batch, groups * sense), float(read_noise) ** 2)
                for k in range(groups):
                    driven = volts[:, k * drive : (k + 1) * drive][:, span]
                    out = slice(k * sense, (k + 1) * sense)
                    block = slice(k * inputs, (k + 1) * inputs)
                    plane = g[s, block].T[span] if transposed else g[s, block][span]
                    current[:, out] = driven @ plane
                    if noise_var is not None:
                        var = np.asarray(noise_var, np.float64)[s, block]
                        variance[:, out] += driven**2 @ (var.T[span] if transposed else var[span])
                slot = (p * planes + s) * len(spans) + t
                if read_noise or noise_var is not None:
                    draw = {"purpose": purpose, "slot": slot, "step": int(step), "seed": seed}
                    current += np.sqrt(variance) * normals(
                        row_index, groups * sense, generator=generator, **draw
                    )
                weight = stream_scale[p] * slice_scale[s]
                if adc_bits:
                    if adc_gain is not None:
                        current = current * adc_gain[s, t]
                    if adc_offset is not None:
                        current = current + adc_offset[s, t]
                    steps = current / lsb
                    if adc_inl is not None:
                        steps = bent(steps, adc_inl[s, t], code_max)
                    code = np.clip(np.rint(steps), code_min, code_max)
                    y += weight * code * lsb
                    gate += abs(weight) * (
                        (steps <= code_max + 0.5) & ((steps >= code_min - 0.5) | (not adc_signed))
                    )
                else:
                    y += weight * current
                    gate += abs(weight)
    weights = len(spans) * np.abs(slice_scale).sum() * np.abs(stream_scale).sum()
    gate /= weights or 1.0
    if row_scale is not None:
        y *= np.repeat(np.asarray(row_scale, np.float64), batch // np.size(row_scale))[:, None]
    if col_scale is not None:
        y *= np.asarray(col_scale, np.float64)
    if bias is not None:
        y += np.asarray(bias, np.float64)
    if conv is not None:
        if transposed:
            y = fold(y, n_images, conv)
        else:
            y, gate = (
                np.ascontiguousarray(a.reshape(n_images, *conv.out, groups * sense).transpose(0, 3, 1, 2))
                for a in (y, gate)
            )
    return (y, gate) if want_gate else y
