"""Misspelt keys, parts and options: each is refused, and the name that was meant is among three."""

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from rlt.config import compose

STAGES = ("pipeline", "teacher_rl", "distill", "collect", "evaluate", "score", "student_rl")
N_COMMANDS, TOGETHER = 15, 5  # commands with misspelt keys, and how many of them in each
N_OPTIONS = 20
# Below these stand names of a user's own choosing: what is added there is no typo.
OWN_NAMES = ("steps", "inputs", "overrides", "gate")


def misspelt(rng: random.Random, name: str) -> str:
    """A letter of a name dropped, doubled, or swapped with the next one."""
    places = [i for i, letter in enumerate(name) if letter.isalpha()]
    while True:
        place, how = rng.choice(places), rng.choice(("drop", "double", "swap"))
        if how == "drop" and len(places) > 1:
            typo = name[:place] + name[place + 1 :]
        elif how == "double":
            typo = name[:place] + name[place] + name[place:]
        else:
            typo = name[:place] + name[place + 1 : place + 2] + name[place] + name[place + 2 :]
        if typo != name and typo[0].isalpha():
            return typo


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values of a config, those of `_target_` and its like left out."""
    if isinstance(node, dict) and node:
        for key, child in node.items():
            if not str(key).startswith("_"):
                yield from leaves(child, (*path, str(key)))
    else:
        yield path


def misspelt_path(
    rng: random.Random, content: dict[str, Any], own: tuple[str, ...]
) -> tuple[list[str], int, str]:
    """A real path with a typo in one of its names, the place of that name, and the name.

    Args:
        own: keys below which no name is misspelt.
    """
    paths = list(leaves(content))
    while True:
        path = list(rng.choice(paths))
        place = rng.randrange(len(path))
        meant = path[place]
        if not re.search("[a-z]", meant):
            continue
        path[place] = misspelt(rng, meant)
        parent = content
        for name in path[:place]:
            parent = parent[name]
        if path[place] not in parent and not set(own) & set(path[:place]):
            return path, place, meant


def named(message: str) -> list[str]:
    """The first three names after each `did you mean`, without quotes."""
    found = re.findall(r"did you mean (.+?)\?", message)
    return [name.strip("'") for text in found for name in text.split(" or ")[:3]]


@functools.cache
def parts(stage: str) -> list[str]:
    """What stands left of = to choose an option in a stage: `reward`, `model@teacher`."""
    return [g for g in compose._groups([f"stage={stage}"]) if g not in ("stage", "sweep", "debug")]


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[[str, list[str]], list[str]]:
    """Arguments that choose a new experiment file of a stage, which sets one nested key."""
    folder = tmp_path / "experiment"
    folder.mkdir()

    def write(stage: str, path: list[str]) -> list[str]:
        tree: Any = 1
        for name in reversed(path):
            tree = {name: tree}
        text = yaml.safe_dump({"defaults": [{"override /stage": stage}], **tree})
        name = f"mine{len(list(folder.iterdir()))}"
        (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
        return [f"--config-dir={tmp_path}", f"experiment={name}"]

    return write


def test_of_100_misspelt_keys_100_are_refused_and_95_are_named(
    composed: Callable[..., DictConfig],
    refuse: Callable[..., str],
    experiment: Callable[[str, list[str]], list[str]],
) -> None:
    rng = random.Random(0)
    tried, not_named = 0, []

    def look(typo: str, meant: str, written: str) -> None:
        """The line that tells a typo, among those of other typos, names what was meant."""
        nonlocal tried
        tried += 1
        given = [name for line in written.splitlines() if typo in line for name in named(line)]
        if not any(meant in (name, *name.split(".")) for name in given):
            not_named.append((typo, meant, written))

    for n, stage in enumerate(itertools.islice(itertools.cycle(STAGES), N_COMMANDS)):
        content: Any = OmegaConf.to_container(composed(f"stage={stage}"))
        plus = "+" if n % 3 == 0 else ""
        typos = [misspelt_path(rng, content, OWN_NAMES if plus else ()) for _ in range(TOGETHER)]
        arguments = [f"{plus}{'.'.join(path)}=1" for path, _, _ in typos]
        written = refuse(f"stage={stage}", *arguments, "check=true")
        for path, place, meant in typos:
            look(".".join(path[: place + 1]), meant, written)
        while (typo := misspelt(rng, meant := rng.choice(parts(stage)))) in parts(stage):
            pass
        look(typo, meant, refuse(f"stage={stage}", f"{rng.choice(['', '+'])}{typo}=x"))
        path, place, meant = misspelt_path(rng, content, OWN_NAMES)
        look(path[place], meant, refuse(*experiment(stage, path), "check=true"))
    assert tried == N_COMMANDS * (TOGETHER + 2) >= 100
    assert len(not_named) <= 0.05 * tried, "\n\n".join(map(str, not_named))


def test_misspelt_options_are_refused_and_named(refuse: Callable[..., str]) -> None:
    rng = random.Random(1)
    not_named = []
    for stage in itertools.islice(itertools.cycle(STAGES), N_OPTIONS):
        part = rng.choice(parts(stage))
        folder = compose.config_dir() / part.partition("@")[0]
        options = [f.stem for f in folder.glob("*.yaml") if not f.stem.startswith("_")]
        while (typo := misspelt(rng, meant := rng.choice(options))) in options:
            pass
        written = refuse(f"stage={stage}", f"{part}={typo}", "check=true")
        if meant not in named(written):
            not_named.append((stage, f"{part}={typo}", meant, written))
    assert len(not_named) <= N_OPTIONS // 20, "\n\n".join(map(str, not_named))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["stage=teacher_rl", "optim.lrr=1", "reward=rtl", "+algorithm.bteta=1", "+sede=1",
             "model@teacher=nanno", "rewrad=rlt", "hardware.presicion=32", "teacher.path=x"],
            ["'lr'", "'rlt'", "'beta'", "'seed'", "'nano'", "'reward'", "'precision'"],
        ),
        (
            ["stage=distill", "optm.lr=1", "+hydra.job.env_set.LD_PRELOAD=x", "sed=1",
             "explanations=none"],
            ["'optim'", "LD_PRELOAD: this", "'seed'"],
        ),
        (["stage=teacher_lr", "optim.lr=1", "optim.x=1"], []),  # what it meant is not known
    ],
)  # fmt: skip
def test_all_misspelt_overrides_are_told_at_once(
    refuse: Callable[..., str], arguments: list[str], told: list[str]
) -> None:
    written = refuse(*arguments)
    if not told:
        assert "stage=teacher_lr: no such option" in written and "optim" not in written
        return
    assert written.startswith(f"rlt: ConfigError: the config has {len(told)} errors:")
    assert [name for name in told if name not in written] == []
