"""What every group of settings is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Category = Literal["hate", "sexual", "violence", "shocking", "illegal_activity", "harassment", "self_harm"]
CATEGORIES: tuple[Category, ...] = (
    "hate",
    "sexual",
    "violence",
    "shocking",
    "illegal_activity",
    "harassment",
    "self_harm",
)
Rate = Annotated[float, Field(ge=0.0, le=1.0)]
Item = TypeVar("Item")


def _once_each(values: tuple[Item, ...]) -> tuple[Item, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"expected each value once, found {value!r} {values.count(value)} times")
    return values


Distinct = Annotated[tuple[Item, ...], AfterValidator(_once_each)]


def added_field(default: Any, **rules: Any) -> Any:
    """Return the `Field` of a setting that earlier versions did not have; at its default it is left out of every dump.

    Keys of artifacts, the identity of run folders and measured results hash such dumps. A new setting whose default
    is what was done before therefore leaves everything that is stored as it is; any other value is a new identity.
    The default of such a field never changes, or the same dump would mean two things.
    """
    return Field(default, exclude_if=lambda value: value == default, **rules)


class Frozen(BaseModel):
    """A group of settings: cannot be changed, refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
