"""Sampling from a random model and from a model with known continuations."""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlt.llm.batching import Row, pad_rows
from rlt.llm.logprobs import continuation_hidden, row_log_probs
from rlt.llm.models import LanguageModel
from rlt.sampling import Completion, HFRollout, known_log_probs
from rlt.sampling.shared_prefix import BufferedLayer, RunningRows
from tests.llm.test_logprobs import CONFIGS, make

NEVER = "\x00\x01\x02"  # a stop string that does not occur


@pytest.fixture(scope="module")
def teacher(tiny: Callable[..., LanguageModel]) -> LanguageModel:
    return tiny(3)


def prompts_of(tokenizer: Any) -> list[list[int]]:
    texts = ["a", "What is 1+1?", "Why", "Tell me all about it, please."]
    return [tokenizer(text)["input_ids"] for text in texts]


def sample(
    language_model: LanguageModel, rollout: HFRollout, n: int, stop: str = NEVER, seed: int = 0
) -> list[list[Completion]]:
    torch.manual_seed(seed)
    tokenizer = language_model.tokenizer
    return rollout.sample(language_model.model, tokenizer, prompts_of(tokenizer), n, stop)


def rows_of(language_model: LanguageModel, groups: list[list[Completion]]) -> list[Row]:
    prompts = prompts_of(language_model.tokenizer)
    return [(prompt, c.ids) for prompt, g in zip(prompts, groups, strict=True) for c in g]


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


def test_prompts_of_a_group_run_once(teacher: LanguageModel) -> None:
    shapes = []
    hook = teacher.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    sample(teacher, HFRollout(0.0, max_new_tokens=3), 5)
    hook.remove()
    longest = max(map(len, prompts_of(teacher.tokenizer)))
    # The four prompts give the first tokens. Then twenty rows get one token at a time.
    assert shapes == [(4, longest), (20, 1), (20, 1)]


def test_rows_that_have_ended_leave_the_batch(byte_tokenizer: Any) -> None:
    model = follow(byte_tokenizer, ids_of(byte_tokenizer, "abc<END>"), ids_of(byte_tokenizer, "xx"))
    sizes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    prompts = [ids_of(byte_tokenizer, text) for text in ("c", "a", "x", "x")]
    groups = HFRollout(1.0, max_new_tokens=10).sample(model, byte_tokenizer, prompts, 1, "<END>")
    texts = [byte_tokenizer.decode(group[0].ids) for group in groups]
    assert texts == ["<END>", "bc<END>", "x" * 10, "x" * 10]
    # The prompts (x once); four rows until the first is done at 5, three until the next at 7.
    assert sizes == [3, 4, 4, 4, 4, 3, 3, 2, 2, 2]


@pytest.mark.parametrize("name", ["shares_prefixes", "attends to shared prompts"])
def test_a_model_that_shares_no_prompts_writes_the_same(
    name: str, teacher: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The stop string is frequent, so that rows leave the batch.
    rollout = HFRollout(0.3, max_new_tokens=40)
    written = [c.ids for group in sample(teacher, rollout, 3) for c in group]
    text = "".join(teacher.tokenizer.decode(ids) for ids in written)
    stop = Counter(c for c in text if c.isalnum()).most_common(1)[0][0]
    shared = sample(teacher, rollout, 3, stop=stop)
    if name == "shares_prefixes":
        monkeypatch.setattr("rlt.sampling.shared_prefix.shares_prefixes", lambda model: False)
    else:
        monkeypatch.setattr(type(teacher.model), "_can_set_attn_implementation", lambda _: False)
    alone = sample(teacher, rollout, 3, stop=stop)
    assert [[c.ids for c in g] for g in shared] == [[c.ids for c in g] for g in alone]
    assert sum(len(c.ids) < 40 for g in shared for c in g) >= 3  # of 12


def test_a_failure_leaves_the_models_attention_as_it_was(teacher: LanguageModel) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    prompts = [p for p in prompts_of(teacher.tokenizer) for _ in range(3)]
    attention = teacher.model.config._attn_implementation
    with torch.no_grad():
        running = RunningRows(teacher.model, prompts, teacher.tokenizer.pad_token_id)
        running.append(torch.arange(12))
        hook = teacher.model.base_model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            running.append(torch.arange(12))
        hook.remove()
    assert teacher.model.config._attn_implementation == attention
    assert (
        "rlt_shared_prompts" not in ALL_ATTENTION_FUNCTIONS
    )  # the entry would keep the cache alive


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(temperature: float) -> None:
    logits_BV = torch.zeros(2, 5)
    logits_BV[1, 3] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        HFRollout(temperature)._draw(logits_BV)


def test_rows_of_a_prompt_attend_to_one_copy_of_it(teacher: LanguageModel) -> None:
    prompts = [p for p in prompts_of(teacher.tokenizer) for _ in range(3)]
    attention = teacher.model.config._attn_implementation
    with torch.no_grad():
        running = RunningRows(teacher.model, prompts, teacher.tokenizer.pad_token_id)
        for tokens in (12, 12):
            running.append(torch.arange(tokens))
        running.keep(torch.tensor([0, 7, 8, 9]))  # no row of the second prompt
        running.append(torch.arange(4))
    longest = max(map(len, prompts))
    for layer in running.cache.layers:
        assert layer.prompt_keys.shape[0] == layer.prompt_values.shape[0] == 3
        assert (layer.prompt_keys.shape[2], layer.keys.shape[2]) == (longest, 3)
        assert layer.keys.shape[0] == 4
        assert layer.get_seq_length() == longest + 3
    # Compare with a forward pass over the whole rows.
    rows = [(prompts[b], [b, b, n, 99]) for n, b in enumerate([0, 7, 8, 9])]
    hidden_ND = continuation_hidden(teacher.model, pad_rows(rows, 0, "cpu"))
    torch.testing.assert_close(running.hidden_BD, hidden_ND[3::4], rtol=0, atol=1e-5)
    assert teacher.model.config._attn_implementation == attention


def test_buffers_hold_what_a_growing_cache_holds() -> None:
    torch.manual_seed(0)
    buffered, plain = BufferedLayer(), DynamicLayer()
    for tokens in (5, 1, 1, 70, 1, 1):  # 70 exceeds the free places of the buffer
        new = torch.randn(3, 2, tokens, 4), torch.randn(3, 2, tokens, 4)
        for one, other in zip(buffered.update(*new), plain.update(*new), strict=True):
            assert torch.equal(one, other)
    for layer in (buffered, plain):
        layer.batch_select_indices(torch.tensor([2, 0]))
    new = torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4)
    for one, other in zip(buffered.update(*new), plain.update(*new), strict=True):
        assert torch.equal(one, other)
        assert one.shape == (2, 2, 80, 4)
    assert buffered.get_seq_length() == plain.get_seq_length() == 80


