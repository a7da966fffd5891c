"""What the engine draws: from the distribution that was asked for, and each sample anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keel.doctor import chance
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.forward import distribution, few_rows, model_logits
from keel.doctor.probes.gap import batch_of
from keel.doctor.subject import STEP, Subject
from keel.training.buffer import PromptStream
from keel.types import Batch, Completion

SAMPLED = (64, 16, 2.0), (192, 16, 0.0)  # prompts, samples of each, and the standard deviations beyond which more are asked
OF_LARGE = ((8, 4, 0.0),)  # the same of a large model
FAR = 5.0  # standard deviations at which there is an alarm
ALSO = 0.05  # chance of so many repeats, below which new and more samples decide


def sampling(subject: Subject) -> Check:
    """Whether tokens come as often as their log-probabilities say: by surprise, and by rank, against the model's own logits.

    Given what came before, a token's surprise less its expectation has mean 0, and so has "it was the likeliest" less that chance:
    sums of them over their standard deviation are about standard normal. Where that looks odd, new and more samples decide. Of
    prompts whose samples repeat each other one sample counts.
    """
    subject.awake()
    for draw, (asked, each, odd) in enumerate(OF_LARGE if subject.large else SAMPLED):
        told = _drawn(subject, asked, each, draw)
        if abs(told.worst) <= odd:
            break
    p = min(1.0, chance.normal_tail(told.worst) * len(told.off))
    says = f"{told.tokens} sampled tokens come as often as the model's own logits say (largest z {told.worst:+.1f})"
    if p >= chance.ALPHA or abs(told.worst) < FAR:
        return Check("sampling", says)
    kind = (
        f"no token beyond rank {told.rank + 1} came, and {told.beyond:.0f} were due"
        if told.beyond > 20
        else f"“{told.name}” is {told.worst:+.0f} standard deviations off"
    )
    says = f"{told.tokens} sampled tokens do not come from the distribution that was asked for: {kind}"
    z = {name: told.z(name) for name in told.off}
    return Check("sampling", says, (Finding(fault("K212"), says, told.worst, FAR, p, {"z": z}),))


@dataclass(frozen=True)
class Drawn:
    """What came of sampled tokens, against what was due.

    Args:
        tokens: how many.
        rank: the last one that came, 0 for the likeliest.
        due: [V] tokens that were due at each rank.
        off, variance: observed less expected, and the variance of that, by what was counted.
    """

    tokens: int
    rank: int
    due: Tensor
    off: dict[str, float]
    variance: dict[str, float]

    def __add__(self, other: Drawn) -> Drawn:
        off, variance = ({n: a[n] + b[n] for n in a} for a, b in ((self.off, other.off), (self.variance, other.variance)))
        return Drawn(self.tokens + other.tokens, max(self.rank, other.rank), self.due + other.due, off, variance)

    def z(self, name: str) -> float:
        return self.off[name] / max(self.variance[name], 1e-300) ** 0.5

    @property
    def name(self) -> str:
        return max(self.off, key=lambda name: abs(self.z(name)))

    @property
    def worst(self) -> float:
        return self.z(self.name)

    @property
    def beyond(self) -> float:
        """Tokens that were due beyond the last rank that came."""
        return float(self.due[self.rank + 1 :].sum())


def _drawn(subject: Subject, asked: int, each: int, draw: int) -> Drawn:
    """Of so many prompts and so many samples of each, drawn anew; or of one each, where samples repeat."""
    prompts = subject.rendered(PromptStream(subject.task.train, subject.config.seed + 1).take(asked))
    made = subject.generate(prompts, each, step=STEP + 10 * (draw + 1))
    batch = batch_of(prompts, made[::each] if subject.facts.get("repeats", False) else made)
    first, *others = (_counted(subject, part) for part in _in_parts(subject, batch))
    return sum(others, first)


def _in_parts(subject: Subject, batch: Batch) -> Iterator[Batch]:
    """Rows whose tables of logits are made at once."""
    for rows in torch.arange(len(batch)).split(len(few_rows(subject, batch))):
        yield batch.rows(rows)


@torch.no_grad()
def _counted(subject: Subject, batch: Batch) -> Drawn:
    log_probs = distribution(model_logits(subject, batch), batch, subject.sampling.temperature)[batch.mask].double()
    said = log_probs.gather(1, _tokens(batch)[batch.mask][:, None])[:, 0]
    probs = log_probs.exp()
    surprise = torch.where(probs > 0, -log_probs, 0.0)
    mean = (probs * surprise).sum(1)
    off = {"surprise": float((-said - mean).sum())}
    variance = {"surprise": float(((probs * surprise.square()).sum(1) - mean.square()).sum())}
    top, place = _ranked(probs)
    rank = (log_probs > said[:, None]).sum(1)
    for name, low, high in (("likeliest", 0, 1), ("second or third", 1, 3), ("beyond the third", 3, probs.shape[1])):
        expected = torch.where((place >= low) & (place < high), top, 0.0).sum(1).clamp(0, 1)
        off[name] = float((((rank >= low) & (rank < high)).double() - expected).sum())
        variance[name] = float((expected * (1 - expected)).sum())
    return Drawn(len(said), int(rank.max()), top.sum(0), off, variance)


def _ranked(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [n, V] from the largest down, and the rank of each; equal ones share a rank."""
    top = probs.sort(1, descending=True).values
    lower = torch.nn.functional.pad(top[:, 1:] < top[:, :-1], (1, 0))
    return top, torch.where(lower, torch.arange(top.shape[1]), 0).cummax(1).values


