"""What every group of settings is: frozen, strict about its keys, one line a wrong setting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from typing_extensions import Self

from gpuxbar.spec.errors import SpecError, one_line_a_setting

__all__ = ["Part"]


class Part(BaseModel):
    """A frozen group of settings; a wrong one raises a `SpecError` of one line."""

    another: ClassVar[str] = "with {} under this part's key in spec.with_overrides"  # way to have settings

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def __init__(self, /, **settings: Any) -> None:
        with one_line_a_setting(type(self)):
            super().__init__(**settings)

    # pydantic builds nested parts without this method, and so reports the whole path from the outermost one
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        way_out = self.another.format({name: value})
        raise SpecError(
            f"{type(self).__name__}: `{name}` must stay as it was made, got {value!r}; make another spec, {way_out}"
        )

    def __delattr__(self, name: str) -> None:
        raise SpecError(
            f"{type(self).__name__}: `{name}` must stay as it was made, got del; make another spec without it, for the default"
        )

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Only what differs from the defaults is shown."""
        fields = type(self).model_fields
        return (
            (name, value)
            for name, value in super().__repr_args__()
            if name is None or value != fields[name].default
        )

    __str__ = BaseModel.__repr__

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        with one_line_a_setting(cls):
            return super().model_validate(obj, **options)
