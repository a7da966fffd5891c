"""OpenRLHF's own losses: `compute_advantages_and_returns`, `PolicyLoss`, `compute_approx_kl`, run from the installed source files.

The sum of policy loss, KL and entropy is put together here as in its `training_step`, which cannot run without DeepSpeed.
Rewards and KL go through float32 in its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from keel.audit.peers.defaults import OPENRLHF, OPENRLHF_VERSION
from keel.audit.peers.loss import PeerLoss, PeerPrepared, Rows
from keel.audit.peers.source import run_source
from keel.errors import KeelError, nearest


@cache
def modules() -> SimpleNamespace:
    """OpenRLHF's modules, each run once: utils, loss, maker (of experience)."""
    utils = run_source("openrlhf", "models/utils.py")
    names = {name: getattr(utils, name) for name in ("masked_mean", "compute_approx_kl", "compute_reward")}
    silent = {"init_logger": lambda _: SimpleNamespace(info=lambda *_: None, warning=lambda *_: None)}
    penalties = run_source("openrlhf", "trainer/ppo_utils/length_penalty.py", silent)
    given = {**names, **silent, "apply_length_penalties": penalties.apply_length_penalties}
    return SimpleNamespace(
        utils=utils,
        loss=run_source("openrlhf", "models/loss.py", names),
        maker=run_source("openrlhf", "trainer/ppo_utils/experience_maker.py", given).RemoteExperienceMaker,
    )


@dataclass(frozen=True)
class OpenRlhfLoss(PeerLoss):
    """OpenRLHF's loss under a configuration of dotted names (those of its arguments), of which only differences are given."""

    peer: ClassVar[str] = "openrlhf"
    written_for: ClassVar[str] = OPENRLHF_VERSION

    def __post_init__(self):
        for name in self.configuration:
            if name not in OPENRLHF:
                hint = nearest(name, OPENRLHF)
                raise KeelError(f"OpenRLHF has no {name!r} that touches the loss; {hint}Expected a dotted name of its own.")

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        return {**OPENRLHF, **self.configuration}

    def advantages(self, rows: Rows, max_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        order = rows.group.argsort(stable=True)
        sizes = rows.group.unique(return_counts=True)[1].tolist()
        if len(set(sizes)) > 1:
            raise KeelError(f"OpenRLHF's groups have one size, and these have {sizes}. Expected groups of n_samples_per_prompt.")
        maker, settings = modules().maker, self.settings
        mask, kl = rows.mask[order].to(rows.logp_old.dtype), torch.zeros_like(rows.logp_old)
        if settings["algo.kl.init_coef"] > 0 and not settings["algo.kl.use_loss"]:
            kl = modules().utils.compute_approx_kl(rows.logp_old, rows.logp_ref, kl_estimator=settings["algo.kl.estimator"])[order]
        experience = SimpleNamespace(
            index=list(range(len(order))), rewards=rows.reward[order].to(mask.dtype), info={}, kl=kl.to(mask.dtype),
            action_mask=mask, response_length=rows.length[order], truncated=rows.truncated[order],
        )  # fmt: skip
        arguments = _nested({**settings, "rollout.n_samples_per_prompt": sizes[0], "rollout.max_new_tokens": max_tokens})
        stand_in = SimpleNamespace(
            strategy=SimpleNamespace(args=arguments),
            advantage_estimator=settings["algo.advantage.estimator"],
            kl_ctl=SimpleNamespace(value=settings["algo.kl.init_coef"]),
        )
        stand_in.get_cumulative_returns = lambda *given: maker.get_cumulative_returns(stand_in, *given)
        maker.compute_advantages_and_returns(stand_in, [experience])
        advantage = (experience.advantages.to(mask.dtype) * mask)[order.argsort()]
        return advantage, rows.mask, torch.ones_like(rows.logp_old), rows.logp_old

    def step(self, logp: Tensor, entropy: Tensor, rows: Rows, prepared: PeerPrepared, tokens: Tensor, max_tokens: int) -> Tensor:
        settings, own = self.settings, modules()
        mask = prepared.mask.to(logp.dtype)
        low, high = settings["actor.eps_clip_low_high"] or (settings["actor.eps_clip"],) * 2
        whole = dict(batch_num_tokens=tokens, global_batch_size=prepared.whole)
        policy = own.loss.PolicyLoss(
            clip_eps_low=low,
            clip_eps_high=high,
            dual_clip=settings["actor.dual_clip"],
            token_level_loss=settings["actor.loss_agg_mode"] == "token-mean",
            policy_loss_type=settings["actor.policy_loss_type"],
            is_correction_level=settings["algo.advantage.is_correction_level"],
            is_correction_mode=settings["algo.advantage.is_correction_mode"],
            is_correction_gating=settings["algo.advantage.is_correction_gating"],
            is_correction_threshold=settings["algo.advantage.is_correction_threshold"],
        )
        loss = policy(logp, prepared.old, prepared.advantage, action_mask=mask, rollout_log_probs=rows.logp_rollout, **whole)[0]
        if settings["algo.kl.use_loss"] and settings["algo.kl.init_coef"] > 0:
            kl = own.utils.compute_approx_kl(
                logp, rows.logp_ref, log_probs_old=prepared.old, kl_estimator=settings["algo.kl.estimator"],
                unbiased_gradient=settings["algo.kl.unbiased_gradient"],
            )  # fmt: skip
            loss = loss + settings["algo.kl.init_coef"] * own.loss.aggregate_loss(kl, mask, **whole)
        if settings["actor.entropy_coef"]:
            loss = loss - settings["actor.entropy_coef"] * own.loss.aggregate_loss(entropy, mask, **whole)
        return loss


def _nested(settings: Mapping[str, Any]) -> SimpleNamespace:
    """Arguments by dotted name as the nested namespace that OpenRLHF reads."""
    arguments = SimpleNamespace()
    for name, value in settings.items():
        *path, last = name.split(".")
        at = arguments
        for step in path:
            at.__dict__.setdefault(step, SimpleNamespace())
            at = getattr(at, step)
        setattr(at, last, value)
    return arguments
