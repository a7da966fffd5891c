"""Controls: a bandit whose gradient is known, rewards that are turned round, and rewards by the toss of a coin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from keel.doctor import chance
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.forward import distribution, model_logits, unsteady
from keel.doctor.probes.objective import beside
from keel.doctor.subject import Subject, some_differ
from keel.objectives.kl import k1
from keel.training import loop
from keel.types import Batch, Completion, Group, Prompt, Score

COINS, FLIPS = 12, 200_000
NUMBERS = 2e6  # of a gradient that are kept


def bandit(subject: Subject) -> Check:
    """One prompt, two completions of one token, one of them right: whatever the recipe, the gradient is that of log π(wrong) −
    log π(right). By hand it is taken from the model's own logits.
    """
    if (skip := _not_plain(subject, "bandit")) is not None:
        return skip
    prompt = subject.rendered(subject.task.train[:1])[0]
    batch = loop._with_log_probabilities(subject.trainer, loop.batch_from_groups([_two_tokens(subject, prompt)]))
    step = subject.gradient(batch)
    log_probs = distribution(model_logits(subject, batch), batch, subject.sampling.temperature)[:, 0]
    token = batch.tokens[:, int(batch.prompt_len[0])]
    step, by_hand = beside(subject, step, log_probs[1, token[1]] - log_probs[0, token[0]])
    if not float(step.norm()) > 0:
        off, says = 1.0, "a bandit of two tokens, one of them right, has no gradient"
    else:
        off = 1.0 - float(step @ by_hand / (step.norm() * by_hand.norm()))
        says = f"the gradient of a bandit of two tokens is off its known direction by {off:.1e} (1 − cosine)"
    floor = max(subject.facts.get("floor", 0.0), 1e-5)
    if off <= floor:
        return Check("bandit", says)
    return Check("bandit", says, (Finding(fault("K125"), says, off, floor),))


def _two_tokens(subject: Subject, prompt: Prompt) -> Group:
    """The likeliest token, which is right, and the next, which is not."""
    blank = _one_token(prompt, 0, 0, 0.0, subject)
    look = loop.batch_from_groups([Group(prompt, (blank,), (Score(0.0),))])
    log_probs = distribution(model_logits(subject, look).detach(), look, subject.sampling.temperature)[0, 0]
    best = log_probs.topk(2)
    made = tuple(_one_token(prompt, i, int(best.indices[i]), float(best.values[i]), subject) for i in range(2))
    return Group(prompt, made, (Score(1.0, True), Score(0.0)))


def _one_token(prompt: Prompt, sample: int, token: int, logp: float, subject: Subject) -> Completion:
    vocabulary = subject.policy.base.get_output_embeddings().weight.shape[0]
    one = torch.ones(1, dtype=torch.bool)
    return Completion(
        prompt_id=prompt.id, sample=sample, token_ids=torch.tensor([token]), logp_rollout=torch.tensor([logp]),
        finish="length", text="", versions=torch.zeros(1, dtype=torch.long), sampled=one,
        kept=one[:, None].expand(1, vocabulary) if subject.sampling.truncated else None,
    )  # fmt: skip


def reversed_rewards(subject: Subject) -> Check:
    """Right for wrong and wrong for right: the gradient must point the other way."""
    if (skip := _not_plain(subject, "reversed")) is not None:
        return skip
    batch = _at_rest(subject)
    if not some_differ(batch):
        return Check("reversed", "", skipped="in no group there are two different completions, so no reward can tell them apart")
    other = replace(batch, reward=1.0 - batch.reward, correct=batch.scorable & ~batch.correct)
    there, back = subject.gradient(batch).flat, subject.gradient(other).flat
    size = float(there.norm() * back.norm())
    cosine = float(there @ back) / size if size > 0 else 1.0
    says = f"with rewards turned round the gradient has cosine {cosine:.2f} with what it was"
    if cosine < 0:
        return Check("reversed", says)
    return Check("reversed", says, (Finding(fault("K125"), says, cosine, 0.0),))


def coins(subject: Subject) -> Check:
    """Rewards by the toss of a coin, on one batch, a dozen times: no direction in common.

    Turning a coin's verdicts round turns its gradient round, so without a fault every choice of signs is as likely: the length of
    the sum is compared with those under random signs. So for any part of the numbers, which is what is kept of a large model's.
    """
    if (skip := _not_plain(subject, "coins")) is not None:
        return skip
    batch, generator = _at_rest(subject), torch.Generator().manual_seed(subject.config.seed)
    if not some_differ(batch):
        return Check("coins", "", skipped="in no group there are two different completions, so no reward can tell them apart")
    found = []
    for _ in range(COINS):
        right = torch.rand(len(batch), generator=generator) < 0.5
        worth = torch.where(batch.scorable, right.float(), torch.nan)
        flat = subject.gradient(replace(batch, reward=worth, correct=right & batch.scorable)).flat
        found.append(flat[:: 1 + int(len(flat) / NUMBERS)].clone())
    table = torch.stack([g / g.norm().clamp(min=1e-300) for g in found])
    p = sign_flips((table @ table.T).numpy(), subject.config.seed)
    length = float(table.sum(0).norm()) / COINS**0.5
    says = f"{COINS} gradients of rewards by chance add up to {length:.2f} of what chance would make (p {p:.2g})"
    if p >= chance.ALPHA:
        return Check("coins", says)
    return Check("coins", says, (Finding(fault("K125"), says, length, 1.0, p),))


def sign_flips(gram: np.ndarray, seed: int) -> float:
    """Share of sign choices under which the sum of vectors is at least as long as it is."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(FLIPS, len(gram)))
    lengths = ((signs @ gram) * signs).sum(1)
    return float((1 + (lengths >= gram.sum() - 1e-9).sum()) / (1 + FLIPS))


def _at_rest(subject: Subject) -> Batch:
    """The batch where the policy, the one that sampled and the reference are one."""
    batch, seen = subject.batch, subject.seen
    return replace(batch, logp_old=None if batch.logp_old is None else seen, logp_ref=None if batch.logp_ref is None else seen)


def _not_plain(subject: Subject, name: str) -> Check | None:
    """What stands in the way: an earlier finding, or a term of the objective that does not look at rewards."""
    objective = subject.trainer.objective
    if objective.entropy_coef or (objective.loss_kl is not None and objective.loss_kl.estimator is k1) or objective.shaping:
        return Check(name, "", skipped="the recipe has no update that depends on the rewards alone")
    if subject.trainer.step and objective.loss_kl is not None:
        return Check(
            name, "", skipped="the recipe has no update that depends on the rewards alone, once it has moved from its reference"
        )
    return unsteady(subject, name) or subject.blocked(name, "advantage", "gradient")
