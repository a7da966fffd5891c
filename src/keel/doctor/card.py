"""The preflight card: the conditions of a solid baseline, measured on the user's own model, task, reward and engine.

A generous cap; on-policy; data with right answers; an accurate reward; engine and trainer alike; no stabilising trick. If one is
broken, that is mended first. If all hold and a run still fails, the framework is broken, or the task is beyond the base.

Source: "Make post-training solid again" (essay, 2026). Differs from it: every condition has a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from keel.doctor.finding import Check, Diagnosis, Finding
from keel.doctor.probes import PROBES, ask
from keel.doctor.probes.data import Answered, answered
from keel.doctor.probes.reward import accuracy_words
from keel.doctor.subject import Subject
from keel.doctor.verdict import weigh
from keel.errors import KeelError
from keel.evaluate.estimates import pass_at_k

State = Literal["ok", "broken", "chosen", "unknown"]
CONDITIONS = {
    "length": "1 a generous length cap",
    "on-policy": "2 fully on-policy",
    "data": "3 data with right answers",
    "reward": "4 an accurate reward",
    "engine": "5 training and inference alike",
    "plain": "6 no stabilising trick",
    "framework": "the framework computes what it says",
    "difficulty": "the task is within the base's reach",
}


@dataclass(frozen=True)
class Line:
    """One line of the card.

    Args:
        condition: a key of `CONDITIONS`, or "size": what a run will take.
        name: what was measured.
        value: the measurement, in words.
        bound: what it is held to, and what that rests on; "" for information.
        state: "chosen" = not the baseline, by the settings.
        why: it matters.
        do: what to do where it is broken.
        codes: of the findings behind it.
    """

    condition: str
    name: str
    value: str
    bound: str
    state: State
    why: str
    do: str = ""
    codes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """What was measured, and the verdict."""

    source: str
    lines: tuple[Line, ...]
    diagnosis: Diagnosis
    seconds: float

    @property
    def broken(self) -> list[str]:
        """Conditions that do not hold, in their order."""
        states = {line.condition for line in self.lines if line.state == "broken"}
        return [name for name in CONDITIONS if name in states]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "source": self.source,
            "healthy": self.diagnosis.healthy,
            "verdicts": list(self.diagnosis.verdicts),
            "broken": [CONDITIONS[name] for name in self.broken],
            "lines": [asdict(line) for line in self.lines],
            "findings": [finding_json(f) for f in self.diagnosis.findings],
            "checks": [check_json(c) for c in self.diagnosis.checks],
            "unknown": list(self.diagnosis.unknown),
            "seconds": round(self.seconds, 1),
        }


def finding_json(f: Finding) -> dict[str, Any]:
    """A finding for machines."""
    told = {name: getattr(f.fault, name) for name in ("code", "name", "part", "component", "remedy", "rests_on")}
    return told | {"says": f.says, "value": f.value, "bound": f.bound, "p": f.p, "evidence": dict(f.evidence)}


def check_json(c: Check) -> dict[str, Any]:
    """A check for machines."""
    codes = [f.fault.code for f in c.findings]
    return {"name": c.name, "says": c.says, "findings": codes, "skipped": c.skipped, "seconds": round(c.seconds, 2)}


def examine(subject: Subject, source: str, see: Callable[[Check], None] = lambda check: None) -> Card:
    """Ask every probe, and fill in the card.

    Args:
        see: is told each check as it is made.
    """
    begun = time.perf_counter()
    checks = ask(subject, tuple(PROBES), see)
    diagnosis = weigh(checks)
    lines = tuple(_lines(subject, {c.name: c for c in checks}, diagnosis))
    return Card(source, lines, diagnosis, time.perf_counter() - begun)


def _lines(subject: Subject, checks: dict[str, Check], diagnosis: Diagnosis) -> list[Line]:
    told, line = _answered(subject), _Writer(checks, diagnosis.findings)
    return [
        line("length", "length at the cap", _length(subject, told), ("K620", "K136"), ("budget", "end tokens"), WHY["length"]),
        _on_policy(subject, line),
        line("data", "gold answers", checks["golds"].says, ("K366", "K367"), ("golds",), WHY["gold"]),
        line("data", "copies and overlap", checks["copies"].says, ("K363", "K364", "K365"), ("copies",), WHY["copies"]),
        line(
            "reward", "accuracy", _accuracy(subject, checks), ("K458", "K461", "K465", "K466", "K482"), ("gold",), WHY["accuracy"]
        ),
        line("reward", "cheats", checks["cheats"].says, ("K463",), ("cheats",), WHY["cheats"]),
        line("reward", "odd and endless texts", checks["hangs"].says, ("K419", "K464", "K489"), ("junk", "hangs"), WHY["junk"]),
        line("reward", "same verdict again", checks["threads"].says, ("K418", "K462", "K485"), ("threads",), WHY["threads"]),
        line("engine", "gap", checks["gap"].says, ("K210", "K211", "K246", "K247"), ("gap",), WHY["gap"]),
        line("engine", "sampling", _sampling(subject, checks), ("K212", "K215"), ("sampling", "unique"), WHY["sampling"]),
        line("engine", "weight sync", checks["sync"].says, ("K213", "K214"), ("sync",), WHY["sync"]),
        _plain(subject),
        _framework(checks, diagnosis.findings),
        line("difficulty", "pass rate", _difficulty(subject, told, checks), ("K568", "K569"), ("difficulty",), WHY["difficulty"]),
        line("framework", "step size", checks["census"].says, ("K653",), ("census",), WHY["census"]),
        *_size(subject, told),
    ]


WHY = {
    "length": "a completion that is cut off earns nothing, so a short cap looks like a hard task",
    "gold": "a wrong gold answer rewards the wrong completion",
    "copies": "copies share a batch, and questions that leak measure memory",
    "accuracy": "the true gradient is multiplied by (right ones taken − wrong ones taken)",
    "cheats": "what is rewarded without an answer is learned first",
    "junk": "the policy will write such texts, and one of them ends or stops the run",
    "threads": "a verdict that depends on company is noise",
    "gap": "the gradient takes the engine's tokens for the trainer's own",
    "sampling": "what took effect is what is trained on, whatever was asked for",
    "sync": "old weights make every batch stale without a sign",
    "difficulty": "only groups with right and wrong answers have a gradient",
    "census": "what moves by less than the spacing of its numbers does not move",
}


class _Writer:
    """Makes lines whose state is that of the findings and checks behind them."""

    def __init__(self, checks: dict[str, Check], findings: Sequence[Finding]):
        self.checks, self.findings = checks, findings

    def __call__(self, condition: str, name: str, value: str, codes: Sequence[str], behind: Sequence[str], why: str) -> Line:
        found = [f for f in self.findings if f.fault.code in codes]
        if found:
            first = found[0]
            return Line(
                condition,
                name,
                first.says,
                first.fault.rests_on,
                "broken",
                why,
                first.fault.remedy,
                tuple(f.fault.code for f in found),
            )
        skipped = next((self.checks[b].skipped for b in behind if self.checks[b].skipped), "")
        if skipped and not value:
            return Line(condition, name, f"not measured: {skipped}", "", "unknown", why)
        return Line(condition, name, value, RESTS.get(behind[0], ""), "ok", why)


RESTS = {
    "budget": "at most 2 % of right answers lost to the cap, at the edge of chance",
    "gold": "gold 1, another row's gold 0",
    "golds": "no share of wrong golds that chance does not explain (likelihood ratio)",
    "copies": "no pair of copies in a batch, no question held out",
    "cheats": "no text is right for two answers",
    "junk": "finite verdicts within 3 s",
    "threads": "equal verdicts",
    "gap": "10 × the trainer against itself",
    "sampling": "martingale tests, a false alarm in 20 000",
    "sync": "the gap before",
    "difficulty": "one group in ten live, at the edge of chance",
    "census": "every tensor moves",
}


def _answered(subject: Subject) -> Answered | None:
    try:
        return answered(subject)
    except KeelError:  # the engine refused; its own line says why
        return None


def _length(subject: Subject, told: Answered | None) -> str:
    if told is None:
        return ""
    ended = told.finished
    p95 = f"the 95th percentile of finished ones is {ended[int(0.95 * (len(ended) - 1))]} tokens" if ended else "none finished"
    return f"{told.truncated:.1%} of completions reach the cap of {subject.cap} tokens; {p95}"


def _on_policy(subject: Subject, line: _Writer) -> Line:
    train, sync = subject.config.train, subject.config.engine.sync_every
    updates = train.updates_per_batch or 1
    name, why = "policy against sampler", "a clip, a weight or a KL against stale data is a trick that the baseline does without"
    broken = line("on-policy", name, " ", ("K122", "K123", "K145", "K152"), ("updates",), why)
    if broken.state == "broken":
        return broken
    metrics = subject.gradient(subject.batch).metrics
    off, clipped = metrics.get("policy/off_policy_frac", 0.0), metrics.get("policy/clip_frac", 0.0)
    several = f"{updates} update{'s' * (updates > 1)} a batch, staleness {train.max_staleness}"
    told = f"{several}; at the first update {off:.1%} of tokens off-policy, {clipped:.1%} clipped"
    chosen = updates > 1 or train.max_staleness > 0 or sync > 1
    return Line("on-policy", name, told, "ratio 1 and nothing clipped", "chosen" if chosen else "ok", why)


def _accuracy(subject: Subject, checks: dict[str, Check]) -> str:
    told = subject.facts.get("accuracy")
    return accuracy_words(told) if told is not None else checks["gold"].says


def _sampling(subject: Subject, checks: dict[str, Check]) -> str:
    s = subject.sampling
    asked = f"temperature {s.temperature:g}, top_p {s.top_p:g}, top_k {s.top_k}, min_p {s.min_p:g}"
    return f"{asked} took effect: {checks['sampling'].says}" if checks["sampling"].says else ""


def _plain(subject: Subject) -> Line:
    """Which tricks are on. None is a fault; each is a departure from what everything is measured against."""
    objective, train = subject.trainer.objective, subject.config.train
    named = {
        f"surrogate {type(objective.surrogate).__name__}": type(objective.surrogate).__name__ != "Reinforce",
        "KL in the loss": objective.loss_kl is not None,
        "KL in the reward": objective.reward_kl is not None,
        "corrections of the engine gap": bool(objective.corrections),
        "shaped rewards or masks": bool(objective.shaping),
        "advantages divided by a spread": getattr(objective.advantage.scale, "__name__", "") != "unscaled",
        "entropy bonus": objective.entropy_coef != 0,
        "dynamic sampling": bool(train.dynamic_sampling),
        "a curriculum": train.curriculum != "none",
    }
    active = [name for name, on in named.items() if on]
    value = ", ".join(active) or "none"
    why = "a trick can hide what is broken; break the baseline only once it holds"
    return Line("plain", "stabilisers", value, "none in the baseline", "chosen" if active else "ok", why)


def _framework(checks: dict[str, Check], findings: Sequence[Finding]) -> Line:
    from keel.doctor.verdict import LOOKS_AT

    asked = [checks[name] for name, part in LOOKS_AT.items() if part == "framework" and name in checks]
    found = [f for f in findings if f.fault.part == "framework"]
    holds = sum(c.holds for c in asked)
    why = "the step must be the gradient of the stated objective, whatever the batch is cut into"
    if found:
        codes = tuple(dict.fromkeys(f.fault.code for f in found))
        return Line("framework", "identities", found[0].says, found[0].fault.rests_on, "broken", why, found[0].fault.remedy, codes)
    return Line(
        "framework",
        "identities",
        f"{holds} of {len(asked)} identities hold, the others do not apply",
        "equal to rounding",
        "ok",
        why,
    )


def _difficulty(subject: Subject, told: Answered | None, checks: dict[str, Check]) -> str:
    if told is None:
        return ""
    ks = [k for k in (1, told.tries) if k <= told.tries]
    rates = [f"pass@{k} {sum(pass_at_k(told.tries, r, k) for r in told.right) / len(told.right):.0%}" for k in ks]
    live = subject.facts.get("live")
    return ", ".join(rates) + ("" if live is None else f"; {live:.0%} of groups of {subject.config.train.group_size} will be live")


def _size(subject: Subject, told: Answered | None) -> list[Line]:
    """What a run will take: batches, memory, time."""
    config, derived = subject.config, subject.config.derived()
    table = "{completions_per_update:,} completions an update, {completions_per_batch:,} a batch, {batches:,} batches".format(
        **derived
    )
    parameters = sum(p.numel() for p in subject.policy.model.parameters())
    trained = sum(p.numel() for p in subject.policy.parameters().values())
    copies = parameters * (1 + (config.engine.name == "local") + (subject.trainer.reference is not None and config.lora is None))
    rows = min(config.train.micro_batch_tokens or 10**9, derived["completion_tokens_per_update_at_most"])
    vocabulary = subject.policy.base.get_output_embeddings().weight.shape[0]
    gigabytes = 4 * (copies + 3 * trained + 2 * min(rows, 4096) * vocabulary) / 1e9
    lines = [
        Line("size", "batch", table, "", "ok", "units: an update is one optimizer step, a batch one rollout phase"),
        Line(
            "size",
            "memory",
            f"about {gigabytes:.2g} GB for weights, gradients, moments and logits; activations besides",
            "",
            "ok",
            "an estimate",
        ),
    ]
    seconds = subject.facts.get("sampling s/token")
    if told is not None and seconds is not None:
        begun = time.perf_counter()
        step = subject.gradient(subject.batch)
        per_token = (time.perf_counter() - begun) / max(1.0, step.metrics.get("tokens/step", 1.0))
        length = sum(len(c.token_ids) for row in told.completions for c in row) / sum(map(len, told.completions))
        tokens = derived["completions_per_update"] * length
        each = tokens * (seconds + per_token)
        lines.append(
            Line("size", "time", f"about {each:.2g} s a step, {each * config.steps / 60:.2g} min in all", "", "ok", "an estimate")
        )
    return lines
