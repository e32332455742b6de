"""A small OpenAI-compatible server of a model folder, computed by transformers alone: none of our own code answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def transformers_model(folder: Path) -> Any:
    """A folder as transformers loads it, in float32, without the clamp on dt that engines do not have."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


class _Served:
    """A model, its tokenizer, and one answer at a time. ``requests``: the bodies that came."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers_model(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.name, self.lock, self.requests = folder.name, Lock(), list[dict[str, Any]]()

    @torch.inference_mode()
    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        token_ids = self.tokenizer(body["prompt"], return_tensors="pt")["input_ids"]
        out = self.model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=body["max_tokens"],
            do_sample=False,
            pad_token_id=0,
        )
        new = self.tokenizer.decode(out[0, token_ids.shape[1] :], skip_special_tokens=True)
        for stop in body.get("stop") or ():
            new = new.partition(stop)[0]
        if not body.get("echo"):
            return {"text": new, "logprobs": None}
        log_probs = self.model(out).logits.log_softmax(-1)[0]
        tokens = out[0].tolist()
        ends = [len(self.tokenizer.decode(tokens[: idx + 1])) for idx in range(len(tokens))]
        values = [None, *(float(log_probs[idx, token]) for idx, token in enumerate(tokens[1:]))]
        return {"text": "", "logprobs": {"text_offset": [0, *ends[:-1]], "token_logprobs": values, "tokens": tokens}}


@contextmanager
def served_model(folder: Path, *, has_logprobs: bool = True, num_failures: int = 0) -> Iterator[tuple[str, _Served]]:
    """The address of a running server and what it serves; ``num_failures``: first requests that it is too busy for."""
    served = _Served(folder)
    failures = [503] * num_failures

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {"data": [{"id": served.name}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                if failures:
                    self._answer(failures.pop(), {})
                    return
                served.requests.append(body)
                choice = served.completion(body)
            if not has_logprobs:
                choice["logprobs"] = None
            self._answer(200, {"choices": [choice]})

        def _answer(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
