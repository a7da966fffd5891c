"""From completions to a batch: which row belongs to which prompt, which tokens are trained, whose score it is."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.subject import STEP, Subject
from keel.models.load import find_end_ids
from keel.training import loop
from keel.types import Batch, Completion, Finish, Group, Prompt, Score


def rows(subject: Subject) -> Check:
    """A batch made of groups with everything that can happen to one, against the groups themselves.

    One completion failed in the engine, one could not be scored, one has a tool's tokens in it, and two prompts have the same text.
    """
    groups = _eventful(subject.groups)
    batch, findings = loop.batch_from_groups(groups), []
    expected = list(_expected(groups))
    sizes = torch.unique(batch.group, return_counts=True)[1].tolist()
    histogram = {size: sizes.count(size) for size in sorted(set(sizes))}
    findings += _of_groups(batch, expected, histogram)
    if len(batch) == len(expected):
        findings += _of_rows(batch, expected)
    if findings:
        subject.block("advantage", "rows of a batch are not the completions that they stand for; see rows")
    says = f"{len(expected)} completions stand in their groups (size: how many {histogram}), with their tokens, masks and scores"
    return Check("rows", findings[0].says if findings else says, tuple(findings))


def _eventful(groups: Sequence[Group]) -> list[Group]:
    """The groups with scores by turns, and with what can happen in a run."""
    out = []
    for place, group in enumerate(groups):
        scores = tuple(Score(float(i % (2 + place % 3) == 0), i % (2 + place % 3) == 0) for i in range(len(group.scores)))
        completions = list(group.completions)
        if place == 0 and len(completions) > 2:
            completions[1] = replace(completions[1], finish="error", error="for the examination")
            scores = (scores[0], Score(None, reason="engine: for the examination"), *scores[2:])
        if place == 1:
            scores = (Score(None, reason="for the examination"), *scores[1:])
            completions = [_with_tool(c) for c in completions]
        out.append(replace(group, completions=tuple(completions), scores=scores))
    if len(out) > 2:  # the same question twice: two instances, two groups
        twin = replace(out[2].prompt, id=f"{out[2].prompt.id}@twin")
        out.append(replace(out[2], prompt=twin, scores=tuple(Score(float(i % 2), i % 2 == 1) for i in range(len(out[2].scores)))))
    return out


def _with_tool(c: Completion) -> Completion:
    """The same completion, of whose first half the second token was a tool's."""
    if len(c.token_ids) < 4:
        return c
    sampled = c.sampled.clone()
    sampled[1] = False
    return replace(c, sampled=sampled)


def _expected(groups: Sequence[Group]) -> Iterator[tuple[str, Prompt, Completion, Score]]:
    for group in groups:
        for completion, score in zip(group.completions, group.scores, strict=True):
            if completion.finish != "error":
                yield group.prompt.id, group.prompt, completion, score


def _of_groups(batch: Batch, expected: Sequence[tuple], histogram: Mapping[int, int]) -> Iterator[Finding]:
    if len(batch) != len(expected):
        says = f"a batch of {len(expected)} completions has {len(batch)} rows"
        yield Finding(fault("K108"), says, float(len(batch)), float(len(expected)))
        return
    prompts: dict[int, set[str]] = defaultdict(set)
    ids: dict[str, set[int]] = defaultdict(set)
    for group, (prompt, *_) in zip(batch.group.tolist(), expected, strict=True):
        prompts[group].add(prompt)
        ids[prompt].add(group)
    split, merged = sum(len(found) > 1 for found in ids.values()), sum(len(found) > 1 for found in prompts.values())
    if split and merged:
        code, says = (
            "K108",
            f"{merged} groups hold completions of several prompts, and {split} prompts stand in several groups",
        )
    elif split:
        code, says = "K106", f"{split} of {len(ids)} prompts have their completions in several groups"
    elif merged:
        code, says = "K107", f"{merged} groups hold completions of several prompts that have the same text"
    else:
        return
    told = {"sizes": {str(size): count for size, count in histogram.items()}}
    yield Finding(fault(code), f"{says} (group size: how many {dict(histogram)})", float(split + merged), 0.0, evidence=told)


