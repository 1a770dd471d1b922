"""The renderer: known spans, and the end tag in the completion of a teacher."""

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlt.data.problem import make_problem
from rlt.data.renderer import PromptStyle, Renderer
from rlt.llm.tokenizers import utf8_bytes

STYLES = ("r1", "stratos", "compact")
TOKENIZERS = ("byte_tokenizer", "smollm2_tokenizer")
Viewer = Callable[[str, Any], Renderer]
# Text with parts of tags, names of placeholders, merging characters and any Unicode.
PIECES = st.sampled_from([
    "</", "<", ">", "think", "think>", "</think", "<think", "<explanation", "</explanation",
    "</solution", "<|end_of", "<|end_of_thought|", "_explanation|>", "{solution}", "{explanation}",
    "{explanation_close}", "{", "}", "\\1", "\n", "\n\n", " ", "  ", "\t", "a", "é", "e\u0301",
    "👩‍👩‍👧", "日本", "42", "the end", ".",
])  # fmt: skip
TEXTS = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=12).map("".join))
FORBIDDEN = (
    "<think>", "</think>", "<answer>", "</answer>", "<solution>", "</solution>", "<explanation>",
    "</explanation>", "<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    *(f"<|{e}_of_{b}|>" for e in ("begin", "end") for b in ("thought", "solution", "explanation")),
)  # fmt: skip
CLEAN = TEXTS.filter(lambda text: not any(tag in text for tag in FORBIDDEN))
FAST = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=STYLES)
def renderer(request: pytest.FixtureRequest, tokenizer: Any, renderer_of: Viewer) -> Renderer:
    return renderer_of(request.param, tokenizer)


# The text of each style, written by hand: thought and solution with their tags, and the opening.
BLOCKS = {
    "r1": ("<think>", "\n{t}\n", "</think>\n<solution>", "\n{s}\n", "</solution>"),
    "stratos": (
        "<|begin_of_thought|>", "\n\n{t}\n\n", "<|end_of_thought|>\n\n<|begin_of_solution|>",
        "\n\n{s}\n\n", "<|end_of_solution|>",
    ),
    "compact": ("? <think>", "{t}", "</think> <answer>", "{s}", "</answer>"),
}  # fmt: skip
TEACHER_OPENINGS = {
    "r1": "<solution>\n{s}\n</solution>\n<explanation>",
    "stratos": "<|begin_of_solution|>\n\n{s}\n\n<|end_of_solution|>\n\n<|begin_of_explanation|>",
    "compact": "{s} <think>",
}
CLOSERS = {"r1": "</explanation>", "stratos": "<|end_of_explanation|>", "compact": "</think>"}


def assume_known_bytes(renderer: Renderer, *texts: str) -> None:
    """SmolLM2's vocabulary lacks a few bytes (0x04, 0xF1 …), which it drops."""
    assume(all(renderer.decode(renderer.encode(text)) == text for text in texts))


def style_of(renderer: Renderer) -> str:
    return {closer: name for name, closer in CLOSERS.items()}[renderer.stop]


@FAST
@given(question=CLEAN, solution=CLEAN, explanation=CLEAN)
def test_spans_hold_exactly_their_text(
    renderer: Renderer, question: str, solution: str, explanation: str
) -> None:
    assume_known_bytes(renderer, question, solution, explanation)
    opening, thought, bridge, answer, closing = BLOCKS[style_of(renderer)]
    thought = thought.replace("{t}", explanation)
    answer = answer.replace("{s}", solution)
    problem = make_problem(question, solution)
    thought_ids = renderer.thought(explanation)
    text = renderer.student_text(problem, thought_ids)

    def decoded(span: tuple[int, int]) -> str:
        return renderer.decode(text.continuation[slice(*span)])

    assert text.thought_span[0] == 0
    assert text.continuation[slice(*text.thought_span)] == thought_ids
    assert decoded(text.thought_span) == thought
    assert decoded((text.thought_span[1], text.solution_span[0])) == bridge
    assert decoded(text.solution_span) == answer
    assert text.continuation[-1] == renderer.tokenizer.eos_token_id
    assert text.prompt == renderer.student_prompt(problem)

    prompt = renderer.decode(text.prompt)
    assert prompt.endswith(opening)
    assert question in prompt
    whole = renderer.decode([*text.prompt, *text.continuation])
    assert whole.startswith(prompt + thought + bridge + answer + closing)

    teacher_prompt = renderer.decode(renderer.teacher_prompt(problem))
    assert teacher_prompt.endswith(TEACHER_OPENINGS[style_of(renderer)].replace("{s}", solution))
    assert question in teacher_prompt
    target = renderer.decode(renderer.teacher_target(explanation))
    assert target.startswith(thought + renderer.stop)


