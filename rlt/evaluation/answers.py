"""The final answer of a completion: the text in its solution block.

A student's completion is sampled after the opening thought tag. It normally holds a thought, the
closing thought tag and one solution block. A completion without a solution block has no answer and
is counted as such (`eval/no_answer_rate`), because a number that is picked out of an unfinished
thought would reward rambling.

`rlt stage=evaluate` and the correctness reward use these functions.
"""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def extract_answer(text: str, open_tag: str, close_tag: str) -> str | None:
    """Return the stripped text of the last complete solution block, which may be empty.

    Without a complete block it is the text after the last opening tag, because the closing tag is
    often the stop string itself.

    Args:
        text: the completion.
        open_tag: the tag before the solution, such as `<answer>`.
        close_tag: the tag after it.

    Returns:
        The text, or None where there is no opening tag, which means "no answer".

    Raises:
        ValueError: a tag is empty.
    """
    if not open_tag or not close_tag:
        raise ValueError(
            f"solution tags are {open_tag!r} and {close_tag!r}, must not be empty; "
            "set both in the prompt style"
        )
    start = text.rfind(open_tag)
    if start < 0:
        return None
    end = text.rfind(close_tag)
    while end >= 0:
        complete = text.rfind(open_tag, 0, end)
        if complete < 0:
            break
        inside = text[complete + len(open_tag) : end]
        if close_tag not in inside:
            return inside.strip()
        end = text.rfind(close_tag, 0, end)  # a stray closing tag after the block's own
    return text[start + len(open_tag) :].strip()


def unwrap_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{…}` whose braces balance, or None without one."""
    for match in reversed(list(_BOX.finditer(text))):
        depth, position = 1, match.end()
        while position < len(text):
            character = text[position]
            if character == "\\":
                position += 1  # an escaped brace, as in \left\{, opens and closes nothing
            elif character == "{":
                depth += 1
            elif character == "}":
                depth -= 1
                if depth == 0:
                    return text[match.end() : position].strip()
            position += 1
    return None
