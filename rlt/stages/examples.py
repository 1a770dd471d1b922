"""From problems and traces to training examples, as token ids."""

from collections.abc import Sequence

from rlt.data.problem import Problem
from rlt.data.renderer import Renderer
from rlt.training import Example


def require_explanations(problems: Sequence[Problem]) -> None:
    """Raises ValueError when no problem carries an explanation."""
    if all(p.explanation is None for p in problems):
        raise ValueError(
            "no problem of this data set carries an explanation: map a column to "
            "data.source.columns.explanation; else start teacher RL from the model as it is, and "
            "distill from traces or from solutions alone (explanations=none)"
        )


def without_explanation(problems: Sequence[Problem]) -> int:
    """How many problems carry no explanation."""
    return sum(p.explanation is None for p in problems)


def teacher_examples(problems: Sequence[Problem], renderer: Renderer) -> list[Example]:
    """Warm-up targets: prompt with question and solution, target the explanation.

    Problems without an explanation are left out.
    """
    return [
        Example(renderer.teacher_prompt(p), renderer.teacher_target(p.explanation), p.id)
        for p in problems
        if p.explanation is not None
    ]


def student_examples(
    problems: Sequence[Problem], renderer: Renderer, drop_explanations: bool = False
) -> list[Example]:
    """Student targets: thought and solution.

    Problems without an explanation are left out; with `drop_explanations` every thought is empty.
    """
    return [
        _student_example(p, renderer, "" if drop_explanations else p.explanation or "")
        for p in problems
        if drop_explanations or p.explanation is not None
    ]


def _student_example(problem: Problem, renderer: Renderer, explanation: str) -> Example:
    thought = renderer.thought(explanation) if explanation else []
    text = renderer.student_text(problem, thought)
    return Example(text.prompt, text.continuation, problem.id)
