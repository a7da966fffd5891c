"""A model as the grader, behind any server that speaks OpenAI's chat API. Asked by the official client.

A judge that fails (no answer in time, an error of the server, an answer that is no verdict) makes the completion unscorable, never
wrong. Every question is bounded by the wall clock, retries included; questions in the air are bounded in number; the same question
is asked once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from keel.errors import KeelError
from keel.rewards.judge_cache import AnswerCache
from keel.rewards.judge_prompt import FORM, Malformed, Question, question, read_verdict
from keel.rewards.judge_server import MOST_BYTES, JudgeSettings, Worker, body_of, content_of, pause_of
from keel.rewards.rubric import Criterion, Rubric, explained
from keel.types import Prompt, Score

RETRIED = (408, 409, 425, 429)  # and everything from 500 on
LATENCIES = 10_000  # last answers over which quantiles are taken


@dataclass(frozen=True)
class JudgeCounts:
    """What a judge has done so far.

    Args:
        judged: completions. unscorable: those of them without a verdict.
        requests: sent to the server, retries included. retries: of them.
        cache_hits: questions answered from the cache, or by the same question that was already in the air.
        failures: why requests failed, and how often.
        prompt_tokens, completion_tokens: as the server counts them. cost: by the prices of the settings.
        latency_p50_s, latency_p95_s, latency_max_s: of requests that were answered; NaN before the first.
    """

    judged: int = 0
    unscorable: int = 0
    requests: int = 0
    retries: int = 0
    cache_hits: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    latency_p50_s: float = math.nan
    latency_p95_s: float = math.nan
    latency_max_s: float = math.nan


Verdict = dict[str, tuple[float, str]]


class Judge:
    """A grader: the rubric's score by what a model says of each point. Safe to call from any thread; `many` asks at once.

    Close it, or use it in a `with`; it is closed at the program's end in any case.

    Args:
        settings: which model, and how.
        rubric: what it looks at.

    Raises:
        KeelError: the openai package is missing, or the cache cannot be opened.
    """

    def __init__(self, settings: JudgeSettings, rubric: Rubric):
        self.settings, self.rubric = settings, rubric
        self._worker = Worker(settings)
        self._cache = AnswerCache(settings.cache)
        self._asked: dict[str, asyncio.Future[tuple[Verdict | None, str]]] = {}
        self._tally: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._waited = 0.0

    def __call__(self, prompt: Prompt, text: str) -> Score:
        return self.many([(prompt, text)])[0]

    def many(self, asked: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """The scores in the order asked for; as many questions are in the air as `concurrency` allows."""

        async def everything() -> list[Score]:
            return list(await asyncio.gather(*(self._judge(prompt, text) for prompt, text in asked)))

        return self._worker.run(everything())

    @property
    def counts(self) -> JudgeCounts:
        """What was asked, answered, and paid so far."""
        tally, times = dict(self._tally), sorted(self._latencies)
        quantiles = {f"latency_{name}_s": _quantile(times, q) for name, q in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))}
        return JudgeCounts(**tally, **quantiles, failures=dict(self._failures), cost=self.cost)

    @property
    def cost(self) -> float:
        """So far, in the currency of the prices."""
        paid = self.settings.price_in * self._tally["prompt_tokens"] + self.settings.price_out * self._tally["completion_tokens"]
        return paid / 1e6

    def describe(self) -> dict[str, Any]:
        """For the manifest: everything that a verdict depends on."""
        s = self.settings
        return {"model": s.model, "revision": s.revision, "base_url": s.base_url, "rubric": self.rubric.name} | self._key_parts()

    def spent(self) -> dict[str, float]:
        """For the metrics below judge/: what was used up so far. Seconds are those of requests, many of which go on at a time."""
        c = self.counts
        told = {
            "judged": c.judged, "unscorable": c.unscorable, "requests": c.requests, "retries": c.retries,
            "cache_hits": c.cache_hits, "prompt_tokens": c.prompt_tokens, "completion_tokens": c.completion_tokens, "cost": c.cost,
            "answers_s": self._waited,
        }  # fmt: skip
        return {name: float(value) for name, value in told.items()}

    def close(self) -> None:
        """End the connections, the thread and the cache."""
        self._worker.close()
        self._cache.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- in the worker's thread, so that nothing here needs a lock

    async def _judge(self, prompt: Prompt, text: str) -> Score:
        self._tally["judged"] += 1
        if len(text) > self.settings.max_chars:
            return Score(0.0, reason=f"longer than the {self.settings.max_chars} characters that the judge reads")
        every = self.rubric.criteria
        rounds = [every] if self.rubric.judging == "together" else [(criterion,) for criterion in every]
        found = await asyncio.gather(*(self._once(criteria, prompt, text) for criteria in rounds))
        verdict: Verdict = {}
        for part, reason in found:
            if part is None:
                self._tally["unscorable"] += 1
                return Score(None, reason=f"judge: {reason}")
            verdict |= part
        return self.rubric.score({name: earned for name, (earned, _) in verdict.items()}, _told(verdict))

    async def _once(self, criteria: Sequence[Criterion], prompt: Prompt, text: str) -> tuple[Verdict | None, str]:
        """The verdict from the cache, from the same question in the air, or from the server."""
        key = self._key(criteria, prompt, text)
        kept = self._kept(key)
        if kept is not None:
            self._tally["cache_hits"] += 1
            return kept, ""
        if key in self._asked:
            self._tally["cache_hits"] += 1
            return await asyncio.shield(self._asked[key])
        self._asked[key] = asyncio.get_running_loop().create_future()
        answer: tuple[Verdict | None, str] = (None, "given up")
        try:
            async with self._worker.room:
                answer = await self._answer(question(self.rubric, criteria, prompt, text), criteria, key)
            if answer[0] is not None:
                self._keep(key, answer[0])
            return answer
        finally:
            self._asked.pop(key).set_result(answer)

    def _kept(self, key: str) -> Verdict | None:
        try:
            kept = self._cache.get(key)
        except sqlite3.Error:  # locked for long, or the disk: the server still knows
            self._failures["cache"] += 1
            return None
        return None if kept is None else {name: (float(earned), why) for name, (earned, why) in json.loads(kept).items()}

    def _keep(self, key: str, verdict: Verdict) -> None:
        try:
            self._cache.put(key, self.settings.model, json.dumps(verdict))
        except sqlite3.Error:  # a full disk costs money, and no verdict
            self._failures["cache"] += 1

    async def _answer(self, asked: Question, criteria: Sequence[Criterion], key: str) -> tuple[Verdict | None, str]:
        """Ask until there is a verdict, no try is left, or the time is over."""
        settings, draw = self.settings, random.Random(key)
        malformed, reason = 0, "no try"
        try:
            async with asyncio.timeout(settings.timeout_s):
                for attempt in range(settings.retries + 1):
                    try:
                        return read_verdict(await self._request(asked, attempt), criteria, asked.check), ""
                    except Malformed as fault:
                        reason, again, pause = f"its answer is {fault}", malformed < settings.retries_malformed, 0.0
                        malformed += 1
                        self._failures["malformed"] += 1
                    except self._worker.errors as fault:
                        reason, again, pause = self._failed(fault)
                    if not again:
                        break
                    if attempt < settings.retries:
                        longest = settings.pause_s * 2**attempt
                        await asyncio.sleep(max(pause, longest * draw.uniform(0.5, 1.0)))
        except TimeoutError:
            self._failures["timeout"] += 1
            reason = f"no verdict within {settings.timeout_s:g} s{'' if reason == 'no try' else f' (before: {reason})'}"
        return None, reason

    def _failed(self, fault: Exception) -> tuple[str, bool, float]:
        """What happened, whether to try again, and how long the server asks to wait."""
        response = getattr(fault, "response", None)
        if response is None:
            self._failures["connection"] += 1
            return f"the server cannot be reached or broke off: {fault.__cause__ or fault}", True, 0.0
        status = response.status_code
        self._failures[f"http_{status}"] += 1
        return f"HTTP {status}: {str(fault)[:200]}", status in RETRIED or status >= 500, pause_of(response.headers)

    async def _request(self, asked: Question, attempt: int) -> str:
        """One request → the text of the answer. Its length is bounded, whatever the server sends."""
        self._tally["requests"] += 1
        self._tally["retries"] += attempt > 0
        begun, body = time.perf_counter(), bytearray()
        create = self._worker.client.chat.completions.with_streaming_response.create
        async with create(messages=asked.messages, **self.settings.fields(asked)) as response:
            async for piece in response.iter_bytes():
                body += piece
                if len(body) > MOST_BYTES:
                    raise Malformed(f"longer than {MOST_BYTES} bytes")
        self._latencies.append(time.perf_counter() - begun)
        self._waited += self._latencies[-1]
        answer = body_of(bytes(body))
        usage = answer.get("usage") or {}
        for name in ("prompt_tokens", "completion_tokens"):
            spent = usage.get(name) if isinstance(usage, dict) else None
            self._tally[name] += spent if type(spent) is int and spent > 0 else 0
        return content_of(answer)

    def _key_parts(self) -> dict[str, Any]:
        s = self.settings
        sampling = [s.temperature, s.seed, s.max_tokens, s.structured, s.extra_body]
        return {"form": FORM, "rubric_hash": self.rubric.hash, "sampling": sampling}

    def _key(self, criteria: Sequence[Criterion], prompt: Prompt, text: str) -> str:
        names = [criterion.name for criterion in criteria]
        whole = [self.settings.model, self.settings.revision, self._key_parts(), names, prompt.text, prompt.answer, text]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _told(verdict: Verdict) -> str:
    return "; ".join(f"{name} {earned:g}: {why}" for name, (earned, why) in verdict.items())


def _quantile(times: Sequence[float], q: float) -> float:
    return times[math.ceil(q * len(times)) - 1] if times else math.nan


def judge_of(rubric: Rubric, **settings: Any) -> Judge:
    """A judge from loose settings, as a task's options or a table give them.

    Raises:
        KeelError: a setting is unknown, missing or out of range; or as `Judge`.
    """
    try:
        return Judge(JudgeSettings(**settings), rubric)
    except ValidationError as found:
        raise KeelError(f"The judge's settings: {explained(found, JudgeSettings, 'the judge')}") from None
