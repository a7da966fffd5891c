"""The server behind a judge: which one, how it is reached, and what of its answers is text."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import threading
import weakref
from collections.abc import Coroutine, Mapping
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import Field

from keel.config import Section
from keel.errors import KeelError
from keel.rewards.judge_prompt import Malformed, Question

T = TypeVar("T")
MOST_BYTES = 1 << 20  # of an answer
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class JudgeSettings(Section):
    """Which model judges, and how it is asked."""

    base_url: str = Field("http://127.0.0.1:8080/v1", description="where the server's API begins")
    model: str = Field(min_length=1, description="the model's name, as the server knows it")
    revision: str = Field("", description="any text; another one makes kept answers unknown, for instance after new weights")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable with the key; local servers need none")
    temperature: float | None = Field(0.0, ge=0, description="of the judge; none = do not send one")
    seed: int | None = Field(0, description="of the judge; none = do not send one")
    max_tokens: int = Field(1024, ge=16, description="tokens of an answer; one that is cut off is no verdict")
    limit_name: Literal["max_tokens", "max_completion_tokens"] = Field("max_tokens", description="what the server calls that")
    structured: Literal["json_schema", "json_object", "none"] = Field(
        "json_schema", description="how the answer's form is asked for"
    )
    extra_body: dict[str, Any] = Field(default_factory=dict, description="further fields of the request")
    concurrency: int = Field(16, ge=1, le=1024, description="questions in the air at a time")
    timeout_s: float = Field(120.0, gt=0, description="seconds for a question by the wall clock, retries and pauses included")
    retries: int = Field(5, ge=0, description="further tries after 429, 5xx or a broken connection, with growing pauses")
    retries_malformed: int = Field(1, ge=0, description="further tries after an answer that is no verdict")
    pause_s: float = Field(0.5, gt=0, description="the first pause; each further one is up to twice as long")
    max_chars: int = Field(60_000, ge=1, description="a longer completion scores 0 unread")
    cache: str = Field("", description="SQLite file that keeps answers; none = in memory, for this run")
    price_in: float = Field(0.0, ge=0, description="price of a million prompt tokens")
    price_out: float = Field(0.0, ge=0, description="price of a million tokens of answers")

    def fields(self, asked: Question) -> dict[str, Any]:
        """Of the request, apart from the messages."""
        fields: dict[str, Any] = {
            "model": self.model,
            self.limit_name: self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        if self.structured == "json_schema":
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": asked.schema},
            }
        elif self.structured == "json_object":
            fields["response_format"] = {"type": "json_object"}
        if self.extra_body:
            fields["extra_body"] = self.extra_body
        return {name: value for name, value in fields.items() if value is not None}


# ---- answers -----------------------------------------------------------------------------------------------------------


def body_of(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise Malformed(f"no JSON but {body[:80].decode('utf-8', 'replace')!r}") from None
    if not isinstance(answer, dict):
        raise Malformed(f"a {type(answer).__name__}, no completion")
    return answer


def content_of(answer: Mapping[str, Any]) -> str:
    """The first choice's text.

    Raises:
        Malformed: there is none, it was refused, or it was cut off.
    """
    try:
        choice = answer["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Malformed(f"no completion: it has {', '.join(map(str, answer))[:120] or 'nothing'}") from None
    if refusal:
        raise Malformed(f"a refusal: {str(refusal)[:120]}")
    if not isinstance(content, str) or not content.strip():
        raise Malformed(f"empty (finish reason {finish!r:.40})")
    if finish == "length":
        raise Malformed("cut off by max_tokens")
    return content


def pause_of(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait; the deadline bounds them."""
    try:
        pause = float(headers.get("retry-after", "0"))
    except ValueError:  # a date; the growing pauses do
        return 0.0
    return pause if math.isfinite(pause) and pause > 0 else 0.0


# ---- the client --------------------------------------------------------------------------------------------------------


class Worker:
    """A thread with an event loop and the client in it; begun at the first question."""

    def __init__(self, settings: JudgeSettings):
        try:
            import openai
        except ImportError as missing:
            raise KeelError(
                f"A judge needs the openai package, which cannot be imported ({missing}): pip install 'keel-rl[judge]'."
            ) from missing
        transport = sys.modules[openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]]
        self.errors: tuple[type[Exception], ...] = (openai.APIError, transport.HTTPError)  # the second: while a body is read
        self.settings, self._lock, self._closed = settings, threading.Lock(), False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self.room = asyncio.Semaphore(settings.concurrency)
        self.client: Any = None
        self._end: weakref.finalize | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, run in the thread. An interrupt here cancels it there.

        Raises:
            KeelError: the judge is closed.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._begun())
        except BaseException:
            work.close()
            raise
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._end is not None:
                self._end()

    def _begun(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise KeelError("The judge is closed. Expected questions before that; make a new one.")
            if self._loop is None or self._process != os.getpid():  # a fork has no thread
                self._process = os.getpid()
                self._loop, self.client = asyncio.new_event_loop(), _client(self.settings)
                thread = threading.Thread(target=self._loop.run_forever, name="keel-judge", daemon=True)
                thread.start()
                self._end = weakref.finalize(self, _end, self._loop, thread, self.client)
            return self._loop


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: Any) -> None:
    async def last() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await client.close()

    if threading.current_thread() is thread:  # the last reference was the loop's own: it cannot wait for itself
        threading.Thread(target=_end, args=(loop, thread, client)).start()
        return
    asyncio.run_coroutine_threadsafe(last(), loop).result(10.0)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10.0)
    loop.close()


def _client(settings: JudgeSettings) -> Any:
    """The official client. Retries are ours, so that they are counted and bounded; a loopback address needs no proxy."""
    import openai

    local = urlsplit(settings.base_url).hostname in LOOPBACK
    return openai.AsyncOpenAI(
        base_url=settings.base_url,
        api_key=os.environ.get(settings.api_key_env) or "none",
        max_retries=0,
        timeout=settings.timeout_s,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if local else None,
    )
