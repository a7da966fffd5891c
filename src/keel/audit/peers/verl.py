"""verl's own losses: `compute_advantage`, `ppo_loss` and what they call, run from the installed source files.

The composition is verl's too: KL in the reward, advantage, correction weights, policy loss, entropy and KL loss. What is ours is
the stand-in for its containers, and the denominators of the step, which its trainer hands in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from keel.audit.peers.defaults import VERL, VERL_VERSION
from keel.audit.peers.loss import PeerLoss, PeerPrepared, Rows
from keel.audit.peers.source import run_source
from keel.errors import KeelError, nearest

ACTOR = "actor_rollout_ref.actor."
CORRECTION = "algorithm.rollout_correction."


class Settings(SimpleNamespace):
    """In place of verl's ActorConfig and AlgoConfig, which need omegaconf: attributes, and `get`."""

    def get(self, name: str, otherwise: Any = None) -> Any:
        return getattr(self, name, otherwise)


class Columns(dict):
    """In place of a TensorDict: named tensors."""

    batch_size: tuple[int, ...] = ()

    def select(self, *names: str) -> Columns:
        return Columns({name: self[name] for name in names})

    def to_padded_tensor(self) -> Columns:
        return self


@cache
def modules() -> SimpleNamespace:
    """verl's modules, each run once: functional, core, trainer, losses, correction."""
    functional = run_source("verl", "utils/torch_functional.py", {"get_device_name": lambda: "cpu"})
    deprecated = run_source("verl", "utils/import_utils.py").deprecated
    grouped = run_source("verl", "utils/groupwise.py", {"get_device_name": lambda: "cpu"})
    own = {"verl_F": functional, "deprecated": deprecated, "ActorConfig": Settings}
    core = run_source("verl", "trainer/ppo/core_algos.py", {**own, **_names(grouped, "as_torch_index", "group_mean_std")})
    metric = run_source("verl", "utils/metric/utils.py")
    algorithms = _names(core, "agg_loss", "compute_value_loss", "get_policy_loss_fn", "kl_penalty", "AdvantageEstimator")
    losses = {**_names(metric, "Metric", "AggregationType"), "no_padding_2_padding": lambda value, data: value}
    sums = _names(functional, "masked_mean", "masked_sum")
    return SimpleNamespace(
        core=core,
        trainer=run_source("verl", "trainer/ppo/ray_trainer.py", {**own, **algorithms, **sums, "core_algos": core}),
        losses=run_source("verl", "workers/utils/losses.py", {**own, **algorithms, **sums, **losses}),
        correction=run_source("verl", "trainer/ppo/rollout_corr_helper.py", own),
    )


def _names(module: ModuleType, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


@dataclass(frozen=True)
class VerlLoss(PeerLoss):
    """verl's loss under a configuration of dotted names, of which only what differs from the defaults is given."""

    peer: ClassVar[str] = "verl"
    written_for: ClassVar[str] = VERL_VERSION

    def __post_init__(self):
        for name in self.configuration:
            if name not in VERL:
                hint = nearest(name, VERL)
                raise KeelError(f"verl has no {name!r} that touches the loss; {hint}Expected a dotted name of its own.")
        if self.settings[CORRECTION + "bypass_mode"]:
            raise KeelError("verl's bypass_mode imports ray in the middle of its loss. Expected decoupled mode: bypass_mode false.")

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        return {**VERL, **self.configuration}

    def advantages(self, rows: Rows, max_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        import numpy

        mask, algorithm = rows.mask.to(rows.logp_old.dtype), _section(self.settings, "algorithm.")
        weight, mask = self._corrected(rows, mask)
        scores = torch.zeros_like(rows.logp_old)
        scores[torch.arange(len(scores)), rows.last] = rows.reward.to(scores.dtype) + self._overlong(rows, max_tokens)
        columns = Columns(
            response_mask=mask, token_level_scores=scores, token_level_rewards=scores, old_log_probs=rows.logp_old,
            ref_log_prob=rows.logp_ref,
        )  # fmt: skip
        columns.batch_size = (len(scores),)
        data = SimpleNamespace(batch=columns, non_tensor_batch={"uid": numpy.array(rows.group.tolist())})
        if algorithm.use_kl_in_reward:
            control = modules().core.FixedKLController(algorithm.kl_ctrl.kl_coef)
            data, _ = modules().trainer.apply_kl_penalty(data, control, algorithm.kl_penalty)
        data = modules().trainer.compute_advantage(
            data, modules().core.AdvantageEstimator(algorithm.adv_estimator), gamma=algorithm.gamma, lam=algorithm.lam,
            norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo, config=algorithm,
        )  # fmt: skip
        return data.batch["advantages"], mask, weight, rows.logp_old

    def step(self, logp: Tensor, entropy: Tensor, rows: Rows, prepared: PeerPrepared, tokens: Tensor, max_tokens: int) -> Tensor:
        config = _section(self.settings, ACTOR)
        if config.loss_agg_mode == "seq-mean-token-sum-norm" and config.loss_scale_factor is None:
            config.loss_scale_factor = max_tokens  # verl divides by the width that a micro-batch is padded to; here that is the cap
        config.global_batch_info = {}
        data = Columns(
            dp_size=1, batch_num_tokens=tokens, global_batch_size=prepared.whole, response_mask=prepared.mask,
            old_log_probs=prepared.old, advantages=prepared.advantage, ref_log_prob=rows.logp_ref,
        )  # fmt: skip
        if self.settings[CORRECTION + "rollout_is"]:
            data["rollout_is_weights"] = prepared.weight
        output = {"log_probs": logp, **({"entropy": entropy} if config.entropy_coeff else {})}
        return modules().losses.ppo_loss(config, output, data)[0]

    def _corrected(self, rows: Rows, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Correction weights, and the mask after rejection."""
        chosen, gap = _section(self.settings, CORRECTION), rows.logp_old - rows.logp_rollout
        weight = torch.ones_like(gap)
        if chosen.rollout_is:
            weight, _ = modules().correction.compute_rollout_correction_weights(
                gap, mask, chosen.rollout_is, chosen.rollout_is_threshold, chosen.rollout_is_batch_normalize
            )
        if chosen.rollout_rs:
            mask, _ = modules().correction.compute_rollout_rejection_mask(gap, mask, chosen.rollout_rs, chosen.rollout_rs_threshold)
        return weight, mask

    def _overlong(self, rows: Rows, max_tokens: int) -> Tensor:
        """The soft punishment of verl's "dapo" reward manager: its formula again, for the manager itself grades text."""
        buffer = _section(self.settings, "reward.reward_kwargs.overlong_buffer_cfg.")
        if not buffer.enable:
            return torch.zeros_like(rows.reward)
        exceeding = rows.length - (max_tokens - buffer.len)
        return (-exceeding / buffer.len * buffer.penalty_factor).clamp(max=0).to(rows.reward.dtype)


def _section(settings: Mapping[str, Any], prefix: str) -> Settings:
    """The knobs below a dotted prefix, nested."""
    section = Settings()
    for name, value in settings.items():
        if not name.startswith(prefix):
            continue
        *path, last = name[len(prefix) :].split(".")
        at = section
        for step in path:
            if not hasattr(at, step):
                setattr(at, step, Settings())
            at = getattr(at, step)
        setattr(at, last, value)
    return section
