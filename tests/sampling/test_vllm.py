"""Sampling on rollout servers: what is asked, whose weights they hold, and what goes wrong."""

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlt.llm.models import LanguageModel
from rlt.sampling import VLLMRollout
from rlt.sampling.vllm_server import RolloutServerError, start_server
from rlt.sampling.vllm_weights import save_for_servers
from tests.sampling.samplers import NEVER, prompts_of, sample
from tests.sampling.scripted_server import ScriptedServer, served

RELOAD = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]


@pytest.fixture
def policy(tiny: Callable[..., LanguageModel]) -> LanguageModel:
    return tiny(3)


@pytest.fixture
def script(tiny: Callable[..., LanguageModel]) -> ScriptedServer:
    """Begins with other weights than the policy's."""
    return ScriptedServer(tiny(4))


@pytest.fixture
def url(script: ScriptedServer) -> Iterator[str]:
    with served(script) as address:
        yield address


def move_(policy: LanguageModel, by: float = 0.1) -> None:
    """As an optimizer does that leaves the tensors' counters of changes as they are."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.model.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)


def test_completions_carry_the_server_s_tokens_and_their_version(
    policy: LanguageModel, script: ScriptedServer, url: str
) -> None:
    rollout = VLLMRollout(0.7, max_new_tokens=6, servers=[url])
    groups = sample(policy, rollout, 3, stop="a")
    assert [len(group) for group in groups] == [3] * len(groups)
    (version,) = {c.version for group in groups for c in group}
    assert version.endswith("-v1")
    assert all(not c.exact and len(c.ids) == len(c.log_probs) for g in groups for c in g)
    body = script.bodies[-1]
    assert (body["n"], body["temperature"], body["max_tokens"]) == (3, 0.7, 6)
    assert body["stop"] == ["a"] and policy.tokenizer.eos_token_id in body["stop_token_ids"]
    assert sorted(b["prompt"] for b in script.bodies[1:]) == sorted(prompts_of(policy.tokenizer))


def test_weights_are_sent_when_they_have_changed(
    policy: LanguageModel, script: ScriptedServer, url: str
) -> None:
    """Between a pause and a reset of the prefix cache."""
    rollout = VLLMRollout(0.7, max_new_tokens=4, servers=[url])
    for begun, version, moved in ((False, 1, False), (True, 1, False), (True, 2, True)):
        if moved:
            move_(policy)
        script.asked.clear()
        groups = sample(policy, rollout, 2, stop=NEVER)
        assert groups[0][0].version.endswith(f"-v{version}")
        sent = [path for path in script.asked if path != "/v1/completions"]
        assert sent == (RELOAD if moved or not begun else [])


@pytest.mark.parametrize(
    ("fault", "by", "told"),
    [
        ("stale", 1e-3, r"-v2, but from earlier ones: .*nats a token"),
        ("stale head", 1e-2, "times the first canary's"),
    ],
)
def test_a_server_that_keeps_weights_is_refused(
    policy: LanguageModel, script: ScriptedServer, url: str, fault: str, by: float, told: str
) -> None:
    """All of them, however small the change is, or some of them: `canary_bound` would pass both."""
    rollout = VLLMRollout(0.7, max_new_tokens=4, servers=[url], canary_bound=1.0)
    sample(policy, rollout, 2, stop=NEVER)
    script.fault = fault
    move_(policy, by)
    with pytest.raises(RolloutServerError, match=told):
        sample(policy, rollout, 2, stop=NEVER)


@pytest.mark.parametrize("tied", [True, False])
def test_servers_get_a_head_of_its_own(
    tiny: Callable[..., LanguageModel], tmp_path: Path, tied: bool
) -> None:
    """vLLM on a CPU goes on with the head that it packed, if new weights do not name one."""
    made = tiny(3, tie_embeddings=tied)
    save_for_servers(made.model, made.tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not loaded.config.tie_word_embeddings
    ids = torch.tensor([[3, 5, 8]])
    torch.testing.assert_close(loaded(ids).logits, made.model(ids).logits)


def test_a_server_of_another_model_is_refused(
    policy: LanguageModel, script: ScriptedServer, url: str
) -> None:
    script.fault = "stale"
    rollout = VLLMRollout(0.7, max_new_tokens=4, servers=[url])
    with pytest.raises(RolloutServerError, match="does not sample from the weights"):
        sample(policy, rollout, 2, stop=NEVER)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("refuses", "status 500: .*out of memory"),
        ("hangs", r"nothing more for 1 s|no answer for 1 s"),
        ("ends early", "ended"),
        ("has no log-probs", "log-probs|does not sample"),
        ("lacks tokens", "not the form"),
        ("is another model", "answered as other"),
        ("fails", "engine dead"),
        ("is no JSON", "no JSON"),
    ],
)
def test_faults_are_errors_in_time(
    policy: LanguageModel, script: ScriptedServer, url: str, fault: str, told: str
) -> None:
    rollout = VLLMRollout(0.7, max_new_tokens=8, servers=[url], timeout_seconds=1)
    sample(policy, rollout, 2, stop=NEVER)
    script.fault = fault
    started = time.monotonic()
    with pytest.raises(RolloutServerError, match=told):
        sample(policy, rollout, 2, stop=NEVER)
    assert time.monotonic() - started < 10


def test_a_slow_server_is_waited_for(
    policy: LanguageModel, script: ScriptedServer, url: str
) -> None:
    """The time limit is for the next token, not for all of them."""
    rollout = VLLMRollout(0.7, max_new_tokens=40, servers=[url], timeout_seconds=3)
    script.fault = "is slow"
    assert sample(policy, rollout, 2, stop=NEVER)


def test_a_dead_server_is_named(policy: LanguageModel, script: ScriptedServer) -> None:
    with served(script) as address:
        rollout = VLLMRollout(0.7, max_new_tokens=4, servers=[address])
        sample(policy, rollout, 2, stop=NEVER)
    with pytest.raises(RolloutServerError, match=f"{address}.*cannot be reached or has ended"):
        sample(policy, rollout, 2, stop=NEVER)


def test_prompts_are_spread_over_servers(
    policy: LanguageModel, tiny: Callable[..., LanguageModel]
) -> None:
    scripts = [ScriptedServer(tiny(4)), ScriptedServer(copy.deepcopy(tiny(5)))]
    with served(scripts[0]) as one, served(scripts[1]) as two:
        groups = sample(policy, VLLMRollout(0.7, max_new_tokens=4, servers=[one, two]), 2, NEVER)
        again = sample(policy, VLLMRollout(0.7, max_new_tokens=4, servers=[two]), 2, NEVER)
    canaries, prompts = 2, len(prompts_of(policy.tokenizer))
    assert sum(len(s.bodies) for s in scripts) == canaries + prompts + 1 + prompts
    assert all(len(s.bodies) > 1 for s in scripts)
    assert len(groups) == len(again) == prompts


def test_what_starts_no_server_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(RolloutServerError, match=r"rollout\.python=/nowhere: it cannot be run"):
        start_server("/nowhere", tmp_path, "base", [], log, 1, 1)
    with pytest.raises(RolloutServerError, match="ended with status 0"):
        start_server("/bin/true", tmp_path, "base", [], log, 1, 5)


def test_servers_or_a_python_are_needed() -> None:
    with pytest.raises(ValueError, match=r"either rollout\.servers"):
        VLLMRollout()
    with pytest.raises(ValueError, match=r"rollout\.timeout_seconds=0 must be above 0"):
        VLLMRollout(servers=["http://127.0.0.1:1"], timeout_seconds=0)
