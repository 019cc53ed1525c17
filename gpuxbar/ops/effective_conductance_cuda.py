"""`effective_conductance` on a CUDA device: leaves merged in shared memory, then level by level in batched products.

Tiles are padded with open cells to powers of two, 16 cells at least, so that all blocks of a level are alike. A level is
one batch over all its pairs of blocks and all tiles of a chunk; the number of launches depends on the tile's size only.
Nothing waits for the device.

A ladder moves 18 bytes a cell, a mean field 41, if no pass over a tile finds it in a cache: of 6000 tiles of 128 x 128 an
estimated 0.4 and 0.9 ms at 4.3 TB/s. Not yet run on a GPU.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any

from gpuxbar.launch import Device, In, InOut, Kernel, Out, Scalar

__all__ = [
    "KERNELS",
    "LEAF",
    "LINES",
    "VALUES",
    "Level",
    "effective_conductance_cuda",
    "grid",
    "invert",
    "leaf_bits",
    "leaves",
    "merge_ways",
    "product",
    "wire_values",
]

_INT, _LONG, _FLOAT = Scalar("int32"), Scalar("int64"), Scalar("float32")
LINES: dict[str, Any] = {
    "r_wordline": In("float32", "R", optional=True), "r_bitline": In("float32", "C", optional=True),
    "r_source": In("float32", "R", optional=True), "r_sink": In("float32", "C", optional=True),
}  # fmt: skip
VALUES: dict[str, Any] = {
    "wordline_value": _FLOAT, "bitline_value": _FLOAT, "source_value": _FLOAT, "sink_value": _FLOAT,
}  # fmt: skip

LADDER = Kernel(
    "ladder.cu", g=In("float32", "T R C"), **LINES, starts=Out("float32", "T two N"), g_eff=Out("float32", "T R C"),
    **VALUES, rows=_INT, cols=_INT,
)  # fmt: skip
CONDUCTANCE_LEAF = Kernel(
    "conductance_leaf.cu", g=In("float32", "T R C"), **LINES, q=Out("float32"), **VALUES, rows=_INT, cols=_INT,
    high_bits=_INT, wide_bits=_INT,
)  # fmt: skip
GAUSS_JORDAN = Kernel(
    "gauss_jordan.cu", m=InOut("float32"), ld=_INT, stride=_LONG, count=_LONG, diagonal=_FLOAT
)
CONDUCTANCE_MERGE = Kernel(
    "conductance_merge.cu", q=In("float32"), cross=In("float32"), merged=Out("float32"), block_rows=_INT,
    block_cols=_INT, along_rows=_INT, next_along_rows=_INT, alternate=_INT, size=_LONG,
)  # fmt: skip
CONDUCTANCE_OUT = Kernel(
    "conductance_out.cu", direct=In("float32"), cross=In("float32", optional=True), g_eff=Out("float32"),
    direct_stride=_LONG, direct_ld=_INT, along_rows=_INT, rows=_INT, cols=_INT, high=_INT, wide=_INT, size=_LONG,
)  # fmt: skip
CONDUCTANCE_SHARE = Kernel(
    "conductance_share.cu", q=In("float32"), r_source=In("float32", "R", optional=True), m=Out("float32"),
    source_value=_FLOAT, rows=_INT, high=_INT, ports=_INT, shared=_INT, size=_LONG,
)  # fmt: skip
SPLIT_TF32 = Kernel(
    "split_tf32.cu", x=In("float32"), split=Out("float32"), stride=_LONG, ld=_INT, rows=_INT, cols=_INT, right=_INT,
    size=_LONG,
)  # fmt: skip
MEAN_FIELD_COARSEN = Kernel(
    "mean_field.cu", name="mean_field_coarsen", g=In("float32", "T R C"), ladder=In("float32", "T R C"), **LINES,
    parts=Out("float32", "T two P C"), coarse=Out("float32", "T P Q"), strength=Out("float32", "T L"), segments=Out("float32", "two S"),
    ends=Out("float32", "two S"), **VALUES, rows=_INT, cols=_INT, k=_INT,
)  # fmt: skip
MEAN_FIELD = Kernel(
    "mean_field.cu", coarse=In("float32", "T P Q"), strength=In("float32", "T L"), segments=In("float32", "two S"),
    ends=In("float32", "two S"), q=In("float32"), g_eff=InOut("float32", "T R C"), rows=_INT, cols=_INT, k=_INT,
)  # fmt: skip
KERNELS = (
    LADDER, CONDUCTANCE_LEAF, GAUSS_JORDAN, CONDUCTANCE_MERGE, CONDUCTANCE_OUT, CONDUCTANCE_SHARE, MEAN_FIELD_COARSEN,
    MEAN_FIELD, SPLIT_TF32,
)  # fmt: skip

LEAF = 16  # cells along the side of a leaf, and at most along that of the coarse tile of a mean field
Operand = tuple[Any, int, int, int]  # array, offset, elements to a batch's next matrix and to the next row
CHUNK = 8  # workspaces of the device for the exact solution of a chunk: 128 tiles of 128 x 128, 95 launches, in 512 MB
BASE = 32  # largest matrix inverted in registers


def effective_conductance_cuda(
    device: Device, g: Any, lines: dict[str, Any], method: str, arithmetic: str = "fp32", shared: int = 0
) -> Any:  # fmt: skip
    """`ops.effective_conductance` on tiles [T, R, C], checked; `lines` are numbers, or arrays on the device.

    `shared`: so many neighbours are column tiles on the same drivers; 0: every tile has its own.
    """
    out = device.empty(g.shape, "float32")
    wires = wire_values(lines)
    rows, cols = g.shape[1:]
    if method == "mean_field" and max(rows, cols) <= LEAF:
        method = "exact"  # nothing to coarsen
    bits = leaf_bits(rows, cols)
    # blocks of two levels, and the products between them: below four times the leaves
    tree = 4 * 4 * 4096 << sum(bits)
    coarse = 4 * (4096 + LEAF * LEAF + rows + cols + 2 * LEAF * cols)
    ladder = 4 * 2 * _pieces(rows, cols)
    per_tile = {"exact": tree, "mean_field": ladder + coarse}.get(method, ladder)
    room = device.workspace * (CHUNK if method == "exact" else 1)
    chunk = max(room // per_tile // (shared or 1), 1) * (shared or 1)
    for first in range(0, len(g), chunk):
        part, found = g[first : first + chunk], out[first : first + chunk]
        if method == "exact":
            _merge_tiles(device, part, found, wires, bits, arithmetic, shared)
            continue
        _walk_lines(device, part, found, wires, method == "first_order")
        if method == "mean_field":
            _add_coupling(device, part, found, wires)
    return out


def leaf_bits(rows: int, cols: int) -> tuple[int, int]:
    """Numbers of leaves down and along a tile, as powers of two."""
    high, wide = (max(-(-count // LEAF) - 1, 0).bit_length() for count in (rows, cols))
    return high, wide


def wire_values(lines: dict[str, Any]) -> dict[str, Any]:
    """Resistances as the kernels take them: an array or none, and one value for all lines."""
    arrays = {name: None if isinstance(value, float) else value for name, value in lines.items()}
    values = {
        f"{name[2:]}_value": value if isinstance(value, float) else 0.0 for name, value in lines.items()
    }
    return arrays | values


def _walk_lines(device: Device, g: Any, out: Any, wires: dict[str, Any], first_order: bool) -> None:
    tiles, rows, cols = g.shape
    starts = device.empty((tiles, 2, _pieces(rows, cols)), "float32")
    device.launch(
        LADDER, (tiles,), (256,), {"g": g, "starts": starts, "g_eff": out, **wires, "rows": rows, "cols": cols},
        {"FIRST_ORDER": int(first_order)},
    )  # fmt: skip


def _pieces(rows: int, cols: int) -> int:
    """Of 32 cells, that the lines of a tile are cut into."""
    return -(-cols // 32) * rows + -(-rows // 32) * cols


def _add_coupling(device: Device, g: Any, ladder: Any, wires: dict[str, Any]) -> None:
    """Add to the ladder what lines have in common, from a coarse tile solved exactly; see `reference.mean_field`."""
    tiles, rows, cols = g.shape
    k = -(-max(rows, cols) // LEAF)
    high, wide = -(-rows // k), -(-cols // k)
    coarse = device.empty((tiles, high, wide), "float32")
    strength = device.empty((tiles, rows + cols), "float32")
    segments, ends = (device.empty((2, LEAF), "float32") for _ in range(2))
    size = {"rows": rows, "cols": cols, "k": k}
    between = {"coarse": coarse, "strength": strength, "segments": segments, "ends": ends, **size}
    parts = device.empty((tiles, 2, high, cols), "float32")
    device.launch(
        MEAN_FIELD_COARSEN, (tiles,), (256,), {"g": g, "ladder": ladder, **wires, "parts": parts, **between}
    )  # fmt: skip
    lines = {
        "r_wordline": segments[0, :high], "r_bitline": segments[1, :wide], "r_source": ends[0, :high],
        "r_sink": ends[1, :wide],
    }  # fmt: skip
    q = leaves(device, coarse, wire_values(lines), (0, 0))
    device.launch(MEAN_FIELD, (tiles,), (256,), {"q": q, "g_eff": ladder, **between})


def leaves(device: Device, g: Any, wires: dict[str, Any], bits: tuple[int, int]) -> Any:
    """Ports of the blocks of 16 x 16 cells of every tile, 2^bits of them down and along."""
    count = len(g) << sum(bits)
    q = device.empty((count * 4096,), "float32")
    device.launch(
        CONDUCTANCE_LEAF, (count,), (128,),
        {"g": g, "q": q, **wires, "rows": g.shape[1], "cols": g.shape[2], "high_bits": bits[0], "wide_bits": bits[1]},
    )  # fmt: skip
    return q


def _merge_tiles(
    device: Device, g: Any, out: Any, wires: dict[str, Any], bits: tuple[int, int], arithmetic: str, shared: int
) -> None:  # fmt: skip
    drivers = {"r_source": wires["r_source"], "source_value": wires["source_value"]}
    q = leaves(device, g, wires | {"r_source": None, "source_value": 0.0} if shared else wires, bits)
    ways = merge_ways(*bits)
    level = Level(device, arithmetic, q, len(g) << sum(bits), LEAF, LEAF, bool(ways and ways[0]))
    for _, after in pairwise(ways):
        level = level.merged(after)
    if shared:
        level = level.merged() if ways else level
        read = _closed(level, drivers, g.shape[1], shared)
    else:
        read = level.last() if ways else (q, 2 * LEAF, 4096, 4 * LEAF, None)
    direct, offset, stride, ld, cross = read
    device.launch(
        CONDUCTANCE_OUT, grid(out.size), (256,),
        {"direct": direct[offset:], "cross": cross, "g_eff": out, "direct_stride": stride, "direct_ld": ld,
         "along_rows": int(level.along_rows), "rows": g.shape[1], "cols": g.shape[2], "high": LEAF << bits[0],
         "wide": LEAF << bits[1], "size": out.size},
    )  # fmt: skip


def _closed(
    level: Level, drivers: dict[str, Any], rows: int, shared: int
) -> tuple[Any, int, int, int, Any]:  # fmt: skip
    """(1 + Y r_source)^-1 G with Y the sum of `shared` tiles' admittances; the arguments of `conductance_out`.

    Every tile inverts the sum for itself: next to its merges that is little, and one batch.
    """
    device, tiles, high, wide, ports = level.device, level.count, level.rows, level.cols, level.ports
    m = device.empty((tiles * high * high,), "float32")
    size = m.size // shared
    device.launch(
        CONDUCTANCE_SHARE, grid(size), (256,),
        {"q": level.q, "m": m, **drivers, "rows": rows, "high": high, "ports": ports, "shared": shared, "size": size},
    )  # fmt: skip
    invert(device, m, high, high, high * high, tiles, 0, diagonal=1.0)
    closed = device.empty((tiles * high * wide,), "float32")
    device.matmul(
        m, level.q[2 * high :], closed, (tiles, high, wide, high), (high * high, ports * ports, high * wide),
        (high, ports, wide), 1.0, 0.0, "fp32",
    )  # fmt: skip
    return closed, 0, high * wide, wide, None


def grid(size: int) -> tuple[int]:
    """Blocks of 256 threads for a grid-stride loop."""
    return (min(-(-size // 256), 65536),)


def merge_ways(high_bits: int, wide_bits: int) -> list[bool]:
    """Of every merge above the leaves, whether it joins along the wordlines; see `leaf_place` in parasitics.cuh."""
    ways = []
    for bit in range(max(high_bits, wide_bits)):
        ways += [True] * (bit < wide_bits) + [False] * (bit < high_bits)
    return ways


class Level:
    """All blocks of rows x cols cells, about to be joined in pairs; each a matrix of its ports, the joined side last.

    (1 + Z A)^-1 is found in float32 whatever the arithmetic of the other products.
    """

    def __init__(
        self, device: Device, arithmetic: str, q: Any, count: int, rows: int, cols: int, along_rows: bool
    ):  # fmt: skip
        self.device, self.q, self.count, self.rows, self.cols = device, q, count, rows, cols
        self.along_rows, self.arithmetic = along_rows, arithmetic
        self.ports = 2 * (rows + cols)
        self.joined = rows if along_rows else cols
        self.rest = self.ports - self.joined
        self.pairs = count // 2
        self.second = self.ports**2  # where the second block of the first pair begins

    def at(self, block: int, row: int, col: int) -> int:
        return block * self.second + row * self.ports + col

    def product(
        self, m: int, n: int, a: Operand, b: Operand, c: Operand, alpha: float = 1.0, beta: float = 0.0
    ) -> None:
        """c = alpha a b + beta c for every pair."""
        product(self.device, self.arithmetic, (self.pairs, m, n, self.joined), a, b, c, alpha, beta)

    def block(self, block: int, row: int, col: int) -> Operand:
        """A part of the first or second block of every pair."""
        return self.q, self.at(block, row, col), 2 * self.second, self.ports

    def new(self, rows: int, cols: int) -> Operand:
        return self.device.empty((self.pairs * rows * cols,), "float32"), 0, rows * cols, cols

    @cached_property
    def solved(self) -> Operand:
        """F = (1 + Z A)^-1."""
        k, e = self.joined, self.rest
        f = self.new(k, k)
        z, a = self.block(0, e, e), self.block(1, e, e)
        product(self.device, "fp32", (self.pairs, k, k, k), z, a, f, -1.0, 0.0)
        invert(self.device, f[0], k, k, k * k, self.pairs, 0, diagonal=1.0)
        return f

    def merged(self, next_along_rows: bool | None = None) -> Level:
        """The pairs as blocks, about to be joined that way; None: they are tiles, with sides left, right, bottom, top.

        Of `q`, rows and columns of the joined sides stay as they were.
        """
        k, e = self.joined, self.rest
        f = self.solved
        x, y, w, fz, cross = self.new(k, e), self.new(k, e), self.new(k, e), self.new(k, k), self.new(e, e)
        self.product(k, e, f, self.block(0, e, 0), x)
        self.product(k, e, self.block(1, e, e), x, y)
        self.product(k, k, f, self.block(0, e, e), fz, alpha=-1.0)
        self.product(k, e, fz, self.block(1, e, 0), w)
        self.product(e, e, self.block(1, 0, e), x, cross, alpha=-1.0)
        self.product(e, e, self.block(0, 0, e), y, self.block(0, 0, 0), beta=1.0)
        self.product(e, e, self.block(1, 0, e), w, self.block(1, 0, 0), alpha=-1.0, beta=1.0)
        rows, cols = (self.rows, 2 * self.cols) if self.along_rows else (2 * self.rows, self.cols)
        out = Level(
            self.device, self.arithmetic, self.device.empty((self.pairs * 4 * (rows + cols) ** 2,), "float32"), self.pairs, rows, cols,
            bool(next_along_rows),
        )  # fmt: skip
        self.device.launch(
            CONDUCTANCE_MERGE, grid(out.q.size // 16), (256,),  # a piece a warp
            {"q": self.q, "cross": cross[0], "merged": out.q, "block_rows": self.rows, "block_cols": self.cols,
             "along_rows": int(self.along_rows), "next_along_rows": int(out.along_rows),
             "alternate": int(next_along_rows is not None), "size": out.q.size},
        )  # fmt: skip
        return out

    def last(self) -> tuple[Any, int, int, int, Any]:
        """The last merge, only between the tile's left and lower sides; the arguments of `conductance_out`."""
        k, e, p, q = self.joined, self.rest, self.rows, self.cols
        f = self.solved
        # sides of block 0: left, top, bottom | right, or left, right, bottom | top; of block 1 with right for left, top for bottom
        bottom = p + q if self.along_rows else 2 * p
        x, y = self.new(k, q), self.new(k, q)
        self.product(k, q, f, self.block(0, e, bottom), x)
        self.product(k, q, self.block(1, e, e), x, y)
        self.product(p, q, self.block(0, 0, e), y, self.block(0, 0, bottom), beta=1.0)
        if self.along_rows:
            left, cross = self.new(k, p), self.new(q, p)
            self.product(k, p, f, self.block(0, e, 0), left)
            self.product(q, p, self.block(1, bottom, e), left, cross, alpha=-1.0)
        else:
            cross = self.new(p, q)
            self.product(p, q, self.block(1, 0, e), x, cross, alpha=-1.0)
        return self.q, self.at(0, 0, bottom), 2 * self.second, self.ports, cross[0]


