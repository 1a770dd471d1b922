"""Rewards and per-token values of the published implementation, to 1e-4 (see rewards.json)."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlt.config.compose import config_dir
from rlt.data.problem import make_problem
from rlt.data.renderer import Renderer
from rlt.llm.logprobs import row_log_probs
from rlt.llm.models import freeze
from rlt.rewards import RewardScorer, ScoredExplanation

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "rewards.json").read_text())

# Variants of the figures that are a shipped file as it is, and those that are a few overrides.
OVERRIDES: dict[str, tuple[str, list[str]]] = {
    **{
        name: (name, [])
        for name in ("rlt", "rlt_5", "no_min_max", "k3", "no_entropy", "exp", "median")
    },
    "sum": (
        "rlt",
        [
            "reward.terms.solution_log_prob.coefficients.mean=0",
            "+reward.terms.solution_log_prob.coefficients.sum=1.0",
            "reward.terms.thought_kl.coefficients.mean=0",
            "+reward.terms.thought_kl.coefficients.sum=1.0",
        ],
    ),
    "temperature_1": ("rlt", ["reward.temperature=1.0"]),
    "clipped": (
        "rlt",
        ["reward.terms.solution_log_prob.clip=3.0", "reward.terms.thought_kl.clip=2.0"],
    ),
}


@functools.cache
def build_reward(variant: str) -> Any:
    group, overrides = OVERRIDES[variant]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        overrides = [*overrides, "stage=teacher_rl", f"reward={group}"]
        return instantiate(compose("config", overrides).reward, _convert_="all")


@pytest.fixture(scope="module")
def setting() -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tokenizer")
    models = {
        role: freeze(AutoModelForCausalLM.from_pretrained(HERE / role))
        for role in ("student", "teacher")
    }
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("config", ["stage=teacher_rl", "prompt=stratos"]).prompt
    cfg.teacher_system = GOLDEN["teacher_system_prompt"]
    cfg.student_system = GOLDEN["student_system_prompt"]
    renderer = Renderer(instantiate(cfg, _convert_="all"), tokenizer)
    return {"renderer": renderer, **models}


def scored(case: dict[str, Any], setting: dict[str, Any], temperature: float) -> ScoredExplanation:
    renderer = setting["renderer"]
    solution = case["solution"].split("\n\n")[1]
    problem = make_problem(case["question"], solution)
    # The figures' prompts hold the blank line after the opening tag; here the teacher writes it.
    explanation = renderer.explanation(renderer.encode("\n\n" + case["completion"]))
    prompt = renderer.teacher_prompt(problem)
    # The whole completion with its end tag, as in training: k3 and exp take exponentials of these
    # log-probs, so a forward over fewer tokens is already off by more than 1e-4 in float32.
    completion = [*explanation.ids, *case["teacher_input_ids"][case["teacher_think_span"][1] :]]
    log_probs = row_log_probs(
        setting["teacher"],
        [(prompt, completion)],
        temperature=temperature,
        pad_id=257,
        token_budget=4096,
    )[0]
    return ScoredExplanation(problem, explanation, prompt, log_probs)


@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_views_put_the_same_tokens_at_the_same_places(number: int, setting: dict[str, Any]) -> None:
    case = GOLDEN["cases"][number]
    row = scored(case, setting, 0.7)
    text = setting["renderer"].student_text(row.problem, row.explanation.ids)
    start = len(text.prompt)
    ids = [*text.prompt, *text.continuation]
    assert ids == case["student_input_ids"][: len(ids)]
    assert case["student_input_ids"][len(ids) :] == setting["renderer"].encode("\n")
    assert [start + i for i in text.thought_span] == case["student_think_span"]
    assert [start + i for i in text.solution_span] == case["student_solution_span"]
    begin, end = case["teacher_think_span"]
    assert len(row.teacher_prompt) == begin
    assert [*row.teacher_prompt, *row.explanation.ids] == case["teacher_input_ids"][:end]
    assert row.explanation.end_tag_found == case["end_tag_found"]


def test_per_token_values(setting: dict[str, Any]) -> None:
    scorer = RewardScorer(
        build_reward("rlt"), setting["student"], setting["renderer"], temperature=0.7,
        token_budget=1024,
    )  # fmt: skip
    rows = [scored(case, setting, 0.7) for case in GOLDEN["cases"]]
    for case, scores in zip(GOLDEN["cases"], scorer.token_scores(rows), strict=True):
        expected = torch.tensor(case["student_solution_log_probs"])
        torch.testing.assert_close(scores.solution_log_probs_K, expected, rtol=0, atol=1e-4)
        ratio = scores.teacher_log_probs_T - scores.student_log_probs_T
        torch.testing.assert_close(ratio, torch.tensor(case["think_log_ratio"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", sorted(GOLDEN["variants"]))
@pytest.mark.parametrize("token_budget", [1, 100_000])
def test_rewards_of_every_variant(variant: str, token_budget: int, setting: dict[str, Any]) -> None:
    scorer = RewardScorer(
        build_reward(variant), setting["student"], setting["renderer"], temperature=0.7,
        token_budget=token_budget,
    )  # fmt: skip
    rows = [scored(case, setting, scorer.temperature) for case in GOLDEN["cases"]]
    rewards = scorer(rows).rewards
    expected = [case["rewards"][variant] for case in GOLDEN["cases"]]
    # 1e-4 per completion. exp and k3 reach 515 and 750, where a log-prob's last float32 digit moves
    # the sixth digit of its exponential, and sum adds up to 300; processors whose matrix products
    # round otherwise (AMD's with AVX-512, say) are off by up to 3e-6 of such values.
    rel = {"exp": 5e-6, "k3": 5e-6, "sum": 1e-6}.get(variant, 0)
    assert rewards == pytest.approx(expected, abs=1e-4, rel=rel)
