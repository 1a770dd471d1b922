"""Tasks of RL: a student's answers and their verdicts, what monitors see of a teacher."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlt.data.problem import make_problem
from rlt.data.renderer import Renderer
from rlt.evaluation.graders import ExactGrader
from rlt.llm.logprobs import row_log_probs
from rlt.llm.models import LanguageModel
from rlt.rewards import Reward, RewardScorer, SolutionLogProb
from rlt.training import Answering, Teaching

PROBLEMS = [make_problem("1 + 1", "2"), make_problem("2 + 3", "5")]


def written(renderer: Renderer, prompt: list[int], *texts: str) -> list[Any]:
    return [(prompt, renderer.encode(text)) for text in texts]


def test_answers_are_verified_and_missing_ones_penalised(renderer: Renderer) -> None:
    task = Answering(renderer, ExactGrader(), missing_answer_penalty=0.5)
    tags = renderer.style.tags
    assert task.stop == tags["solution_close"]
    assert task.prompt(PROBLEMS[0]) == renderer.student_prompt(PROBLEMS[0])
    opened = tags["thought_close"] + tags["solution_open"]
    texts = [f"so{opened}2{task.stop}", f"{opened}3", "nothing", opened]
    rows = written(renderer, task.prompt(PROBLEMS[0]), *texts)
    scored, table = task.score(None, [PROBLEMS[0]] * 4, rows, [], 1.0)
    assert table.rewards == [1.0, 0.0, -0.5, -0.5]
    assert table.terms["answer/correct"] == [1.0, 0.0, 0.0, 0.0]
    assert table.terms["answer/missing_penalty"] == [0.0, 0.0, 0.5, 0.5]
    assert [one.closed for one in scored] == [True, True, False, False]
    assert scored[2].text == "nothing"
    assert [one.thought for one in scored] == ["so", "", "nothing", ""]
    assert task.monitor(scored, 4) == {} == task.details(scored[0], table, 0, torch.ones(9))


def test_student_rl_needs_a_grader(renderer: Renderer) -> None:
    with pytest.raises(ValueError, match=r"set data\.grader \(it is null\)"):
        Answering(renderer, None)
    with pytest.raises(ValueError, match="missing_answer_penalty=-1 must not be negative"):
        Answering(renderer, ExactGrader(), -1)


def test_gains_are_those_of_log_probs_written_out(
    renderer: Renderer, tiny: Callable[..., LanguageModel]
) -> None:
    student = tiny(3).model
    scorer = RewardScorer(
        Reward({"r_ss": SolutionLogProb({"mean": 1.0})}), student, renderer,
        temperature=0.7, token_budget=9999,
    )  # fmt: skip
    task = Teaching(renderer, scorer)
    texts = ["is 2</think>", "is 9</think>", "a 5</think>", "so</think>"]
    owners = [PROBLEMS[0], PROBLEMS[0], PROBLEMS[1], PROBLEMS[1]]
    rows = [
        (renderer.teacher_prompt(p), renderer.encode(t)) for p, t in zip(owners, texts, strict=True)
    ]
    log_probs = [torch.zeros(len(ids)) for _, ids in rows]
    scored, table = task.score(None, owners, rows, log_probs, 0.7)
    found = task.monitor(scored, 2)

    def mean_of(problem: Any, thought: list[int]) -> float:
        text = renderer.student_text(problem, thought)
        [values] = row_log_probs(
            student, [(text.prompt, text.continuation)], temperature=0.7, pad_id=0,
            token_budget=9999,
        )  # fmt: skip
        return float(values[slice(*text.solution_span)].mean())

    thoughts = [scored[0].explanation.ids, scored[2].explanation.ids]
    own = sum(mean_of(p, t) for p, t in zip(PROBLEMS, thoughts, strict=True)) / 2
    empty = sum(mean_of(p, []) for p in PROBLEMS) / 2
    swapped = sum(mean_of(p, t) for p, t in zip(PROBLEMS, thoughts[::-1], strict=True)) / 2
    assert found["gain_over_empty"] == pytest.approx(own - empty, abs=1e-4)
    assert found["gain_over_swapped"] == pytest.approx(own - swapped, abs=1e-4)
    # "is 2" tells it at 3/4, "a 5" at 2/3: neither early, and no other's solution either.
    assert found["solution_early_excess"] == 0.0
    assert table.rewards[0] == pytest.approx(mean_of(PROBLEMS[0], thoughts[0]), abs=1e-4)
    assert set(task.monitor(scored[:2], 2)) == {"gain_over_empty"}  # one problem alone
    told = task.details(scored[0], table, 0, torch.ones(9))["attribution"]["explanation"]
    assert "".join(token for token, _ in told) == "is 2"
