"""A chat server on loopback whose answers are a function: for trying a judge without a model, and without luck.

    with serving(lambda body, number: attentive(body, lambda texts: "42" in texts["COMPLETION"])) as server:
        judge = judge_of(rubric, base_url=server.url, model="scripted")

It speaks real HTTP, so it can also do all that a real server should not.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | dict[str, Any] | tuple[int, dict[str, str], bytes] | Callable[[BaseHTTPRequestHandler], None] | None
Behave = Callable[[dict[str, Any], int], Answer]


class ScriptedServer:
    """Counts what it is asked, and answers by a function.

    Args:
        behave: (body of the request, its number from 1 on) → the text of a completion, a whole body, (status, headers, bytes), a
            function that writes to the handler itself, or None: no answer until the server ends.
    """

    def __init__(self, behave: Behave):
        self.behave = behave
        self.asked: list[dict[str, Any]] = []
        self.now = self.most = 0  # requests in the air, and the most at a time
        self._lock, self.over = threading.Lock(), threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def begin(self, body: dict[str, Any]) -> int:
        """The number of a request that came in."""
        with self._lock:
            self.asked.append(body)
            self.now += 1
            self.most = max(self.most, self.now)
            return len(self.asked)

    def end(self) -> None:
        """A request is answered, or was broken off."""
        with self._lock:
            self.now -= 1


@contextmanager
def serving(behave: Behave) -> Iterator[ScriptedServer]:
    """A server as long as the block lasts."""
    server = ScriptedServer(behave)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join(5)


def attentive(body: Mapping[str, Any], earned: Callable[[dict[str, str]], Any]) -> str:
    """The answer of a judge that reads what is asked of it, and looks at the fenced texts alone.

    Args:
        earned: {"PROBLEM": …, "REFERENCE ANSWER": …, "COMPLETION": …} → what every point gets.
    """
    system, user = body["messages"][0]["content"], body["messages"][1]["content"]
    mark = re.findall(r"=====BEGIN ([0-9a-f]{24})=====", system)[0]
    check = re.findall(r'"check": "([0-9a-f]{8})"', system)[0]
    points = re.findall(r"^- ([\w-]+): ", system, re.MULTILINE)
    fenced = re.findall(rf"^([A-Z ]+)\n=====BEGIN {mark}=====\n(.*?)\n=====END {mark}=====$", user, re.MULTILINE | re.DOTALL)
    found = earned(dict(fenced))
    return json.dumps({"check": check, "points": {name: {"why": "scripted", "earned": found} for name in points}})


def completion(text: str | None, finish: str = "stop") -> dict[str, Any]:
    """A whole body around the text of a completion; it says 100 prompt tokens and 10 of the answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "scripted", "object": "chat.completion", "created": 0, "model": "scripted", "choices": [choice], "usage": usage}


def _handler(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is printed."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            number = server.begin(body)
            try:
                self._answer(server.behave(body, number))
            except (BrokenPipeError, ConnectionResetError):  # the other side gave up
                self.close_connection = True
            finally:
                server.end()

        def _answer(self, answer: Answer) -> None:
            if answer is None or callable(answer):
                self.close_connection = True
                server.over.wait(60) if answer is None else answer(self)
                return
            whole = completion(answer) if isinstance(answer, str) else answer
            status, headers, data = whole if isinstance(whole, tuple) else (200, {}, json.dumps(whole).encode())
            self.send_response(status)
            for name, value in ({"content-type": "application/json", "content-length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    return Handler
