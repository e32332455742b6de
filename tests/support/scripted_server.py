"""A server that speaks the OpenAI API and answers as a function says, faults too, and counts what it gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

Reply = tuple[int, Mapping[str, str], bytes | None]  # status, headers, body; no body cuts the connection
MODEL = "scripted"


def said(text: str, finish_reason: str = "stop", **others: Any) -> Reply:
    """A whole answer, for chats and for completions."""
    choice = {"message": {"content": text}, "text": text, "finish_reason": finish_reason, **others}
    usage = {"prompt_tokens": 7, "completion_tokens": len(text.split())}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()


def rewarded(scores: Mapping[str, float]) -> Reply:
    """Scores in NVIDIA's form: tokens named after the attributes, with the scores as log-probabilities."""
    content = [{"token": name, "logprob": value} for name, value in scores.items()]
    return said("", logprobs={"content": content})


def asked(body: Mapping[str, Any]) -> str:
    """The last thing that a request says."""
    return str(body["messages"][-1]["content"]) if "messages" in body else str(body["prompt"])


class ScriptedServer:
    """``answer`` gets the body of a request and how often the same body came before."""

    def __init__(self, answer: Callable[[Mapping[str, Any], int], Reply]) -> None:
        self.answer, self.lock = answer, Lock()
        self.bodies: list[str] = []
        self.url = ""

    def num_calls(self) -> int:
        """Of questions, not of lists of models."""
        return len(self.bodies)

    def reply_to(self, raw: bytes) -> Reply:
        """Count a request and answer it."""
        text = raw.decode()
        with self.lock:
            before = self.bodies.count(text)
            self.bodies.append(text)
        return self.answer(json.loads(text), before)


@contextmanager
def scripted_server(answer: Callable[[Mapping[str, Any], int], Reply]) -> Iterator[ScriptedServer]:
    """A running server on a port of its own."""
    scripted = ScriptedServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(200, {}, json.dumps({"data": [{"id": MODEL}]}).encode())

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, body = scripted.reply_to(raw)
            if json.loads(raw)["model"] != MODEL:
                status, body = 404, b"{}"
            if body is None:
                self.connection.close()
                return
            self.send(status, headers, body)

        def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    scripted.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield scripted
    finally:
        server.shutdown()
        server.server_close()
