"""Digital values to DAC codes."""

from __future__ import annotations

from ctypes import c_int64
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpuxbar import reference
from gpuxbar.launch import Device, In, Kernel, Out, Scalar, backend, cuda_device, host_call, library
from gpuxbar.ops.checks import (
    NUMBER,
    check_array,
    check_integers,
    check_numbers,
    check_written,
    host_backend,
    require_finite,
    require_finite_values,
    scalar_array,
)

__all__ = ["KERNEL", "Dac", "check_dac", "dac_fit", "dac_quantize"]

KERNEL = Kernel(
    "dac_quantize.cu",
    x=In("float32"), lsb=In("float32", "L"), codes=Out("int16"), code_min=Scalar("float32"), code_max=Scalar("float32"),
    per_row=Scalar("int64"), lsb_count=Scalar("int64"), size=Scalar("int64"),
)  # fmt: skip


@dataclass(frozen=True)
class Dac:
    """What makes codes of the digital values of a read on the way to its products; see `dac_quantize`.

    Attributes:
        lsb: Value of one code, above 0: a number, or float32 [1] or one per leading index.
        code_max: Largest code, 1 to 32767.
        signed: Whether negative codes exist.
        codes: int16, shape of the values: receives their codes. None: the read alone needs them.
    """

    lsb: Any
    code_max: int
    signed: bool = True
    codes: Any = None

    def quantize(self, x: Any, device: Device | None = None) -> Any:
        """The codes of values, in `codes` if there is such an array."""
        if device is not None:
            return _cuda(device, x, self)
        found = dac_quantize(x, lsb=self.lsb, code_max=self.code_max, signed=self.signed)
        if self.codes is None:
            return found
        self.codes[...] = found
        return self.codes

    def there(self, device: Device) -> Dac:
        """The same with `lsb` in memory of a device."""
        if not isinstance(self.lsb, NUMBER):
            return self
        lsb = device.empty((1,), "float32")
        lsb.fill(self.lsb)
        return replace(self, lsb=lsb)

    def arguments(self) -> dict[str, Any]:
        """For a kernel that quantises on the way."""
        code_min = -self.code_max if self.signed else 0
        return {
            "lsb": self.lsb, "codes": self.codes, "code_min": code_min, "code_max": self.code_max, "lsb_count": self.lsb.size,
        }  # fmt: skip


NO_DAC: dict[str, Any] = {"lsb": None, "codes": None, "code_min": 0, "code_max": 0, "lsb_count": 0}


def check_dac(op: str, dac: Dac, v: Any) -> None:
    """Refuse a DAC that cannot make codes of the values v; these are looked at where they are quantised."""
    check_array(op, "v", v, "float32", (2, 4))
    _check_code_max(op, dac.code_max)
    if not isinstance(dac.lsb, NUMBER):
        check_array(op, "dac.lsb", dac.lsb, "float32", 1)
        _check_count(op, dac.lsb, v, "dac.lsb")
    if dac.codes is not None:
        check_array(op, "dac.codes", dac.codes, "int16", v.ndim)
        check_written(op, **{"dac.codes": dac.codes})
        if dac.codes.shape != v.shape:
            raise ValueError(
                f"{op}: `dac.codes` must have the shape of `v`, {tuple(v.shape)}, got {tuple(dac.codes.shape)}; allocate it like `v`"
            )


def dac_quantize(
    x: Any, *, lsb: Any, code_max: int, signed: bool = True, device: Device | None = None
) -> Any:
    """Round digital values to DAC codes.

    code = clip(round(x / lsb), -code_max if signed else 0, code_max), half to even.

    Args:
        x: Digital values, float32 [n, ...], C-contiguous; finite.
        lsb: Value of one code, above 0: a number, or float32 [n], one per leading index.
        code_max: Largest code, 1 to 32767.
        signed: Whether negative codes exist.
        device: Where CuPy arrays are allocated and run; None: CuPy's current device and memory pool.

    Returns:
        Codes, int16, shape of `x`.

    Raises:
        TypeError: `x` is not float32.
        ValueError: `x` is not contiguous or holds NaN or infinity (checked on the CPU; on a GPU a NaN becomes
            a code of the range, and no value is read back), `lsb` has another length or is not above 0 (checked
            alike), or `code_max` is out of range.
    """
    check_array("dac_quantize", "x", x, "float32", range(1, 8))
    _check_code_max("dac_quantize", code_max)
    where = "cuda" if device is not None else backend(x)
    if where == "cuda":
        if not isinstance(lsb, NUMBER):
            _check_count("dac_quantize", lsb, x)
        return _cuda(device or cuda_device(), x, Dac(lsb, code_max, signed))
    lsb = scalar_array(lsb)
    _check_count("dac_quantize", lsb, x)
    if where == "reference":
        require_finite("dac_quantize", "x", int((~np.isfinite(x)).sum()), "bad data")
        _check_lsb(lsb)
        return reference.dac_quantize(x, lsb=lsb, code_max=code_max, signed=signed)
    codes = np.empty(x.shape, dtype=np.int16)
    if x.size:
        bad = c_int64()
        sizes = len(x), x.size // len(x), lsb.size
        host_call(library(), "gpuxbar_dac_quantize", x, lsb, codes, *sizes, code_max, signed, bad)
        require_finite("dac_quantize", "x", bad.value, "bad data")
    _check_lsb(lsb)  # behind the values: a step taken from bad ones is bad itself
    return codes


