"""Graders with a worker that several tests use."""

from collections.abc import Iterator

import pytest

from rlt.evaluation.graders import (
    MathGrader,
    ReasoningGymGrader,
)


@pytest.fixture(scope="module")
def maths() -> Iterator[MathGrader]:
    with MathGrader(timeout_seconds=10) as grader:
        yield grader


@pytest.fixture(scope="module")
def gym() -> Iterator[ReasoningGymGrader]:
    with ReasoningGymGrader(timeout_seconds=10) as grader:
        yield grader
