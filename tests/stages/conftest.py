"""Runs that many tests look at: every stage by hand, one after another, and a pipeline."""

from pathlib import Path

import pytest

from tests.cli import pipeline_from, rlt, stage
from tests.stages.killing import finish


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano model that has seen enough text to close its tags now and then."""
    folder = tmp_path_factory.mktemp("base")
    rlt(stage("pretrain", "output_dir=pretrain"), folder)
    return folder / "pretrain" / "model"


@pytest.fixture(scope="session")
def chain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of each stage, each fed by the one before it.

    The stages have processes of their own, forked from one that has the libraries loaded.
    """
    folder = tmp_path_factory.mktemp("chain")
    (folder / "pretrain").symlink_to(base.parent)
    student = "student_path=pretrain/model"
    for name, overrides in {
        "teacher_sft": ["teacher_path=pretrain/model"],
        "teacher_rl": ["teacher_path=teacher_sft/model"],
        "collect": ["teacher_path=teacher_rl/model", student],
        "distill": ["traces=collect/traces", student],
        "evaluate": ["student_path=distill/model"],
    }.items():
        finish(stage(name, f"output_dir={name}", *overrides), folder)
    return folder


@pytest.fixture(scope="session")
def piped(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of a pipeline, in `first`, and its steps, in `store`."""
    folder = tmp_path_factory.mktemp("piped")
    rlt(pipeline_from(base, "output_dir=first"), folder)
    return folder
