"""What holds for any shape: the host kernel is its oracle, and reading is linear, adjoint, and blind to padding.

Values are small integers, so that float32 sums are exact and rounding edges are met, not avoided: codes must agree
to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuxbar import ops, reference
from gpuxbar.launch import library
from gpuxbar.ops import ConvGeometry

always = settings(deadline=None, derandomize=True, max_examples=150)


@dataclass(frozen=True)
class Array:
    """Sizes of a stack of tiles; `tile` may exceed the array."""

    batch: int
    groups: int
    rows: int
    cols: int
    planes: int
    tile: int
    transposed: bool

    @property
    def drive(self):
        return self.cols if self.transposed else self.rows

    @property
    def sense(self):
        return self.rows if self.transposed else self.cols

    @property
    def lines(self):
        return min(self.tile, self.drive)

    @property
    def layout(self):
        return {
            "groups": self.groups,
            "tile_rows": self.tile,
            "tile_cols": self.tile,
            "transposed": self.transposed,
        }

    def conductances(self, rng):
        return rng.integers(-7, 8, (self.planes, self.groups * self.rows, self.cols)).astype(np.float32)

    def codes(self, rng, top=127):
        return rng.integers(-top, top + 1, (self.batch, self.groups * self.drive)).astype(np.int16)


arrays = st.builds(
    Array,
    batch=st.integers(1, 60),
    groups=st.integers(1, 3),
    rows=st.integers(1, 70),
    cols=st.integers(1, 40),
    planes=st.integers(1, 3),
    tile=st.integers(1, 80),
    transposed=st.booleans(),
)
seeds = st.integers(0, 2**63 - 1)


@dataclass(frozen=True)
class Converters:
    """Streams, phases and ADC of reads of 7-bit codes, in exact binary steps."""

    stream_bits: int
    phases: int
    adc_bits: int | None
    adc_signed: bool
    clipping: int  # binary orders from the largest current down to the ADC's range
    v_lsb: float

    def settings(self, lines):
        """Settings of a read whose tiles have `lines` lines, of conductances up to 7."""
        bits = self.stream_bits
        digit = 2**bits - 1 if bits else 127
        range_bits = int(np.ceil(np.log2(digit * 7 * lines))) - self.clipping
        # not below an eighth of the unit of a current, so that sums of codes are exact in float32
        lsb = 2.0 ** max(-3, range_bits - (self.adc_bits or 0)) * self.v_lsb
        return {
            "stream_bits": bits, "streams": -(-7 // bits) if bits else 1, "phases": self.phases if bits else 1,
            "adc_bits": self.adc_bits, "adc_signed": self.adc_signed, "adc_lsb": lsb if self.adc_bits else None, "v_lsb": self.v_lsb,
        }  # fmt: skip


converters = st.builds(
    Converters,
    stream_bits=st.sampled_from([0, 2, 7, 1, 3, 4]),
    phases=st.sampled_from([1, 2]),
    adc_bits=st.sampled_from([8, 3, 5, 12, 2, None, 6, 16]),
    adc_signed=st.booleans(),
    clipping=st.sampled_from([3, 2, 4, 0, 6]),
    v_lsb=st.sampled_from([1.0, 2.0**-8, 2.0]),
)


@st.composite
def geometries(draw):
    """Convolutions whose kernel fits the padded image."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    reach = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    height, width = (draw(st.integers(max(1, r), max(1, r) + 7)) for r in reach)
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    order = draw(st.sampled_from(["channel_position", "position_channel"]))
    return ConvGeometry(draw(st.integers(1, 4)), height, width, kernel, stride, padding, dilation, order)


