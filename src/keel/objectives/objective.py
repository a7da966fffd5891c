"""Objective: one choice from each file of this folder. This is "the loss".

::

    reward ──shaping──► Scored ──advantage──► Prepared          once per rollout batch   (`prepare`)
                                    Prepared ──► StepCounts     once per optimizer step  (`counts`)
    logp ──► TokenView ──surrogate × corrections + KL − entropy──► loss per token        (`per_token`)
                                    loss per token ──aggregate──► share of the loss      (`loss`)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.errors import KeelError
from keel.objectives import aggregate as aggregates
from keel.objectives import log_ratios
from keel.objectives.advantages import Advantage, leave_one_out
from keel.objectives.aggregate import Aggregate
from keel.objectives.corrections import Correction, accepted, weight
from keel.objectives.kl import LossKL, RewardKL
from keel.objectives.log_ratios import LogRatio, own_gradient
from keel.objectives.shaping import Shaping
from keel.objectives.signals import Prepared, Scored, TokenView, keep
from keel.objectives.surrogates import Reinforce, Surrogate
from keel.types import Batch, StepCounts

__all__ = ["Objective", "Prepared"]


@dataclass(frozen=True)
class Objective:
    """What is minimised, as a composition. The defaults are the solid baseline: nothing but the policy gradient.

    Args:
        advantage: returns → advantages.
        log_ratio: over what the surrogate's importance ratio is taken.
        surrogate: advantage and ratio → loss per token.
        corrections: what to do about the engine gap; their weights multiply.
        reward_kl, loss_kl: KL to the reference, in the reward, in the loss, in both or in neither.
        aggregate: loss per token → scalar.
        shaping: what happens to rewards and masks first, in this order.
        entropy_coef: reward per nat of entropy of each token's distribution.
    """

    advantage: Advantage = leave_one_out
    log_ratio: LogRatio = log_ratios.token
    surrogate: Surrogate = Reinforce()
    corrections: tuple[Correction, ...] = ()
    reward_kl: RewardKL | None = None
    loss_kl: LossKL | None = None
    aggregate: Aggregate = aggregates.constant_length_mean
    shaping: tuple[Shaping, ...] = ()
    entropy_coef: float = 0.0

    def __post_init__(self):
        _refuse_impossible(self)

    @property
    def needs(self) -> frozenset[str]:
        """What must be computed besides `logp`: "logp_old" and "logp_ref" before the first update, "entropy" in it."""
        leaving = any(correction.leaves for correction in self.corrections)
        wanted = {
            "logp_old": leaving or self.reward_kl is not None,
            "logp_ref": self.reward_kl is not None or self.loss_kl is not None,
            "entropy": self.entropy_coef != 0,
        }
        return frozenset(name for name, want in wanted.items() if want)

    @torch.no_grad()
    def prepare(self, batch: Batch, max_tokens: int) -> Prepared:
        """Advantages and the mask of trained tokens, of one whole rollout batch.

        Args:
            batch: all of it, over all ranks, since baselines and scales are taken over it.
            max_tokens: the length cap.

        Raises:
            KeelError: the batch lacks log-probabilities that this objective needs before the first update.
        """
        self._refuse_missing(batch)
        scored = Scored(
            reward=keep(batch.reward, batch.scorable),
            group=batch.group,
            counted=batch.scorable,
            mask=batch.mask & batch.scorable[:, None],
        )
        for shape in self.shaping:
            scored = shape(scored, batch, max_tokens)
        scored = replace(scored, mask=self._accepted(batch, scored))
        return Prepared(self._advantage(batch, scored), scored.mask, batch.group)

    def counts(self, batch: Batch, prepared: Prepared, max_tokens: int) -> StepCounts:
        """The denominators of the optimizer step that these rows make up."""
        return aggregates.count(prepared, max_tokens)

    def per_token(
        self, logp: Float[Tensor, "B T"], entropy: Float[Tensor, "B T"], batch: Batch, prepared: Prepared
    ) -> Float[Tensor, "B T"]:
        """Loss of each token before aggregation, zero where masked; differentiable in `logp` and `entropy`.

        Without `batch.logp_old` the update is on-policy, and logp_old is `logp` without gradient.
        """
        view = self.view(logp, entropy, batch, prepared)
        loss = self.surrogate(view) * weight(self.corrections, view)
        if self.loss_kl is not None:
            loss = loss + self.loss_kl(view)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * view.entropy
        return keep(loss, view.mask)

    def loss(
        self,
        logp: Float[Tensor, "B T"],
        entropy: Float[Tensor, "B T"],
        batch: Batch,
        prepared: Prepared,
        counts: StepCounts,
    ) -> Float[Tensor, ""]:
        """This micro-batch's share of the step's loss; the shares of all micro-batches and ranks sum to it."""
        return self.aggregate(self.per_token(logp, entropy, batch, prepared), prepared, counts)

    def clipped(self, logp: Float[Tensor, "B T"], batch: Batch, prepared: Prepared) -> Bool[Tensor, "B T"]:
        """Trained tokens at which the surrogate's clip, cap or gate binds."""
        view = self.view(logp.detach(), torch.zeros_like(logp), batch, prepared)
        return view.mask & self.surrogate.bound(view)

    def view(self, logp: Float[Tensor, "B T"], entropy: Float[Tensor, "B T"], batch: Batch, prepared: Prepared) -> TokenView:
        """What the loss terms see: all of it zero where masked, each difference of log-probabilities named once."""
        mask = prepared.mask
        logp = keep(logp, mask)
        old = logp.detach() if batch.logp_old is None else keep(batch.logp_old.detach(), mask)
        log_ratio = logp.detach() - old
        importance = own_gradient(self.log_ratio(log_ratio, mask), logp)
        return TokenView(
            logp=logp,
            log_ratio=log_ratio,
            importance=keep(importance, mask & (prepared.advantage != 0)),
            gap=old - keep(batch.logp_rollout.detach(), mask),
            ref_log_ratio=None if batch.logp_ref is None else logp - keep(batch.logp_ref.detach(), mask),
            entropy=keep(entropy, mask),
            advantage=keep(prepared.advantage, mask),
            mask=mask,
        )

    def _advantage(self, batch: Batch, scored: Scored) -> Float[Tensor, "B T"]:
        returns = scored.reward[:, None].expand(scored.mask.shape)
        if self.reward_kl is None:
            return self.advantage(returns, scored)
        d = keep(batch.logp_old, scored.mask) - keep(batch.logp_ref, scored.mask)
        penalty, whole = self.reward_kl.penalty(d, scored.mask)
        if self.reward_kl.after_normalising:
            return keep(self.advantage(returns, scored) - penalty, scored.mask)
        return self.advantage(returns - penalty, replace(scored, reward=scored.reward - whole))

    def _accepted(self, batch: Batch, scored: Scored) -> Bool[Tensor, "B T"]:
        if not any(correction.leaves for correction in self.corrections):
            return scored.mask
        prepared = Prepared(torch.ones_like(batch.logp_old), scored.mask, batch.group)
        return accepted(self.corrections, self.view(batch.logp_old, torch.zeros_like(batch.logp_old), batch, prepared))

    def _refuse_missing(self, batch: Batch) -> None:
        missing = sorted(name for name in self.needs - {"entropy"} if getattr(batch, name) is None)
        if missing:
            raise KeelError(
                f"This objective needs {' and '.join(missing)} before the first update, and the batch has none. "
                f"Expected what `objective.needs` names ({', '.join(sorted(self.needs))}): compute it with a forward "
                "pass before `prepare`."
            )


