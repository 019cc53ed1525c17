"""Where the kernel sources are, and where builds of them are cached."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

__all__ = ["cache_dir", "kernel_dir"]


def kernel_dir() -> Path:
    """The `kernels/` folder: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "_kernels", package.parent / "kernels"):
        if (candidate / "include" / "gpuxbar").is_dir():
            return candidate
    raise FileNotFoundError(
        f"gpuxbar: kernel sources must lie in {package / '_kernels'}, found none; reinstall gpuxbar"
    )


@lru_cache(maxsize=1)
def cache_dir() -> Path:
    """The build cache: `$GPUXBAR_CACHE`, else ~/.cache/gpuxbar; a temporary folder (one warning) if unwritable."""
    wanted = Path(os.environ.get("GPUXBAR_CACHE") or Path.home() / ".cache" / "gpuxbar")
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError as error:
        scratch = Path(tempfile.mkdtemp(prefix="gpuxbar-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        warnings.warn(
            f"gpuxbar cannot write its build cache {wanted} ({error.strerror}); building in {scratch} for this "
            "process only: set GPUXBAR_CACHE to a writable folder",
            RuntimeWarning,
            stacklevel=2,
        )
        return scratch
