"""The engine against the trainer on the same weights: how far apart they are, and why."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.forward import alone, distribution, few_rows, model_logits, unsteady
from keel.doctor.subject import Subject
from keel.gap.floor import noise_floor
from keel.gap.measure import measure
from keel.gap.routing import routed
from keel.gap.temperature import fit_temperature
from keel.training.batch import micro_batches
from keel.training.buffer import PromptStream
from keel.training.step import look
from keel.types import Batch, Completion, Group, Prompt, Score

SLACK = 10  # times the noise floor that the trainer has against itself
ROUTED = 0.02  # share of tokens of a mixture whose router may stand at a tie


def gap(subject: Subject) -> Check:
    """Engine against trainer on the weights that both should have, and what explains the difference."""
    if (skip := unsteady(subject, "gap")) is not None:
        return skip
    subject.awake()
    number = 4 if subject.large else 8
    prompts = subject.rendered(PromptStream(subject.task.train, subject.config.seed).take(number))
    batch = batch_of(prompts, subject.generate(prompts, number))
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
    if (where := _one_place(batch, logp, bound)) is not None:
        return "K249", f"only the {where} tokens of completions have another log-probability"
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
        more = f"it gives every sampled token more than the trainer does, {1 / float(d.exp().mean()):.3g} times on average"
        if _cuts_off(subject, batch, bound):
            return "K211", f"{more}: it cuts off"
        return "K249", f"{more}, and not by what is left when a tail is cut off: it tells other tokens' log-probabilities, or none"
    if (told := routed(subject.policy, batch, seen, cuts, temperature)) is not None and told.layers_differ_frac > 0:
        return "K246", f"it sends {told.tokens_differ_frac:.1%} of the tokens to other experts"
    return "K247", f"of either sign, {float((d > 0).double().mean()):.0%} of them up: it computes in other arithmetic"


def _one_place(batch: Batch, logp: Float[Tensor, "B T"], bound: float) -> str | None:
    """The one place in completions at which there is a gap, in a word; None where there are several."""
    column, last = torch.arange(batch.mask.shape[1]), batch.completion_len[:, None] - 1
    for name, place in (("first", (column == 0).expand(batch.mask.shape)), ("last", column == last)):
        rest = batch.mask & ~place
        if rest.any() and float((logp - batch.logp_rollout)[rest].abs().max()) <= bound:
            return name
    return None


@torch.no_grad()
def _cuts_off(subject: Subject, batch: Batch, bound: float) -> bool:
    """Whether what the engine gives a token more is what is left of a distribution whose tail was cut off: then 1 over it is a sum
    of the largest probabilities, the token's own among them.
    """
    part = few_rows(subject, batch)
    log_probs = distribution(model_logits(subject, part), part, subject.sampling.temperature)[part.mask].double()
    column = (part.prompt_len[:, None] + torch.arange(part.mask.shape[1])).clamp(max=part.tokens.shape[1] - 1)
    own = log_probs.gather(1, part.tokens.gather(1, column)[part.mask][:, None])
    left = own - part.logp_rollout[part.mask][:, None].double()
    cut = left[:, 0] < -bound
    if not cut.any():
        return True
    sums = log_probs.sort(1, descending=True).values.exp().cumsum(1)
    holds = sums >= own.exp() - 1e-9  # from the token's own rank on
    near = ((sums - left.exp()).abs() < 1e-4) & holds
    return float(near.any(1)[cut].double().mean()) > 0.95


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


def batch_of(prompts: list[Prompt], made: list[Completion]) -> Batch:
    """Completions as a batch, every row of which is trained."""
    from keel.training.batch import batch_from_groups

    size = len(made) // len(prompts)
    groups = [Group(prompt, tuple(made[i * size : (i + 1) * size]), (Score(0.0),) * size) for i, prompt in enumerate(prompts)]
    return batch_from_groups(groups)
