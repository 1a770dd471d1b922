"""Checks of a composed config before anything is built from it: all errors at once, with remedies.

Hydra would import and call whatever a `_target_` names, and would report a misspelt argument only
when that object is built, perhaps after a model was loaded. Here every `_target_` must be on the
allow-list of `rlt.config.allowed_targets`, and live where it claims to live, and every key beside
it must be a parameter of its signature. Parameters that the program passes itself must be absent.

Runs at the start of every `rlt` command; `rlt.config.hydra_guard` checks Hydra's own node. No torch
import here.
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf, grammar_parser
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser

from rlt.config.allowed_targets import ALLOWED, Allowed, allowed_by_user, resolve_target
from rlt.config.fields import passed_by
from rlt.config.suggestions import did_you_mean, nearest

PARTS = ("callbacks", "terms")  # mappings of names to parts that are built, or null
# Keys of every run, whatever its stage (conf/config.yaml): where it goes, and what is done with it.
RUN_KEYS = ("stage", "output_dir", "note", "check", "probe", "accept_changes")
WHOLE_RUN_GROUPS = ("experiment", "sweep", "debug")  # chosen like keys of the root, but none
_MISSPELT = 0.85  # how alike a key is to a parameter where any key is taken
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


def check_targets(cfg: DictConfig) -> list[str]:
    """Every `_target_` of `cfg` allowed and importable, its keys known, and nothing left at ???."""
    errors: list[str] = check_run(cfg) if "stage" in cfg else []
    allowed = (*ALLOWED, *allowed_by_user())
    passed: dict[str, tuple[str, ...]] = {}  # path of a part → what its stage passes to it
    for path, value in walk(cfg, "", errors):  # a stage comes before its parts
        errors += check_resolvers(value, path)
        if isinstance(value, DictConfig):
            errors += check_node(value, path, allowed, passed.get(path, ()))
            names = passed_by(_target_of(value, allowed))
            passed |= {join(path, key): arguments for key, arguments in names.items()}
            if path.rpartition(".")[2] in PARTS:
                errors += _check_parts(value, path)
    return errors


def check_resolved(node: DictConfig, path: str) -> list[str]:
    """A node without interpolations, about to be built: its targets and keys, and that it is so.

    Values may be missing (???): they are passed when it is called.
    """
    errors: list[str] = []
    allowed = (*ALLOWED, *allowed_by_user())
    for where, value in walk(node, path, errors=None):
        if not isinstance(value, DictConfig | ListConfig):
            continue
        keys: Iterable[Any] = value if isinstance(value, DictConfig) else range(len(value))
        errors += [
            f"{join(where, key)}: gives another interpolation, which is not resolved; write it out"
            for key in keys
            if OmegaConf.is_interpolation(value, key)
        ]
        if isinstance(value, DictConfig):
            errors += check_node(value, where, allowed)
    return errors


def check_run(cfg: DictConfig) -> list[str]:
    """Keys of a whole run's config: those of every run, and those that its stage takes.

    The stage is the config's own `_target_`, so its keys are checked as those of any other part;
    here it is the top level, where a group may be misspelt, too.
    """
    errors = []
    for key in ("check", "probe"):
        if not isinstance(cfg.get(key, False), bool):
            errors.append(f"{key}={cfg[key]!r}: must be true or false")
    if "_target_" not in cfg:
        errors.append(
            "this config names no stage: its key _target_ is missing. Choose one by stage=…"
        )
    if cfg.get("probe") and not cfg.get("check"):
        errors.append("probe=true: it is a part of a check; add check=true, or leave it out")
    if cfg.get("accept_changes") and cfg.get("datamodule") is None:
        errors.append(
            "accept_changes: only training goes on with another config; choose another output_dir"
        )
    return errors


# --- walking ------------------------------------------------------------------------------------


def walk(
    root: DictConfig | ListConfig, path: str, errors: list[str] | None
) -> Iterator[tuple[str, Any]]:
    """Every value below and including `root`, resolved, once, under the path it is written at.

    Containers that are reached through an interpolation come last, so that they show up under
    their own path if they have one. Missing and unresolvable values go to `errors`, if given.
    """
    seen: set[int] = set()
    here: list[tuple[str, Any]] = [(path, root)]
    borrowed: list[tuple[str, Any]] = []
    alive: list[Any] = []  # what an interpolation made must outlive its id
    while here or borrowed:
        path, value = here.pop() if here else borrowed.pop(0)
        if not isinstance(value, DictConfig | ListConfig):
            yield path, value
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        alive.append(value)
        yield path, value
        children: list[tuple[str, Any]] = []
        keys: Iterable[Any] = value if isinstance(value, DictConfig) else range(len(value))
        for key in keys:
            child = join(path, key)
            if OmegaConf.is_missing(value, key):
                if errors is not None:
                    errors.append(
                        f"{child}: has no value (???); set it, e.g. {child}=… on the command line"
                    )
                continue
            try:
                resolved = value[key]
            except OmegaConfBaseException as error:
                if errors is not None:
                    errors.append(f"{child}: cannot be resolved: {str(error).splitlines()[0]}")
                continue
            borrow = OmegaConf.is_interpolation(value, key)
            (borrowed if borrow else children).append((child, resolved))
        here += reversed(children)


def join(path: str, key: object) -> str:
    """Return the path of an entry: `path[0]` in a list, `path.key` in a mapping."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


# --- one node -----------------------------------------------------------------------------------


def _target_of(node: DictConfig, allowed: tuple[Allowed, ...]) -> Any:
    """What a node's `_target_` names; None if it names nothing that may be built."""
    try:
        return resolve_target(str(node.get("_target_")), allowed)
    except (ValueError, OmegaConfBaseException):
        return None


