"""The one record every source yields and every stage reads."""

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A question with its known solution.

    Attributes:
        id: content hash of question and solution (see `problem_id`).
        question: what student and teacher are asked.
        solution: the final answer, without tags.
        explanation: a worked explanation if the source has one (warm-up and gold traces).
        system: a system prompt that the row itself carries; overrides the prompt style's own.
        metadata: whatever the source's verifier needs; JSON-serialisable.
    """

    id: str
    question: str
    solution: str
    explanation: str | None = None
    system: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def content_hash(*parts: str) -> str:
    """Hex digest of length 16 over the parts; unambiguous for any strings."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()[:16]


def problem_id(question: str, solution: str) -> str:
    return content_hash(question, solution)


def make_problem(
    question: str,
    solution: str,
    explanation: str | None = None,
    system: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> Problem:
    """Build a `Problem` and give it its content hash."""
    return Problem(
        problem_id(question, solution), question, solution, explanation, system, metadata or {}
    )