def product(
    device: Device, arithmetic: str, shape: tuple[int, int, int, int], a: Operand, b: Operand, c: Operand,
    alpha: float, beta: float,
) -> None:  # fmt: skip
    """c = alpha a b + beta c; shape (batch, m, n, k). "3xtf32" is one product in TF32 of operands in three parts."""
    batch, m, n, k = shape
    if arithmetic == "3xtf32":
        a, b = _split(device, a, batch, m, k, right=False), _split(device, b, batch, k, n, right=True)
        k *= 3
    left, right, out = (array[offset:] for array, offset, _, _ in (a, b, c))
    strides, lds = (a[2], b[2], c[2]), (a[3], b[3], c[3])
    precision = "fp32" if arithmetic == "fp32" else "tf32"
    device.matmul(left, right, out, (batch, m, n, k), strides, lds, alpha, beta, precision)


def _split(device: Device, x: Operand, batch: int, rows: int, cols: int, right: bool) -> Operand:
    array, offset, stride, ld = x
    split = device.empty((3 * batch * rows * cols,), "float32")
    device.launch(
        SPLIT_TF32, grid(batch * rows * cols), (256,),
        {"x": array[offset:], "split": split, "stride": stride, "ld": ld, "rows": rows, "cols": cols,
         "right": int(right), "size": batch * rows * cols},
    )  # fmt: skip
    return split, 0, 3 * rows * cols, cols if right else 3 * cols


