"""What the renderer makes of a tokenizer's chat template."""

from collections.abc import Callable
from typing import Any

import pytest

from rlt.data.problem import Problem, make_problem
from rlt.data.renderer import Renderer
from rlt.llm.tokenizers import turn_end_ids, utf8_bytes

Viewer = Callable[[str, Any], Renderer]


def with_template(template: str) -> Any:
    tokenizer = utf8_bytes()
    tokenizer.chat_template = template
    return tokenizer


PROBLEM = Problem("id", "1+1?", "2", system="Row's own.")


@pytest.mark.parametrize(
    "on_system",
    ["{{ raise_exception('no system turns') }}", ""],
    ids=["refused, as Gemma", "left out"],
)
def test_a_template_without_system_turns(on_system: str, renderer_of: Viewer) -> None:
    tokenizer = with_template(
        "{% for m in messages %}{% if m['role'] == 'system' %}" + on_system + "{% else %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}"
    )
    renderer = renderer_of("r1", tokenizer)
    system = renderer.style.teacher_system
    assert system
    prompt = renderer.decode(renderer.teacher_prompt(PROBLEM))
    assert prompt == (f"[user]{system}\n\n1+1?<solution>\n2\n</solution>\n<explanation>")


def test_the_rows_own_system_prompt(byte_tokenizer: Any, renderer_of: Viewer) -> None:
    for style, taken in (("stratos", True), ("r1", False), ("compact", False)):
        renderer = renderer_of(style, byte_tokenizer)
        assert ("Row's own." in renderer.decode(renderer.student_prompt(PROBLEM))) is taken
        assert "Row's own." not in renderer.decode(renderer.teacher_prompt(PROBLEM))
    plain = renderer_of("r1", byte_tokenizer)
    assert plain.style.student_system
    without = renderer_of("r1", byte_tokenizer).student_prompt(make_problem("1+1?", "2"))
    assert plain.style.student_system in plain.decode(without)


def test_a_template_that_rewrites_assistant_text(renderer_of: Viewer) -> None:
    # Qwen3's template removes thoughts from assistant turns and inserts an empty thought.
    tokenizer = with_template(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
        "{{ m['content'].split('</think>')[-1].lstrip('\n') }}<eos>\n{% else %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    renderer = renderer_of("r1", tokenizer)
    text = renderer.student_text(make_problem("1+1?", "2"), renderer.thought("two"))
    assert renderer.decode(text.prompt).endswith("1+1?[assistant]<think>")
    assert renderer.decode(text.continuation) == (
        "\ntwo\n</think>\n<solution>\n2\n</solution><eos>"
    )


@pytest.mark.parametrize(
    ("assistant", "ending"),
    [
        ("{{ m['content'] }}<eos>\nignored", "<eos>"),
        ("{{ m['content'] }}[end]\n", "[end]\n<eos>"),
        ("{{ m['content'] }}", "<eos>"),
        ("", "<eos>"),
        ("{{ m['content'][:3] }}[cut]", "<eos>"),
    ],
)
def test_how_a_turn_ends(assistant: str, ending: str, renderer_of: Viewer) -> None:
    tokenizer = with_template(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + assistant + "{% else %}"
        "{{ m['content'] }}{% endif %}{% endfor %}"
    )
    renderer = renderer_of("compact", tokenizer)
    assert renderer.decode(renderer.teacher_target("x")) == "x</think>" + ending


def test_a_turn_that_ends_in_a_token_of_its_own(renderer_of: Viewer) -> None:
    """The templates of Gemma and Phi end a turn with a token that is not EOS."""
    tokenizer = with_template(
        "{% for m in messages %}<turn>{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end_of_turn>"]})
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert turn_end_ids(tokenizer) == {tokenizer.eos_token_id, end}
    renderer = renderer_of("compact", tokenizer)
    assert renderer.decode(renderer.teacher_target("x")) == "x</think><end_of_turn>"
    assert renderer.explanation([*renderer.encode("x"), end]).text == "x"
    tokenizer.chat_template = None
    assert turn_end_ids(tokenizer) == {tokenizer.eos_token_id}


def test_turn_end_of_a_real_template(smollm2_tokenizer: Any, renderer_of: Viewer) -> None:
    renderer = renderer_of("r1", smollm2_tokenizer)
    assert renderer.decode(renderer.teacher_target("x")) == "\nx\n</explanation><|im_end|>"


def test_a_tokenizer_without_a_chat_template_is_refused(renderer_of: Viewer) -> None:
    tokenizer = utf8_bytes()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"teacher\.chat_template / student\.chat_template"):
        renderer_of("r1", tokenizer)
