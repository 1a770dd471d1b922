"""A rollout engine that samples on vLLM servers, which get the policy's weights when they change.

Token ids go to a server and token ids with their log-probs come back; no text is tokenised again. A
prompt's completions are one request, so that the server runs the prompt once. Prompts are spread
over the servers in turn.

New weights are written to a folder of a new name: an adapter as an adapter, which the server loads
beside its base under a name that is used once, all weights as a Hugging Face folder, which the
server reads between a pause and a reset of its prefix cache. Without the reset, a server goes on
with keys and values of the old weights and says nothing. Therefore no engine is trusted: before
each batch, it samples from a prompt that it has seen under earlier weights (the canary), and its
log-probs must be the model's.
"""

import concurrent.futures
import copy
import dataclasses
import itertools
import logging
import shlex
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlt.llm.adapter_layers import adapter_modules, remove_
from rlt.llm.logprobs import row_log_probs
from rlt.llm.tokenizers import turn_end_ids
from rlt.runs import ranks
from rlt.sampling.canary import Canary
from rlt.sampling.engine import Completion, draw_seeds, require_sampling
from rlt.sampling.vllm_server import RolloutServerError, Server, start_server
from rlt.sampling.vllm_weights import marks_of, save_for_servers, server_rank

log = logging.getLogger(__name__)

_CANARY_PROMPT_TOKENS, _CANARY_NEW_TOKENS = 256, 8
_SEED_LIMIT = 2**31  # well inside the 64 bits that a server takes


