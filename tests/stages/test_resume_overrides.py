"""What a saved sweep may tell the program when the sweep is resumed."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rlt.cli.resume import resume


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, list[str]], list[str]]:
    """`resumed(folder, overrides)`: what the program is told when that sweep goes on."""

    def resume_sweep(folder: Path, overrides: list[str]) -> list[str]:
        told: list[str] = []
        monkeypatch.setattr(sys, "argv", ["rlt"])
        monkeypatch.setattr("rlt.cli.hydra_app.compose_and_run", lambda: told.extend(sys.argv[1:]))
        monkeypatch.chdir(Path.cwd())  # where this test began is restored
        folder.mkdir()
        hydra = {
            "overrides": {"hydra": ["hydra.mode=MULTIRUN"], "task": overrides},
            "runtime": {"cwd": str(folder), "config_sources": []},
        }
        OmegaConf.save({"hydra": hydra}, folder / "multirun.yaml")
        resume(folder, [])
        return told

    return resume_sweep


@pytest.mark.parametrize(
    "entry", ["--experimental-rerun=x.pickle", "-cd=x", " --cfg", "no override"]
)
def test_a_saved_sweep_gives_overrides_alone(
    entry: str, resumed: Callable[[Path, list[str]], list[str]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is no override"):
        resumed(tmp_path / "sweep", ["seed=0,1", entry])


@pytest.mark.parametrize("name", ["plain", "a,b", "it's (1)", "tail\\", "a\\'b=c d"])
def test_a_sweep_goes_on_in_a_folder_of_any_name(
    name: str, resumed: Callable[[Path, list[str]], list[str]], tmp_path: Path
) -> None:
    told = resumed(tmp_path / name, ["seed=0,1", "++output_dir=x", "~note"])
    assert told[:-1] == ["hydra.mode=MULTIRUN", "seed=0,1", "~note"]
    (override,) = OverridesParser.create().parse_overrides(told[-1:])
    assert override.key_or_group == "output_dir" and not override.is_sweep_override()
    assert override.value() == str(tmp_path / name)
