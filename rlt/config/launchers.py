"""Launchers of other packages that a config may choose, and what it may tell them.

They take any keyword, and hand some to a shell or to another machine: commands that are run before
a job, a Python to run it with. A config may set what is listed here; the rest takes RLT_ALLOW in
the environment, which trusts the launcher as a whole.
"""

import re
from collections.abc import Iterator

from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlt.config.suggestions import did_you_mean

_JOBLIB = "hydra_plugins.hydra_joblib_launcher"
_SUBMITIT = "hydra_plugins.hydra_submitit_launcher"
_RAY = "hydra_plugins.hydra_ray_launcher"

# Typed values of a config, which an interpolation cannot make a part of.
PLAIN = re.compile(
    r"\$\{(output_dir|seed|stage|hardware\.threads"
    r"|hydra\.(job\.(name|num|id)|runtime\.output_dir|(run|sweep)\.dir))\}"
)
# Package of a target → extra of this project that installs it.
EXTRAS = {_JOBLIB: "sweep", _SUBMITIT: "submitit", _RAY: "ray", "bitsandbytes": "qlora"}

_QUEUE = (
    "submitit_folder", "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb",
    "nodes", "name", "stderr_to_stdout",
)  # fmt: skip
# Launcher → keys (dotted) that a config may set.
LAUNCHERS = {
    f"{_JOBLIB}.joblib_launcher.JoblibLauncher": (
        "n_jobs", "verbose", "timeout", "pre_dispatch", "batch_size",
    ),
    f"{_SUBMITIT}.submitit_launcher.LocalLauncher": _QUEUE,
    f"{_SUBMITIT}.submitit_launcher.SlurmLauncher": (
        *_QUEUE, "partition", "qos", "account", "comment", "constraint", "exclude", "gres",
        "cpus_per_gpu", "gpus_per_task", "mem_per_gpu", "mem_per_cpu", "array_parallelism",
        "signal_delay_s", "max_num_timeout",
    ),
    f"{_RAY}.ray_launcher.RayLauncher": (
        "ray.init.num_cpus", "ray.init.num_gpus", "ray.init.namespace",
        "ray.init.include_dashboard", "ray.remote.num_cpus", "ray.remote.num_gpus",
        "ray.remote.memory", "ray.remote.max_retries",
    ),
}  # fmt: skip


def check_launcher(node: DictConfig) -> list[str]:
    """What is wrong with the values that a known launcher is given."""
    target = str(node.get("_target_"))
    known = LAUNCHERS.get(target)
    if known is None:
        return []
    errors = []
    for key, value, written in _leaves(node):
        where = f"hydra.launcher.{key}"
        # The folder of the run, which an interpolation gives, may hold more than what is written.
        folder = key == "submitit_folder"
        dangerous = r"[\n\r]" if folder and not written else r"[\n\r;&|`$<>\\\"']"
        if key not in known:
            errors.append(
                f"{where}: may not be set from a config{did_you_mean(key, known)}; if you trust "
                f"this config, set RLT_ALLOW={target} in the environment"
            )
        elif not isinstance(value, str | int | float):
            errors.append(f"{where}={value!r}: must be one value, text or a number")
        elif isinstance(value, str) and re.search(dangerous, value):
            errors.append(f"{where}={value!r}: has a character that a shell might act on")
    return errors


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, object, bool]]:
    """(dotted key, value, whether it is written as it is) of all that is set below a node."""
    for key in map(str, node):
        try:
            value = node.get(key)
        except OmegaConfBaseException:  # what Hydra fills in later
            child = node._get_node(key)
            written = str(child._value()) if isinstance(child, Node) else ""
            if not PLAIN.fullmatch(written):
                yield f"{prefix}{key}", written, True
            continue
        if isinstance(value, DictConfig):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None and key != "_target_":
            yield f"{prefix}{key}", value, not OmegaConf.is_interpolation(node, key)
