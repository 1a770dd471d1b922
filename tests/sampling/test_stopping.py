"""Where a completion ends: at its stop string, at the end of the turn, or at its length."""

from typing import Any

import pytest

from rlt.sampling import HFRollout
from tests.sampling.samplers import follow, ids_of


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