def test_samples_follow_the_distribution(teacher: LanguageModel) -> None:
    tokenizer = teacher.tokenizer
    prompt = tokenizer("a")["input_ids"]
    torch.manual_seed(0)
    [group] = HFRollout(0.7, max_new_tokens=1).sample(
        teacher.model, tokenizer, [prompt], 4000, NEVER
    )
    counts = torch.bincount(torch.tensor([c.ids[0] for c in group]), minlength=len(tokenizer))
    with torch.no_grad():
        expected_V = (teacher.model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    # The total variation distance of 4000 samples from their own distribution is below this.
    assert (counts / 4000 - expected_V).abs().sum() / 2 < 0.15
    assert expected_V.max() > 0.02


def test_weights_are_cast_once_under_autocast_and_anew_when_they_have_changed(
    tiny: Callable[..., LanguageModel],
) -> None:
    language_model = tiny(3)
    rollout = HFRollout(0.0, max_new_tokens=8)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # as Lightning sets it
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as short:
            sample(language_model, HFRollout(0.0, max_new_tokens=2), 1)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as long:
            before = sample(language_model, rollout, 1)
        assert not torch.is_autocast_cache_enabled()
        with torch.no_grad():
            for parameter in language_model.model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        changed = sample(language_model, rollout, 1)
    again = LanguageModel(copy.deepcopy(language_model.model), language_model.tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        assert sample(again, rollout, 1) == changed != before
    size = language_model.model.base_model.layers[0].mlp.gate_proj.weight.shape
    casts = [
        sum(e.name == "aten::_to_copy" and list(size) in e.input_shapes for e in events)
        for events in (short.events(), long.events())
    ]
    assert casts[0] == casts[1] > 0


def test_no_token_of_probability_zero_is_drawn() -> None:
    torch.manual_seed(0)
    logits_BV = torch.full((3000, 7), -torch.inf)
    logits_BV[:, [2, 4]] = torch.tensor([0.0, -3.0])
    tokens_B, log_probs_B = HFRollout(1.0)._draw(logits_BV)
    counts = torch.bincount(tokens_B, minlength=7) / 3000
    share = 1 / (1 + math.exp(-3.0))
    assert counts[2] + counts[4] == 1
    assert float(counts[2]) == pytest.approx(share, abs=0.02)
    assert log_probs_B.exp()[tokens_B == 2] == pytest.approx(share, abs=1e-6)


def follow(tokenizer: Any, *chains: list[int]) -> Any:
    """A model that follows chains of tokens: the next token is a function of the last.

    Its layer adds nothing; each token of a chain has a direction of its own, which the head maps to
    the successor. All others have direction 0 and are followed by token 0.
    """
    successor = {a: b for chain in chains for a, b in itertools.pairwise(chain)}
    size = 2 * (len(successor) // 2 + 1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=size, num_hidden_layers=1,
            num_attention_heads=1, intermediate_size=4, pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip
    for parameter in model.model.layers.parameters():
        parameter.data.zero_()
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embedding.zero_(), head.zero_()
    embedding[:, 0] = 1.0
    head[0, 0] = 50.0
    for direction, (token, following) in enumerate(successor.items(), start=1):
        embedding[token] = torch.nn.functional.one_hot(torch.tensor(direction), size)
        head[following, direction] = 50.0
    return model


def ids_of(tokenizer: Any, text: str) -> list[int]:
    actual: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return actual


@pytest.mark.parametrize(
    ("prompt", "written", "finish"),
    [
        ("a", "bc<END>", "stop"),  # a tag of five tokens
        ("b", "c<END>", "stop"),
        ("A", "B<eos>", "eos"),
        ("x", "xxxxxxxxxxxx", "length"),
        ("1", "<eos>", "eos"),
    ],
)
def test_where_a_completion_ends(
    prompt: str, written: str, finish: str, byte_tokenizer: Any
) -> None:
    chains = [ids_of(byte_tokenizer, t) for t in ("abc<END>yyz", "AB<eos>q", "xx", "1<eos>")]
    model = follow(byte_tokenizer, *chains)
    # The batch also has longer and shorter rows.
    prompts = [ids_of(byte_tokenizer, t) for t in (prompt, "long prompt, x", "bb")]
    groups = HFRollout(1.0, max_new_tokens=12).sample(model, byte_tokenizer, prompts, 1, "<END>")
    [actual] = groups[0]
    assert (byte_tokenizer.decode(actual.ids), actual.finish) == (written, finish)
    assert actual.log_probs == pytest.approx([0.0] * len(actual.ids), abs=1e-6)
    assert groups[1][0].finish == "length"
    assert len(groups[1][0].ids) == 12
    assert byte_tokenizer.decode(groups[2][0].ids) == "c<END>"


def test_a_tag_of_one_token(byte_tokenizer: Any) -> None:
    assert len(ids_of(byte_tokenizer, "</think>")) == 1
    model = follow(byte_tokenizer, ids_of(byte_tokenizer, "ab</think>cc"))
    prompts = [ids_of(byte_tokenizer, t) for t in ("a", "c")]
    [one], [other] = HFRollout(1.0, max_new_tokens=6).sample(
        model, byte_tokenizer, prompts, 1, "</think>"
    )
    assert (byte_tokenizer.decode(one.ids), one.finish) == ("b</think>", "stop")
    assert (byte_tokenizer.decode(other.ids), other.finish) == ("cccccc", "length")


def test_a_tag_in_the_prompt_does_not_stop(byte_tokenizer: Any) -> None:
    model = follow(byte_tokenizer, ids_of(byte_tokenizer, "<EN>zz"))
    prompts = [ids_of(byte_tokenizer, "x<END>"), ids_of(byte_tokenizer, "<END")]
    for group in HFRollout(1.0, max_new_tokens=3).sample(
        model, byte_tokenizer, prompts, 1, "<END>"
    ):
        assert group[0].finish == "length"


def test_padding_with_eos_is_not_taken_for_an_end(byte_tokenizer: Any) -> None:
    class PaddedWithEos:
        """A tokenizer that pads with EOS, as in model families without a padding token."""

        pad_token_id = byte_tokenizer.eos_token_id

        def __getattr__(self, name: str) -> Any:
            return getattr(byte_tokenizer, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return byte_tokenizer(*args, **kwargs)

    model = follow(byte_tokenizer, ids_of(byte_tokenizer, "ab<END>y"), ids_of(byte_tokenizer, "xx"))
    prompts = [ids_of(byte_tokenizer, t) for t in ("a", "some x")]
    [one], [other] = HFRollout(1.0, max_new_tokens=9).sample(
        model, PaddedWithEos(), prompts, 1, "<END>"
    )
    assert (byte_tokenizer.decode(one.ids), one.finish) == ("b<END>", "stop")
    assert (other.finish, len(other.ids)) == ("length", 9)


def test_a_tag_that_merges_with_its_neighbours(smollm2_tokenizer: Any) -> None:
    tokenizer = smollm2_tokenizer
    merged = ids_of(tokenizer, "(<b></explanation>")
    assert [tokenizer.decode([i]) for i in merged][3] == "></"
    merged.remove(ids_of(tokenizer, "<")[0])  # each token occurs once, so the chain has no branch
    *head, last = merged
    end = ids_of(tokenizer, ">\n")
    model = follow(tokenizer, [*head, last, *end[1:], 5, 5])
    [[actual]] = HFRollout(1.0, max_new_tokens=12).sample(
        model, tokenizer, [head[:1]], 1, "</explanation>"
    )
    assert (tokenizer.decode(actual.ids), actual.finish) == ("b></explanation>", "stop")


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
    torch.manual_seed(0)
    groups = HFRollout(0.7, max_new_tokens=20).sample(model, Numbers(), prompts, 4, "stop")
    completions = [c for group in groups for c in group]
    assert name != "llama" or {c.finish for c in completions} == {"stop", "eos", "length"}
    rows = [(prompt, c.ids) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    expected = row_log_probs(model, rows, temperature=0.7, pad_id=0, token_budget=999)
    for completion, values in zip(completions, expected, strict=True):
        assert completion.log_probs == pytest.approx(values.tolist(), abs=1e-4)
