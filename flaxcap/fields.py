"""Declared fields of nested dataclasses: bounds, choices, help text, and what a field identifies."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, cast

from flaxcap.errors import cut, nearest

Identity = Literal["store", "model", "run"]

# A number exceeds an exclusive lower bound by at least this: float32's smallest normal number is 1.2e-38.
_TINY = 1e-30
# The `most` of an integer that declares none: the largest int32. Fields that memory grows with declare less, because a
# downloaded export brings its own preset.
_LARGEST_INT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Rules:
    """Declarations of one field: its help text, and what `check` accepts.

    Attributes:
      help: what the field means.
      least: inclusive lower bound.
      most: inclusive upper bound.
      above: exclusive lower bound.
      below: exclusive upper bound.
      choices: the only values of a text field; (): any.
      nonempty: what the value of a text field names, if it cannot be empty; "": it can.
    """

    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    nonempty: str = ""

    @property
    def bounds(self) -> str:
        """The interval of a number in words, such as "0 to 0.99"; "" without bounds."""
        if self.least is not None and self.most is not None:
            return f"{self.least} to {self.most}"
        ends = {
            "{} or more": self.least,
            "more than {}": self.above,
            "at most {}": self.most,
            "less than {}": self.below,
        }
        return " and ".join(text.format(end) for text, end in ends.items() if end is not None)

    def expected(self, value: Any) -> str:
        """Returns what these rules expect instead of `value`, or "" if they accept it."""
        if self.choices:
            known = value in self.choices
            return "" if known else f"one of {', '.join(self.choices)}{nearest(cut(str(value)), self.choices)}"
        if isinstance(value, str):
            return "" if value else self.nonempty
        inside = (
            (self.least is None or value >= self.least)
            and (self.above is None or value - self.above >= _TINY)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )
        if not inside:
            return self.bounds
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if self.most is None and value > _LARGEST_INT and isinstance(value, int):
            return f"at most {_LARGEST_INT}"
        return ""


class Condition(NamedTuple):
    """A condition on another field, without which a field has no effect."""

    name: str  # the other field's full name
    value: str  # its value; "": any but 0 and empty text

    def holds(self, found: Any) -> bool:
        """Returns True if the other field's value meets the condition."""
        return found == self.value if self.value else bool(found)

    def __str__(self) -> str:
        return f"{self.name}={self.value}" if self.value else self.name


def _conditions(only: str) -> tuple[Condition, ...]:
    """Parses "NAME=VALUE" and "NAME", separated by commas."""
    parts = (part.strip().partition("=") for part in only.split(",") if part)
    return tuple(Condition(name, value) for name, _, value in parts)


def field(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    nonempty: str = "",
    identity: tuple[Identity, ...] = (),
    only: str = "",
) -> Any:
    """Declares a field by its default, its `Rules`, and what it identifies in addition to what its group does.

    Args:
      default: the default; its type is the field's type.
      help: see `Rules`, as for all arguments up to `nonempty`.
      identity: "store": prepared features of another value cannot be used. "model": trained parameters of another
        value cannot be used. "run": a run cannot resume with another value, which also holds for the fields of a store
        or a model.
      only: the other fields that the field needs to have an effect, by full name: "decode.method=beam" needs this
        value, "train.cider_epochs" any but 0 and empty text. Several are separated by commas.
    """
    rules = Rules(help, least, most, above, below, choices, nonempty)
    metadata = {"rules": rules, "identity": identity, "only": _conditions(only)}
    return dataclasses.field(default=default, metadata=metadata)


def group(cls: type, help: str, identity: tuple[Identity, ...] = (), only: str = "") -> Any:
    """Declares a group of fields; `identity` and `only` hold for each of them."""
    metadata = {"rules": Rules(help), "identity": identity, "only": _conditions(only)}
    return dataclasses.field(default_factory=cls, metadata=metadata)


class Field(NamedTuple):
    """A field of a preset."""

    value: Any
    type: type
    rules: Rules
    identity: frozenset[Identity]  # its own and its groups'
    only: tuple[Condition, ...]  # its groups' and its own


def flatten(
    config: Any, prefix: str = "", identity: frozenset[Identity] = frozenset(), only: tuple[Condition, ...] = ()
) -> dict[str, Field]:
    """Returns every field by its full name.

    Args:
      config: a preset or a group of one.
      prefix: the group's full name and a dot; "" for a preset.
      identity: what the group identifies.
      only: the group's conditions.

    Returns:
      {"train.epochs": Field(...), ...}, in the order of declaration.
    """
    found = {}
    for f in dataclasses.fields(config):
        value, own = getattr(config, f.name), identity | set(f.metadata["identity"])
        needs = only + f.metadata["only"]
        if dataclasses.is_dataclass(value):
            found |= flatten(value, f"{prefix}{f.name}.", own, needs)
        else:
            found[prefix + f.name] = Field(value, cast(type, f.type), f.metadata["rules"], own, needs)
    return found