def assert_codes_close(y, expected, step):
    """Equal but for float32 error, or one conversion on a rounding edge in a hundred."""
    off = np.abs(y - expected)
    edge = off > 1e-5 * np.abs(expected).max() + 1e-6 * step
    assert edge.sum() <= max(1, edge.size // 100), off.max() / step
    assert (off[edge] <= 1.001 * step).all(), off.max() / step


@always
@given(array=arrays, converter=converters, seed=seeds)
def test_host_is_its_oracle_to_the_bit(array, converter, seed):
    assert library() is not None
    rng = np.random.default_rng(seed)
    v, g = array.codes(rng), array.conductances(rng)
    scale = 2.0 ** rng.integers(-1, 3, array.planes) * rng.choice([-1, 1], array.planes)
    s = {**converter.settings(array.lines), "slice_scale": scale.astype(np.float32), "want_gate": True}
    y, gate = ops.tile_mvm(v, g, **array.layout, **s)
    s["adc_bits"] = s["adc_bits"] or 0
    expected, expected_gate = reference.tile_mvm(
        v, g, groups=array.groups, tile=array.tile, transposed=array.transposed, **s
    )
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(gate, expected_gate, atol=1e-6)


@always
@given(array=arrays, converter=converters, generator=st.sampled_from(["exact", "fast"]), seed=seeds)
def test_host_is_its_oracle_with_noise(array, converter, generator, seed):
    rng = np.random.default_rng(seed)
    v, g = array.codes(rng), array.conductances(rng)
    lsb = 2.0 ** rng.integers(3, 8, array.groups * array.sense)
    s = {
        **converter.settings(array.lines), "v_lsb": 1.0, "read_noise": 20.0, "noise_var": np.abs(g),
        "generator": generator, "seed": seed, "step": seed >> 7, "row_offset": seed >> 40,
    }  # fmt: skip
    if s["adc_bits"]:
        s["adc_lsb"] = lsb.astype(np.float32)
    y = ops.tile_mvm(v, g, **array.layout, **s)
    s["adc_bits"] = s["adc_bits"] or 0
    expected = reference.tile_mvm(
        v, g, groups=array.groups, tile=array.tile, transposed=array.transposed, **s
    )
    assert_codes_close(y, expected, lsb.max() * 2.0 ** (s["stream_bits"] * (s["streams"] - 1)))


@always
@given(
    conv=geometries(), images=st.integers(1, 4), groups=st.integers(1, 2), outputs=st.integers(1, 20),
    tile=st.integers(1, 50), converter=converters, seed=seeds,
)  # fmt: skip
def test_convolution_reads_the_patches(conv, images, groups, outputs, tile, converter, seed):
    """A convolution is the matrix read of `unfold`, noise and all, to the bit; backwards it is `fold` of one."""
    rng = np.random.default_rng(seed)
    g = rng.integers(-7, 8, (2, groups * conv.inputs, outputs)).astype(np.float32)
    x = rng.integers(-127, 128, (images, groups * conv.channels, conv.height, conv.width)).astype(np.int16)
    s = {
        **converter.settings(min(tile, conv.inputs)),
        "groups": groups,
        "read_noise": 8 * converter.v_lsb,
        "seed": seed,
    }
    y = ops.tile_mvm(x, g, conv=conv, tile_rows=tile, **s)
    patches = ops.tile_mvm(reference.unfold(x, conv), g, tile_rows=tile, **s)
    np.testing.assert_array_equal(y, patches.reshape(images, *conv.out, -1).transpose(0, 3, 1, 2))

    back = rng.integers(-127, 128, (images, groups * outputs, *conv.out)).astype(np.int16)
    s |= {"transposed": True, "tile_cols": tile}
    pixels = np.ascontiguousarray(back.transpose(0, 2, 3, 1)).reshape(images * conv.pixels, -1)
    rows = ops.tile_mvm(pixels, g, **s)
    expected = reference.fold(rows.astype(np.float64), images, conv)
    folded = ops.tile_mvm(back, g, conv=conv, **s)
    np.testing.assert_allclose(folded, expected, rtol=0, atol=1e-6 * max(1, np.abs(rows).max()) * 16)


@always
@given(array=arrays, seed=seeds)
def test_reading_is_linear_without_converters(array, seed):
    rng = np.random.default_rng(seed)
    g = array.conductances(rng)
    a, b = (array.codes(rng).astype(np.float32) for _ in range(2))
    read = lambda v, g: ops.tile_mvm(v, g, **array.layout)  # noqa: E731
    np.testing.assert_array_equal(read(2 * a - 3 * b, g), 2 * read(a, g) - 3 * read(b, g))
    np.testing.assert_array_equal(read(a, 4 * g), 4 * read(a, g))
    np.testing.assert_array_equal(read(a, g), sum(read(a, plane[None]) for plane in g))


@always
@given(array=arrays, seed=seeds)
def test_transposed_is_the_adjoint_without_converters(array, seed):
    rng = np.random.default_rng(seed)
    g = array.conductances(rng)
    v = array.codes(rng).astype(np.float32)
    u = rng.integers(-9, 10, (array.batch, array.groups * array.sense)).astype(np.float32)
    back = ops.tile_mvm(u, g, **{**array.layout, "transposed": not array.transposed})
    forth = ops.tile_mvm(v, g, **array.layout)
    assert np.vdot(u.astype(np.int64), forth.astype(np.int64)) == np.vdot(v.astype(np.int64), back.astype(np.int64))  # fmt: skip


@always
@given(array=arrays, converter=converters, seed=seeds)
def test_zero_drives_nothing(array, converter, seed):
    g = array.conductances(np.random.default_rng(seed))
    v = np.zeros((array.batch, array.groups * array.drive), np.int16)
    bias = np.random.default_rng(seed).normal(size=array.groups * array.sense).astype(np.float32)
    y = ops.tile_mvm(v, g, bias=bias, noise_var=np.abs(g), **array.layout, **converter.settings(array.lines))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))