def unique(subject: Subject) -> Check:
    """Equal completions of one prompt, in one step and in the next, against how often they must be equal by chance."""
    subject.awake()
    prompts = subject.rendered(PromptStream(subject.task.train, subject.config.seed).take(4 if subject.large else 16))
    made, later = (subject.generate(prompts, 8, step=STEP + offset) for offset in (2, 4))
    same = sum(torch.equal(a.token_ids, b.token_ids) for a, b in zip(made, later, strict=True))
    due = sum(map(_chance_of, made))
    if chance.more_than_expected(*_repeats(made)[:2]) < ALSO and not subject.large:
        prompts = subject.rendered(PromptStream(subject.task.train, subject.config.seed + 2).take(64))
        made = subject.generate(prompts, 8, step=STEP + 5)
    again, expected, distinct = _repeats(made)
    p, p_later = chance.more_than_expected(again, expected), chance.more_than_expected(same, due)
    says = (
        f"{distinct} of {len(made)} completions are different; {again} repeat another of their prompt, and {expected:.0f} were due"
    )
    subject.facts["repeats"] = p < chance.ALPHA
    if p < chance.ALPHA:
        return Check("unique", says, (Finding(fault("K215"), says, float(again), expected, p),))
    if p_later < chance.ALPHA:
        says = f"{same} of {len(later)} completions are the same again in the next step, and {due:.0f} were due"
        return Check("unique", says, (Finding(fault("K215"), says, float(same), due, p_later),))
    return Check("unique", says)


def _repeats(made: Sequence[Completion]) -> tuple[int, float, int]:
    """Completions that repeat an earlier one of their eight, how many were due by chance, and how many are different."""
    again, expected, distinct = 0, 0.0, 0
    for i in range(0, len(made), 8):
        seen: dict[tuple[int, ...], float] = {}
        for c in made[i : i + 8]:
            key = tuple(c.token_ids.tolist())
            again += key in seen
            expected += min(1.0, sum(seen.values()))
            seen[key] = _chance_of(c)
        distinct += len(seen)
    return again, expected, distinct


def _chance_of(c: Completion) -> float:
    return min(1.0, float(c.logp_rollout.double().sum().exp()))


def _tokens(batch: Batch) -> Tensor:
    column = batch.prompt_len[:, None] + torch.arange(batch.mask.shape[1])
    return batch.tokens.gather(1, column.clamp(max=batch.tokens.shape[1] - 1))
