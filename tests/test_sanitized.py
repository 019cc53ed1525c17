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


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers of other systems differ")
def test_folded_taps_lie_anywhere(tmp_path):
    """Lines of a patch begin at any float: a vector that claimed more would crash where the compiler believes it."""
    source, program = tmp_path / "fold.cpp", tmp_path / "fold"
    source.write_text(FOLD)
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