def check_node(
    node: DictConfig, path: str, allowed: tuple[Allowed, ...], passed: tuple[str, ...] = ()
) -> list[str]:
    """Return what is wrong with one node of a config, a line for each error.

    The target, its arguments and Hydra's own keys are checked; nodes below it are not.

    Args:
        path: dotted path of the node, for the messages.
        allowed: the targets that may be built.
        passed: arguments that the program gives the target itself; a key here would be ignored.
    """
    keys = [key for key in node if key not in HYDRA_KEYS]
    errors = [
        f"{join(path, key)}: no such Hydra key{did_you_mean(str(key), HYDRA_KEYS)}"
        for key in keys
        if re.fullmatch(r"_\w+_", str(key)) and nearest(str(key), HYDRA_KEYS)
    ]
    if "_target_" not in node or OmegaConf.is_missing(node, "_target_"):
        return errors
    where = join(path, "_target_")
    if OmegaConf.is_interpolation(node, "_target_"):  # it might say something else when it is built
        return [*errors, f"{where}: must be written out, not be an interpolation"]
    target = node["_target_"]
    if not isinstance(target, str):
        return [*errors, f"{where}={target!r}: must be a dotted name, e.g. rlt.module.Class"]
    try:
        found = resolve_target(target, allowed)
        parameters = list(inspect.signature(found).parameters.values())
    except ValueError as error:
        return [*errors, f"{where}={target}: {error}"]
    accepted = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in passed
    ]
    if path == "":
        errors += _name_errors(node.get("stage"), found)
        return [*errors, *_root_key_errors(node, keys, accepted, found)]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if getattr(getattr(found, "__init__", None), "__module__", None) == "typing":
        takes_any = False  # a protocol's, which takes all and heeds none
    for key in keys:
        if key in passed:
            errors.append(f"{join(path, key)}: the program sets it itself; leave it out")
        elif key not in accepted and (
            not takes_any or nearest(str(key), accepted, cutoff=_MISSPELT)
        ):
            errors.append(
                f"{join(path, key)}: {target} has no parameter {str(key)!r}"
                f"{did_you_mean(str(key), accepted)}; accepted: {', '.join(accepted) or 'none'}"
            )
    return errors


def _name_errors(name: object, stage: Any) -> list[str]:
    """What is wrong with the name that a config gives its stage, whose class has one of its own."""
    own = getattr(stage, "name", None)
    if own is None or name == own:
        return []
    return [
        f"stage={name}: the config is one of stage={own}{did_you_mean(str(name), [own])}; choose "
        "another stage on the command line, or by an override of /stage in the defaults list"
    ]


def _root_key_errors(
    node: DictConfig, keys: list[Any], accepted: list[str], stage: Any
) -> list[str]:
    """Keys of a whole run's config that neither every run nor its stage has."""
    known = [*accepted, *RUN_KEYS]
    if getattr(stage, "takes_stages", False):  # a pipeline, with each stage's own part
        keys = [
            key
            for key in keys
            if not (isinstance(node._get_node(key), DictConfig) and "_target_" in node[key])
        ]
    meant = [*known, *WHOLE_RUN_GROUPS]
    return [
        f"{key}: no such key{did_you_mean(str(key), meant)}; valid: {', '.join(sorted(known))}"
        for key in keys
        if key not in known
    ]


def check_resolvers(node: Any, path: str) -> list[str]:
    """Values that may be others when they are used than when they are checked.

    A mapping that a resolver makes is made anew at each look, a resolver whose name is computed may
    be another, and text that looks like an interpolation may be resolved once more.
    """
    if not isinstance(node, DictConfig | ListConfig):
        return []
    errors = []
    keys: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        child = node._get_node(key)
        raw = child._value() if isinstance(child, Node) else None
        if not isinstance(raw, str) or "${" not in raw:
            continue
        if _computes_a_resolver(raw):
            errors.append(f"{join(path, key)}={raw}: the name of a resolver must be written out")
            continue
        try:
            made = node[key]
        except OmegaConfBaseException:
            continue
        if isinstance(made, str) and "${" in made:
            errors.append(f"{join(path, key)}={raw}: must not give another interpolation")
        # a colon: by a resolver
        if ":" in raw and isinstance(made, DictConfig | ListConfig | dict | list):
            errors.append(
                f"{join(path, key)}={raw}: a resolver may give a plain value, no mapping and "
                "no list; write it out"
            )
    return errors


def _computes_a_resolver(text: str) -> bool:
    """Whether the name of a resolver is itself an interpolation: `${${which}:…}`."""
    try:
        nodes: list[Any] = [grammar_parser.parse(text)]
    except OmegaConfBaseException:
        return False  # it cannot be resolved either
    while nodes:
        node = nodes.pop()
        if isinstance(node, OmegaConfGrammarParser.ResolverNameContext) and "${" in node.getText():
            return True
        nodes += getattr(node, "children", None) or []
    return False


def _check_parts(node: DictConfig, path: str) -> list[str]:
    """Entries without a `_target_`: a misspelt name beside the part that it was meant to change."""
    found = {
        str(key): OmegaConf.select(node, str(key), throw_on_resolution_failure=False)
        for key in node
    }
    named = [key for key, value in found.items() if isinstance(value, DictConfig)]
    parts = [key for key in named if "_target_" in node[key]]
    return [
        f"{join(path, key)}: no such part{did_you_mean(key, parts)}; a new one needs a _target_"
        for key in named
        if key not in parts
    ]
