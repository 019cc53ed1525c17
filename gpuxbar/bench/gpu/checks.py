"""Checks of the reads by every fused kernel: against the float64 oracle, cuBLAS + epilogue, and themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from gpuxbar import ops, reference
from gpuxbar.bench.cases import OracleMismatch
from gpuxbar.bench.gpu import ceilings
from gpuxbar.bench.gpu.reads import COMMON, FUSED, G_STEP, LSB, gathering, kernels_of
from gpuxbar.launch import Device
from gpuxbar.ops import ConvGeometry
from gpuxbar.ops.tile_mvm_case import HOPPER

__all__ = ["CHECKS", "FAILURES", "Subject", "check"]

# Wrong results, and what CUDA, cuBLAS or PyTorch refuse.
FAILURES = (OracleMismatch, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Subject:
    """A device, how arrays get there and back, and the only fused kernel that is asked for (None: all)."""

    device: Device
    there: Callable[[np.ndarray], Any]
    back: Callable[[Any], np.ndarray]
    only: str | None = None

    @property
    def kernels(self) -> tuple[str, ...]:
        """The fused strategies that are asked for, of those that the device has."""
        return tuple(kernel for kernel in kernels_of(self.device.arch) if self.only in (None, kernel))

    @property
    def units(self) -> tuple[str, ...]:
        """What bounds them."""
        hopper = any(kernel in HOPPER for kernel in self.kernels)
        return tuple(
            unit for unit in ceilings.units_of(self.device.arch) if hopper or unit != "wgmma TFLOP/s"
        )

    def read(self, codes: np.ndarray, g: np.ndarray, strategy: str, **s: Any) -> np.ndarray:
        moved = {k: self.there(v) if isinstance(v, np.ndarray) else v for k, v in s.items()}
        try:
            y = ops.tile_mvm(self.there(codes), self.there(g), device=self.device, strategy=strategy, **moved)
            return self.back(y)  # waits, so that what a kernel does wrong shows here
        except RuntimeError as error:
            raise RuntimeError(f"{strategy} fails: {error}") from error


def _operands(rows: int, inputs: int, outputs: int, top: int = 2047) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and conductances that fp16 holds exactly."""
    rng = np.random.default_rng(rows + inputs + outputs)
    codes = rng.integers(-127, 128, (rows, inputs)).astype(np.int16)
    return codes, (rng.integers(-top, top + 1, (1, inputs, outputs)) * G_STEP).astype(np.float32)


