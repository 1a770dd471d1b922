"""Rows that run beside each other: shared prompts, rows that leave, buffers, cast weights."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlt.llm.batching import pad_rows
from rlt.llm.logprobs import continuation_hidden
from rlt.llm.models import LanguageModel
from rlt.sampling import HFRollout
from rlt.sampling.shared_prefix import BufferedLayer, RunningRows
from tests.sampling.samplers import follow, ids_of, prompts_of, sample


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
