"""A small model of every architecture, one after another."""

from typing import Any

import pytest

from tests.llm.architectures import CONFIGS, make


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)
