"""What is sampled: its distribution, its log-probs, and that it can be repeated."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from rlt.llm.logprobs import row_log_probs
from rlt.llm.models import LanguageModel
from rlt.sampling import Completion, HFRollout, known_log_probs
from tests.llm.architectures import CONFIGS, make
from tests.sampling.samplers import NEVER, prompts_of, rows_of, sample


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.6, "top_k": 20, "min_p": 0.01}])
def test_log_probs_are_those_of_the_training_forward(
    teacher: LanguageModel, truncation: dict[str, Any]
) -> None:
    # The stop string "a" lets rows of one batch end at different lengths.
    groups = sample(teacher, HFRollout(0.7, max_new_tokens=24, **truncation), 3, stop="a")
    rows = rows_of(teacher, groups)
    expected = row_log_probs(
        teacher.model, rows, temperature=0.7, pad_id=teacher.tokenizer.pad_token_id, token_budget=99
    )
    actual = [c.log_probs for group in groups for c in group]
    assert len({len(values) for values in actual}) > 1
    for values, wanted in zip(actual, expected, strict=True):
        assert values == pytest.approx(wanted.tolist(), abs=1e-4)


def test_the_models_own_generation_config_does_not_count(
    tiny: Callable[..., LanguageModel],
) -> None:
    # Qwen2.5-Instruct has a repetition penalty, which would change the distribution.
    language_model = tiny(3)
    plain = sample(language_model, HFRollout(0.7, max_new_tokens=16), 2)
    own = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=16)
    language_model.model.generation_config = own
    assert sample(language_model, HFRollout(0.7, max_new_tokens=16), 2) == plain
    assert language_model.model.generation_config is own


def test_the_same_seed_gives_the_same_samples(teacher: LanguageModel) -> None:
    rollout = HFRollout(1.0, max_new_tokens=8)
    assert sample(teacher, rollout, 4, seed=5) == sample(teacher, rollout, 4, seed=5)
    groups = sample(teacher, rollout, 4, seed=5)
    assert groups != sample(teacher, rollout, 4, seed=6)
    assert all(len({tuple(c.ids) for c in group}) > 1 for group in groups)


def greedy_by_hand(language_model: LanguageModel, prompt: list[int], length: int) -> list[int]:
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(language_model.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == language_model.tokenizer.eos_token_id:
            break
    return ids[len(prompt) :]


def test_greedy(teacher: LanguageModel) -> None:
    expected = [[greedy_by_hand(teacher, p, 8)] * 2 for p in prompts_of(teacher.tokenizer)]
    greedy = sample(teacher, HFRollout(0.0, max_new_tokens=8), 2)
    assert [[c.ids for c in group] for group in greedy] == expected
    for rollout in (
        HFRollout(0.7, max_new_tokens=8, top_k=1),
        HFRollout(0.7, max_new_tokens=8, top_p=1e-6),
        HFRollout(0.7, max_new_tokens=8, min_p=0.999),
    ):
        groups = sample(teacher, rollout, 2)
        assert [[c.ids for c in group] for group in groups] == expected
    # Log-probs of temperature 0 are those of temperature 1.
    rows = rows_of(teacher, greedy)
    values = row_log_probs(teacher.model, rows, temperature=1.0, pad_id=0, token_budget=999)
    assert greedy[3][0].log_probs == pytest.approx(values[6].tolist(), abs=1e-4)


@pytest.mark.parametrize("token_budget", [1, 40, 100])
def test_prompts_keep_their_order_whatever_the_budget(
    teacher: LanguageModel, token_budget: int
) -> None:
    # With greedy decoding, the cut into batches cannot change the completions.
    whole = sample(teacher, HFRollout(0.0, max_new_tokens=8), 2)
    cut = sample(teacher, HFRollout(0.0, max_new_tokens=8, token_budget=token_budget), 2)
    assert [[c.ids for c in group] for group in cut] == [[c.ids for c in g] for g in whole]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(temperature: float) -> None:
    logits_BV = torch.zeros(2, 5)
    logits_BV[1, 3] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        HFRollout(temperature)._draw(logits_BV, torch.rand(len(logits_BV)))


def test_samples_follow_the_distribution(teacher: LanguageModel) -> None:
    tokenizer = teacher.tokenizer
    prompt = tokenizer("a")["input_ids"]
    torch.manual_seed(0)
    [group] = HFRollout(0.7, max_new_tokens=1).sample(
        teacher.model, tokenizer, [prompt], 4000, NEVER
    )
    counts = torch.bincount(torch.tensor([c.ids[0] for c in group]), minlength=len(tokenizer))
    with torch.no_grad():
        logits_V = teacher.model(torch.tensor([prompt])).logits[0, -1]

    def distance(temperature: float) -> float:
        """The total variation distance of the samples from the distribution at a temperature."""
        return float((counts / 4000 - (logits_V / temperature).softmax(-1)).abs().sum() / 2)

    assert distance(0.7) < 0.15  # as far as 4000 samples may be from their own distribution
    assert distance(1.0) > 0.15 and distance(0.5) > 0.15


def test_no_token_of_probability_zero_is_drawn() -> None:
    torch.manual_seed(0)
    logits_BV = torch.full((3000, 7), -torch.inf)
    logits_BV[:, [2, 4]] = torch.tensor([0.0, -3.0])
    tokens_B, log_probs_B = HFRollout(1.0)._draw(logits_BV, torch.rand(len(logits_BV)).double())
    counts = torch.bincount(tokens_B, minlength=7) / 3000
    share = 1 / (1 + math.exp(-3.0))
    assert counts[2] + counts[4] == 1
    assert float(counts[2]) == pytest.approx(share, abs=0.02)
    assert log_probs_B.exp()[tokens_B == 2] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("max_new_tokens", 0), ("top_p", 0.0), ("top_p", 1.1),
        ("top_k", -1), ("min_p", 1.0), ("min_p", -0.1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"rollout.{name}={value}"):
        HFRollout(**{name: value})  # type: ignore[arg-type]


def test_log_probs_are_taken_over_only_where_they_are_exact(
    tiny: Callable[..., LanguageModel],
) -> None:
    language_model = tiny(3)
    completions = [c for group in sample(language_model, HFRollout(0.7, 6), 2) for c in group]
    actual = known_log_probs(language_model.model, completions)
    assert actual is not None
    assert [v.tolist() for v in actual] == [pytest.approx(c.log_probs) for c in completions]
    with torch.autocast("cpu", torch.bfloat16):
        assert known_log_probs(language_model.model, completions) is None
    assert known_log_probs(language_model.model, [Completion([1], [], "stop")]) is None
    assert known_log_probs(language_model.model.to(torch.bfloat16), completions) is None


class Numbers:
    """A tokenizer of bare ids: 5 is the stop string, 2 ends a turn."""

    pad_token_id, eos_token_id, chat_template = 0, 2, None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [5]}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_log_probs_of_every_architecture(name: str) -> None:
    """Prompts exceed a sliding window and rows leave the batch. The log-probs stay correct."""
    model = make(name)
    prompts = [[1, 7, 8, 9, 10, 11, 12], [3, 4], [6]]
    torch.manual_seed(1)
    groups = HFRollout(0.7, max_new_tokens=20).sample(model, Numbers(), prompts, 4, "stop")
    completions = [c for group in groups for c in group]
    assert name != "llama" or {c.finish for c in completions} == {"stop", "eos", "length"}
    rows = [(prompt, c.ids) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    expected = row_log_probs(model, rows, temperature=0.7, pad_id=0, token_budget=999)
    for completion, values in zip(completions, expected, strict=True):
        assert completion.log_probs == pytest.approx(values.tolist(), abs=1e-4)


def test_completions_do_not_depend_on_what_else_is_sampled(teacher: LanguageModel) -> None:
    """Each prompt has random numbers of its own, by its seed, however rows are batched."""
    prompts, seeds = prompts_of(teacher.tokenizer), [11, 12, 13, 14]

    def ids(which: list[int], budget: int = 65536) -> list[list[list[int]]]:
        rollout = HFRollout(1.0, max_new_tokens=8, token_budget=budget)
        groups = rollout.sample(
            teacher.model, teacher.tokenizer, [prompts[p] for p in which], 3, NEVER,
            [seeds[p] for p in which],
        )  # fmt: skip
        return [[c.ids for c in group] for group in groups]

    whole = ids([0, 1, 2, 3])
    assert ids([2]) == [whole[2]] and ids([3, 1]) == [whole[3], whole[1]]
    assert ids([0, 1, 2, 3], budget=1) == whole
    assert len({tuple(one) for one in whole[0]}) > 1
    assert ids([]) == []
