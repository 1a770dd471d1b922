"""Tokenizers that need no download."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlt.data.prompt_style import PromptStyle
from rlt.data.renderer import Renderer
from rlt.llm.digit_words import vocabulary
from rlt.llm.tokenizers import TAGS, digit_words, utf8_bytes, words

BYTES = utf8_bytes()
COMPACT = PromptStyle(
    thought=["<think>", "</think>"],
    solution=["<answer>", "</answer>"],
    explanation=["<think>", "</think>"],
    teacher_opening="{solution} {explanation_open}",
    student_opening="? {thought_open}",
    thought_text="{explanation}",
    solution_text="{solution}",
    student_bridge="{thought_close} {solution_open}",
    student_closing="{solution_close}",
    system_from_data=False,
)


@given(st.text())
def test_bytes_are_tokens(text: str) -> None:
    assume(not any(tag in text for tag in BYTES.get_added_vocab()))
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert BYTES.decode(ids, clean_up_tokenization_spaces=False) == text


def test_tags_are_one_token_each_and_stay_in_the_text() -> None:
    ids = BYTES("a<think>é</answer><eos>", add_special_tokens=False)["input_ids"]
    assert [BYTES.decode([i]) for i in ids[1:2] + ids[-2:]] == ["<think>", "</answer>", "<eos>"]
    assert len(ids) == 1 + 1 + 2 + 1 + 1
    assert len(BYTES) == 256 + 3 + len(TAGS) == len(BYTES.get_vocab())
    assert sorted(BYTES.get_vocab().values()) == list(range(263))


def test_words_are_tokens() -> None:
    tokenizer = digit_words()
    assert len(tokenizer) == len(vocabulary()) == 28
    written = ["3", "5", ".", "?", "<think>", "is", "</think>"]
    ids = tokenizer(" ".join(written), add_special_tokens=False)["input_ids"]
    assert ids == [vocabulary().index(word) for word in written]
    assert tokenizer.decode(ids) == "3 5 . ? <think> is </think>"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_an_unknown_word_is_refused() -> None:
    renderer = Renderer(COMPACT, digit_words())
    assert renderer.encode("3 5 <think>") == [vocabulary().index(w) for w in ("3", "5", "<think>")]
    with pytest.raises(ValueError, match=r"'3 plus 5' holds a word .*model@teacher=micro"):
        renderer.encode("3 plus 5")


def test_vocabularies_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="hold <pad>, </answer>"):
        words(["<bos>", "<eos>", "<think>", "</think>", "<answer>"])
    with pytest.raises(ValueError, match="no repeats"):
        words([*vocabulary(), "3"])


@pytest.mark.parametrize("make", [utf8_bytes, digit_words])
def test_chat_and_reload(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    messages = [{"role": "user", "content": "3 5"}, {"role": "assistant", "content": "8"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<bos> 3 5 8<eos>"
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<bos> 3 5 "
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<bos> 3 5 ? <think> 8 </think>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