def invert(
    device: Device, m: Any, size: int, ld: int, stride: int, count: int, at: int, diagonal: float
) -> None:
    """Inverses in place of `count` matrices m + diagonal, from element `at` on: by halves down to BASE."""
    if size <= BASE:
        device.launch(
            GAUSS_JORDAN, (-(-count * size // 256),), (256,),
            {"m": m[at:], "ld": ld, "stride": stride, "count": count, "diagonal": diagonal}, {"SIZE": size},
        )  # fmt: skip
        return
    half = size // 2
    upper, lower = at + half, at + half * ld
    corner = lower + half
    t, u = (device.empty((count * half * half,), "float32") for _ in range(2))

    def product(a: Any, b: Any, c: Any, alpha: float = 1.0, beta: float = 0.0) -> None:
        """c = alpha a b + beta c; a number is a quarter of the matrices by its first element."""
        (a, *of_a), (b, *of_b), (c, *of_c) = (
            (m[x:], stride, ld) if isinstance(x, int) else (x, half * half, half) for x in (a, b, c)
        )
        strides, lds = zip(of_a, of_b, of_c, strict=True)
        device.matmul(a, b, c, (count, half, half, half), strides, lds, alpha, beta, "fp32")

    # [[a, b], [c, d]]: t = c a^-1, s = d - t b, u = a^-1 b; the inverse is [[a^-1 + u s^-1 t, -u s^-1], [-s^-1 t, s^-1]]
    invert(device, m, half, ld, stride, count, at, diagonal)
    product(lower, at, t)
    product(at, upper, u)
    product(t, upper, corner, alpha=-1.0, beta=1.0)
    invert(device, m, half, ld, stride, count, corner, diagonal)
    product(u, corner, upper, alpha=-1.0)
    product(corner, t, lower, alpha=-1.0)
    product(upper, t, at, alpha=-1.0, beta=1.0)
