"""From problems and traces to training examples, as token ids."""

from collections.abc import Sequence

from rlt.data.prompts import Views
from rlt.data.records import Problem
from rlt.modules import Example


def teacher_examples(problems: Sequence[Problem], views: Views) -> list[Example]:
    """Warm-up targets: prompt with question and solution, target the explanation.

    Raises:
        ValueError: no problem carries an explanation.
    """
    found = [
        Example(views.teacher_prompt(p), views.teacher_target(p.explanation))
        for p in problems
        if p.explanation is not None
    ]
    if not found:
        raise ValueError(
            "no problem of this data set carries an explanation to warm up on: map a column to "
            "data.source.columns.explanation, or start stage=teacher_rl from the model as it is"
        )
    return found


def student_examples(
    problems: Sequence[Problem], views: Views, drop_explanations: bool = False
) -> list[Example]:
    """Student targets: thought and solution. Without an explanation the thought is empty.

    Raises:
        ValueError: explanations are wanted and no problem carries one.
    """
    if drop_explanations:
        return [_student_example(p, views, "") for p in problems]
    found = [
        _student_example(p, views, p.explanation) for p in problems if p.explanation is not None
    ]
    if not found:
        raise ValueError(
            "no problem carries an explanation: map data.source.columns.explanation, pass traces=…,"
            " or train on solutions alone with explanations=none"
        )
    return found


def _student_example(problem: Problem, views: Views, explanation: str) -> Example:
    thought = views.thought(explanation) if explanation else []
    text = views.student_text(problem, thought)
    return Example(text.prompt, text.continuation)
