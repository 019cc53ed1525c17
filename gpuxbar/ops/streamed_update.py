"""The update of sliced weights by outer products that are streamed into the slices, and the weights read out."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, In, Kernel, Out, Scalar, Struct, backend, cuda_device, host_call, library
from gpuxbar.ops.checks import check_kind, check_lines, check_numbers, require_finite
from gpuxbar.ops.device_update import device_update
from gpuxbar.ops.images import Conv
from gpuxbar.ops.outer_product import outer_product
from gpuxbar.ops.pairs import Pairs, Slices
from gpuxbar.reference.tile_mvm import ConvGeometry
from gpuxbar.spec import Carry

__all__ = ["KERNELS", "streamed_update"]

OP = "streamed_update"
WORKSPACE = 16 << 20  # bytes of bits and digits that the CPU holds at a time


def streamed_update(
    pairs: Pairs,
    x: Any,
    d: Any,
    *,
    rate: float,
    w_max: Any,
    groups: int = 1,
    conv: ConvGeometry | None = None,
    step: Any = 0,
    device: Device | None = None,
) -> Any:
    """Stream a batch of inputs and errors into sliced weights, in place, and read the weights out.

    With x_lsb = max|x| / (2**input_bits - 1) over the batch and a group, code = round(|x| / x_lsb), and `full` the units of
    a full weight, 2**(slices slice_bits) - 1:
    e[b, o] = -rate d[b, o] x_lsb full / w_max[o]                                  units for a code of 1
    digits[k, i, o] = sum_b sum_t sign(x[b, i]) bit_t(code[b, i]) digit_k(2**t e[b, o])
    where digit_k cuts a number as `device_update` cuts a change: at most a full weight, the lowest digit with what is below a
    unit. The sum of digits[k] 2**(k slice_bits) is so -rate d^T x of the rounded inputs, where no stream asks for more than
    a full weight; but slices gather sums of digits, of any sign and beyond the base, not the digits of a sum.

    Each slice's pair is then asked for its digits, in shares of its window, at most the whole window, in one step of its
    law, as by `device_update`: opposite writes of a batch cancel before the law sees them. Writes of one direction are as if
    made one after the other, since laws are flows and the noise of their pulses adds up (Agarwal's `cycle`, a share of a whole
    change, is smaller one by one). For samples in sequence, update after each. The outer product of the batch is never formed.

    Args:
        pairs: The devices, two slices or more with a carry of scheme "streamed"; changed in place. `ops.carry` puts digits in
            order.
        x: Inputs, float32 [B, G * I]; finite. With `conv` the images [N, G * channels, height, width] whose patches are the
            samples, image by image; max|x| is that of the images.
        d: Errors, the gradient of the loss by the outputs, float32 [B, G * O]; finite. With `conv` images of the outputs,
            [N, G * O, height, width].
        rate: Learning rate, above 0.
        w_max: Weight of a full pair of slices, whose digits are all 2**slice_bits - 1, float32 [G * O], above 0.
        groups: Arrays side by side, G.
        conv: Shape of the convolution whose patches drive the wordlines; no patch matrix is made.
        step: As for `device_update`.
        device: Where CuPy arrays are allocated and run; None: CuPy's current device and memory pool.

    Returns:
        Weights after the update, float32 [G, O, I], as `device_update` reads them. The same on any number of threads.

    Raises:
        TypeError: An array has another dtype, or `pairs` are no `ops.Pairs`.
        ValueError: Shapes disagree, an array is not contiguous, the carry is of another scheme, or a value is not finite
            (checked on the CPU; on a GPU no value is read back); pairs are unchanged.

    Source:
        Own formulation of outer products sliced by bits; the idea of gathering them in slices with headroom and of
        resolving carries later is that of Ankit et al., "PANTHER", IEEE Transactions on Computers 2020.
    """
    check_kind(OP, "pairs", pairs, Pairs)
    carry, bits = pairs.carry, pairs.slice_bits
    if carry is None or bits is None or carry.scheme != "streamed":
        got = "one pair" if carry is None else repr(carry.scheme)
        raise ValueError(
            f"{OP}: `carry.scheme` must be streamed, on two slices or more, got {got}; choose it, or update by device_update"
        )
    check_numbers(OP, "rate", rate, "", "give the learning rate")
    batch, inputs, outputs = check_lines(OP, pairs.g, x, d, w_max, groups, conv)
    where = "cuda" if device is not None else backend(pairs.g)
    if where != "cuda":
        for name, array in (("x", x), ("d", d)):
            require_finite(OP, name, int((~np.isfinite(array)).sum()), "bad data")
    if where == "reference":
        digits = reference.streamed_digits(
            x, d, rate=rate, w_max=w_max, input_bits=carry.input_bits, slices=pairs.slices, slice_bits=bits, groups=groups,
            conv=conv,
        ).astype(np.float32)  # fmt: skip
    else:
        lines = Lines(
            streams=Streams.of(carry, rate, pairs.slices * bits), slices=pairs.settings["slices"], conv=Conv.of(conv),
            groups=groups, inputs=inputs, outputs=outputs,
        )  # fmt: skip
        if where == "cuda":
            digits = _gathered_cuda(device or cuda_device(), lines, batch, x, d, w_max)
        else:
            digits = _gathered(lines, batch, x, d, w_max)
    return device_update(pairs, None, digits=digits, w_max=w_max, step=step, device=device)


class Streams(ctypes.Structure):
    """Twin of `struct Streams` in kernels/include/gpuxbar/streams.cuh."""

    _fields_ = [("bits", ctypes.c_int32), ("code_max", ctypes.c_float), ("gain", ctypes.c_float)]

    @classmethod
    def of(cls, carry: Carry, rate: float, weight_bits: int) -> Streams:
        code_max = 2**carry.input_bits - 1
        return cls(carry.input_bits, code_max, rate * (2.0**weight_bits - 1) / code_max)


class Lines(ctypes.Structure):
    """Twin of `struct Lines` in kernels/host/streamed_update.cpp."""

    _fields_ = [
        ("streams", Streams), ("slices", Slices), ("conv", Conv),
        *((name, ctypes.c_int64) for name in ("groups", "inputs", "outputs")),
    ]  # fmt: skip

    def samples(self, workspace: int, groups: int) -> int:
        """Samples whose bits and digits of so many groups take up to so many bytes."""
        values = groups * (self.inputs + self.slices.count * self.outputs)
        return max(1, workspace // max(1, 4 * self.streams.bits * values))


def _largest(x: Any, groups: int) -> Any:
    """Largest magnitude of every group's inputs, [G]."""
    return abs(x).reshape(len(x), groups, -1).max((0, 2))