@FAST
@given(ids=st.lists(st.integers(0, 255), max_size=20))
def test_any_thought_ids_are_taken_over_unchanged(renderer: Renderer, ids: list[int]) -> None:
    text = renderer.student_text(make_problem("q", "s"), ids)
    assert text.continuation[: len(ids)] == ids
    assert text.thought_span == (0, len(ids))
    answer = BLOCKS[style_of(renderer)][3].replace("{s}", "s")
    assert renderer.decode(text.continuation[slice(*text.solution_span)]) == answer


def longest_prefix(renderer: Renderer, ids: Sequence[int], text: str) -> int:
    """Return the most ids that decode to a beginning of `text`, by trying every length."""
    fits = [n for n in range(len(ids) + 1) if text.startswith(renderer.decode(ids[:n]))]
    return max(fits)


@FAST
@given(
    explanation=CLEAN,
    tail=st.one_of(st.just(""), CLEAN),
    cuts=st.lists(st.integers(-8, 8), max_size=3),
    eos=st.booleans(),
)
def test_a_completion_is_cut_at_its_end_tag(
    renderer: Renderer, explanation: str, tail: str, cuts: list[int], eos: bool
) -> None:
    assume_known_bytes(renderer, explanation, tail)
    # Without cuts, the BPE may merge the tag with its neighbours. With cuts around the
    # beginning of the tag it consists of other tokens than usual, as in a sampled completion.
    text = explanation + renderer.stop + tail
    places = [0, *sorted(max(0, len(explanation) + cut) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    ids = [token for piece in pieces for token in renderer.encode(piece)]
    ids += [renderer.tokenizer.eos_token_id] * eos
    actual = renderer.explanation(ids)
    assert actual.end_tag_found
    assert actual.text == explanation.strip()
    assert actual.ids == ids[: longest_prefix(renderer, ids, explanation)]


@FAST
@given(explanation=CLEAN, cut=st.integers(0, 60), eos=st.booleans())
def test_a_completion_without_its_end_tag_is_kept_whole(
    renderer: Renderer, explanation: str, cut: int, eos: bool
) -> None:
    ids = renderer.encode(explanation)[:cut]
    actual = renderer.explanation(ids + [renderer.tokenizer.eos_token_id] * eos)
    assert (actual.ids, actual.end_tag_found) == (ids, False)
    assert actual.text == renderer.decode(ids).strip()


def test_a_tag_that_merges_with_the_text_before_it(
    smollm2_tokenizer: Any, renderer_of: Viewer
) -> None:
    renderer = renderer_of("r1", smollm2_tokenizer)
    ids = renderer.encode("(<b></explanation>\n")
    pieces = [renderer.decode([i]) for i in ids]
    assert pieces == ["(", "<", "b", "></", "explan", "ation", ">", "\n"]
    actual = renderer.explanation(ids)
    assert (actual.ids, actual.text, actual.end_tag_found) == (ids[:3], "(<b>", True)


def test_half_a_character_before_the_tag(byte_tokenizer: Any, renderer_of: Viewer) -> None:
    renderer = renderer_of("r1", byte_tokenizer)
    half = renderer.encode("aé")[:2]
    actual = renderer.explanation(half + renderer.encode("</explanation>"))
    assert (actual.ids, actual.text, actual.end_tag_found) == (half, "a\ufffd", True)


def test_the_first_of_two_tags_counts(byte_tokenizer: Any, renderer_of: Viewer) -> None:
    renderer = renderer_of("r1", byte_tokenizer)
    actual = renderer.explanation(renderer.encode("a</explanation>b</explanation>"))
    assert (actual.ids, actual.text) == (renderer.encode("a"), "a")
    assert renderer.explanation(renderer.encode("</explanation>")).ids == []
    nothing = renderer.explanation([])
    assert (nothing.ids, nothing.text, nothing.end_tag_found) == ([], "", False)


def test_a_tokenizer_that_decodes_unfinished_characters_byte_by_byte(renderer_of: Viewer) -> None:
    # Sentencepiece models fall back to bytes: two thirds of "€" decode to two characters, the whole
    # to one, so that the decoded length goes down again as tokens are added.
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)} | {"<unk>": 256, "</s>": 257}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>",
        chat_template="{{ messages[0]['content'] }}",
    )  # fmt: skip
    renderer = renderer_of("r1", tokenizer)
    euros = list("€€€".encode())
    assert len(renderer.decode(euros[:5])) > len(renderer.decode(euros[:6]))
    actual = renderer.explanation(euros + list(b"</explanation>"))
    assert (actual.ids, actual.text) == (euros, "€€€")


