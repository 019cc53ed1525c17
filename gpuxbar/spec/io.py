"""Specs as YAML files."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from shutil import copymode
from typing import Any

import yaml

from gpuxbar.spec.errors import SpecError
from gpuxbar.spec.model import CrossbarSpec

__all__ = ["load_spec", "nested", "parse_value", "save_spec"]

# a date that is none is a ValueError, nesting beyond Python's stack a RecursionError
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
HEADER = "# gpuxbar CrossbarSpec; SI units (S, A, V)\n"


def load_spec(path: str | Path) -> CrossbarSpec:
    """Read a spec from a YAML file; keys left out keep their ideal defaults.

    Args:
        path: A file as `save_spec` writes it; a mapping of the keys of `CrossbarSpec`.

    Raises:
        TypeError: `path` is neither text nor a path.
        SpecError: The file is missing, is not YAML, names a key twice, or holds a wrong setting. The text names
            the file, the key, the rule and the nearest known key.
    """
    path = _path("load_spec", path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        if not isinstance(data, dict):
            got = "nothing" if data is None else type(data).__name__
            raise SpecError(
                f"CrossbarSpec: the file must hold settings by name, got {got}; write {{}} for the ideal spec"
            )
        return CrossbarSpec.model_validate(data)
    except FileNotFoundError:
        known = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, known, n=1)
        way_out = f"did you mean `{path.with_name(near[0])}`?" if near else "check the path"
        raise SpecError(f"load_spec: `{path}` must be a file, got none; {way_out}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"load_spec: `{path}` must be a readable text file, got {error}; check it") from error
    except SpecError as error:
        raise SpecError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    except UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise SpecError(f"{path}{place}: must be YAML, got: {problem}; correct the line") from None


def save_spec(spec: CrossbarSpec, path: str | Path) -> None:
    """Write every setting of a spec, defaults included, so that `load_spec` gives an equal one.

    Args:
        spec: What to write.
        path: A file, in a folder that exists; written over, or left as it was where that fails.

    Raises:
        TypeError: `spec` is not a CrossbarSpec, or `path` is neither text nor a path.
        OSError: The file cannot be written.
    """
    if not isinstance(spec, CrossbarSpec):
        raise TypeError(
            f"save_spec: `spec` must be a CrossbarSpec, got {type(spec).__name__}; call save_spec(spec, path)"
        )
    text = HEADER + yaml.safe_dump(spec.model_dump(), sort_keys=False)
    whole = _path("save_spec", path).resolve()
    # beside it, and in its place once it is whole; what is no file, as /dev/stdout, is written to itself
    part = whole.with_name(f".{whole.name}.part") if whole.is_file() or not whole.exists() else whole
    try:
        part.write_text(text, encoding="utf-8")
        if part != whole:
            if whole.exists():
                copymode(whole, part)
            part.replace(whole)
    except OSError as error:
        if part != whole:
            with suppress(OSError):
                part.unlink()
        raise OSError(f"save_spec: cannot write {path} ({error.strerror}); nothing was changed") from error


def _path(op: str, path: Any) -> Path:
    if not isinstance(path, (str, Path)):
        raise TypeError(
            f'{op}: `path` must be text or a pathlib.Path, got {type(path).__name__}; for instance "spec.yaml"'
        )
    return Path(path)


def parse_value(text: str) -> Any:
    """A setting from the text of a command line: "6", "1e-6", "null", "[1, 2]", "offset"."""
    try:
        value = yaml.safe_load(text)
    except UNREADABLE:
        value = text
    if isinstance(value, str):
        try:
            return float(value)  # YAML takes 1e-6 for text
        except ValueError:
            return value
    return value


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Overrides of a spec from values by dotted keys: {"adc.bits": 6} to {"adc": {"bits": 6}}."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        *groups, last = key.split(".")
        place = out
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise SpecError(
                    f"CrossbarSpec: `{key}` must not follow a value of {group}, got one; leave one out"
                )
        place[last] = value
    return out


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if repr(key) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` for the second time", key_node.start_mark
                )
            seen.add(repr(key))
        return super().construct_mapping(node, deep)