def dac_fit(
    x: Any,
    scale: Any = None,
    *,
    code_max: int,
    signed: bool = True,
    per_sample: bool = False,
    what: str = "dac_fit: `x`",
) -> tuple[Any, Any]:
    """Round scaled values to codes of a DAC whose range fits them, on the CPU.

    lsb  = largest |scale[c] x[n, c, ...]| / code_max
    code = dac_quantize(scale[c] x[n, c, ...], lsb)

    Args:
        x: Values, NumPy float32 [n, channels, ...], C-contiguous; finite.
        scale: Factor of each channel, float32 [channels]; None: 1.
        code_max: Largest code, 1 to 32767.
        signed: Whether negative codes exist.
        per_sample: Fit the range to each leading index, not to all.
        what: What the error about values that are not finite calls them.

    Returns:
        (codes, lsb): int16, shape of `x`, and the value of one code, float32 [1] or [n]. A range below 1e-30 counts as 1e-30.

    Raises:
        TypeError: An array is not float32, or is not NumPy's.
        ValueError: An array is not contiguous, `scale` has another length, `code_max` is out of range, or scaled values are
            NaN or infinite.
    """
    op = "dac_fit"
    check_array(op, "x", x, "float32", range(2, 8))
    _check_code_max(op, code_max)
    rows, channels = x.shape[:2]
    if scale is not None:
        check_array(op, "scale", scale, "float32", 1)
        if len(scale) != channels:
            raise ValueError(
                f"{op}: `scale` must have {channels} values, got {len(scale)}; give one for each channel of `x`"
            )
    if host_backend(op, "x", x, "scale it and call dac_quantize") == "reference":
        scale = np.ones(channels, np.float32) if scale is None else scale
        with np.errstate(over="ignore", invalid="ignore"):
            bad = int((~np.isfinite(x * scale.reshape(-1, *[1] * (x.ndim - 2)))).sum())
        require_finite_values(what, bad, "bad data")
        codes, lsb = reference.dac_fit(x, scale, code_max=code_max, signed=signed, per_sample=per_sample)
        return codes, lsb.astype(np.float32)
    codes, lsb = np.empty(x.shape, np.int16), np.empty(rows if per_sample else 1, np.float32)
    sizes = rows, channels, x.size // max(1, rows * channels), lsb.size
    found = c_int64()
    host_call(
        library(), "gpuxbar_dac_fit", x, scale, codes, lsb, *sizes, code_max, signed, reference.SMALLEST_RANGE, found
    )  # fmt: skip
    require_finite_values(what, found.value, "bad data")
    return codes, lsb


def _cuda(device: Device, x: Any, dac: Dac) -> Any:
    codes = device.empty(x.shape, "int16") if dac.codes is None else dac.codes
    if x.size:
        device.launch(
            KERNEL, (min(-(-x.size // 1024), 65536),), (256,),
            {**replace(dac.there(device), codes=codes).arguments(), "x": x, "per_row": x.size // len(x), "size": x.size},
        )  # fmt: skip
    return codes


def _check_code_max(op: str, code_max: int) -> None:
    check_integers(op, code_max=code_max)
    if not 1 <= code_max <= 32767:
        raise ValueError(f"{op}: `code_max` must be 1 to 32767, got {code_max}; int16 holds the codes")


def _check_count(op: str, lsb: Any, x: Any, name: str = "lsb") -> None:
    if lsb.size not in (1, len(x)):
        raise ValueError(
            f"{op}: `{name}` must have 1 or {len(x)} values, got {lsb.size}; give one, or one per leading index"
        )


def _check_lsb(lsb: Any) -> None:
    check_numbers(
        "dac_quantize", "lsb", lsb, "", "it is the value of one code, the largest input over code_max"
    )
