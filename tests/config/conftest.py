"""Commands that must be refused, and a small tree of configs that Hydra composes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from rlt.config.allowed_targets import allowed_by_user


@pytest.fixture
def refuse(refuse: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """In these tests a refused command also leaves no file but the configs of the test."""

    def run(*arguments: str) -> str:
        message = refuse(*arguments)
        assert [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".yaml"] == []
        return message

    return run


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`allow("my.*")`: a process started with RLT_ALLOW=my.*"""

    def start(value: str) -> None:
        monkeypatch.setenv("RLT_ALLOW", value)
        allowed_by_user.cache_clear()

    yield start
    allowed_by_user.cache_clear()


@dataclass
class Root:
    seed: int = 0
    reward: Any = None
    experiment: Any = None
    extra: list[int] = field(default_factory=list)


@pytest.fixture
def conf(tmp_path: Path) -> Iterator[Path]:
    files = {
        "config.yaml": "defaults: [test_checks_schema, reward: rlt, _self_, experiment: null]",
        "reward/rlt.yaml": "alpha: 1",
        "experiment/bad.yaml": "# @package _global_\nrewrad: {alpha: 1}",
        "experiment/worse.yaml": "# @package _global_\ndefaults: [override /rewrad: rlt]",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    store = ConfigStore.instance()
    before = dict(store.repo)
    store.store("test_checks_schema", Root)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield tmp_path
    GlobalHydra.instance().clear()
    store.repo = before
