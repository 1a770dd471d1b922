"""Names that were perhaps meant; one line for what Hydra says of a config that does not compose."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass

from omegaconf import DictConfig


def nearest(name: str, candidates: Iterable[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
    """Up to `n` candidates that `name` may have been meant to be, the nearest first.

    Args:
        cutoff: how alike they must be, 1 for the same.
    """
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=n, cutoff=cutoff)
    # Two letters swapped are too much of a short name for the cutoff.
    swapped = [c for c in by_lower if sorted(c) == sorted(name.lower()) and c not in close]
    return [by_lower[match] for match in [*swapped, *close][:n]]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` if a candidate looks like the name, else nothing."""
    names = nearest(name, candidates)
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


def explain_struct_error(
    error: Exception, valid_names: Iterable[str] = (), groups: Iterable[str] = ()
) -> str:
    """One line for an error of Hydra's composition, with the names that were perhaps meant.

    Args:
        valid_names: keys of the config; those of the node in which a key was not found, and the
            options of a group, are taken from the error itself.
        groups: what stands left of = to choose an option, e.g. `reward`, `model@teacher`.
    """
    text = str(error)
    cause = error.__cause__
    options = getattr(error, "options", None)
    if options is not None and (match := re.search(r"Could not find '([^']+)'", text)):
        group, _, option = match[1].rpartition("/")
        prefix = f"{group}={option}: no such option"
        shown = [option for option in options if not option.startswith("_")]
        return f"{prefix}{did_you_mean(option, shown)}; available: {', '.join(shown)}"
    if match := re.search(r"Override \+?(\S+?)=.* looks like a config group override", text):
        return _no_such_group(match[1], list(groups), None)
    not_mounted = r"Could not override '([^']+)'\.\s+(No match|Did you mean to override (.*)\?)"
    if match := re.search(not_mounted, text):
        return _place(text) + _no_such_group(match[1], list(groups), match[3])
    patterns = (
        r"Key '([^']+)' (?:is not in struct|not in )",
        r"Could not override '([^']+)'",
        r"Could not delete from config\. '([^']+)'",
        r"Could not find '([^']+)'",
    )
    for message in (str(cause) if cause else "", text):
        for pattern in patterns:
            if match := re.search(pattern, message):
                full = re.search(r"full_key: (\S+)", message)
                name = full[1] if full else match[1]
                near = _siblings(cause or error.__context__ or error)
                if "." not in name:
                    near = [*valid_names, *groups, *near]
                hint = did_you_mean(match[1], dict.fromkeys(near))
                return f"{_place(text)}no such key {name!r}{hint}"
    return " ".join((text if cause is None else f"{text}: {cause}").split())


def _siblings(error: BaseException) -> list[str]:
    """Names that stand, or may stand, where omegaconf did not find one."""
    parent, schema = getattr(error, "parent_node", None), getattr(error, "object_type", None)
    names = [str(key) for key in parent if key != "hydra"] if isinstance(parent, DictConfig) else []
    return names + ([f.name for f in fields(schema)] if is_dataclass(schema) else [])


def _place(text: str) -> str:
    """The file that Hydra blames, if it does."""
    place = re.search(r"In '([^']+)'", text)
    return f"{place[1]}: " if place else ""


def _no_such_group(group: str, groups: list[str], suggested: str | None) -> str:
    """An option was chosen for a part that this config does not have.

    Args:
        suggested: parts that take options of the same group, as Hydra writes them.
    """
    problem = f"{group}: this config has no such part"
    if suggested is not None:
        names = sorted(suggested.removeprefix("one of ").split(", "))
        return f"{problem}; did you mean {' or '.join(names)}?"
    whole = [name for name in groups if "." not in name]  # not a part of a part
    has = f"; it has: {', '.join(sorted(whole))}" if whole else ""
    return f"{problem}{did_you_mean(group, groups)}{has}"