def _variance(codes: np.ndarray, g: np.ndarray, s: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Codes and noise variances whose products bf16 holds, where settings ask for a variance."""
    if "noise_var" not in s:
        return codes, s
    levels = np.rint(127 / np.abs(g).max() * np.abs(g)).astype(np.float32)
    return codes % 16, {**s, "noise_var": levels * np.float32(s["noise_var"])}


ODD_SHAPES = ((1, 1, 1, 64), (3, 70, 9, 64), (131, 333, 257, 100), (257, 640, 130, 512))
WAYS: dict[str, dict[str, Any]] = {
    "adc": {},
    "exact": {"read_noise": LSB / 3},
    "fast": {"read_noise": LSB / 3, "generator": "fast"},
    "two halves": {"precision": "fp16x2"},
    "streams": {"stream_bits": 4, "streams": 2, "read_noise": LSB / 3},
    "variance": {"read_noise": LSB / 3, "noise_var": 2.0**-52},
}
ODD_CONVOLUTIONS = (  # geometry, images, outputs, lines of a tile; the last ones as timed
    (ConvGeometry(5, 9, 7, (3, 2), (2, 1), (1, 1)), 3, 9, 20),
    (ConvGeometry(8, 6, 5, (3, 2), (2, 1), (1, 1), (1, 2), "position_channel"), 3, 9, 24),
    (ConvGeometry(16, 6, 5, (3, 3), (1, 1), (1, 1), (1, 2)), 2, 70, 64),
    (ConvGeometry(256, 14, 14, (3, 3), (1, 1), (1, 1)), 2, 256, 128),
    (ConvGeometry(256, 14, 14, (3, 3), (1, 1), (1, 1), line_order="position_channel"), 2, 256, 128),
)


def _matches_the_oracle(subject: Subject) -> str:
    worst = 0.0
    for rows, inputs, outputs, tile in ODD_SHAPES:
        codes, g = _operands(rows, inputs, outputs)
        for way, changes in WAYS.items():
            driven, s = _variance(codes, g, {**COMMON, **changes})
            weight = 2 ** (s.get("stream_bits", 0) * (s.get("streams", 1) - 1))
            name = f"{way}, {rows} x {inputs} x {outputs}"
            worst = max(
                worst, _against_the_oracle(subject, subject.kernels, driven, g, tile, weight, name, s)
            )
    return f"at most {worst:.1e} of the codes fell to the other side of a rounding edge"


def _convolutions_match_the_oracle(subject: Subject) -> str:
    worst = 0.0
    for conv, images, outputs, tile in ODD_CONVOLUTIONS:
        _, g = _operands(1, conv.inputs, outputs)
        codes, _ = _operands(images * conv.channels, conv.height * conv.width, 1)
        codes = codes.reshape(images, conv.channels, conv.height, conv.width)
        for way in ("exact", "fast"):
            s = {**COMMON, **WAYS[way], "conv": conv}
            name = f"{way}, {conv.channels} channels of {conv.height} x {conv.width}, {conv.line_order}"
            kernels = (*subject.kernels, *gathering(subject.kernels, conv.line_order))
            worst = max(worst, _against_the_oracle(subject, kernels, codes, g, tile, 1, name, s))
    return f"at most {worst:.1e} of the codes fell to the other side of a rounding edge"


def _eight_bits_match_the_oracle(subject: Subject) -> str:
    """Of whole levels, around an offset as bytes, which only the first fused kernel multiplies as bytes or bf16."""
    if FUSED[0] not in subject.kernels:
        return f"{FUSED[0]} alone multiplies them"
    worst = 0.0
    for rows, inputs, outputs, tile in ODD_SHAPES:
        codes, levels = _operands(rows, inputs, outputs, top=127)
        for precision, way in product(("bf16", "int8"), ("adc", "fast")):
            g = levels + np.float32(COMMON["g_offset"] if precision == "int8" else 0.0)
            s = {**COMMON, **WAYS[way], "precision": precision}
            name = f"{way}, {precision}, {rows} x {inputs} x {outputs}"
            worst = max(worst, _against_the_oracle(subject, FUSED[:1], codes, g, tile, 1, name, s))
    return f"at most {worst:.1e} of the codes fell to the other side of a rounding edge"


def _against_the_oracle(
    subject: Subject, kernels: Sequence[str], codes: np.ndarray, g: np.ndarray, tile: int, weight: int, name: str,
    s: dict[str, Any],
) -> float:  # fmt: skip
    """The largest share of results of a kernel that differ."""
    oracle = {
        key: value for key, value in s.items() if key not in ("precision", "g_range", "g_step", "g_offset")
    }
    expected = reference.tile_mvm(codes, g, tile=tile, **oracle)
    s = {"precision": "fp16", **s}
    return max(
        _edges(subject.read(codes, g, kernel, tile_rows=tile, **s), expected, weight, f"{kernel}, {name}")
        for kernel in kernels
    )


def _edges(y: np.ndarray, expected: np.ndarray, weight: int, name: str) -> float:
    """Share of the results that differ: by one code, on a rounding edge."""
    off = np.abs(y - expected) / LSB
    differ = off > 0.01
    parts = differ & ((np.abs(off - np.rint(off)) > 0.01) | (off > weight + 0.01))
    if not np.isfinite(y).all() or parts.any() or differ.sum() > max(1, 2e-3 * y.size):
        raise OracleMismatch(
            f"{differ.sum()} of {y.size} results are off ({name}), {parts.sum()} of them by more than a code or by "
            f"parts of one; the largest by {off.max():.2g} codes"
        )
    return float(differ.mean()) if y.size > 1000 else 0.0


def _repeats(subject: Subject) -> str:
    codes, g = _operands(131, 333, 257)
    s = {**COMMON, **WAYS["exact"], "precision": "fp16", "tile_rows": 64}
    for kernel in subject.kernels:
        first, second = (subject.read(codes, g, kernel, **s) for _ in range(2))
        _same_bits(first, second, f"a second run of {kernel}")
    return "same bits"


def _equals_the_epilogue(subject: Subject) -> str:
    """Where partial sums are integers, sums are exact in any order."""
    codes, g = _operands(150, 320, 250, top=15)
    for way, changes in WAYS.items():
        s = {
            **COMMON,
            "precision": "fp16",
            **changes,
            "tile_rows": 64,
            "g_range": 2.0**-27,
            "adc_lsb": 2.0**-33,
        }
        if "read_noise" in s:
            s["read_noise"] = 2.0**-33
        if "noise_var" in s:
            s["noise_var"] *= 2.0**-12
        driven, s = _variance(codes, g, s)
        expected = subject.read(driven, g, "epilogue", **s)
        for kernel in subject.kernels:
            _same_bits(subject.read(driven, g, kernel, **s), expected, f"cuBLAS + epilogue ({kernel}, {way})")
    return "same bits"


def _same_bits(y: np.ndarray, other: np.ndarray, name: str) -> None:
    off = np.count_nonzero(y != other)
    if off or not np.isfinite(y).all() or np.unique(y).size < 8:
        raise OracleMismatch(f"{off} of {y.size} results are not those of {name}")


def _noise_is_normal(subject: Subject) -> str:
    """Without inputs a read is its noise: five standard errors of mean, variance, kurtosis and neighbours."""
    codes, g = np.zeros((512, 64), np.int16), np.zeros((1, 64, 256), np.float32)
    sigma, worst = 20.0, 0.0  # steps
    for kernel, generator in product(subject.kernels, ("exact", "fast")):
        s = {**COMMON, "adc_bits": 16, "read_noise": sigma * LSB, "generator": generator, "precision": "fp16"}
        draws = [subject.read(codes, g, kernel, **{**s, "step": step}) / LSB for step in (3, 4)]
        z = draws[0] / np.sqrt(sigma**2 + 1 / 12)
        root = np.sqrt(z.size)
        scores = {
            "mean": z.mean() * root,
            "variance": ((z**2).mean() - 1) * root / np.sqrt(2),
            "kurtosis": ((z**4).mean() - 3) * root / np.sqrt(96),
            "columns": (z[:, 1:] * z[:, :-1]).mean() * root,
            "rows": (z[1:] * z[:-1]).mean() * root,
            "steps": (z * draws[1] / sigma).mean() * root,
        }
        name = max(scores, key=lambda key: abs(scores[key]))
        if not abs(scores[name]) < 5:
            raise OracleMismatch(
                f"{generator} noise of {kernel}: its {name} lies {scores[name]:.1f} standard errors off"
            )
        worst = max(worst, abs(scores[name]))
    return f"within {worst:.1f} standard errors"


def _ceilings_compute(subject: Subject) -> str:
    return ceilings.check(subject.device, subject.there, subject.back, subject.units)


CHECKS: dict[str, Callable[[Subject], str]] = {
    "matches the float64 oracle": _matches_the_oracle,
    "convolutions": _convolutions_match_the_oracle,
    "eight bits": _eight_bits_match_the_oracle,
    "two runs": _repeats,
    "fused and cuBLAS + epilogue": _equals_the_epilogue,
    "noise": _noise_is_normal,
    "ceilings": _ceilings_compute,
}


def check(subject: Subject, say: Callable[[str], object] = lambda line: None) -> dict[str, str]:
    """What every check found; each is said as it comes.

    Raises:
        OracleMismatch: One failed; the message names all that did.
    """
    found, red = {}, []
    for name, run in CHECKS.items():
        try:
            found[name] = run(subject)
        except FAILURES as error:
            red.append(f"{name}: {error}")
        say(f"{name}: {found.get(name, 'FAILED')}")
    if red:
        raise OracleMismatch("; ".join(red))
    return found
