"""Tokenizers for models trained from scratch, made without any download; where a turn ends."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlt.llm.digit_words import vocabulary

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_MARK = "rlt-assistant-turn"  # stands for the text of a turn

# A turn is its bare text: the prompts' own tags tell the roles apart.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}"
    "{{ eos_token }}{% else %} {{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} {% endif %}"
)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
    )


def digit_words(signs: bool = False) -> PreTrainedTokenizerFast:
    """One token per digit, tag and word of the digit chains (`data=digit_chain`), and per sign."""
    return words(vocabulary(signs))


def words(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per word; text holding any other word is refused by the tokenizer.

    Raises:
        ValueError: the vocabulary lacks `<pad>`, `<bos>`, `<eos>` or a tag, or repeats a word.
    """
    missing = [w for w in ("<pad>", "<bos>", "<eos>", *TAGS) if w not in vocabulary]
    if missing or len(set(vocabulary)) != len(vocabulary):
        raise ValueError(f"vocabulary must be unique and hold {', '.join(missing) or 'no repeats'}")
    ids = {word: i for i, word in enumerate(vocabulary)}
    # An unknown word becomes padding, which no text holds: `Renderer.encode` refuses it.
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer)


def utf8_bytes() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, and one for each tag: any text, with no vocabulary to learn."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<pad>", "<bos>", "<eos>", *TAGS)]
    )
    return _wrap(tokenizer)


def turn_end_ids(tokenizer: Any) -> set[int]:
    """Tokens after which an assistant's turn is over: EOS, and what the chat template ends it with.

    They differ in some families: Gemma's turns end in `<end_of_turn>`, Phi's in `<|end|>`.
    """
    ids = {int(tokenizer.eos_token_id)}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        _, found, after = text.rpartition(_MARK)
        following = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
        if following and following[0] in tokenizer.added_tokens_decoder:
            ids.add(int(following[0]))
    return ids
