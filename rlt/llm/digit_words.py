"""The words of the digit chains (`data=digit_chain`). They are the tokens of the nano models."""

MODULUS = 10
FILLER = "."
LEAK_WORD = "is"
VAGUE_WORDS = ("well", "so", "hmm", "now", "then", "maybe", "okay", "right")
SIGNS = {"add": "+", "subtract": "-"}
DIGITS = tuple(str(digit) for digit in range(MODULUS))
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "<answer>", "</answer>")


def vocabulary(signs: bool = False) -> list[str]:
    """Return all 28 tokens in the order of their ids, from padding on.

    Args:
        signs: append the signs of the operations (`SIGNS`), which makes 30 tokens.
    """
    tokens = [*SPECIAL_TOKENS, FILLER, "?", *DIGITS, LEAK_WORD, *VAGUE_WORDS]
    return [*tokens, *SIGNS.values()] if signs else tokens
