"""Checks of the node `hydra`: its loggers, callbacks, launcher and environment run code as well.

Hydra acts on it before the program starts, so `rlt.config.compose` has it checked wherever Hydra
loads a config.
"""

import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf, grammar_parser
from omegaconf.errors import OmegaConfBaseException

from rlt.config.allowed_targets import ALLOWED_IN_HYDRA, allowed_by_user
from rlt.config.check import check_node, check_resolvers, join, walk
from rlt.config.launchers import PLAIN, check_launcher
from rlt.config.suggestions import did_you_mean

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
# What Hydra builds or sets → keys of text that may hold an interpolation, such as the run's folder.
ACTED_ON: dict[str, tuple[str, ...] | None] = {
    "hydra.callbacks": None,  # any
    "hydra.hydra_logging": ("filename",),
    "hydra.job.env_set": None,
    "hydra.job_logging": ("filename",),
    "hydra.launcher": ("submitit_folder",),
    "hydra.sweeper": None,
}
# Not among them: what makes a process load code (LD_PRELOAD, PYTHONPATH, NCCL_NET_PLUGIN, PATH …).
ENVIRONMENT = (
    *("CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"),
    *("HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"),
    *("HYDRA_FULL_ERROR", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"),
    *("NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TRANSFORMERS_OFFLINE"),
)


def check_hydra_node(hydra_cfg: DictConfig) -> list[str]:
    """Its targets allowed, and its logging, job name, launcher, parameters and environment.

    Values that Hydra fills in later (???, and what refers to them) are none of its errors.
    """
    errors: list[str] = []
    allowed = (*ALLOWED_IN_HYDRA, *allowed_by_user())

    def value_of(key: str) -> Any:
        return OmegaConf.select(hydra_cfg, key, throw_on_resolution_failure=False)

    launcher = value_of("launcher")
    trusted = isinstance(launcher, DictConfig) and any(
        entry.names(str(launcher.get("_target_"))) for entry in allowed_by_user()
    )
    for path, value in walk(hydra_cfg, "hydra", errors=None):
        errors += check_resolvers(value, path)
        if not (trusted and path.startswith("hydra.launcher")):
            errors += _check_written_out(value, path)
        if isinstance(value, DictConfig):
            errors += check_node(value, path, allowed)
    for name in ("job_logging", "hydra_logging"):
        node = value_of(name)
        if isinstance(node, DictConfig):
            # by itself, so that what it refers to is seen as a part of it
            for path, value in walk(node, f"hydra.{name}", errors=None):
                errors += _check_logging(path, value)
    if (subdir := _written(hydra_cfg, "output_subdir")) is not None:
        errors.append(
            f"hydra.output_subdir={subdir}: must stay null, as Hydra would write "
            "there before anything is checked; a run keeps its own resolved config"
        )
    job_name = value_of("job.name")
    if job_name is None:
        job_name = _written(value_of("job"), "name")
    if re.search(r"[/\\$]", str(job_name)):
        errors.append(f"hydra.job.name={job_name}: a log file is named so; use no / \\ or $")
    if isinstance(launcher, DictConfig) and not trusted:
        errors += check_launcher(launcher)
    for key in value_of("sweeper.params") or {}:
        if re.match(r"[+~]*([^@]*@)?hydra([./@]|$)", str(key)):
            errors.append(
                f"hydra.sweeper.params.{key}: Hydra's own settings may not be swept over, as a "
                "job acts on them before they are checked; set them for the whole sweep"
            )
    for name in value_of("job.env_set") or {}:
        if name not in ENVIRONMENT:
            errors.append(
                f"hydra.job.env_set.{name}: this environment variable may not be set from a config"
                f"{did_you_mean(str(name), ENVIRONMENT)}; set it in the shell if you need it"
            )
    return errors


def _written(node: Any, key: Any) -> Any:
    """A value as it stands in the config, whatever it may give; None if there is none."""
    if not isinstance(node, DictConfig | ListConfig) or (
        isinstance(node, DictConfig) and key not in node
    ):
        return None
    child = node._get_node(key)
    return child._value() if isinstance(child, Node) else None


def _check_written_out(node: Any, path: str) -> list[str]:
    """Interpolations in what Hydra builds: resolved then, they may give another part than now.

    With text beside it, an interpolation gives text, no part; a launcher hands text to a shell, and
    logging imports what it names.
    """
    if not isinstance(node, DictConfig | ListConfig):
        return []
    errors = []
    keys: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        where = join(path, key)
        root = next((root for root in ACTED_ON if re.match(rf"{re.escape(root)}\b", where)), None)
        raw = _written(node, key)
        if root is None or not isinstance(raw, str) or "${" not in raw:
            continue
        if "logging" not in root and PLAIN.fullmatch(raw):
            continue
        may_vary = ACTED_ON[root]
        if (may_vary is None or key in may_vary) and not _is_interpolation_alone(raw):
            continue
        errors.append(f"{where}={raw}: must be written out, not be an interpolation")
    return errors


def _is_interpolation_alone(text: str) -> bool:
    try:
        return bool(grammar_parser.parse(text).getChild(0).getChildCount() == 1)
    except OmegaConfBaseException:
        return True


def _check_logging(path: str, value: Any) -> list[str]:
    """logging.config calls classes and factories, and imports whatever stands after ext://."""
    if isinstance(value, DictConfig):
        return _check_handler(path, value)
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


def _check_handler(path: str, node: DictConfig) -> list[str]:
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