def _refuse_impossible(objective: Objective) -> None:
    """Combinations that contradict themselves; unwise ones are allowed, for they are what the bench compares."""
    surrogate, weighing = objective.surrogate, [c for c in objective.corrections if c.weighs]
    name = type(surrogate).__name__
    other_ratio = objective.log_ratio is not log_ratios.token
    if other_ratio and (not surrogate.reads_ratio or surrogate.token_only):
        raise KeelError(
            f"{name} with log_ratio={objective.log_ratio.__name__}: {name} works on single tokens, so that choice "
            "would be ignored or mixed up. Expected log_ratio=token, or a surrogate such as Clip that takes any ratio."
        )
    if surrogate.weighs_gap and weighing:
        raise KeelError(
            f"{name} with {type(weighing[0]).__name__}: both weigh by the engine gap, which would count it twice. "
            "Expected one of them; corrections that only accept and reject (RejectGeometric, Veto, OffPolicyMask) go "
            f"with {name}."
        )
    if len(weighing) > 1:
        names = " and ".join(type(c).__name__ for c in weighing)
        raise KeelError(f"{names} together count the engine gap twice. Expected at most one weighing correction; drop one of them.")
    if not abs(objective.entropy_coef) < float("inf"):
        raise KeelError(f"entropy_coef is {objective.entropy_coef}. Expected a finite number; 0 switches the entropy bonus off.")
