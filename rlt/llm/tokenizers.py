"""Tokenizers for models trained from scratch, and the tokens that end an assistant's turn.

The tokenizers are made without any download. A config may call any function of this module, so
none of them may read or write files.
"""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlt.llm.digit_words import vocabulary

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_MARK = "rlt-assistant-turn"  # the text of a turn that is searched for in a rendered chat

# A turn is rendered as its bare text, because the tags in the prompts tell the roles apart.
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
    """Make a tokenizer with one token for each word of the digit chains (`data=digit_chain`).

    Args:
        signs: include the signs of the operations (`rlt.llm.digit_words.SIGNS`).
    """
    return words(vocabulary(signs))


def words(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each word. Words are separated by white space.

    The tokenizer turns any other word into padding; `rlt.data.renderer.Renderer.encode` refuses a
    text with such a word.

    Args:
        vocabulary: the words in the order of their token ids.

    Raises:
        ValueError: the vocabulary lacks `<pad>`, `<bos>`, `<eos>` or a tag, or repeats a word.
    """
    missing = [w for w in ("<pad>", "<bos>", "<eos>", *TAGS) if w not in vocabulary]
    if missing or len(set(vocabulary)) != len(vocabulary):
        raise ValueError(
            f"the vocabulary must be unique and hold {', '.join(missing) or 'no repeats'}"
        )
    ids = {word: i for i, word in enumerate(vocabulary)}
    # An unknown word becomes padding because no text holds it, so the renderer can detect it.
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer)


def utf8_bytes() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each UTF-8 byte and each tag. It encodes any text."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<pad>", "<bos>", "<eos>", *TAGS)]
    )
    return _wrap(tokenizer)


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the tokens that end an assistant's turn.

    They are EOS and the special token that the chat template puts after the turn. The two differ in
    some model families: a turn of Gemma ends in `<end_of_turn>`, one of Phi in `<|end|>`.
    """
    ids = {int(tokenizer.eos_token_id)}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        _, mark, after = text.rpartition(_MARK)
        following = tokenizer(after, add_special_tokens=False)["input_ids"] if mark else []
        if following and following[0] in tokenizer.added_tokens_decoder:
            ids.add(int(following[0]))
    return ids
