"""Checks of the node `hydra`, on which Hydra acts before the program starts.

By its loggers, callbacks, launcher, sweeper and environment Hydra runs code as well. The node is
held against an allow-list: a key on the list may be set, and is checked by the checkers beside it;
every other key must be as it is shipped. `rlt.config.compose.Loader` has the node
checked wherever Hydra composes a config.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf, grammar_parser
from omegaconf.errors import OmegaConfBaseException

from rlt.config.allowed_targets import ALLOWED_IN_HYDRA, allowed_by_user
from rlt.config.check import check_node, check_resolvers, join, walk
from rlt.config.launchers import PLAIN, check_launcher
from rlt.config.suggestions import did_you_mean

Checker = Callable[[str, Any], list[str]]  # (path, value) → errors

LOGGING_CLASSES = (
    "logging.Formatter",
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.NullHandler",
    "rich.logging.RichHandler",
    "colorlog.ColoredFormatter",
)
LOG_FILE = (
    r"\$\{hydra\.(runtime\.output_dir|sweep\.dir)\}/"
    r"(?!.*\.\.)([\w./-]|\$\{hydra\.job\.name\})*\.log"
)
LOGGING_OBJECTS = ("ext://sys.stdout", "ext://sys.stderr")
# Not among them: what makes a process load code (LD_PRELOAD, PYTHONPATH, NCCL_NET_PLUGIN, PATH …).
ENVIRONMENT = (
    *("CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"),
    *("HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"),
    *("HYDRA_FULL_ERROR", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"),
    *("NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TRANSFORMERS_OFFLINE"),
)


# What is swept over in Hydra's own node, whatever stands before it: +, ~, a package and @.
SWEPT_BY_HYDRA = r"[+~]*([^@]*@)?hydra([./@]|$)"


def check_hydra_node(node: DictConfig) -> list[str]:
    """What is wrong with the keys of the node `hydra`, all of it; see `ALLOWED_KEYS`.

    Values that Hydra fills in later (???, and what refers to them) are none of its errors.
    """
    errors: list[str] = []
    allowed = (*ALLOWED_IN_HYDRA, *allowed_by_user())
    for path, value in walk(node, "hydra", errors=None):
        errors += check_resolvers(value, path)
        if isinstance(value, DictConfig):
            errors += check_node(value, path, allowed)
    for key, checkers in ALLOWED_KEYS.items():
        value = OmegaConf.select(node, key, throw_on_resolution_failure=False)
        parent, _, last = key.rpartition(".")
        owner: Any = node
        if parent:
            owner = OmegaConf.select(node, parent, throw_on_resolution_failure=False)
        written = _written(owner, last)
        # A part that an interpolation gives, now or later, is checked as it is written.
        if value is None or (isinstance(written, str) and OmegaConf.is_config(value)):
            value = written
        for checker in checkers if value is not None else ():
            errors += checker(f"hydra.{key}", value)
    listed = {key.partition(".")[0] for key in ALLOWED_KEYS}
    for key in map(str, node):
        written = _written(node, key)
        if key not in listed and (key not in MUST_STAY or written != MUST_STAY[key]):
            stay = MUST_STAY.get(key, "out of the config")
            errors.append(
                f"hydra.{key}={written}: must stay {'null' if stay is None else stay}; leave it "
                f"out, as only these may be set: {', '.join(ALLOWED_KEYS)}"
            )
        elif OmegaConf.is_interpolation(node, key) and not ALLOWED_KEYS.get(key):
            errors.append(f"hydra.{key}={written}: must be written out, not be an interpolation")
    return errors


# --- checkers -----------------------------------------------------------------------------------


def _written_out(*may_vary: str) -> Checker:
    """Interpolations in what Hydra builds: resolved then, they may give another part than now.

    With text beside it, an interpolation gives text, no part; a launcher hands text to a shell, and
    logging imports what it names.

    Args:
        may_vary: keys of text that may hold an interpolation, such as the run's folder; `*` for
            any.
    """

    def check(path: str, value: Any) -> list[str]:
        plain = not path.endswith("_logging")
        return [
            f"{where}={text}: must be written out, not be an interpolation"
            for where, key, text in _texts(path, value)
            if "${" in text
            and not (plain and PLAIN.fullmatch(text))
            and not (("*" in may_vary or key in may_vary) and not _is_interpolation_alone(text))
        ]

    return check


def _launcher(path: str, value: Any) -> list[str]:
    """A launcher that the user trusts may be told anything; one of a package, what is listed."""
    target = value.get("_target_") if isinstance(value, DictConfig) else None
    if any(entry.names(str(target)) for entry in allowed_by_user()):
        return []
    errors = _written_out("submitit_folder")(path, value)
    return errors + (check_launcher(value) if isinstance(value, DictConfig) else [])


def _logging(path: str, value: Any) -> list[str]:
    """By itself, so that what it refers to is seen as a part of it."""
    if not isinstance(value, DictConfig):
        return []
    return [error for where, part in walk(value, path, errors=None) for error in _log(where, part)]


def _swept(path: str, value: Any) -> list[str]:
    node = value if isinstance(value, DictConfig) else OmegaConf.create()
    params = OmegaConf.select(node, "params", throw_on_resolution_failure=False)
    return [
        f"{path}.params.{key}: Hydra's own settings may not be swept over, as a job acts on them "
        "before they are checked; set them for the whole sweep"
        for key in params or {}
        if re.match(SWEPT_BY_HYDRA, str(key))
    ]


def _variables(path: str, value: Any) -> list[str]:
    return [
        f"{path}.{name}: this environment variable may not be set from a config"
        f"{did_you_mean(str(name), ENVIRONMENT)}; set it in the shell if you need it"
        for name in (value if isinstance(value, DictConfig) else {})
        if name not in ENVIRONMENT
    ]


def _job_name(path: str, value: Any) -> list[str]:
    bad = re.search(r"[/\\$]", str(value))
    return [f"{path}={value}: a log file is named so; use no / \\ or $"] if bad else []


# Key of the node → its checkers. Targets and resolvers are checked in all of them.
ALLOWED_KEYS: dict[str, tuple[Checker, ...]] = {
    "callbacks": (_written_out("*"),),
    "hydra_logging": (_written_out("filename"), _logging),
    "job.env_set": (_written_out("*"), _variables),
    "job.name": (_job_name,),
    "job_logging": (_written_out("filename"), _logging),
    "launcher": (_launcher,),
    "sweeper": (_written_out("*"), _swept),
    # Folders, names and texts, of which Hydra builds nothing; search paths have been checked.
    "defaults": (), "help": (), "hydra_help": (), "job": (), "mode": (), "overrides": (),
    "run": (), "runtime": (), "searchpath": (), "sweep": (), "verbose": (),
}  # fmt: skip
# What is shipped of the other keys. Hydra would write into the folder `output_subdir` before
# anything is checked; a run keeps its own resolved config.
MUST_STAY: dict[str, Any] = {"env": {}, "output_subdir": None}


# --- texts as they are written ------------------------------------------------------------------


def _written(node: Any, key: Any) -> Any:
    """A value as it stands in the config, whatever it may give; None if there is none."""
    if not isinstance(node, DictConfig | ListConfig) or (
        isinstance(node, DictConfig) and key not in node
    ):
        return None
    child = node._get_node(key)
    return child._value() if isinstance(child, Node) else None


def _texts(path: str, value: Any) -> Iterator[tuple[str, Any, str]]:
    """(path, key, text as it is written) of a value, and of all below it."""
    if isinstance(value, str):
        yield path, path.rpartition(".")[2], value
        return
    for where, node in walk(value, path, errors=None):
        keys: Iterable[Any] = range(len(node)) if isinstance(node, ListConfig) else ()
        for key in node if isinstance(node, DictConfig) else keys:
            if isinstance(text := _written(node, key), str):
                yield join(where, key), key, text


def _is_interpolation_alone(text: str) -> bool:
    try:
        return bool(grammar_parser.parse(text).getChild(0).getChildCount() == 1)
    except OmegaConfBaseException:
        return True


def _log(path: str, value: Any) -> list[str]:
    """logging.config calls classes and factories, and imports whatever stands after ext://."""
    if isinstance(value, DictConfig):
        return _handler(path, value)
    key = path.rpartition(".")[2]
    if key in ("class", "()"):
        if value in LOGGING_CLASSES:
            return []
        return [f"{path}={value}: is not allowed here; allowed: {', '.join(LOGGING_CLASSES)}"]
    if isinstance(value, str) and re.match(r"\s*(ext|cfg)://", value):
        if value in LOGGING_OBJECTS:
            return []
        return [f"{path}={value}: is not allowed here; allowed: {', '.join(LOGGING_OBJECTS)}"]
    return []


def _handler(path: str, node: DictConfig) -> list[str]:
    """What a logging class is, and the file that it writes, as they are written in the config."""
    errors = []
    if "." in node:  # attributes that logging.config sets afterwards, such as the file's name
        errors.append(f"{path}['.']: is not allowed here")
    if node.get("mode") not in (None, "a"):
        errors.append(f"{join(path, 'mode')}: a log file is only added to; leave it out")
    file = _written(node, "filename")
    if file is not None and not re.fullmatch(LOG_FILE, str(file)):
        errors.append(
            f"{join(path, 'filename')}={file}: must be a .log file below the run's "
            "folder, such as ${hydra.runtime.output_dir}/more.log"
        )
    return errors