def test_braces_are_not_expanded(byte_tokenizer: Any, renderer_of: Viewer) -> None:
    renderer = renderer_of("r1", byte_tokenizer)
    problem = make_problem(
        "{solution} {{ bos_token }} {% x %}", "{explanation} \\g<0> {thought_open}"
    )
    text = renderer.student_text(problem, renderer.thought("{solution}{explanation}"))
    assert "{solution} {{ bos_token }} {% x %}" in renderer.decode(text.prompt)
    assert renderer.decode(text.continuation[slice(*text.thought_span)]) == (
        "\n{solution}{explanation}\n"
    )
    assert renderer.decode(text.continuation[slice(*text.solution_span)]) == (
        "\n{explanation} \\g<0> {thought_open}\n"
    )


def test_settings_saved_with_a_tokenizer_do_not_cut_or_pad(renderer_of: Viewer) -> None:
    tokenizer = utf8_bytes()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    renderer = renderer_of("r1", tokenizer)
    assert renderer.count_tokens("abc") == 3
    assert renderer.count_tokens("abcdefghij") == 10


def test_encode_gives_a_list_of_the_callers_own(byte_tokenizer: Any, renderer_of: Viewer) -> None:
    renderer = renderer_of("r1", byte_tokenizer)
    renderer.encode("ab").append(0)
    assert renderer.count_tokens("ab") == 2


def test_encode_adds_no_special_tokens(smollm2_tokenizer: Any, renderer_of: Viewer) -> None:
    renderer = renderer_of("r1", smollm2_tokenizer)
    text = "The answer is 42.\n\n"
    assert renderer.encode(text) == smollm2_tokenizer(text, add_special_tokens=False)["input_ids"]


def test_forbidden_strings(byte_tokenizer: Any, renderer_of: Viewer) -> None:
    assert renderer_of("r1", byte_tokenizer).forbidden == [
        "</explanation>", "</solution>", "</think>", "<bos>", "<eos>", "<explanation>", "<pad>",
        "<solution>", "<think>",
    ]  # fmt: skip


STYLE: dict[str, Any] = {
    "thought": ("<t>", "</t>"), "solution": ("<s>", "</s>"), "explanation": ("<e>", "</e>"),
    "teacher_opening": "{solution}<e>", "student_opening": "<t>", "thought_text": "{explanation}",
    "solution_text": "{solution}", "student_bridge": "</t><s>", "student_closing": "</s>",
    "system_from_data": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thought": ("<t>",)}, "prompt.thought"),
        ({"solution": ("<s>", "")}, "prompt.solution"),
        ({"teacher_opening": "<e>"}, "prompt.teacher_opening='<e>' must contain {solution}"),
        ({"thought_text": "x"}, "prompt.thought_text='x' must contain {explanation}"),
        ({"solution_text": "x"}, "prompt.solution_text='x' must contain {solution}"),
    ],
)
def test_a_style_that_cannot_work_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PromptStyle(**(STYLE | change))


def test_system_prompts_from_files(tmp_path: Path) -> None:
    file = tmp_path / "teacher.txt"
    file.write_text("Lehre geduldig. ✓\n", encoding="utf-8")
    style = PromptStyle(**STYLE, teacher_system="unused", teacher_system_file=str(file))
    assert (style.teacher_system, style.student_system) == ("Lehre geduldig. ✓", None)
    with pytest.raises(FileNotFoundError, match=r"prompt\.student_system_file=nowhere\.txt"):
        PromptStyle(**STYLE, student_system_file="nowhere.txt")


def test_words_without_a_decoder(word_tokenizer: Any, renderer_of: Viewer) -> None:
    """The tokenizer of `model=nano` joins words by spaces; cutting at the tag still works."""
    renderer = renderer_of("compact", word_tokenizer)
    ids = renderer.encode("3 8 0 7 </think>")
    actual = renderer.explanation([*ids, *renderer.encode("1 2")])
    assert (actual.ids, actual.text, actual.end_tag_found) == (ids[:-1], "3 8 0 7", True)
    text = renderer.student_text(make_problem("3 5 2", "0"), actual.ids)
    assert renderer.decode([*text.prompt, *text.continuation]) == (
        "<bos> 3 5 2 ? <think> 3 8 0 7 </think> <answer> 0 </answer> <eos>"
    )
    teacher = renderer.teacher_prompt(make_problem("3 5 2", "0"))
    assert renderer.decode(teacher) == "<bos> 3 5 2 0 <think>"
