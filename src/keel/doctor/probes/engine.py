"""The engine against the trainer: how far apart they are, from which distribution it draws, whether weights arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from keel.doctor import chance
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.forward import alone, distribution, few_rows, model_logits, unsteady
from keel.doctor.subject import STEP, Subject
from keel.gap.floor import noise_floor
from keel.gap.measure import measure
from keel.gap.routing import routed
from keel.gap.temperature import fit_temperature
from keel.training.batch import micro_batches
from keel.training.buffer import PromptStream
from keel.training.step import look
from keel.types import Batch, Completion, Group, Prompt, Score

SAMPLED = (16, 1.5), (64, 2.5), (192, 0.0)  # prompts, and the standard deviations beyond which more are asked
ALSO = 0.05  # chance of so many repeats, below which new and more samples decide
FAR = 5.0  # standard deviations at which there is an alarm
SYNCS = 3  # in a row
SLACK = 10  # times the noise floor that the trainer has against itself
ROUTED = 0.02  # share of tokens of a mixture whose router may stand at a tie


def gap(subject: Subject) -> Check:
    """Engine against trainer on the weights that both should have, and what explains the difference."""
    if (skip := unsteady(subject, "gap")) is not None:
        return skip
    subject.awake()
    prompts = subject.rendered(PromptStream(subject.task.train, subject.config.seed).take(8))
    batch = batch_of(prompts, subject.generate(prompts, 8))
    cuts = micro_batches(batch, subject.config.train.micro_batch_tokens)
    seen = look(subject.policy, batch, cuts, subject.sampling.temperature)
    floor = noise_floor(subject.policy, batch, seen.logp, subject.sampling.temperature)
    if "floor" not in subject.facts:
        alone(subject)
    rounding = max(floor.max_abs_nats, subject.facts.get("floor", 1e-5))
    far, bound = largest_gap(subject, seen.logp, batch), SLACK * rounding
    subject.facts |= {"gap": far, "gap bound": bound}
    says = f"engine and trainer differ by up to {far:.1e} nats; the trainer against itself by {rounding:.1e}"
    if far <= bound:
        return Check("gap", says)
    code, why = _explained(subject, batch, seen, cuts, bound)
    told = measure(seen.logp, batch.logp_rollout, batch.mask, seen.entropy, batch.group)
    evidence = {
        "mean_nats": told.gap.mean,
        "weight_mean": told.weight.mean,
        "k3_nats": told.k3_nats,
        "floor_nats": rounding,
    }
    return Check("gap", f"{says}: {why}", (Finding(fault(code), f"{says}: {why}", far, bound, evidence=evidence),))


def largest_gap(subject: Subject, logp: Float[Tensor, "B T"], batch: Batch) -> float:
    """The largest |gap|; of a mixture, leaving out the share of tokens whose router may stand at a tie."""
    d = (logp - batch.logp_rollout)[batch.mask].abs().double()
    return float(d.max() if subject.policy.routing is None else d.quantile(1 - ROUTED))


def _explained(subject: Subject, batch: Batch, seen, cuts: list[Tensor], bound: float) -> tuple[str, str]:
    """The first explanation after which the gap is gone, as (code, words)."""
    mask, logp = batch.mask, seen.logp
    for by in (1, -1):
        moved = batch.logp_rollout.roll(by, 1)
        inner = mask & mask.roll(1, 1) & mask.roll(-1, 1)
        inner[:, 0] = False
        if inner.any() and float((logp - moved)[inner].abs().max()) <= bound:
            return "K248", f"the engine's log-probabilities stand {'after' if by < 0 else 'before'} their tokens"
    last = mask & (torch.arange(mask.shape[1]) == batch.completion_len[:, None] - 1)
    if (mask & ~last).any() and float((logp - batch.logp_rollout)[mask & ~last].abs().max()) <= bound:
        return "K249", "the last tokens of completions have another log-probability, and no other token has"
    if _of_other_prompts(subject, batch, logp, bound):
        return "K151", "completions stand under other prompts than those that they answer"
    temperature = subject.sampling.temperature
    fit = fit_temperature(lambda f: look(subject.policy, batch, cuts, temperature * f).logp, batch.logp_rollout, mask)
    if fit.misreported:
        subject.facts["fit"] = fit
        at, drawn = temperature * fit.squared, fit.misdrawn
        if drawn:
            return "K212", f"it samples at temperature {at:.3g}, and {temperature:g} was asked for"
        return "K210", f"its log-probabilities are those at temperature {at:.3g}, and {temperature:g} was asked for"
    d = (logp - batch.logp_rollout)[mask]
    if float(d.max()) <= bound:
        mass = float(d.exp().mean())
        return "K211", f"it gives every sampled token more than the trainer does, {1 / mass:.3g} times on average: it cuts off"
    if (told := routed(subject.policy, batch, seen, cuts, temperature)) is not None and told.layers_differ_frac > 0:
        return "K246", f"it sends {told.tokens_differ_frac:.1%} of the tokens to other experts"
    return "K247", f"of either sign, {float((d > 0).double().mean()):.0%} of them up: it computes in other arithmetic"


def _of_other_prompts(subject: Subject, batch: Batch, logp: Float[Tensor, "B T"], bound: float) -> bool:
    """Whether every completion with a gap fits, to within the bound, under another of these prompts."""
    far = ((logp - batch.logp_rollout).abs() > bound) & batch.mask
    rows = far.any(1).nonzero()[:, 0][:2]
    found = 0
    for row in rows.tolist():
        length, tokens = int(batch.prompt_len[row]), int(batch.completion_len[row])
        said = batch.tokens[row, length : length + tokens]
        others = [
            batch.rows(torch.tensor([int((batch.group == g).nonzero()[0, 0])]))
            for g in batch.group.unique()
            if g != batch.group[row]
        ]
        for other in others:
            asked = other.tokens[0, : int(other.prompt_len)]
            joined = torch.cat((asked, said))[None]
            whole = replace(
                batch.rows(torch.tensor([row])), tokens=joined, prompt_len=other.prompt_len, kept=None, experts_rollout=None
            )
            there = look(subject.policy, whole, [torch.arange(1)], subject.sampling.temperature).logp
            if float((there - batch.logp_rollout[row])[0, :tokens].abs().max()) <= bound:
                found += 1
                break
    return 0 < len(rows) == found


def sampling(subject: Subject) -> Check:
    """Whether tokens come as often as their log-probabilities say: by surprise, and by rank, against the model's own logits.

    Given what came before, a token's surprise less its expectation has mean 0, and so has "it was the likeliest" less that chance:
    sums of them over their standard deviation are about standard normal. Where that looks odd, new and more samples decide. Of
    prompts whose samples repeat each other one sample counts.
    """
    subject.awake()
    for draw, (asked, odd) in enumerate(SAMPLED):
        told = _surprises(subject, asked, draw, subject.facts.get("repeats", False))
        if abs(told.worst) <= odd or subject.large:
            break
    p = min(1.0, chance.normal_tail(told.worst) * len(told.z))
    says = f"{told.tokens} sampled tokens come as often as the model's own logits say (largest z {told.worst:+.1f})"
    if p >= chance.ALPHA or abs(told.worst) < FAR:
        return Check("sampling", says)
    kind = (
        f"no token beyond rank {told.rank} came, and {told.beyond:.0f} were due"
        if told.beyond > 20
        else f"“{told.name}” is {told.worst:+.0f} standard deviations off"
    )
    says = f"{told.tokens} sampled tokens do not come from the distribution that was asked for: {kind}"
    return Check("sampling", says, (Finding(fault("K212"), says, told.worst, FAR, p, {"z": told.z}),))


@dataclass(frozen=True)
class Surprises:
    """Of sampled tokens.

    Args:
        tokens: how many.
        z: standard deviations off, by what was counted.
        rank: the last one that came.
        beyond: tokens that were due beyond that rank.
    """

    tokens: int
    z: dict[str, float]
    rank: int
    beyond: float

    @property
    def name(self) -> str:
        return max(self.z, key=lambda name: abs(self.z[name]))

    @property
    def worst(self) -> float:
        return self.z[self.name]


def _surprises(subject: Subject, asked: int, draw: int, one_each: bool) -> Surprises:
    """Of 16 completions each of so many prompts, drawn anew; or of one each."""
    prompts = subject.rendered(PromptStream(subject.task.train, subject.config.seed + 1).take(asked))
    made = subject.generate(prompts, 16, step=STEP + 10 * draw)
    batch = batch_of(prompts, made[::16] if one_each else made)
    parts = [_counted(subject, part) for part in _in_parts(subject, batch)]
    tokens, rank = sum(p.tokens for p in parts), max(p.rank for p in parts)
    z = {name: sum(p.off[name] for p in parts) / max(sum(p.variance[name] for p in parts), 1e-300) ** 0.5 for name in parts[0].off}
    return Surprises(tokens, z, rank + 1, sum(float(p.due[rank + 1 :].sum()) for p in parts))


@dataclass(frozen=True)
class _Counted:
    tokens: int
    rank: int
    due: Tensor
    off: dict[str, float]
    variance: dict[str, float]


def _in_parts(subject: Subject, batch: Batch) -> Iterator[Batch]:
    """Rows whose tables of logits are made at once; of a large model only the first of them."""
    size = len(few_rows(subject, batch))
    for rows in torch.arange(len(batch)).split(size)[: 1 if subject.large else None]:
        yield batch.rows(rows)


def _counted(subject: Subject, batch: Batch) -> _Counted:
    """Observed less expected, and its variance, by surprise and by rank."""
    with torch.no_grad():
        logits = model_logits(subject, batch)
    log_probs = distribution(logits, batch, subject.sampling.temperature)[batch.mask].double()
    said = log_probs.gather(1, _tokens(batch)[batch.mask][:, None])[:, 0]
    probs = log_probs.exp()
    surprise = torch.where(probs > 0, -log_probs, 0.0)
    mean = (probs * surprise).sum(1)
    off = {"surprise": float((-said - mean).sum())}
    variance = {"surprise": float(((probs * surprise.square()).sum(1) - mean.square()).sum())}
    rank = (log_probs > said[:, None]).sum(1)
    top = probs.sort(1, descending=True).values
    place = torch.arange(top.shape[1]).expand(top.shape)
    fewer = torch.nn.functional.pad(top[:, 1:] < top[:, :-1], (1, 0))
    place = torch.where(fewer, place, 0).cummax(1).values  # equal ones share a rank
    for name, low, high in (("likeliest", 0, 1), ("second or third", 1, 3), ("beyond the third", 3, probs.shape[1])):
        expected = torch.where((place >= low) & (place < high), top, 0.0).sum(1).clamp(0, 1)
        off[name] = float((((rank >= low) & (rank < high)).double() - expected).sum())
        variance[name] = float((expected * (1 - expected)).sum())
    return _Counted(len(said), int(rank.max()), top.sum(0), off, variance)


def unique(subject: Subject) -> Check:
    """Equal completions of one prompt, in one step and in the next, against how often they must be equal by chance."""
    subject.awake()
    prompts = subject.rendered(PromptStream(subject.task.train, subject.config.seed).take(16))
    made, later = (subject.generate(prompts, 8, step=STEP + offset) for offset in (2, 4))
    same = sum(torch.equal(a.token_ids, b.token_ids) for a, b in zip(made, later, strict=True))
    due = sum(map(_chance_of, made))
    if chance.more_than_expected(*_repeats(made)[:2]) < ALSO:
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


def sync(subject: Subject) -> Check:
    """New weights three times, sent the way that training sends them: which arrive, and is anything kept of the old ones?"""
    if (skip := unsteady(subject, "sync")) is not None:
        return skip
    if "gap" not in subject.facts:
        gap(subject)
    before = subject.facts["gap"]
    bound = max(subject.facts["gap bound"], 3 * before)
    prompts = subject.rendered(subject.task.train[: 4 * (SYNCS + 1)])
    known, *fresh = (prompts[i : i + 4] for i in range(0, len(prompts), 4))
    names = list(subject.trainer.parameters)
    with subject.kept():
        subject.awake()
        subject.generate(known, 4)  # whatever is kept of these is kept from the old weights
        after = []
        for number in range(SYNCS):
            _moved(subject, names, number)
            after.append(_gap_after(subject, fresh[number] if number < len(fresh) else known))
        stale = _gap_after(subject, known)
        behind = subject.trainer.step - subject.parts.engine.version
    says = f"after new weights were sent, engine and trainer differ by up to {max(*after, stale):.1e} nats, before by {before:.1e}"
    findings: list[Finding] = []
    if behind or subject.config.engine.sync_every > 1:
        findings.append(_of_late(subject, behind))
    elif max(after) > bound:
        findings.append(_of_sync(subject, names, after, bound, says))
    elif stale > bound:
        says = f"{says}: only on prompts that it had answered under older weights, so it keeps something of them"
        findings.append(Finding(fault("K213"), says, stale, bound))
    subject.awake()
    return Check("sync", findings[0].says if findings else says, tuple(findings))


def _of_sync(subject: Subject, names: list[str], after: list[float], bound: float, says: str) -> Finding:
    late = sum(gap > bound for gap in after)
    if late < len(after):
        return Finding(fault("K214"), f"{says}: {late} of {len(after)} times they did not arrive", max(after), bound)
    missing = _missing(subject, names, bound)
    what = "nothing of them arrived" if missing is None else f"tensor {missing[0]!r} did not arrive"
    return Finding(fault("K214"), f"{says}: {what}", max(after), bound, evidence={"tensors": missing or names[:20]})


def _of_late(subject: Subject, behind: int) -> Finding:
    every = subject.config.engine.sync_every
    why = f"engine.sync_every is {every}" if every > 1 else f"the engine says that it is {behind} versions behind what was sent"
    says = f"{why}, so it samples from old weights while training takes them for its own"
    return Finding(fault("K214"), says, float(max(behind, every - 1)), 0.0, evidence={"sync_every": every})


def _missing(subject: Subject, names: list[str], bound: float) -> list[str] | None:
    """The tensor that does not arrive, by halving; None where both halves miss some."""
    while len(names) > 1:
        half = names[: len(names) // 2], names[len(names) // 2 :]
        bad = []
        for part in half:
            with subject.kept():
                _moved(subject, part)
                bad.append(_gap_after(subject, subject.rendered(subject.task.train[8:12])) > bound)
        if bad[0] == bad[1]:
            return None if all(bad) else names
        names = half[0] if bad[0] else half[1]
    return names


@torch.no_grad()
def _moved(subject: Subject, names: list[str], time: int = 0) -> None:
    """Move these tensors by a twentieth of their spread, each with a noise of its own, as another step of training might."""
    subject.fresh = False
    for i, name in enumerate(names):
        p = subject.trainer.parameters[name]
        scale = 0.05 * float(p.std()) if p.numel() > 1 and float(p.std()) > 0 else 0.05
        p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i + 1000 * time)).to(p))


def _gap_after(subject: Subject, prompts: list[Prompt]) -> float:
    """The largest gap of completions of these prompts, after the weights were sent as training sends them."""
    subject.trainer.step += 1
    subject.fresh = False
    subject.awake()
    batch = batch_of(prompts, subject.generate(prompts, 4))
    return largest_gap(subject, subject.look(batch), batch)


def batch_of(prompts: list[Prompt], made: list[Completion]) -> Batch:
    """Completions as a batch, every row of which is trained."""
    from keel.training.batch import batch_from_groups

    size = len(made) // len(prompts)
    groups = [Group(prompt, tuple(made[i * size : (i + 1) * size]), (Score(0.0),) * size) for i, prompt in enumerate(prompts)]
    return batch_from_groups(groups)


def _tokens(batch: Batch) -> Tensor:
    column = batch.prompt_len[:, None] + torch.arange(batch.mask.shape[1])
    return batch.tokens.gather(1, column.clamp(max=batch.tokens.shape[1] - 1))
