"""A read as the planner sees it, and a plan for it: plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from gpuxbar.ops.fused_layout import BLOCK_M, gathered_chunks, padded_channels, step_lines

__all__ = ["GATHERING", "HOPPER", "Case", "Plan"]

GATHERING, HOPPER = ("implicit", "implicit-wgmma"), ("wgmma", "implicit-wgmma", "cluster")


@dataclass(frozen=True)
class Case:
    """What the choice depends on: sizes as in `ops.tile_mvm`, and which settings are in use.

    Attributes:
        noise: "none", "exact" or "fast".
        variance: Whether the noise depends on the state (`noise_var`).
        converters: 0 one LSB for all columns, 1 an LSB a column, 2 also gain or offset of every converter, 3 also its
            non-linearity.
        codes: Whether int16 codes drive the lines.
        dac: Whether these are made on the way, which takes a pass of its own where patches are unfolded.
        drivers: Whether DACs have errors or devices are not ohmic (`reference.Drivers`).
        images: Of a convolution read forwards: images, their height and width with padding, and the
            positions of the kernel; else None.
        line_order: Of these positions and the channels on the driven lines (`ConvGeometry`).
    """

    rows: int
    groups: int
    drive: int
    sense: int
    planes: int
    tile: int
    streams: int = 1
    phases: int = 1
    stream_bits: int = 0
    adc_bits: int = 8
    adc_signed: bool = True
    noise: str = "none"
    variance: bool = False
    converters: int = 0
    gate: bool = False
    precision: str = "fp16"
    codes: bool = True
    dac: bool = False
    drivers: bool = False
    images: tuple[int, int, int, int] | None = None
    line_order: str = "channel_position"

    @property
    def tiles(self) -> int:
        return -(-self.drive // self.tile)

    @property
    def passes(self) -> int:
        return self.streams * self.phases

    @property
    def terms(self) -> int:
        """Products a partial sum takes."""
        return 2 if self.precision == "fp16x2" else 1

    @property
    def int8(self) -> bool:
        """Whether digits and levels are multiplied as bytes."""
        return self.precision == "int8"

    @property
    def bf16(self) -> bool:
        """Whether digits and conductances are multiplied as bf16."""
        return self.precision == "bf16"

    @property
    def code_max(self) -> int:
        return 2 ** (self.adc_bits - 1) - 1 if self.adc_signed else 2**self.adc_bits - 1

    @property
    def positions(self) -> int:
        """Of the kernel of a convolution read forwards; 0: another read."""
        return self.images[3] if self.images else 0

    @property
    def chunks(self) -> int:
        """Chunks of eight channels at each position that hold every tile's share of a patch; 0 where the lines of a tile are
        such chunks themselves."""
        if self.line_order == "position_channel":
            return 0
        return gathered_chunks(self.drive, self.tile, self.positions)

    def padded_tile(self, implicit: bool) -> int:
        """Driven lines of a tile as the fused kernels see them, gathering patches (`implicit`) or not."""
        lines = (implicit and 8 * self.chunks * self.positions) or self.tile
        step = step_lines(self.precision)
        return -(-lines // step) * step

    @property
    def image_size(self) -> int:
        """At most the codes of all images, the channels of a group padded to whole chunks."""
        count, height, width, positions = self.images or (0, 0, 0, 1)
        return count * height * width * self.groups * padded_channels(self.drive // positions)

    @property
    def fits_16_bits(self) -> bool:
        """Whether every sum of codes does, so that two share a register."""
        return self.tiles * self.code_max < (2**15 if self.adc_signed else 2**16)


@dataclass(frozen=True)
class Plan:
    """A choice with its reasons; `block_n`, `stages` and `splits` shape the fused kernels.

    `chunks`: of eight channels that a tile gathers at every position (implicit, in the line order channel_position); else 0.
    `cluster`: blocks that share panels.
    """

    strategy: str
    why: tuple[str, ...]
    block_n: int = 128
    stages: int = 0
    splits: int = 1
    chunks: int = 0
    cluster: int = 1

    def blocks(self, rows: int, sense: int) -> int:
        """Of a plane, pass, group and split of the tiles: whole clusters."""
        high = BLOCK_M * self.cluster
        return -(-rows // high) * self.cluster * -(-sense // self.block_n)

    def explain(self) -> str:
        """The choice and its reasons, a line each."""
        return "\n".join([f"strategy: {self.strategy}", *(f"  {line}" for line in self.why)])