def _of_rows(batch: Batch, expected: Sequence[tuple[str, Prompt, Completion, Score]]) -> Iterator[Finding]:
    wrong: dict[str, int] = defaultdict(int)
    for i, (_, prompt, c, score) in enumerate(expected):
        begin, tokens = len(prompt.token_ids), len(c.token_ids)
        line, mask, logp = batch.tokens[i], batch.mask[i, :tokens], batch.logp_rollout[i, :tokens]
        trained = c.sampled if score.scorable else torch.zeros_like(c.sampled)
        wrong["tokens"] += not torch.equal(line[: begin + tokens], torch.cat((torch.tensor(prompt.token_ids), c.token_ids)))
        wrong["missing"] += int((trained & ~mask).sum())
        wrong["end"] += bool(trained[-1] and not mask[-1]) and c.finish == "stop"
        wrong["extra"] += int((mask & ~trained).sum()) + int(batch.mask[i, tokens:].sum())
        wrong["logp"] += not torch.equal(logp[mask & trained], c.logp_rollout[mask & trained])
        wrong["score"] += bool(batch.scorable[i]) != score.scorable or (score.scorable and float(batch.reward[i]) != score.value)
    total = len(expected)
    says = {
        "tokens": ("K143", f"{wrong['tokens']} of {total} rows hold other tokens than were sampled"),
        "end": ("K117", f"the end token of {wrong['end']} finished completions is not trained"),
        "missing": ("K118", f"{wrong['missing']} sampled tokens are not trained"),
        "extra": ("K142", f"{wrong['extra']} tokens are trained that the policy did not sample, or that have no verdict"),
        "logp": ("K139", f"the engine's log-probabilities stand at other tokens in {wrong['logp']} of {total} rows"),
        "score": ("K151", f"{wrong['score']} of {total} rows have another completion's score"),
    }
    for kind, (code, sentence) in says.items():
        if wrong[kind] and not (kind == "missing" and wrong["end"]):
            yield Finding(fault(code), sentence, float(wrong[kind]), 0.0)


# ── the echo ──────────────────────────────────────────────────────────────────────────────────────────────────────────


UNSCORABLE = 0.2  # of the texts of the echo


@dataclass(frozen=True)
class Echo:
    """A task whose reward is a fingerprint of what was asked and what was answered; one text in five it cannot score."""

    inner: object
    name: str = "echo"
    train: Sequence[Prompt] = ()
    test: Sequence[Prompt] = ()

    def reward(self, prompt: Prompt, text: str, finish: Finish) -> Score:
        mark = fingerprint(prompt, text)
        return Score(None, reason="for the examination") if mark < UNSCORABLE else Score(mark)

    def gold(self, prompt: Prompt) -> str:
        return prompt.answer

    def check(self) -> None:
        """Nothing: it grades anything."""


def fingerprint(prompt: Prompt, text: str) -> float:
    """A number in [0, 1) that stands for the two."""
    return zlib.crc32(f"{prompt.id}\n{prompt.text}\n{text}".encode("utf-8", "surrogatepass")) / 2**32


@dataclass
class Witness:
    """An engine that passes everything on and remembers what it returned."""

    inner: object
    told: dict[tuple[str, int], Completion] = field(default_factory=dict)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def generate(self, *asked: object) -> list[Completion]:
        made = self.inner.generate(*asked)
        self.told |= {(c.prompt_id, c.sample): c for c in made}
        return made


def echo(subject: Subject) -> Check:
    """Short completions through training's own collection, graded by a fingerprint: prompts, completions and scores stay together.

    Also whether the tokens that are handed on are those that the engine sampled, and whether what could not be scored stays so.
    """
    sampler = subject.rollouts.sampler
    witness = Witness(sampler.engine)
    short = sampler.config.replaced({"sampling.max_completion_tokens": min(8, subject.cap)})
    subject.awake()
    short_sampler = replace(sampler, engine=witness, task=Echo(None), config=short)
    groups = short_sampler.batch(STEP).groups
    swapped = drifted = total = given = 0
    for group in groups:
        for c, score in zip(group.completions, group.scores, strict=True):
            said = witness.told.get((group.prompt.id, c.sample))
            mark = fingerprint(group.prompt, said.text if said else c.text)
            total += 1
            swapped += score.scorable and mark >= UNSCORABLE and score.value != mark
            given += score.scorable and mark < UNSCORABLE
            drifted += said is None or not torch.equal(said.token_ids, c.token_ids)
    findings = []
    if given and not swapped:
        says = f"{given} of {total} completions that the task could not score have a score all the same"
        findings.append(Finding(fault("K115"), says, float(given), 0.0))
    if swapped:
        says = f"{swapped} of {total} completions carry the score of another prompt or another completion"
        findings.append(Finding(fault("K151"), says, float(swapped), 0.0))
    if drifted:
        says = f"{drifted} of {total} completions are trained on other tokens than the engine sampled"
        findings.append(Finding(fault("K143"), says, float(drifted), 0.0))
    says = f"{total} short completions kept their prompts, tokens and scores"
    return Check("echo", findings[0].says if findings else says, tuple(findings))


def ends(subject: Subject) -> Check:
    """Every token that the model's own files say ends a turn ends a completion here."""
    policy = subject.policy
    known = find_end_ids(policy.base, policy.tokenizer, policy.template)
    missing = sorted(set(known) - set(policy.end_ids))
    if not missing:
        return Check("end tokens", f"{len(policy.end_ids)} tokens end a completion, as the model's files say")
    says = f"token {missing[0]} ends the model's answers, and no completion ends with it"
    return Check("end tokens", says, (Finding(fault("K136"), says, float(len(missing)), 0.0),))
