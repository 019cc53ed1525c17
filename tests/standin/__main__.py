"""Runs Python with CuPy and PyTorch on a stand-in of an H200: `python tests/standin -m pytest tests/test_gpu.py`.

CuPy's wheel has NVIDIA's runtime in one of its modules, which is compiled here from CuPy's sources without it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import tarfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("GPUXBAR_CACHE") or Path.home() / ".cache" / "gpuxbar") / "standin"
RUNTIME = Path("cupy_backends/cuda/api/runtime")  # the module of CuPy whose wheel has NVIDIA's runtime in it


def nvidia():
    """Headers and libraries of CUDA's pip packages."""
    return Path(find_spec("nvidia").submodule_search_locations[0]) / "cu13"


def compiled(source, target, *flags):
    """A shared library, unless it is newer than its source."""
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        headers = (sysconfig.get_paths()["include"], nvidia() / "include")
        command = ["g++", "-O2", "-w", "-std=c++17", "-fPIC", "-shared", *(f"-I{path}" for path in headers)]
        subprocess.run([*command, *flags, "-o", target, source], check=True)
    return target


def runtime_source():
    """`runtime.cpp` of the CuPy that is installed, from its sources."""
    from Cython.Build import cythonize
    from setuptools import Extension

    release = version("cupy-cuda13x")
    folder = CACHE / f"cupy-{release}"
    source = (folder / RUNTIME).with_suffix(".cpp")
    if not source.exists():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "cupy"]
        asked = {
            **os.environ,
            "CUPY_INSTALL_USE_STUB": "1",
        }  # pip asks the sources what they need, and builds nothing
        subprocess.run([*download, f"cupy=={release}", "--dest", CACHE], check=True, env=asked)
        with tarfile.open(CACHE / f"cupy-{release}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
        constants = {"CUPY_USE_CUDA_PYTHON": False, "CUPY_CUDA_VERSION": 13000, "CUPY_HIP_VERSION": 0}
        directives = {
            "language_level": 3,
            "binding": False,
            "c_api_binop_methods": True,
            "warn.deprecated.IF": False,
        }
        module = Extension(str(RUNTIME).replace("/", "."), [f"{RUNTIME}.pyx"], language="c++")
        with contextlib.chdir(folder):
            cythonize(module, compile_time_env=constants, compiler_directives=directives, quiet=True)
    return source


def main():
    CACHE.mkdir(parents=True, exist_ok=True)
    runtime = compiled(runtime_source(), CACHE / "runtime.so")
    flags = "-march=native", "-fopenmp", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"
    library = compiled(HERE / "standin.cpp", CACHE / "libstandin.so", *flags)
    paths = [
        HERE,
        HERE.parent,
        os.environ.get("PYTHONPATH", ""),
    ]  # with sitecustomize.py, for every process of Python
    os.environ |= {
        # what stands in comes first; what else there is of CUDA's runtime finds no GPU
        "LD_PRELOAD": f"{library}:{nvidia() / 'lib' / 'libcudart.so.13'}",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "STANDIN_RUNTIME": str(runtime),
        "STANDIN_LIBRARY": str(library),
        "CUPY_CACHE_DIR": str(CACHE / "cupy"),
        "CUPY_ACCELERATORS": "",  # CUB comes compiled
    }
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


main()
