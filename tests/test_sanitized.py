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


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers of other systems differ")
@pytest.mark.parametrize("text", [FOLD, GRADIENT], ids=["fold", "gradient"])
def test_vectors_lie_where_their_types_say(tmp_path, text):
    """Lines of a patch begin at any float, and what a function takes by reference as it says: a vector that claimed more would
    crash where the compiler believes it."""
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(text)
    root = kernel_dir()
    flags = [
        "-std=c++17",
        "-O1",
        "-march=native",
        "-Wno-psabi",
        "-fsanitize=alignment,bounds",
        "-fno-sanitize-recover=all",
    ]
    includes = [f"-I{root / 'host'}", f"-I{root / 'include'}"]
    built = subprocess.run(
        [compiler(), *flags, *includes, str(source), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