def _gathered(lines: Lines, batch: int, x: Any, d: Any, w_max: Any) -> Any:
    """Units that the digits gather of a batch, [slices, G, I, O], on the CPU."""
    slices, streams, inputs, outputs = lines.slices.count, lines.streams.bits, lines.inputs, lines.outputs
    total = np.zeros((slices, lines.groups, inputs, outputs), np.float32)
    if not (total.size and batch):
        return total
    largest, together = _largest(x, lines.groups), lines.samples(WORKSPACE, 1)
    for first in range(0, batch, together):
        rows = min(together, batch - first) * streams
        bits, digits = np.empty((rows, inputs), np.float32), np.empty((slices, rows, outputs), np.float32)
        for group in range(lines.groups):
            host_call(
                library(), "gpuxbar_streamed_lines", x, d, largest, w_max, lines, group, first, rows // streams, bits, digits,
            )  # fmt: skip
            for k in range(slices):
                if digits[k].any():  # the highest digits of small changes are 0
                    total[k, group] += outer_product(bits, digits[k])
    return total


def _gathered_cuda(device: Device, lines: Lines, batch: int, x: Any, d: Any, w_max: Any) -> Any:
    """The same on a GPU. Sums of whole digits are exact in float32."""
    slices, streams, groups = lines.slices.count, lines.streams.bits, lines.groups
    inputs, outputs = lines.inputs, lines.outputs
    total = device.zeros((slices, groups, inputs, outputs), "float32")
    if not (total.size and batch):
        return total
    largest, together = _largest(x, groups), lines.samples(device.workspace, groups)
    convolved = lines.conv.out_h > 0
    source = {"largest": largest, "streams": lines.streams, "conv": lines.conv, "groups": groups}
    for first in range(0, batch, together):
        samples = min(together, batch - first)
        rows = samples * streams
        bits = device.empty((groups, inputs, rows), "float32")
        digits = device.empty((slices, groups, rows, outputs), "float32")
        part = {**source, "first": first, "samples": samples}
        device.launch(
            STREAMED_BITS, (-(-samples // 32), -(-inputs // 8), groups), (256,),
            {**part, "x": x.reshape(-1), "bits": bits, "inputs": inputs}, {"CONV": int(convolved)},
        )  # fmt: skip
        device.launch(
            STREAMED_DIGITS, (-(-samples // 8), -(-outputs // 32), groups), (256,),
            {**part, "d": d.reshape(-1), "w_max": w_max, "digits": digits, "slices": lines.slices, "outputs": outputs},
            {"CONV": int(convolved)},
        )  # fmt: skip
        for k in range(slices):
            device.matmul(
                bits, digits[k], total[k], (groups, inputs, outputs, rows), (inputs * rows, rows * outputs, inputs * outputs),
                (rows, outputs, outputs), 1.0, 1.0, "fp32",
            )  # fmt: skip
    return total


STREAMED_BITS = Kernel(
    "streamed_lines.cu", name="streamed_bits",
    x=In("float32", "source"), largest=In("float32", "G"), bits=Out("float32", "G I N"), streams=Struct("Streams", Streams),
    conv=Struct("Conv", Conv), first=Scalar("int64"), samples=Scalar("int32"), groups=Scalar("int32"), inputs=Scalar("int32"),
)  # fmt: skip
STREAMED_DIGITS = Kernel(
    "streamed_lines.cu", name="streamed_digits",
    d=In("float32", "errors"), largest=In("float32", "G"), w_max=In("float32", "C"), digits=Out("float32", "S G N O"),
    streams=Struct("Streams", Streams), slices=Struct("Slices", Slices), conv=Struct("Conv", Conv), first=Scalar("int64"),
    samples=Scalar("int32"), groups=Scalar("int32"), outputs=Scalar("int32"),
)  # fmt: skip
KERNELS = (STREAMED_BITS, STREAMED_DIGITS)