class VLLMRollout:
    """Samples on vLLM servers.

    Args:
        temperature, max_new_tokens, top_p, top_k, min_p: as for `rlt.sampling.HFRollout`. Where
            tokens are left out or decoding is greedy, log-probs are not told.
        servers: addresses of servers that run already; None starts one, which ends with this
            process.
        python: interpreter of the environment that vLLM is installed in, to start a server.
        arguments: of the command line of the server that is started.
        folder: for weights on their way; servers must be able to read it. None: a temporary one.
        parallel_requests: prompts that are sent to a server at once.
        timeout_seconds: that a server may take for an answer, or for the next token of one.
        start_seconds: that a started server may take to be ready.
        canary_bound: largest mean difference, in nats a token, between a server's log-probs and the
            model's that is taken for rounding; a server whose first canary was closer may differ by
            20 times that difference.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.7,
        max_new_tokens: int = 256,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        servers: Sequence[str] | None = None,
        python: str | None = None,
        arguments: str | None = None,
        folder: str | None = None,
        parallel_requests: int = 64,
        timeout_seconds: float = 60.0,
        start_seconds: float = 600.0,
        canary_bound: float = 0.1,
    ) -> None:
        require_sampling(temperature, max_new_tokens, top_p, top_k, min_p)
        if (servers is None) == (python is None):
            raise ValueError(
                "rollout=vllm: give either rollout.servers, addresses of servers that run, or "
                "rollout.python, the interpreter of the environment that vLLM is installed in"
            )
        for name, value in {
            "parallel_requests": parallel_requests, "timeout_seconds": timeout_seconds,
            "start_seconds": start_seconds, "canary_bound": canary_bound,
        }.items():  # fmt: skip
            if value <= 0:
                raise ValueError(f"rollout.{name}={value} must be above 0")
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.top_p, self.top_k, self.min_p = top_p, top_k, min_p
        self.python, self.arguments = python, shlex.split(arguments or "")
        self.parallel_requests = parallel_requests
        self.timeout_seconds, self.start_seconds = timeout_seconds, start_seconds
        self._servers = [Server(url, timeout_seconds) for url in servers or ()]
        self._given_folder = folder
        self._folder: Path | None = None
        self._held: Tensor | None = None  # marks of the weights that servers have
        self._versions = itertools.count(1)
        self._run_name = f"rlt-{uuid.uuid4().hex[:8]}"
        self._model_names: dict[str, str] = {}  # by server: what requests call the model
        self._version = ""
        self._canary = Canary(canary_bound)
        self._canary_prompt: list[int] = []

    @torch.no_grad()
    def sample(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        n: int,
        stop: str,
        seeds: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Sample `n` completions of every prompt (see `Rollout.sample`).

        Raises:
            RolloutServerError: a server is dead, hung, or not what it should be.
        """
        if not prompts:
            return []
        if not self._version:  # changed weights are the caller's to tell, by `prepare`
            self.prepare(model, tokenizer)
        seeds = draw_seeds(len(prompts)) if seeds is None else seeds
        self._canary_prompt = self._canary_prompt or list(prompts[0][-_CANARY_PROMPT_TOKENS:])
        for server in self._servers:
            self._require_current(server, model)
        ends = turn_end_ids(tokenizer)
        stopping = {
            "stop": [stop],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "stop_token_ids": sorted(ends),
        }

        def complete(place: int) -> list[Completion]:
            server = self._servers[place % len(self._servers)]
            body = self._body(server, prompts[place], n, seeds[place]) | stopping
            found = self._complete(server, body, n)
            if self._tells_log_probs:
                return found
            return [dataclasses.replace(completion, log_probs=[]) for completion in found]

        workers = min(len(prompts), self.parallel_requests * len(self._servers))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            tasks = [pool.submit(complete, place) for place in range(len(prompts))]
            try:
                return [task.result() for task in tasks]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _body(self, server: Server, prompt: Sequence[int], n: int, seed: int) -> dict[str, Any]:
        return {
            "model": self._model_names[server.url],
            "prompt": list(prompt),
            "n": n,
            "seed": seed % _SEED_LIMIT,
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k or -1,
            "min_p": self.min_p,
            "logprobs": 0,
            "return_token_ids": True,
        }

    @property
    def _tells_log_probs(self) -> bool:
        return self.temperature > 0 and self.top_p == 1 and not self.top_k and not self.min_p

    def _complete(self, server: Server, body: Mapping[str, Any], n: int) -> list[Completion]:
        """Put a request's completions together from the parts that the server sends."""
        completions = [_Completion() for _ in range(n)]
        for part in server.stream("/v1/completions", body):
            if part.get("model") != body["model"]:
                raise RolloutServerError(
                    f"{server.url}: asked for {body['model']}, it answered as {part.get('model')}"
                )
            try:
                for choice in part["choices"]:
                    completions[choice["index"]].add(choice)
            except (KeyError, TypeError, IndexError) as error:
                raise RolloutServerError(
                    f"{server.url}: its answer has not the form that vLLM's has ({error!r}): "
                    f"{str(part)[:200]}"
                ) from error
        for place, one in enumerate(completions):
            if one.finish is None or not one.ids or len(one.ids) != len(one.log_probs):
                raise RolloutServerError(
                    f"{server.url}: completion {place} has {len(one.ids)} tokens, "
                    f"{len(one.log_probs)} log-probs and the end {one.finish}"
                )
        return [
            Completion(one.ids, one.log_probs, str(one.finish), exact=False, version=self._version)
            for one in completions
        ]

    # --- weights -----------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the servers the model's weights, if they changed; rank 0 does it for all.

        Raises:
            RolloutServerError: a server does not start, or does not take the weights.
        """

        def told() -> tuple[str, dict[str, str]]:
            self._bring_up_to_date(model, tokenizer)
            return self._version, self._model_names

        phase = "sending weights to the rollout servers"
        self._version, self._model_names = ranks.from_main(told, phase)
        if not self._servers:  # rank 0 has started one
            self._servers = [Server(url, self.timeout_seconds) for url in self._model_names]

    def _bring_up_to_date(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the servers the model's weights, if they changed since they were last given."""
        now = marks_of(model)
        if self._held is not None and torch.equal(now, self._held):
            return
        self._version = f"{self._run_name}-v{next(self._versions)}"
        folder = self._weights_folder() / self._version
        if not self._servers:
            self._start(model, tokenizer)
            if not adapter_modules(model):
                self._held = now
                return
        if adapter_modules(model):
            model.save_pretrained(folder)
            for server in self._servers:
                self._load_adapter(server, folder)
        else:
            save_for_servers(model, tokenizer, folder)
            for server in self._servers:
                self._load_weights(server, folder)
        shutil.rmtree(folder, ignore_errors=True)
        self._held = now

    def _weights_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="rlt-weights-", dir=self._given_folder))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def _start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Start a server with the model's weights, or with those below its adapter."""
        assert self.python is not None
        arguments = ["--logprobs-mode=processed_logprobs"]
        plain = model
        if adapter_modules(model):
            arguments += ["--enable-lora", f"--max-lora-rank={server_rank(model)}", "--max-loras=2"]
            plain = copy.deepcopy(model)
            remove_(plain)
        folder = self._weights_folder()
        save_for_servers(plain, tokenizer, folder / "base")
        log.info("starting a vLLM server (its output: %s)", folder / "server.log")
        server = start_server(
            self.python, folder / "base", "base", [*arguments, *self.arguments],
            folder / "server.log", self.timeout_seconds, self.start_seconds,
        )  # fmt: skip
        weakref.finalize(self, server.close)
        self._servers.append(server)
        self._model_names[server.url] = "base"

    def _load_adapter(self, server: Server, folder: Path) -> None:
        before = self._model_names.get(server.url)
        named = {"lora_name": self._version, "lora_path": str(folder)}
        server.ask("/v1/load_lora_adapter", named)
        self._model_names[server.url] = self._version
        if before is not None and before != "base":
            server.ask("/v1/unload_lora_adapter", {"lora_name": before})

    def _load_weights(self, server: Server, folder: Path) -> None:
        if server.url not in self._model_names:
            listed = server.ask("/v1/models", get=True)["data"]
            self._model_names[server.url] = listed[0]["id"]
        server.ask("/pause")
        server.ask(
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}},
        )
        server.ask("/reset_prefix_cache")
        server.ask("/resume")

    def _require_current(self, server: Server, model: PreTrainedModel) -> None:
        """Raises RolloutServerError when a server's log-probs are not the model's."""
        greedy = self.temperature == 0
        settings = {"temperature": 1.0 if greedy else self.temperature, "top_p": 1.0, "top_k": -1}
        body = self._body(server, self._canary_prompt, 1, 0) | settings
        body |= {"max_tokens": _CANARY_NEW_TOKENS, "min_p": 0.0, "ignore_eos": True}
        (drawn,) = self._complete(server, body, 1)
        ids, theirs = drawn.ids, drawn.log_probs
        (ours_T,) = row_log_probs(
            model,
            [(self._canary_prompt, ids)],
            temperature=float(settings["temperature"]),
            pad_id=0,
            token_budget=1,
        )
        self._canary.require_same(server.url, self._version, ids, theirs, ours_T)


@dataclass
class _Completion:
    """A completion, as far as its parts have come."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: str | None = None

    def add(self, choice: Mapping[str, Any]) -> None:
        """Add a part."""
        self.ids += choice["token_ids"] or []
        self.log_probs += (choice["logprobs"] or {}).get("token_logprobs", [])
        if choice["finish_reason"] == "length":
            self.finish = "length"
        elif choice["finish_reason"] is not None:
            # A token that ends a turn has no stop string to name.
            self.finish = "stop" if isinstance(choice["stop_reason"], str) else "eos"
