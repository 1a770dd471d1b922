"""Tasks of RL: a student's answers and their verdicts, what monitors see of a teacher."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlt.data.problem import Problem, make_problem
from rlt.data.renderer import Renderer
from rlt.evaluation.graders import ExactGrader
from rlt.llm.logprobs import row_log_probs
from rlt.llm.models import LanguageModel
from rlt.rewards import Reward, RewardScorer, SolutionLogProb
from rlt.sampling import Completion
from rlt.training import Answering, Teaching
from rlt.training.rollout_batch import RolloutBatch

PROBLEMS = [make_problem("1 + 1", "2"), make_problem("2 + 3", "5")]


def rollout_of(task: Any, problems: list[Problem], groups: list[list[str]]) -> RolloutBatch:
    """What `RL.sample` gives where the policy writes these texts."""
    completions = [
        [Completion(task.renderer.encode(text), [], "stop") for text in group] for group in groups
    ]
    prompts = [task.prompt(problem) for problem in problems]
    return RolloutBatch.of_groups(problems, prompts, completions, task.parse)


def test_answers_are_verified_and_missing_ones_penalised(
    renderer: Renderer, tiny: Callable[..., LanguageModel]
) -> None:
    policy = tiny(0).model
    task = Answering(renderer, ExactGrader(), missing_answer_penalty=0.5)
    tags = renderer.style.tags
    assert task.stop == tags["solution_close"]
    assert task.prompt(PROBLEMS[0]) == renderer.student_prompt(PROBLEMS[0])
    opened = tags["thought_close"] + tags["solution_open"]
    texts = [f"so{opened}2{task.stop}", f"{opened}3", "nothing", opened]
    rollout = rollout_of(task, PROBLEMS[:1], [texts])
    table = task.score(rollout, policy, 1.0)
    assert table.rewards == [1.0, 0.0, -0.5, -0.5]
    assert table.terms["answer/correct"] == [1.0, 0.0, 0.0, 0.0]
    assert table.terms["answer/missing_penalty"] == [0.0, 0.0, 0.5, 0.5]
    assert [one.closed for one in rollout.parsed] == [True, True, False, False]
    assert rollout.parsed[2].text == "nothing"
    assert [one.thought for one in rollout.parsed] == ["so", "", "nothing", ""]
    assert task.monitor(rollout) == {} == task.details(rollout, 0)


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
    rollout = rollout_of(task, PROBLEMS, [texts[:2], texts[2:]])
    rollout.log_probs = [torch.zeros(length) for length in rollout.lengths]
    table = rollout.reward_table = task.score(rollout, student, 0.7)
    rollout.advantages_NT = torch.ones(4, 9)
    found = task.monitor(rollout)

    def mean_of(problem: Any, thought: list[int]) -> float:
        text = renderer.student_text(problem, thought)
        [values] = row_log_probs(
            student, [(text.prompt, text.continuation)], temperature=0.7, pad_id=0,
            token_budget=9999,
        )  # fmt: skip
        return float(values[slice(*text.solution_span)].mean())

    thoughts = [rollout.parsed[0].ids, rollout.parsed[2].ids]
    own = sum(mean_of(p, t) for p, t in zip(PROBLEMS, thoughts, strict=True)) / 2
    empty = sum(mean_of(p, []) for p in PROBLEMS) / 2
    swapped = sum(mean_of(p, t) for p, t in zip(PROBLEMS, thoughts[::-1], strict=True)) / 2
    assert found["gain_over_empty"] == pytest.approx(own - empty, abs=1e-4)
    assert found["gain_over_swapped"] == pytest.approx(own - swapped, abs=1e-4)
    # "is 2" tells it at 3/4, "a 5" at 2/3: neither early, and no other's solution either.
    assert found["solution_early_excess"] == 0.0
    assert table.rewards[0] == pytest.approx(mean_of(PROBLEMS[0], thoughts[0]), abs=1e-4)
    alone = rollout_of(task, PROBLEMS[:1], [texts[:2]])
    assert set(task.monitor(alone)) == {"gain_over_empty"}  # one problem alone
    told = task.details(rollout, 0)["attribution"]["explanation"]
    assert "".join(token for token, _ in told) == "is 2"
