"""Prompt styles: the tags, templates and system prompts of `conf/prompt/*.yaml`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase


class PromptStyle:
    """The tags and templates of one prompt style.

    A template can contain the placeholder of every tag, such as `{thought_open}`, and the
    placeholder of its own value.

    Args:
        thought: opening and closing tag of the student's thought.
        solution: opening and closing tag of the solution.
        explanation: opening and closing tag of the teacher's explanation.
        teacher_opening: assistant text that the teacher continues; it contains `{solution}`.
        student_opening: assistant text that the student continues.
        thought_text: text of an explanation inside its tags; it contains `{explanation}`.
        solution_text: the scored solution span; it contains `{solution}`.
        student_bridge: text between the thought and the scored solution span.
        student_closing: text after the scored solution span.
        system_from_data: whether the system prompt of a problem replaces that of the student.
        teacher_system: system prompt of the teacher; None gives no system turn.
        student_system: system prompt of the student; None gives no system turn.
        teacher_system_file: text file with the teacher's system prompt; it replaces
            `teacher_system`.
        student_system_file: text file with the student's system prompt; it replaces
            `student_system`.

    Raises:
        ValueError: a tag is empty, or a template lacks the placeholder of its value.
        FileNotFoundError: a system prompt file does not exist.
    """

    def __init__(
        self,
        thought: Sequence[str],
        solution: Sequence[str],
        explanation: Sequence[str],
        teacher_opening: str,
        student_opening: str,
        thought_text: str,
        solution_text: str,
        student_bridge: str,
        student_closing: str,
        system_from_data: bool,
        teacher_system: str | None = None,
        student_system: str | None = None,
        teacher_system_file: str | None = None,
        student_system_file: str | None = None,
    ) -> None:
        self.tags: dict[str, str] = {}
        for name, pair in {
            "thought": thought, "solution": solution, "explanation": explanation
        }.items():  # fmt: skip
            if len(pair) != 2 or not all(pair):
                raise ValueError(f"prompt.{name}={list(pair)}: give an opening and a closing tag")
            self.tags[f"{name}_open"], self.tags[f"{name}_close"] = pair
        for name, template, value in (
            ("teacher_opening", teacher_opening, "{solution}"),
            ("thought_text", thought_text, "{explanation}"),
            ("solution_text", solution_text, "{solution}"),
        ):
            if value not in template:
                raise ValueError(f"prompt.{name}={template!r} must contain {value}")
        self.teacher_opening = teacher_opening
        self.student_opening = student_opening
        self.thought_text = thought_text
        self.solution_text = solution_text
        self.student_bridge = student_bridge
        self.student_closing = student_closing
        self.teacher_system = _text_or_file(teacher_system, teacher_system_file, "teacher")
        self.student_system = _text_or_file(student_system, student_system_file, "student")
        self.system_from_data = system_from_data

    def fill(self, template: str, **values: str) -> str:
        """Replace every placeholder in one pass, so that braces inside a value stay as they are.

        Args:
            template: text with placeholders such as `{solution}`.
            **values: values beside the tags. Unknown placeholders stay as they are.
        """
        names = self.tags | values
        return re.sub(r"\{(\w+)\}", lambda m: names.get(m.group(1), m.group(0)), template)

    @property
    def forbidden(self) -> list[str]:
        """The tags. The text of a problem must not contain them, because they would end a block."""
        return sorted(set(self.tags.values()))

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "PromptStyle":
        """Return this style, which is the same for every tokenizer."""
        return self


@dataclass(frozen=True)
class StyleByTokenizer:
    """Two prompt styles, of which the tokenizer decides which one is used.

    Attributes:
        tags_are_tokens: the style for tokenizers in which each of its tags is one token.
        otherwise: the style for all other tokenizers.
    """

    tags_are_tokens: PromptStyle
    otherwise: PromptStyle

    @property
    def forbidden(self) -> list[str]:
        """The tags of both styles (see `PromptStyle.forbidden`)."""
        return sorted({*self.tags_are_tokens.forbidden, *self.otherwise.forbidden})

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PromptStyle:
        """Return the style that fits the vocabulary of the tokenizer."""
        vocabulary = tokenizer.get_vocab()
        has_tags = all(tag in vocabulary for tag in self.tags_are_tokens.tags.values())
        return self.tags_are_tokens if has_tags else self.otherwise


def _text_or_file(text: str | None, file: str | None, role: str) -> str | None:
    if file is None:
        return text
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompt.{role}_system_file={file}: no such file; give the path of a text file"
        )
    return path.read_text(encoding="utf-8").strip()
