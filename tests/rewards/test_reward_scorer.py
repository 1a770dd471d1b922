"""The scorer on tiny models, against the log-probs of the texts written out."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlt.data.grader import Verdict, decided
from rlt.data.problem import Problem, make_problem
from rlt.data.renderer import Renderer
from rlt.llm.logprobs import row_log_probs
from rlt.llm.models import LanguageModel, freeze
from rlt.rewards import (
    Correctness,
    Reward,
    RewardScorer,
    ScoredExplanation,
    SolutionLogProb,
    ThoughtKL,
)
from rlt.sampling import Completion

PROBLEMS = [make_problem("1+1?", "2"), make_problem("What is 10 - 3?", "7 é")]


@pytest.fixture(scope="module")
def renderer(byte_tokenizer: Any, renderer_of: Callable[[str, Any], Renderer]) -> Renderer:
    return renderer_of("r1", byte_tokenizer)


@pytest.fixture(scope="module")
def models(tiny: Callable[..., LanguageModel]) -> dict[str, Any]:
    return {"teacher": freeze(tiny(1).model), "student": freeze(tiny(2).model)}


def scored(renderer: Renderer, teacher: Any, temperature: float) -> list[ScoredExplanation]:
    rows = []
    for problem, completion in [
        (PROBLEMS[0], "\nOne more.\n</explanation>"),
        (PROBLEMS[1], "\nSeven is left over, as 7 + 3 = 10.\n</explanation>"),
        (PROBLEMS[1], "\nno end"),
        (PROBLEMS[0], "</explanation>"),
    ]:
        ids, prompt = renderer.encode(completion), renderer.teacher_prompt(problem)
        log_probs = row_log_probs(
            teacher, [(prompt, ids)], temperature=temperature, pad_id=0, token_budget=9999
        )[0]
        rows.append(ScoredExplanation(problem, renderer.explanation(ids), prompt, log_probs))
    return rows


def dense(model: Any, ids: Sequence[int], temperature: float) -> Tensor:
    with torch.no_grad():
        log_probs_TV: Tensor = (
            model(input_ids=torch.tensor([ids])).logits[0] / temperature
        ).log_softmax(-1)
    return log_probs_TV


@pytest.mark.parametrize("token_budget", [1, 300, 100_000])
def test_token_scores_are_those_of_the_written_out_texts(
    token_budget: int, renderer: Renderer, models: dict[str, Any]
) -> None:
    reward = Reward({"kl": ThoughtKL({"mean": 1.0}, estimator="exact")})
    scorer = RewardScorer(
        reward, models["student"], renderer, temperature=0.7, token_budget=token_budget
    )
    rows = scored(renderer, models["teacher"], 0.7)
    found = scorer.token_scores(rows, teacher=models["teacher"])
    assert [s.end_tag_found for s in found] == [True, True, False, True]
    for row, scores in zip(rows, found, strict=True):
        # The student's text, put together as bytes: one token a byte, tags of the thought one each.
        thought = row.explanation.ids
        prompt = renderer.student_prompt(row.problem)
        before = [*prompt, *thought]
        ids = [*before, *renderer.encode("</think>\n<solution>"),
               *renderer.encode(f"\n{row.problem.solution}\n")]  # fmt: skip
        K = len(f"\n{row.problem.solution}\n".encode())
        student_TV = dense(models["student"], ids, 0.7)
        expected = [float(student_TV[i - 1, ids[i]]) for i in range(len(ids) - K, len(ids))]
        assert scores.solution_log_probs_K.tolist() == pytest.approx(expected, abs=1e-4)
        places = range(len(prompt), len(before))
        expected = [float(student_TV[i - 1, ids[i]]) for i in places]
        assert scores.student_log_probs_T.tolist() == pytest.approx(expected, abs=1e-4)
        teacher_TV = dense(models["teacher"], [*row.teacher_prompt, *thought], 0.7)
        start = len(row.teacher_prompt)
        expected = [float(teacher_TV[start + k - 1, token]) for k, token in enumerate(thought)]
        assert scores.teacher_log_probs_T.tolist() == pytest.approx(expected, abs=1e-4)
        p_TV = teacher_TV[start - 1 : -1][: len(thought)]
        q_TV = student_TV[len(prompt) - 1 : len(before) - 1]
        expected_kl = (p_TV.exp() * (p_TV - q_TV)).sum(-1)
        assert scores.exact_kl_T is not None
        torch.testing.assert_close(scores.exact_kl_T, expected_kl, rtol=0, atol=1e-4)
    assert len(found[3].student_log_probs_T) == 0


def test_exact_kl_needs_the_teacher(renderer: Renderer, models: dict[str, Any]) -> None:
    reward = Reward({"kl": ThoughtKL({"mean": 1.0}, estimator="exact")})
    scorer = RewardScorer(reward, models["student"], renderer, temperature=0.7, token_budget=999)
    with pytest.raises(ValueError, match="exact"):
        scorer(scored(renderer, models["teacher"], 0.7))


def test_the_rewards_temperature_overrides_the_rollouts(
    renderer: Renderer, models: dict[str, Any]
) -> None:
    terms = {"r_ss": SolutionLogProb({"mean": 1.0})}
    rows = scored(renderer, models["teacher"], 1.0)[:1]

    def score(temperature: float | None, sampling: float) -> float:
        reward = Reward(terms, temperature=temperature)
        scorer = RewardScorer(
            reward, models["student"], renderer, temperature=sampling, token_budget=999
        )
        return scorer(rows).rewards[0]

    assert score(1.0, 0.7) == pytest.approx(score(None, 1.0), abs=1e-6)
    assert abs(score(None, 0.7) - score(None, 1.0)) > 0.1


class ScriptedRollout:
    """Gives answers from a list, whatever the prompt, and remembers what it was asked."""

    temperature = 1.0
    max_new_tokens = 9

    def __init__(self, renderer: Renderer, answers: list[str]) -> None:
        self.renderer = renderer
        self.answers = iter(answers)
        self.calls: list[tuple[list[str], int, str]] = []

    def prepare(self, model: Any, tokenizer: Any) -> None:
        """Nothing."""

    def sample(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        n: int,
        stop: str,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        assert len(set(seeds)) == len(prompts)
        self.calls.append(([self.renderer.decode(p) for p in prompts], n, stop))
        return [
            [Completion(self.renderer.encode(next(self.answers)), [], "stop") for _ in range(n)]
            for _ in prompts
        ]


class SolutionGrader:
    """Right is what equals the solution."""

    def grade_all(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return [decided(answer == problem.solution, answer) for problem, answer in pairs]


def test_correctness_samples_answers_after_the_thought(
    renderer: Renderer, models: dict[str, Any]
) -> None:
    answers = [
        "\n2\n</solution>",
        "3",
        " 2 ",
        "",
        "2</solution>7 é",
        "\n7 é\n</solution>",
        "é",
        "7",
    ]
    rollout = ScriptedRollout(renderer, answers)
    reward = Reward({"correct": Correctness({"mean": 2.0}, samples=4, rollout=rollout)})
    scorer = RewardScorer(
        reward, models["student"], renderer, temperature=0.7, token_budget=999,
        grader=SolutionGrader(),
    )  # fmt: skip
    rows = scored(renderer, models["teacher"], 0.7)[:2]
    table = scorer(rows)
    assert table.rewards == [2.0 * 0.5, 2.0 * 0.25]
    assert table.terms["correct/mean"] == [0.5, 0.25]
    [(prompts, n, stop)] = rollout.calls
    assert (n, stop) == (4, "</solution>")
    assert prompts[0].endswith("1+1? <think>\nOne more.\n</think>\n<solution>")
    assert prompts[1].endswith("<think>\nSeven is left over, as 7 + 3 = 10.\n</think>\n<solution>")


def test_correctness_needs_a_grader(renderer: Renderer, models: dict[str, Any]) -> None:
    reward = Reward({"correct": Correctness({"mean": 1.0}, 1, ScriptedRollout(renderer, []))})
    with pytest.raises(ValueError, match=r"set data\.grader"):
        RewardScorer(reward, models["student"], renderer, temperature=1.0, token_budget=9)
