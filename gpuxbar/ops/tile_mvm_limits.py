"""Why a fused kernel cannot compute a read."""

from __future__ import annotations

from gpuxbar.ops.fused_layout import BLOCK_M, pipeline, shared_memory
from gpuxbar.ops.tile_mvm_case import Case

__all__ = ["int8_obstacle", "obstacles"]


def obstacles(case: Case, arch: str) -> dict[str, str | None]:
    """Of every strategy of fused kernels: why it is impossible; None if it is possible."""
    return {
        "fused": _obstacle(case, arch),
        "implicit": _implicit_obstacle(case, arch),
        "wgmma": _wgmma_obstacle(case, arch),
        "implicit-wgmma": _implicit_wgmma_obstacle(case, arch),
        "cluster": _wgmma_obstacle(case, arch),
    }


def int8_obstacle(case: Case, arch: str, strategy: str) -> str | None:
    """Why bytes cannot be multiplied; None if they can. No other precision takes their place unasked."""
    if strategy not in ("auto", "fused"):
        return f"strategy={strategy!r} (fused multiplies bytes)"
    return _obstacle(case, arch)


def _obstacle(case: Case, arch: str, implicit: bool = False) -> str | None:
    """Why the fused kernel cannot compute a case; None if it can."""
    lines = case.tiles * case.padded_tile(implicit)
    left = case.image_size if implicit else case.groups * lines * BLOCK_M
    if not shared_memory(arch):
        return f"{arch} has no mma.sync of 16-bit operands (sm_80 and later do)"
    if not case.adc_bits:
        return "nothing is converted (adc_bits=None)"
    if case.converters > 2:
        return "converters are non-linear"
    if not case.codes:
        return "the lines are driven by floats, not int16 codes"
    if case.drivers:
        return "no codes drive the lines: DACs have errors, or devices are not ohmic"
    if case.precision not in ("fp16", "fp16x2", "bf16", "int8"):
        return f"precision={case.precision!r} (fp16, fp16x2, bf16 and int8 run on tensor cores)"
    if case.passes > 1 and not case.stream_bits:
        return "several passes drive whole codes"
    if case.streams * case.stream_bits > 10 and not case.bf16:  # which has digits alone
        return f"streams * stream_bits = {case.streams * case.stream_bits} bits (10 fit an fp16 code)"
    if case.noise != "none" and case.groups > 1 and case.sense % 8:
        return (
            f"the {case.sense} sensed lines of a group are no multiple of 8, so groups share noise counters"
        )
    if case.gate and not case.fits_16_bits:
        return f"sums of {case.tiles} codes of {case.adc_bits} bits take more than 16 bits"
    if case.bf16:
        if implicit:
            return "codes are gathered from images as fp16"
        left *= case.passes
    if case.int8:
        if implicit:
            return "codes are gathered from images"
        if case.variance:
            return "the noise depends on the state (noise_var)"
        if case.stream_bits > 7:
            return f"digits of {case.stream_bits} bits do not fit 8 with a sign"
        left *= case.passes
    if case.planes * case.passes * case.groups > 65535 or left >= 2**32:
        return "the operands are too large for its indices"
    if case.planes * case.groups * case.sense * lines >= 2**32:
        return "the operands are too large for its indices"
    if pipeline(arch, 128, case.terms + case.variance) is None:
        return f"its operands do not fit the shared memory of {arch}"
    return None


def _implicit_obstacle(case: Case, arch: str) -> str | None:
    """Why the fused kernel cannot gather patches; None if it can."""
    if case.images is None:
        return "no patches drive the lines (those of a convolution read forwards do)"
    if max(case.images[1:3]) >= 2**14:
        return f"images of {case.images[1]} x {case.images[2]} are too large for its indices"
    if case.images[0] > 65535:
        return f"{case.images[0]} images are too many for its indices"
    channels = case.drive // case.positions
    if case.line_order == "position_channel" and (channels % 8 or (case.tiles > 1 and case.tile % 8)):
        return (
            f"{channels} channels in tiles of {case.tile} lines are no chunks of eight channels of a position"
        )
    return _obstacle(case, arch, implicit=True)


def _wgmma_obstacle(case: Case, arch: str) -> str | None:
    """Why the Hopper kernel cannot compute a case; None if it can."""
    if arch != "sm_90":
        return f"{arch} has no wgmma (sm_90 does)"
    if case.converters == 2:
        return "converters have a gain or offset of their own"
    if case.int8 or case.bf16:
        return f"it multiplies no {'bytes' if case.int8 else 'bf16'}"
    return _obstacle(case, arch)


def _implicit_wgmma_obstacle(case: Case, arch: str) -> str | None:
    """Why the Hopper kernel cannot gather patches; None if it can."""
    if obstacle := _wgmma_obstacle(case, arch) or _implicit_obstacle(case, arch):
        return obstacle
    if case.line_order != "position_channel":
        return f"the lines are in the order {case.line_order} (of position_channel, eight are 16 bytes of an image)"
    if case.stream_bits:
        return "digits are cut out of the codes that are gathered"
    if case.variance:
        return "the noise depends on the state (noise_var)"
    return None
