"""Renders a problem for teacher and student, as token ids with known spans.

A view is put together from segments that are tokenised one by one, so the place of every span is
known by construction: nothing is ever found again by searching text or token ids, and a repeated
phrase or a merge at a border cannot move a mask. The one search that remains, for the end tag in
what a teacher *wrote*, works on character offsets of the decoded completion
(`Renderer.explanation`).

    teacher   [system] question | solution, <explanation>  -> writes explanation </explanation>
    student   [system] question | <thought> explanation </thought> <solution> s </solution>

Both tag styles, their blank lines and the system prompts come from `conf/prompt/*.yaml`.
"""

import functools
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlt.data.problem import Problem
from rlt.llm.tokenizers import turn_end_ids

_SENTINEL = "rlt-assistant-turn"


class PromptStyle:
    """Tags and templates of one prompt style. Templates may name any tag, and their own value.

    Args:
        thought, solution, explanation: opening and closing tag of each block.
        teacher_opening: assistant text the teacher continues; names `{solution}`.
        student_opening: assistant text the student continues.
        thought_text: how an explanation stands inside its tags; names `{explanation}`.
        solution_text: the scored solution span; names `{solution}`.
        student_bridge: text between the thought and the scored solution span.
        student_closing: text after the scored solution span.
        system_from_data: let a row's own system prompt replace the student's.
        teacher_system, student_system: system prompts, or None for no system turn.
        teacher_system_file, student_system_file: text files that replace them.

    Raises:
        ValueError: a tag is empty, or a template does not name its value.
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
        """Replace every `{name}` in one pass, so a brace inside a value is never expanded."""
        names = self.tags | values
        return re.sub(r"\{(\w+)\}", lambda m: names.get(m.group(1), m.group(0)), template)

    @property
    def forbidden(self) -> list[str]:
        """Strings that a row's own text must not contain: they would end a block early."""
        return sorted(set(self.tags.values()))

    def for_tokenizer(self, tokenizer: Any) -> "PromptStyle":
        return self


@dataclass(frozen=True)
class StyleByTokenizer:
    """One style for tokenizers that have its tags as tokens, another for the rest.

    Attributes:
        tags_are_tokens: taken where each of its tags is one token.
        otherwise: taken elsewhere.
    """

    tags_are_tokens: PromptStyle
    otherwise: PromptStyle

    @property
    def forbidden(self) -> list[str]:
        return sorted({*self.tags_are_tokens.forbidden, *self.otherwise.forbidden})

    def for_tokenizer(self, tokenizer: Any) -> PromptStyle:
        vocabulary = tokenizer.get_vocab()
        known = all(tag in vocabulary for tag in self.tags_are_tokens.tags.values())
        return self.tags_are_tokens if known else self.otherwise


@dataclass(frozen=True)
class StudentText:
    """The student's text: `prompt`, then `continuation`, with spans counted in the latter."""

    prompt: list[int]
    continuation: list[int]
    thought_span: tuple[int, int]
    solution_span: tuple[int, int]


@dataclass(frozen=True)
class Explanation:
    """What a teacher wrote, up to its end tag.

    Attributes:
        ids: tokens wholly before the end tag (all of them, less EOS, if there is none).
        text: the characters before the end tag, stripped.
        end_tag_found: whether the teacher closed its explanation.
    """

    ids: list[int]
    text: str
    end_tag_found: bool


