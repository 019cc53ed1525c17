"""The cubin of a kernel file for one architecture and set of macros, from the build cache or freshly compiled."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpuxbar.launch.nvrtc import compile_cuda, nvrtc_version
from gpuxbar.launch.sources import UNFINISHED, cached, kernel_dir, once

__all__ = ["Resources", "closure", "cubin", "options", "resources"]

_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.M)
_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.S,
)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a multiprocessor: registers a thread, bytes of stack, spills, shared memory."""

    registers: int
    stack: int
    spills: int
    shared: int


def options(arch: str, macros: Mapping[str, int]) -> list[str]:
    """Fused multiply-adds only where written, denormals kept: the arithmetic of the host build."""
    defines = [f"-D{name}={value}" for name, value in sorted(macros.items())]
    return [f"-arch={arch}", "-std=c++17", "-fmad=false", "-ftz=false", "--ptxas-options=-v", *defines]


def cubin(file: str, arch: str, macros: Mapping[str, int]) -> tuple[Path, str]:
    """Path of the cubin of `kernels/<file>`, and the compiler's log.

    The cache key covers the file, every header it includes, the options and the compiler's version.
    """
    root = kernel_dir()
    flags = options(arch, macros)
    key = hashlib.sha256(repr((nvrtc_version(), flags)).encode())
    for path in closure(root / file, root / "include"):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cached(f"{Path(file).stem}-{arch}-{key.hexdigest()[:24]}.cubin")
    log_path = target.with_suffix(".log")

    def make() -> None:
        binary, log = compile_cuda((root / file).read_text(), file, [*flags, f"-I{root / 'include'}"])
        _write(log_path, log.encode())
        _write(target, binary)

    once(target, make)
    return target, log_path.read_text()


def resources(log: str) -> dict[str, Resources]:
    """Resources of every kernel named in a log."""
    found = {}
    for name, stack, stores, loads, registers, rest in _ENTRY.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = Resources(
            int(registers), int(stack), int(stores) + int(loads), int(shared.group(1)) if shared else 0
        )
    return found


def closure(path: Path, include: Path) -> list[Path]:
    """A file and every quoted header it reaches, each once, in a fixed order."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += [include / name for name in _INCLUDE.findall(path.read_text())]
    return sorted(seen)


def _write(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(prefix=UNFINISHED, dir=path.parent, delete=False) as scratch:
        scratch.write(data)
    os.replace(scratch.name, path)
