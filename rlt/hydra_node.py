"""Checks of the node `hydra`: its loggers, callbacks, launcher and environment run code as well.

Hydra acts on it before the program starts, so `rlt.compose` composes the config beforehand, for
this check.
"""

import re
from typing import Any

from omegaconf import DictConfig, Node, OmegaConf

from rlt.checks import check_node, check_resolvers, join, walk
from rlt.launchers import check_launcher
from rlt.names import did_you_mean
from rlt.targets import ALLOWED_IN_HYDRA, allowed_by_user

LOGGING_CLASSES = (
    "logging.Formatter",
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.NullHandler",
    "logging.handlers.RotatingFileHandler",
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


def check_hydra_node(hydra_cfg: DictConfig) -> list[str]:
    """Its targets allowed, and its logging, job name, launcher, parameters and environment.

    Values that Hydra fills in later (???, and what refers to them) are none of its errors.
    """
    errors: list[str] = []
    allowed = (*ALLOWED_IN_HYDRA, *allowed_by_user())
    for path, value in walk(hydra_cfg, "hydra", errors=None):
        errors += check_resolvers(value, path)
        if isinstance(value, DictConfig):
            errors += check_node(value, path, allowed)
    for name in ("job_logging", "hydra_logging"):
        node = hydra_cfg.get(name)
        if isinstance(node, DictConfig):
            # by itself, so that what it refers to is seen as a part of it
            for path, value in walk(node, f"hydra.{name}", errors=None):
                errors += _check_logging(path, value)
    job_name = OmegaConf.select(hydra_cfg, "job.name", throw_on_resolution_failure=False)
    if re.search(r"[/\\$]", str(job_name)):
        errors.append(f"hydra.job.name={job_name}: a log file is named so; use no / \\ or $")
    launcher = hydra_cfg.get("launcher")
    if isinstance(launcher, DictConfig) and not any(
        entry.names(str(launcher.get("_target_"))) for entry in allowed_by_user()
    ):
        errors += check_launcher(launcher)
    for key in hydra_cfg.get("sweeper", {}).get("params") or {}:
        if str(key).lstrip("+~").partition(".")[0].partition("/")[0] == "hydra":
            errors.append(
                f"hydra.sweeper.params.{key}: Hydra's own settings may not be swept over, as a "
                "job acts on them before they are checked; set them for the whole sweep"
            )
    for name in hydra_cfg.get("job", {}).get("env_set", {}):
        if name not in ENVIRONMENT:
            errors.append(
                f"hydra.job.env_set.{name}: this environment variable may not be set from a config"
                f"{did_you_mean(str(name), ENVIRONMENT)}; set it in the shell if you need it"
            )
    return errors


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
    errors = [
        f"{join(path, key)}: must be written out, not be an interpolation"
        for key in ("class", "()")
        if key in node and OmegaConf.is_interpolation(node, key)
    ]
    if "." in node:  # attributes that logging.config sets afterwards, such as the file's name
        errors.append(f"{path}['.']: is not allowed here")
    child = node._get_node("filename") if "filename" in node else None
    if isinstance(child, Node) and not re.fullmatch(LOG_FILE, str(child._value())):
        errors.append(
            f"{join(path, 'filename')}={child._value()}: must be a .log file below the run's "
            "folder, such as ${hydra.runtime.output_dir}/more.log"
        )
    return errors
