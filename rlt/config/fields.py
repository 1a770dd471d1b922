"""What a config may give a dataclass field, declared where the field is, checked in one place.

A stage, or a part of one, that is a dataclass writes `best_of: int = at_least(1)` or
`format: Literal["jsonl", "parquet"]`; `field_errors` compares the values with that. A stage writes
`trainer: Callable[..., Trainer] = passes("logger")` for a part that it calls with more arguments
than the config gives it; `passed_by` tells which, as the config may not give them.
"""

import collections.abc
import types
from dataclasses import MISSING, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rlt.config.suggestions import did_you_mean

_LEAST = "least"
_PASSED = "passed"


def at_least(least: int, default: Any = MISSING) -> Any:
    """A dataclass field: a whole number of at least `least`, or None if its type says so."""
    return field(default=default, metadata={_LEAST: least})


def passes(*names: str) -> Any:
    """A field for a part that the stage calls itself with these arguments."""
    return field(metadata={_PASSED: names})


def passed_by(owner: Any) -> dict[str, tuple[str, ...]]:
    """Field name → the arguments with which a stage calls that part itself."""
    if not is_dataclass(owner):
        return {}
    return {one.name: one.metadata[_PASSED] for one in fields(owner) if _PASSED in one.metadata}


@cache
def field_types(owner: type) -> dict[str, Any]:
    """Field name → its type, with string annotations resolved."""
    return get_type_hints(owner)


def field_errors(owner: type, values: collections.abc.Mapping[str, Any]) -> list[str]:
    """What is wrong with values for fields of a dataclass, one line each: key, value, constraint.

    Fields without a value are left out, and so are those whose type is no plain value.
    """
    errors = []
    for one in fields(owner):
        if one.name not in values:
            continue
        value, hint = values[one.name], field_types(owner)[one.name]
        least = one.metadata.get(_LEAST)
        if value is None and _takes(hint, None):
            continue
        if least is not None:
            words = _choices(hint)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value not in words and not (whole and value >= least):
                told = "".join(f", or {word}" for word in words)
                errors.append(
                    f"{one.name}={value}: must be a whole number of at least {least}{told}"
                )
        elif choices := _choices(hint):
            if value not in choices:
                hint_text = did_you_mean(str(value), choices)
                errors.append(f"{one.name}={value}: choose {', '.join(choices)}{hint_text}")
        elif _is_plain(hint) and not _takes(hint, value):
            errors.append(f"{one.name}={value!r}: must be {_in_words(hint)}")
    return errors


def _choices(hint: Any) -> list[str]:
    """The texts that a `Literal` allows, one that may also be None included."""
    literals = [one for one in _alternatives(hint) if get_origin(one) is Literal]
    return [choice for one in literals for choice in get_args(one)]


_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_plain(hint: Any) -> bool:
    return all(one in _PLAIN or one is type(None) for one in _alternatives(hint))


def _takes(hint: Any, value: Any) -> bool:
    """Whether a value is of a plain type; a whole number is a number, too."""
    for one in _alternatives(hint):
        if one in (Any, object) or type(value) is one:
            return True
        if one is float and type(value) is int:
            return True
    return False


def _in_words(hint: Any) -> str:
    return " or ".join(_PLAIN.get(one, "null") for one in _alternatives(hint))
