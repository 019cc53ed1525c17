"""Where the kernel sources are, and where builds of them are cached."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from gpuxbar.launch.nvrtc import CompileError

__all__ = ["UNFINISHED", "cache_dir", "cached", "kernel_dir", "once"]

UNFINISHED = "unfinished-"  # prefix of what builds work on in the cache
DEAD = 3600  # seconds after which a build that has touched nothing was killed


def kernel_dir() -> Path:
    """The `kernels/` folder: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "_kernels", package.parent / "kernels"):
        if (candidate / "include" / "gpuxbar").is_dir():
            return candidate
    raise FileNotFoundError(
        f"gpuxbar: kernel sources must lie in {package / '_kernels'}, found none; reinstall gpuxbar"
    )


def cached(name: str) -> Path:
    """Where the build of this name is, in a cache that may be read-only, or else where it is to be made."""
    wanted = _wanted_dir()
    ready = wanted / name if wanted else None
    return ready if ready and ready.exists() else cache_dir() / name


@lru_cache(maxsize=1)
def cache_dir() -> Path:
    """The build cache: `$GPUXBAR_CACHE`, else ~/.cache/gpuxbar; a temporary folder (one warning) if unwritable."""
    wanted = _wanted_dir()
    try:
        if wanted is None:
            raise OSError(errno.ENOENT, "this user has no home folder")
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError as error:
        scratch = Path(tempfile.mkdtemp(prefix="gpuxbar-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        warnings.warn(
            f"gpuxbar cannot write its build cache {wanted or '~/.cache/gpuxbar'} ({error.strerror}); building in {scratch} for "
            "this process only: set GPUXBAR_CACHE to a writable folder",
            RuntimeWarning,
            stacklevel=2,
        )
        return scratch


def once(target: Path, make: Callable[[], object]) -> Path:
    """`target`, made unless it is there: of processes that want it at a time, one makes it and the others wait.

    `make` puts it there whole (`os.replace`). Where files cannot be locked, and beside the lock of another user, each process makes
    it, to no harm.
    """
    if target.exists():
        return target
    lock = target.with_suffix(".lock")
    with contextlib.ExitStack() as held:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # not on Windows

            fcntl.flock(held.enter_context(open(lock, "w")), fcntl.LOCK_EX)
        try:
            if not target.exists():
                _clear(target.parent)
                make()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CompileError(
                f"gpuxbar: the build cache {target.parent} must have room for {target.name}, got {error.strerror}; "
                "free some or set GPUXBAR_CACHE to another folder"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
    return target


def _clear(cache: Path) -> None:
    """Remove what killed builds left."""
    for left in cache.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):  # of another user, or just gone
            if time.time() - left.stat().st_mtime > DEAD:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _wanted_dir() -> Path | None:
    """The cache that is asked for; None: that of a user without a home folder, as an id in a container may be."""
    try:
        return Path(os.environ.get("GPUXBAR_CACHE") or Path.home() / ".cache" / "gpuxbar")
    except RuntimeError:
        return None