class Renderer:
    """A prompt style applied with one tokenizer.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, style: PromptStyle | StyleByTokenizer, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: set "
                "teacher.chat_template / student.chat_template to a Jinja string or to a file"
            )
        self.style = style = style.for_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.stop = style.tags["explanation_close"]
        self.eos_ids = turn_end_ids(tokenizer)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:  # a saved tokenizer may carry settings of its training
            self._backend.no_truncation()
            self._backend.no_padding()
        self._encode = functools.lru_cache(maxsize=4096)(self._encode_uncached)
        self._turn_end = self._encode_turn_end()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises ValueError for a word outside the vocabulary."""
        return list(self._encode(text))

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        if self._backend is not None:  # the same ids as a call of the tokenizer, ten times as fast
            ids = tuple(self._backend.encode(text, add_special_tokens=False).ids)
        else:
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.tokenizer.pad_token_id in ids and self.tokenizer.pad_token not in text:
            raise ValueError(
                f"{text[:80]!r} holds a word that the tokenizer does not know; choose a model that "
                "reads any text, such as model@teacher=micro or model@student=micro"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    @property
    def forbidden(self) -> list[str]:
        """Tags of the style and special tokens of the tokenizer (see `PromptStyle.forbidden`)."""
        return sorted({*self.style.forbidden, *self.tokenizer.all_special_tokens})

    def count_tokens(self, text: str) -> int:
        return len(self.encode(text))

    def teacher_prompt(self, problem: Problem) -> list[int]:
        opening = self.style.fill(self.style.teacher_opening, solution=problem.solution)
        return self._prompt(self.style.teacher_system, problem.question, opening)

    def teacher_target(self, explanation: str) -> list[int]:
        """What the teacher should write: the explanation, its end tag, the end of the turn."""
        return self.thought(explanation) + self.encode(self.stop) + self._turn_end

    def student_prompt(self, problem: Problem) -> list[int]:
        system = self.style.student_system
        if self.style.system_from_data and problem.system:
            system = problem.system
        return self._prompt(system, problem.question, self.style.fill(self.style.student_opening))

    def answer_prompt(self, problem: Problem, thought_ids: Sequence[int]) -> list[int]:
        """The student's text with a given thought, up to where its answer begins."""
        text = self.student_text(problem, thought_ids)
        return text.prompt + text.continuation[: text.solution_span[0]]

    def thought(self, explanation: str) -> list[int]:
        """Token ids of an explanation that is given as text."""
        return self.encode(self.style.fill(self.style.thought_text, explanation=explanation))

    def student_text(self, problem: Problem, thought_ids: Sequence[int]) -> StudentText:
        """The student's whole text with the thought's tokens taken over unchanged."""
        style = self.style
        thought = list(thought_ids)
        bridge = self.encode(style.fill(style.student_bridge))
        solution = self.encode(style.fill(style.solution_text, solution=problem.solution))
        closing = self.encode(style.fill(style.student_closing)) + self._turn_end
        start = len(thought) + len(bridge)
        return StudentText(
            prompt=self.student_prompt(problem),
            continuation=thought + bridge + solution + closing,
            thought_span=(0, len(thought)),
            solution_span=(start, start + len(solution)),
        )

    def explanation(self, completion_ids: Sequence[int], end_tag: str | None = None) -> Explanation:
        """Cut a completion at its end tag: a teacher's, if no other is given.

        A token that straddles the border belongs to the tag: its ids are left out of `ids`, its
        characters before the tag are kept in `text`.
        """
        ids = list(completion_ids)
        while ids and ids[-1] in self.eos_ids:
            ids.pop()
        text = self.decode(ids)
        end_tag = end_tag or self.stop
        at = text.find(end_tag)
        if at < 0:
            return Explanation(ids, text.strip(), False)
        # The fewest tokens that hold the whole tag, then back over those that reach into it.
        kept = bisect_left(range(len(ids)), True, key=lambda n: end_tag in self.decode(ids[:n]))
        while not text[:at].startswith(self.decode(ids[:kept])):
            kept -= 1
        return Explanation(ids[:kept], text[:at].strip(), True)

    def _prompt(self, system: str | None, question: str, opening: str) -> list[int]:
        return self.encode(self._chat(system, question, None)) + self.encode(opening)

    def _chat(self, system: str | None, question: str, answer: str | None) -> str:
        """Render the chat up to the assistant's turn, or with `answer` as that turn."""
        from jinja2.exceptions import TemplateError

        tail = [] if answer is None else [{"role": "assistant", "content": answer}]
        user = {"role": "user", "content": question}
        options = {"tokenize": False, "add_generation_prompt": answer is None}
        if system:
            try:
                messages = [{"role": "system", "content": system}, user, *tail]
                rendered = str(self.tokenizer.apply_chat_template(messages, **options))
                if system.strip() in rendered:
                    return rendered
            except TemplateError:
                pass  # a template without system turns (Gemma): the user's turn carries it
            user = {"role": "user", "content": f"{system}\n\n{question}"}
        return str(self.tokenizer.apply_chat_template([user, *tail], **options))

    def _encode_turn_end(self) -> list[int]:
        """Tokens that end an assistant turn, up to and including the first that ends a rollout."""
        _, found, after = self._chat(None, "?", _SENTINEL).rpartition(_SENTINEL)
        ids = self.encode(after) if found else []  # a template may leave the turn's text out
        for position, token in enumerate(ids):
            if token in self.eos_ids:
                return ids[: position + 1]
        return [*ids, self.tokenizer.eos_token_id]


def _text_or_file(text: str | None, file: str | None, role: str) -> str | None:
    if file is None:
        return text
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompt.{role}_system_file={file}: no such file; give the path of a text file"
        )
    return path.read_text(encoding="utf-8").strip()
