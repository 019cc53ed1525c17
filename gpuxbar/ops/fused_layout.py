"""What the fused kernels' plans, packing and launches agree on: the sizes of blocks, stages and shared memory."""

from __future__ import annotations

from functools import lru_cache

__all__ = [
    "BLOCKS_N",
    "BLOCK_M",
    "SHARED",
    "STATIC_SHARED",
    "STEP",
    "WGMMA_STATIC_SHARED",
    "at_or_below",
    "gathered_chunks",
    "padded_channels",
    "pipeline",
    "shared_memory",
    "stage_bytes",
    "step_lines",
    "wgmma_bytes",
    "wgmma_stages",
]

BLOCK_M, STEP = 128, 64  # rows of a block, driven lines of a stage (of bytes 128): kernels/fused_tile_mvm.cu
BLOCKS_N = (256, 128)  # columns of a block
# Bytes of shared memory a block may take; architectures that are absent run the next lower one listed.
SHARED = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
}
STATIC_SHARED, WGMMA_STATIC_SHARED = 2048, 4096  # constants of a block of both kernels, rounded up


def step_lines(precision: str) -> int:
    """Driven lines of a stage: 128 bytes of every row."""
    return 2 * STEP if precision == "int8" else STEP


def padded_channels(channels: int) -> int:
    """Channels of a group where eight lie in 16 bytes."""
    return -(-channels // 8) * 8


@lru_cache(maxsize=4096)
def gathered_chunks(drive: int, tile: int, positions: int) -> int:
    """The most chunks of eight channels that a tile of `drive` lines, a channel each `positions`, touches."""
    size = 8 * positions
    return max((min(at + tile, drive) - 1) // size - at // size + 1 for at in range(0, drive, tile))


def _number(arch: str) -> int:
    return int("".join(c for c in arch if c.isdigit()))


def at_or_below(arch: str, known: list[str]) -> str | None:
    """The architecture itself, or the next lower one that is known; None below all of them."""
    lower = [name for name in known if _number(name) <= _number(arch)]
    return max(lower, key=_number, default=None)


def shared_memory(arch: str) -> int:
    """Bytes that a block may have, as of the next lower architecture in the table; 0 below all of them."""
    known = at_or_below(arch, list(SHARED))
    return SHARED[known] if known else 0


def stage_bytes(block_n: int, panels: int) -> int:
    """Shared memory of one stage: a step of the left operand and of `panels` right ones."""
    return 2 * STEP * (BLOCK_M + block_n * panels)


def pipeline(arch: str, block_n: int, panels: int) -> int | None:
    """Stages of the fused kernel's pipeline on an architecture, at most 4; None if too few fit."""
    stage = stage_bytes(block_n, panels)
    stages = min(4, (shared_memory(arch) - STATIC_SHARED) // stage)
    results = 4 * BLOCK_M * 132  # the block of results takes the place of the stages
    return stages if stages >= 2 and stages * stage >= results else None


def wgmma_bytes(block_n: int, panels: int, stages: int) -> int:
    """Shared memory of a block of the Hopper kernel: aligned stages, two barriers each."""
    return 1024 + stages * (stage_bytes(block_n, panels) + 16)


def wgmma_stages(arch: str, block_n: int, panels: int) -> int:
    """Stages of the Hopper kernel's pipeline, at most 4."""
    free = SHARED[arch] - WGMMA_STATIC_SHARED
    return next(count for count in (4, 3, 2) if wgmma_bytes(block_n, panels, count) <= free)
