"""A rollout server with vLLM's addresses and a tiny model in it, which fails when it is told to."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from rlt.llm.models import LanguageModel
from rlt.sampling import HFRollout

_ONE_AT_A_TIME = threading.Lock()  # the engine in this process is not made for threads


class ScriptedServer:
    """Samples from a tiny model; `fault` names what goes wrong.

    Attributes:
        fault: `none` or how completions go wrong; `stale`: new weights are taken and not
            used; `stale head`: but for the head.
        asked: the addresses that were asked for, in order.
        bodies: of the completions.
    """

    def __init__(self, held: LanguageModel) -> None:
        self.held = held
        self.fault = "none"
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []

    def reload(self, folder: Path) -> None:
        if self.fault != "stale":
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if self.fault == "stale head":  # as a head that was packed when the server started
                model.lm_head.weight.data = self.held.model.lm_head.weight.data
            self.held = LanguageModel(model.eval(), self.held.tokenizer)

    def parts(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What vLLM streams: a token at a time of each completion."""
        rollout = HFRollout(body["temperature"], body["max_tokens"])
        stop = (body.get("stop") or ["\0"])[0]
        with _ONE_AT_A_TIME:
            (group,) = rollout.sample(
                self.held.model, self.held.tokenizer, [body["prompt"]], body["n"], stop,
                [body["seed"]],
            )  # fmt: skip
        for index, completion in enumerate(group):
            for place, token in enumerate(completion.ids):
                ended = place == len(completion.ids) - 1
                why = {"stop": stop, "eos": None, "length": None}[completion.finish]
                yield {
                    "model": body["model"],
                    "choices": [
                        {
                            "index": index,
                            "token_ids": [token],
                            "logprobs": {"token_logprobs": [completion.log_probs[place]]},
                            "finish_reason": (
                                ("length" if completion.finish == "length" else "stop")
                                if ended
                                else None
                            ),
                            "stop_reason": why if ended else None,
                        }
                    ],
                }


class _Handler(BaseHTTPRequestHandler):
    script: ScriptedServer

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "base"}]})

    def do_POST(self) -> None:
        script = self.script
        script.asked.append(self.path)
        content = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.loads(content) if content not in (b"", b"null") else {}
        if self.path == "/collective_rpc":
            script.reload(Path(body["kwargs"]["weights_path"]))
        if self.path != "/v1/completions":
            return self._answer({})
        script.bodies.append(body)
        if script.fault == "refuses":
            return self._answer({"message": "out of memory"}, status=500)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self._stream(script, body)

    def _stream(self, script: ScriptedServer, body: dict[str, Any]) -> None:
        for count, part in enumerate(script.parts(body)):
            if script.fault == "hangs" and count == 2:
                time.sleep(4)
            if script.fault == "is slow":
                time.sleep(0.05)
            if script.fault == "ends early" and count == 2:
                return
            if script.fault == "has no log-probs":
                part["choices"][0]["logprobs"] = None
            if script.fault == "lacks tokens":
                del part["choices"][0]["token_ids"]
            if script.fault == "is another model":
                part["model"] = "other"
            if script.fault == "fails":
                part = {"error": {"message": "engine dead"}}
            text = "{" if script.fault == "is no JSON" else json.dumps(part)
            self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def served(script: ScriptedServer) -> Iterator[str]:
    """The server's address, as long as it runs."""
    handler = type("Handler", (_Handler,), {"script": script})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
