"""Host kernels under the compiler's sanitizers, whose findings no result shows."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpuxbar.launch.host import compiler
from gpuxbar.launch.sources import kernel_dir

FOLD = r"""
#include "fold.hpp"
using namespace gpuxbar;
int main() {
  Conv c{};
  c.channels = 2, c.height = 3, c.width = 40, c.kernel_h = 1, c.kernel_w = 3, c.stride_h = 1, c.stride_w = 2;
  c.pad_h = 0, c.pad_w = 1, c.dilation_h = 1, c.dilation_w = 2, c.out_h = 3, c.out_w = 19;
  c.channel_step = 3, c.position_step = 1;
  Folded folded(c, 1, 1);
  const std::vector<float> sum(57, 1.0f);
  folded.start(runs_of(c, 0, 57), 0);
  for (i64 j = 0; j < 6; ++j) folded.place(j, sum.data());
  folded.add(0, 0, 6);
  std::vector<float> y(2 * 3 * 40);
  folded.store(y.data(), 1, 0, 1, 0, 1, true);
  float total = 0.0f;
  for (const float value : y) total += value;
  return total == 336.0f ? 0 : 1;  // 57 pixels of 6 taps, less the 6 that fall in the padding
}
"""


GRADIENT = r"""
#include "conv_outer_product.cpp"
int main() {
  Conv c{};
  c.channels = 1, c.height = 5, c.width = 13, c.kernel_h = 3, c.kernel_w = 3, c.stride_h = 1, c.stride_w = 1;
  c.pad_h = 1, c.pad_w = 1, c.dilation_h = 1, c.dilation_w = 1, c.out_h = 5, c.out_w = 13;
  c.channel_step = 9, c.position_step = 1;
  const i64 images = 2, groups = 4, size = images * groups * 65;
  const std::vector<float> d(size, 1.0f), x(size, 1.0f);
  const float unit = 1.0f;
  std::vector<float> dw(groups * 9);
  gpuxbar_conv_outer_product(d.data(), x.data(), &unit, &c, dw.data(), images, groups, 1, 0, 1);
  return dw[4] == 2 * 65.0f && dw[0] == 2 * 48.0f ? 0 : 1;  // of the middle, and of a corner, of two images
}
"""


READ = r"""
#include "tile_mvm.cpp"
// Whether ones read through ones, by DACs that `err` by nothing, add up to the pixels that patches touch.
bool reads(i64 stride, i64 out_w, bool transposed, bool err) {
  const i64 images = 3, groups = 2, outputs = 3;
  Conv c{};
  c.channels = 2, c.height = 11, c.width = (out_w - 1) * stride + 2, c.kernel_h = 3, c.kernel_w = 2;
  c.stride_h = 2, c.stride_w = stride, c.pad_h = 1, c.pad_w = 1, c.dilation_h = 1, c.dilation_w = 3;
  c.out_h = 6, c.out_w = out_w, c.channel_step = 6, c.position_step = 1;
  const i64 pixels = 6 * out_w, lines = 12, size = 2 * 11 * c.width, drive = transposed ? outputs : lines;
  const i64 taken = images * groups * size, made = images * groups * outputs * pixels;  // what is read forwards, and the result
  const std::vector<i16> v(transposed ? made : taken, 1);
  const std::vector<float> g(groups * lines * outputs, 1.0f);
  std::vector<float> error(3 * groups * drive, 0.0f), y(transposed ? taken : made);
  std::fill_n(error.data(), groups * drive, 1.0f);  // gains
  const float one = 1.0f, none = 0.0f;
  const i64 step = 0;
  TileMvm p{};
  p.v = v.data(), p.g = g.data(), p.slice_scale = &one, p.read_noise = &none, p.step = &step, p.y = y.data(), p.conv = &c;
  if (err) p.dac_error = error.data();
  p.batch = images * pixels, p.groups = groups, p.inputs = lines, p.cols = outputs, p.planes = 1, p.tile = 5;
  p.is_code = 1, p.transposed = transposed, p.streams = p.phases = 1, p.v_lsb = 1.0, p.v_read = 1.0;
  gpuxbar_tile_mvm(&p);
  float found = 0.0f, expected = 0.0f;
  for (const float value : y) found += value;
  for (i64 patch = 0; patch < p.batch; ++patch)
    for (i64 line = 0; line < groups * lines; ++line)
      expected += outputs * (patch_place(c, patch, groups, line / lines, line % lines) >= 0);
  return found == expected;
}
int main() {
  for (const i64 stride : {1, 2, 3})
    for (const i64 out_w : {5, 29, 32})  // 32: in whole vectors, and images in whole blocks
      for (const int way : {0, 1, 2, 3})
        if (!reads(stride, out_w, way & 1, way & 2)) return 1;
}
"""


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers of other systems differ")


def assert_clean(folder, text, *flags):
    """A program of this text returns 0, and the sanitizers of these flags find nothing in it."""
    source, program = folder / "main.cpp", folder / "main"
    source.write_text(text)
    root = kernel_dir()
    command = [compiler(), "-std=c++17", "-march=native", "-Wno-psabi", "-fno-sanitize-recover=all", *flags]
    includes = [f"-I{root / 'host'}", f"-I{root / 'include'}"]
    built = subprocess.run(
        [*command, *includes, str(source), "-o", str(program)], capture_output=True, text=True, check=False
    )
    if "cannot find" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", [FOLD, GRADIENT], ids=["fold", "gradient"])
def test_vectors_lie_where_their_types_say(tmp_path, text):
    """Lines of a patch begin at any float, and what a function takes by reference as it says: a vector that claimed more would
    crash where the compiler believes it."""
    assert_clean(tmp_path, text, "-O1", "-fsanitize=alignment,bounds")


def test_patches_are_packed_within_their_arrays(tmp_path):
    """Vectors of pixels reach past what a patch is made of: arrays must hold that too. Apart from the test of types, since the
    address sanitizer aligns variables better than others do."""
    assert_clean(tmp_path, READ, "-O0", "-fsanitize=address")
