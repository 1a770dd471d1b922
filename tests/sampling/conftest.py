"""The model that is sampled from."""

from collections.abc import Callable

import pytest

from rlt.llm.models import LanguageModel


@pytest.fixture(scope="module")
def teacher(tiny: Callable[..., LanguageModel]) -> LanguageModel:
    return tiny(3)