@always
@given(array=arrays.map(lambda a: replace(a, groups=1)), converter=converters, seed=seeds)
def test_padding_changes_nothing(array, converter, seed):
    """Lines of conductance 0 that fill up the last tile, and further bitlines, leave every bit as it is."""
    rng = np.random.default_rng(seed)
    v, g = array.codes(rng), array.conductances(rng)
    s = {**array.layout, **converter.settings(array.lines), "read_noise": 8 * converter.v_lsb, "seed": seed}
    y = ops.tile_mvm(v, g, noise_var=np.abs(g), **s)
    lines = -array.drive % array.tile
    driven = np.pad(v, ((0, 0), (0, lines)), constant_values=99)
    padded = np.pad(g, ((0, 0), (0, 5), (0, lines)) if array.transposed else ((0, 0), (0, lines), (0, 5)))
    wide = ops.tile_mvm(driven, padded, noise_var=np.abs(padded), **s)
    np.testing.assert_array_equal(wide[:, : y.shape[1]], y)


@always
@given(array=arrays, converter=converters, seed=seeds)
def test_rows_are_read_one_by_one(array, converter, seed):
    """Rows in any order, each with the noise of its index, give the results in that order."""
    rng = np.random.default_rng(seed)
    v, g = array.codes(rng), array.conductances(rng)
    scale = rng.uniform(1, 2, array.batch).astype(np.float32)
    s = {**array.layout, **converter.settings(array.lines), "read_noise": 8 * converter.v_lsb, "seed": seed}
    whole = ops.tile_mvm(v, g, row_scale=scale, **s)
    for row in rng.permutation(array.batch)[:7]:
        alone = ops.tile_mvm(v[row : row + 1], g, row_offset=int(row), row_scale=scale[row : row + 1], **s)
        np.testing.assert_array_equal(alone[0], whole[row])


@always
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    lsb=st.floats(0.03125, 100, width=32),
    code_max=st.integers(1, 32767),
    signed=st.booleans(),
)
def test_a_dac_code_is_the_nearest(values, lsb, code_max, signed):
    x = np.array([values], np.float32)
    codes = ops.dac_quantize(x, lsb=lsb, code_max=code_max, signed=signed).astype(np.float64)
    low = -code_max if signed else 0
    assert low <= codes.min() <= codes.max() <= code_max
    nearest = np.clip(x.astype(np.float64) / lsb, low, code_max)
    # half a step, and float32 rounding of the quotient
    assert (np.abs(codes - nearest) <= 0.5 + 1e-6 * np.abs(nearest)).all()
