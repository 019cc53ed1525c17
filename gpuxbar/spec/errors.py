"""One line a wrong setting: key path, rule, value, way out."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

__all__ = ["SpecError", "nearest", "one_line_a_setting"]


class SpecError(ValueError):
    """A setting of a `CrossbarSpec`, or a file of one, that cannot be used; the text says which and why."""


def nearest(word: object, known: Iterable[str]) -> str:
    """A way out for an unknown word: the nearest known one, or some of them."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), by_lower, n=1)
    if near:
        return f"did you mean `{by_lower[near[0]]}`?"
    names = list(by_lower.values())
    return f"known: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"


@contextmanager
def one_line_a_setting(model: type[BaseModel]) -> Iterator[None]:
    """Turn pydantic's report about `model` into a `SpecError`."""
    try:
        yield
    except ValidationError as error:
        lines = dict.fromkeys(_line(model, dict(found)) for found in error.errors(include_url=False))
        raise SpecError("\n".join(lines)) from None


def _line(model: type[BaseModel], found: dict[str, Any]) -> str:
    part, field, path = _locate(model, found["loc"])
    kind, value, context = found["type"], found["input"], found.get("ctx", {})
    where = f"{model.__name__}: `{'.'.join(path)}`" if path else f"{model.__name__}:"
    laws = _laws(field)
    if kind == "value_error":  # a rule between settings, in the words of the model
        text = re.sub(rf"^{part.__name__}: ", "", str(context["error"]))
        return f"{where}: {text}" if path else f"{where} {text}"
    if kind == "extra_forbidden":
        having = [f"law={law!r}" for law, settings in laws.items() if path[-1] in settings.model_fields]
        way_out = f"{' or '.join(having)} has it" if having else nearest(path[-1], part.model_fields)
        return f"{where} must be a known key; {way_out}"
    unnamed = kind in ("model_type", "model_attributes_type", "dict_type")
    if kind == "union_tag_not_found" or (unnamed and laws):
        return f"{where} must name its law, got {_short(value)}; add `law`: {', '.join(laws)}"
    if kind == "union_tag_invalid":
        tag = context["tag"]
        where = f"{model.__name__}: `{'.'.join([*path, 'law'])}`"
        return f"{where} must be a known law, got {tag!r}; {nearest(tag, laws)}"
    if unnamed:
        return f"{where} must hold settings by name, got {_short(value)}; {nearest(value, part.model_fields)}"
    if kind == "missing":
        return f"{where} must be given, got none; see help({part.__name__})"
    if field is None:
        return f"{where} must be valid, got {_short(value)}; {found['msg']}"
    if kind == "literal_error":
        choices = [str(choice) for choice in _choices(field.annotation)]
        near = difflib.get_close_matches(str(value), choices, n=1)
        way_out = f"did you mean `{near[0]}`?" if near else "choose one of these"
        return f"{where} must be {' or '.join(choices)}, got {_short(value)}; {way_out}"
    of_tuple = kind == "tuple_type" and float not in _members(field.annotation)
    rule = "a list" if of_tuple else _rule(field)
    way_out = (
        f"see help({part.__name__})" if field.is_required() else f"the default is {_short(field.default)}"
    )
    return f"{where} must be {rule}, got {_short(value)}; {way_out}"


def _locate(
    model: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[type[BaseModel], FieldInfo | None, list[str]]:
    """The part, the field and the key path a pydantic location speaks of; it also holds names of union members."""
    part, field, path = model, None, []
    for step in location:
        if step in part.model_fields:
            field = part.model_fields[str(step)]
            path.append(str(step))
            inner = [t for t in _members(field.annotation) if hasattr(t, "model_fields")]
            if len(inner) == 1:
                part = inner[0]
        elif step in _laws(field):
            part = _laws(field)[str(step)]
        elif step not in ("int", "float", "none", "tuple[float, ...]"):
            path.append(str(step))
    return part, field, path


def _members(annotation: Any) -> list[Any]:
    """The types of a union, through `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [t for member in get_args(annotation) for t in _members(member)]
    return [annotation]


def _choices(annotation: Any) -> list[Any]:
    return [c for t in _members(annotation) if get_origin(t) is Literal for c in get_args(t)]


def _laws(field: FieldInfo | None) -> dict[str, type[BaseModel]]:
    """The parts that a field may be, by the laws that they name."""
    parts = [t for t in _members(field.annotation) if hasattr(t, "model_fields")] if field is not None else []
    return {t.model_fields["law"].default: t for t in parts if "law" in t.model_fields}


def _rule(field: FieldInfo) -> str:
    """A field's rule in words: "an integer from 1 to 16, or null"."""
    members = _members(field.annotation)
    noun = next(
        (
            word
            for kind, word in ((bool, "true or false"), (int, "an integer"), (str, "text"))
            if kind in members
        ),
        "a finite number",
    )
    low = high = ""
    for limit in field.metadata:
        if isinstance(limit, annotated_types.Ge):
            low = f"from {limit.ge}"
        elif isinstance(limit, annotated_types.Gt):
            low = f"above {limit.gt}"
        elif isinstance(limit, annotated_types.Le):
            high = f"to {limit.le}" if low.startswith("from") else f"up to {limit.le}"
        elif isinstance(limit, annotated_types.Lt):
            high = f"below {limit.lt}"
    if low.startswith("from") and not high:
        low = low.replace("from", "of at least")
    if high and low and not high.startswith("to"):
        high = f"and {high}"
    rule = " ".join(word for word in (noun, low, high) if word)
    return f"{rule}, or null" if type(None) in members else rule


def _short(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
