"""Renders problems for teacher and student as token ids with known spans.

A text is put together from segments that are tokenised one by one, so the position of every span is
known by construction. No span is found by searching text or token ids. Therefore a repeated phrase,
or a token that would merge two segments, cannot move a mask. The only search is the one for the end
tag in the completion of a teacher; it uses character offsets of the decoded completion
(`Renderer.explanation`).

    teacher   [system] question | solution, <explanation>  -> writes explanation </explanation>
    student   [system] question | <thought> explanation </thought> <solution> s </solution>

Both tag styles, their blank lines and the system prompts come from `conf/prompt/*.yaml`.
"""

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlt.data.problem import Problem
from rlt.data.prompt_style import PromptStyle, StyleByTokenizer
from rlt.llm.tokenizers import turn_end_ids

_SENTINEL = "rlt-assistant-turn"  # the text of a turn that is searched for in a rendered chat


@dataclass(frozen=True)
class StudentText:
    """The text that the student reads, as token ids. Spans are (start, end), end excluded.

    Attributes:
        prompt: ids up to the opening tag of the thought.
        continuation: ids that follow the prompt; the student's log-probs are taken here.
        thought_span: positions of the thought in `continuation`.
        solution_span: positions of the scored solution in `continuation`.
    """

    prompt: list[int]
    continuation: list[int]
    thought_span: tuple[int, int]
    solution_span: tuple[int, int]


@dataclass(frozen=True)
class Explanation:
    """The explanation that a teacher wrote, without its end tag.

    Attributes:
        ids: tokens that end before the end tag. If there is no end tag, all tokens except EOS.
        text: the characters before the end tag, without white space at both ends.
        end_tag_found: whether the teacher ended its explanation with the end tag.
    """

    ids: list[int]
    text: str
    end_tag_found: bool


class Renderer:
    """Renders problems in one prompt style with one tokenizer.

    Args:
        style: the prompt style.
        tokenizer: the tokenizer. A truncation or padding setting that it was saved with is removed.

    Attributes:
        stop: the end tag of an explanation, at which a rollout stops.
        eos_ids: ids of the tokens that end an assistant's turn.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(
        self, style: PromptStyle | StyleByTokenizer, tokenizer: PreTrainedTokenizerBase
    ) -> None:
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
        if self._backend is not None:  # a tokenizer may be saved with settings of its training
            self._backend.no_truncation()
            self._backend.no_padding()
        self._encode = functools.lru_cache(maxsize=4096)(self._encode_uncached)
        self._turn_end = self._encode_turn_end()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            ValueError: the text contains a word that is not in the vocabulary.
        """
        return list(self._encode(text))

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        if self._backend is not None:  # gives the ids of `self.tokenizer(text)` ten times as fast
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
        """Return the text of token ids, special tokens included."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    @property
    def forbidden(self) -> list[str]:
        """Strings that no text of a problem may contain: the tags and the special tokens."""
        return sorted({*self.style.forbidden, *self.tokenizer.all_special_tokens})

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text (see `encode`)."""
        return len(self.encode(text))

    def teacher_prompt(self, problem: Problem) -> list[int]:
        """Return the teacher's prompt, which has question and solution, up to the explanation."""
        opening = self.style.fill(self.style.teacher_opening, solution=problem.solution)
        return self._prompt(self.style.teacher_system, problem.question, opening)

    def teacher_target(self, explanation: str) -> list[int]:
        """Return what the teacher should write: explanation, end tag and the end of the turn."""
        return self.thought(explanation) + self.encode(self.stop) + self._turn_end

    def student_prompt(self, problem: Problem) -> list[int]:
        """Return the student's prompt, which has the question, up to the thought."""
        system = self.style.student_system
        if self.style.system_from_data and problem.system:
            system = problem.system
        return self._prompt(system, problem.question, self.style.fill(self.style.student_opening))

    def answer_prompt(self, problem: Problem, thought_ids: Sequence[int]) -> list[int]:
        """Return the student's text with a given thought, up to the beginning of the solution."""
        text = self.student_text(problem, thought_ids)
        return text.prompt + text.continuation[: text.solution_span[0]]

    def thought(self, explanation: str) -> list[int]:
        """Return the token ids of an explanation, with the text that surrounds it in its tags."""
        return self.encode(self.style.fill(self.style.thought_text, explanation=explanation))

    def student_text(self, problem: Problem, thought_ids: Sequence[int]) -> StudentText:
        """Return the student's whole text. The token ids of the thought are used unchanged."""
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
        """Cut a completion at its end tag.

        If a token contains both text and the beginning of the tag, it is left out of
        `Explanation.ids`, but its characters before the tag are in `Explanation.text`.

        Args:
            completion_ids: the sampled token ids.
            end_tag: the end tag; None is that of the teacher's explanation.
        """
        ids = list(completion_ids)
        while ids and ids[-1] in self.eos_ids:
            ids.pop()
        text = self.decode(ids)
        end_tag = end_tag or self.stop
        tag_start = text.find(end_tag)
        if tag_start < 0:
            return Explanation(ids, text.strip(), False)
        # Find the shortest prefix of the ids that contains the whole tag, then remove the tokens
        # that reach into the tag.
        kept = bisect_left(range(len(ids)), True, key=lambda n: end_tag in self.decode(ids[:n]))
        while not text[:tag_start].startswith(self.decode(ids[:kept])):
            kept -= 1
        return Explanation(ids[:kept], text[:tag_start].strip(), True)

    def _prompt(self, system: str | None, question: str, opening: str) -> list[int]:
        return self.encode(self._chat(system, question, None)) + self.encode(opening)

    def _chat(self, system: str | None, question: str, answer: str | None) -> str:
        """Render the chat with `answer` as the assistant's turn; if it is None, up to that turn."""
        from jinja2.exceptions import TemplateError

        tail = [] if answer is None else [{"role": "assistant", "content": answer}]
        user = {"role": "user", "content": question}
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": answer is None}
        if system:
            try:
                messages = [{"role": "system", "content": system}, user, *tail]
                rendered = str(self.tokenizer.apply_chat_template(messages, **options))
                if system.strip() in rendered:
                    return rendered
            except TemplateError:
                pass  # The template has no system turns (Gemma), so the user's turn contains it.
            user = {"role": "user", "content": f"{system}\n\n{question}"}
        return str(self.tokenizer.apply_chat_template([user, *tail], **options))

    def _encode_turn_end(self) -> list[int]:
        """Return the tokens that end an assistant's turn, up to the first that ends a rollout."""
        _, sentinel, after = self._chat(None, "?", _SENTINEL).rpartition(_SENTINEL)
        ids = self.encode(after) if sentinel else []  # a template may leave out the turn's text
        for position, token in enumerate(ids):
            if token in self.eos_ids:
                return ids[: position + 1]
        return [*ids, self.tokenizer.eos_token_id]
