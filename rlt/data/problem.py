"""The record of a problem, which every source yields and every stage reads."""

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A question with its known solution.

    Attributes:
        id: content hash of question and solution (see `problem_id`).
        question: the question that student and teacher read.
        solution: the final answer, without tags.
        explanation: a worked explanation if the source has one, for warm-up and gold traces.
        system: a system prompt of this problem. It replaces the student's system prompt if the
            prompt style allows that (`system_from_data`).
        metadata: what the verifier of the source needs; it must be JSON-serialisable.
    """

    id: str
    question: str
    solution: str
    explanation: str | None = None
    system: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def content_hash(*parts: str) -> str:
    """Return a hex digest of 16 characters over the parts and the borders between them."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()[:16]


def problem_id(question: str, solution: str) -> str:
    """Return the id of a problem: the content hash of its question and solution."""
    return content_hash(question, solution)


def make_problem(
    question: str,
    solution: str,
    explanation: str | None = None,
    system: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> Problem:
    """Build a `Problem` and compute its id from question and solution."""
    return Problem(
        problem_id(question, solution), question, solution, explanation, system, metadata or {}
    )
