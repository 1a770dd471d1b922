"""Objects built from config nodes."""

import copy
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlt.config.allowed_targets import raise_if_any
from rlt.config.check import check_resolved


def build(node: DictConfig, **runtime: Any) -> Any:
    """Call a node's `_target_` with its keys and with runtime objects.

    The objects are passed in the call itself: handed to `instantiate`, models would be copied and
    dataclasses turned into configs.
    """
    return build_partial(node)(**runtime)


def build_partial(node: DictConfig) -> Any:
    """A node's `_target_` with its keys bound, to be called with the rest.

    Interpolations are resolved once, and what they give is checked: Hydra would resolve a second
    time, and an earlier check may have seen other values.

    Raises:
        ConfigError: a target, or a key beside it, is not allowed.
    """
    path = node._get_full_key(None)
    resolved = copy.deepcopy(node)  # with the same parent, which interpolations refer to
    resolved._set_flag(["readonly", "struct"], [False, False])
    OmegaConf.resolve(resolved)
    plain = OmegaConf.create(OmegaConf.to_container(resolved, resolve=False))
    assert isinstance(plain, DictConfig)
    raise_if_any(check_resolved(plain, path))
    return instantiate(plain, _partial_=True, _convert_="all")
