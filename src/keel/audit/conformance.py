"""Same inputs, same loss and gradient? Each recipe against the frameworks that have it too, difference by difference.

A row runs a framework's own code on a random batch (stale policy, engine gap, ratios past every bound, two micro-batches) beside
the recipe, and then beside the recipe with the changes that its configuration stands for (`keel.audit.peers.overlay`). Either
these agree, or what remains is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.audit.peers import installed, loss_and_gradient, peer_loss, version
from keel.audit.peers.openrlhf_reading import read_openrlhf
from keel.audit.peers.overlay import as_text, overlay
from keel.audit.peers.reading import Beyond, Reading
from keel.audit.peers.trl_reading import read_trl
from keel.audit.peers.verl_reading import read_verl
from keel.objectives.objective import Objective
from keel.objectives.parts import vary
from keel.objectives.recipes import recipe
from keel.types import Batch

Agreement = Literal["exact", "by overlay", "up to a factor", "differs"]

TOLERANCE = 1e-6  # relative; OpenRLHF's KL and rewards pass through float32
MAX_TOKENS = 10
BATCHES = 3

NAMES = {
    "advantage.scale.eps": "eps",
    "advantage.scale.ddof": "ddof",
    "advantage.scale": "std",
    "surrogate": "clip",
    "surrogate.cap": "cap",
    "surrogate.dual": "dual clip",
    "loss_kl.estimator": "clamp",
    "loss_kl.ratio": "KL ratio",
    "loss_kl": "KL in the loss",
    "reward_kl": "KL in the reward",
    "aggregate": "denominator",
    "shaping": "overlong",
    "corrections": "engine gap",
}  # what a difference is called, by the longest path that fits


@dataclass(frozen=True)
class Case:
    """A framework's configuration, and the recipe that it is meant to be.

    Args:
        peer: "trl", "verl" or "openrlhf".
        recipe: keel's.
        configuration: what differs from the framework's defaults.
        gap: whether the engine's log-probabilities differ from the trainer's.
    """

    peer: str
    recipe: str
    configuration: Mapping[str, Any]
    gap: bool = False

    @property
    def reading(self) -> Reading:
        """The configuration in keel's words."""
        if self.peer == "openrlhf":
            return read_openrlhf(self.configuration, MAX_TOKENS)
        return {"trl": read_trl, "verl": read_verl}[self.peer](self.configuration)


@dataclass(frozen=True)
class Difference:
    """One choice in which a framework differs from the recipe, and which keel has too.

    Args:
        name: in a word: ddof, eps, denominator, cap, clamp …
        path: as `vary` takes it.
        value: that reproduces the framework.
    """

    name: str
    path: str
    value: Any


@dataclass(frozen=True)
class Conformity:
    """A row of the table.

    Args:
        case: what was compared; version: of the framework.
        agreement: "exact", the recipe as it is; "by overlay", with the differences applied; "up to a factor"; "differs".
        differences: named, each with keel's choice that reproduces it; overlay: the same as `vary` takes them.
        beyond: named, without such a choice.
        recipe_error: worst relative error of loss and gradient, against the recipe as it is.
        error: the same after the overlay, and after the factor if that is what remains.
        factor: by which the gradient is multiplied; 1 unless "up to a factor".
    """

    case: Case
    version: str
    agreement: Agreement
    differences: tuple[Difference, ...]
    overlay: Mapping[str, Any]
    beyond: tuple[Beyond, ...]
    recipe_error: float
    error: float
    factor: float = 1.0

    @property
    def holds(self) -> bool:
        """What is named is all there is: agreement, or something that keel has no choice for."""
        return self.agreement in ("exact", "by overlay") or bool(self.beyond)

    def text(self) -> str:
        """The row in a sentence."""
        who = f"{self.case.peer} {self.version} against {self.case.recipe}"
        named = [f"{item.name} ({item.path} = {item.value})" for item in self.differences]
        named += [f"{item.knob.rpartition('.')[2]}: {item.says}" for item in self.beyond]
        factor = f" of {self.factor:.6g}" if self.agreement == "up to a factor" else ""
        return f"{who}: {self.agreement}{factor}" + (f"; {'; '.join(named)}" if named else "")

    def as_json(self) -> dict[str, Any]:
        """The stable record."""
        return {
            "peer": self.case.peer,
            "version": self.version,
            "recipe": self.case.recipe,
            "configuration": dict(self.case.configuration),
            "agreement": self.agreement,
            "differences": [{"name": d.name, "path": d.path, "value": _plain(d.value)} for d in self.differences],
            "overlay": as_text(self.overlay),
            "beyond": [{"knob": b.knob, "says": b.says} for b in self.beyond],
            "recipe_error": self.recipe_error,
            "error": self.error,
            "factor": self.factor,
            "holds": self.holds,
        }


def conformance_table(peers: Iterable[str] | None = None) -> list[Conformity]:
    """Every case of these frameworks, by default of those that are installed.

    Raises:
        KeelError: a framework that was asked for is not installed; how to install it is said.
    """
    wanted = [peer for peer in ("trl", "verl", "openrlhf") if installed(peer)] if peers is None else list(peers)
    return [compare(case) for peer in wanted for case in CASES if case.peer == peer]


def compare(case: Case) -> Conformity:
    """One case: the framework's code against the recipe as it is, and against the recipe with what its configuration says."""
    theirs, own, read = peer_loss(case.peer, case.configuration), recipe(case.recipe).objective, case.reading
    changes = overlay(own, read.objective)
    plain = _errors(theirs, own, case.gap)
    applied = _errors(theirs, vary(own, changes), case.gap)
    factor = applied.factor if not applied.small and applied.scaled <= TOLERANCE else 1.0
    return Conformity(
        case=case,
        version=version(case.peer),
        agreement="exact" if plain.small else "by overlay" if applied.small else "up to a factor" if factor != 1.0 else "differs",
        differences=() if plain.small else tuple(Difference(_name(path, value), path, value) for path, value in changes.items()),
        overlay={} if plain.small else changes,
        beyond=() if plain.small or applied.small else read.beyond,
        recipe_error=plain.worst,
        error=applied.scaled if factor != 1.0 else applied.worst,
        factor=factor,
    )


@dataclass(frozen=True)
class _Errors:
    worst: float
    scaled: float
    factor: float

    @property
    def small(self) -> bool:
        return self.worst <= TOLERANCE


def _errors(theirs: Any, ours: Objective, gap: bool) -> _Errors:
    """Relative errors of loss and gradient over all batches; with the factor that fits the first of them best."""
    worst = scaled = 0.0
    factors = []
    for seed in range(BATCHES):
        batch, logp = random_batch(seed, gap)
        (loss, slope), (own, own_slope) = (loss_and_gradient(one, logp, batch, MAX_TOKENS, cuts=2) for one in (theirs, ours))
        size = float(own_slope.norm())
        worst = max(worst, float((slope - own_slope).norm()) / size, abs(float(loss - own)) / max(abs(float(own)), size))
        factors.append(float((slope * own_slope).sum()) / size**2)
        scaled = max(scaled, float((slope - factors[-1] * own_slope).norm()) / size)
    return _Errors(worst, scaled, factors[0])


def random_batch(seed: int, gap: bool = True, rows: int = 12, groups: int = 3) -> tuple[Batch, Float[Tensor, "B T"]]:
    """A batch of rewards 0 and 1 and its `logp`: float64, stale, with ratios and KLs past every usual bound.

    Args:
        gap: whether the engine differs from the trainer.
        rows: completions, of `groups` groups in turn.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(rows, MAX_TOKENS, generator=draw, dtype=torch.float64)

    length = torch.randint(2, MAX_TOKENS + 1, (rows,), generator=draw)
    length[:2] = MAX_TOKENS
    reward = torch.rand(rows, generator=draw, dtype=torch.float64).round()
    reward[:groups], reward[groups : 2 * groups] = 0.0, 1.0
    old = -normal(2.0).abs() - 0.5
    drift, mismatch, away = normal(0.2), normal(0.2), normal(0.7)
    drift[0, 0], drift[1, 1], drift[groups, 0], drift[groups + 1, 1] = 2.2, -2.2, 2.2, -2.2
    mismatch[0, 2], mismatch[groups, 2], mismatch[1, 3] = 2.0, -2.0, 0.9
    away[0, 1], away[2, 0] = 4.0, -4.0
    mask = torch.arange(MAX_TOKENS) < length[:, None]
    batch = Batch(
        tokens=torch.zeros(rows, MAX_TOKENS + 1, dtype=torch.long),
        prompt_len=torch.ones(rows, dtype=torch.long),
        completion_len=length,
        mask=mask,
        logp_rollout=(old - mismatch).float().double() if gap else old,  # TRL reads them in float32
        group=torch.arange(rows) % groups,
        reward=reward,
        scorable=torch.ones(rows, dtype=torch.bool),
        correct=reward > 0.5,
        truncated=length == MAX_TOKENS,
        versions=torch.zeros(rows, MAX_TOKENS, dtype=torch.long),
        logp_old=old,
        logp_ref=old + drift + away,
    )
    return batch, old + drift


def _name(path: str, value: Any) -> str:
    if value == "dual_clip":
        return NAMES["surrogate.dual"]
    fitting = [prefix for prefix in NAMES if path == prefix or path.startswith(prefix + ".")]
    return NAMES[max(fitting, key=len)] if fitting else path


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | list | None) else getattr(value, "__name__", str(value))


def _cases() -> tuple[Case, ...]:
    twice = {"num_iterations": 2}  # or TRL takes the policy itself for the old one
    vllm = {**twice, "use_vllm": True}
    actor, correction = "actor_rollout_ref.actor.", "algorithm.rollout_correction."
    mode, aggregate = actor + "policy_loss.loss_mode", actor + "loss_agg_mode"
    group = {"algorithm.adv_estimator": "grpo"}
    own_mean = {**group, aggregate: "seq-mean-token-mean"}
    whole = {
        aggregate: "seq-mean-token-sum-norm",
        mode: "gpg",
        "data.max_response_length": MAX_TOKENS,
        actor + "loss_scale_factor": MAX_TOKENS,
    }
    higher = {**group, actor + "clip_ratio_high": 0.28}
    normed = {"algo.advantage.estimator": "group_norm", "algo.kl.init_coef": 0.0}
    by_row = {**normed, "actor.loss_agg_mode": "seq-mean-token-mean"}
    clip_higher = {**normed, "actor.eps_clip_low_high": (0.2, 0.28)}
    level, threshold = "algo.advantage.is_correction_level", "algo.advantage.is_correction_threshold"
    buffer = "reward.reward_kwargs.overlong_buffer_cfg."
    overlong = {buffer + "enable": True, buffer + "len": 2, buffer + "penalty_factor": 0.5, "reward.reward_manager.name": "dapo"}
    return (
        Case("trl", "grpo", {**twice, "loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}),
        Case("trl", "grpo", {**twice, "loss_type": "grpo", "beta": 0.04}),
        Case("trl", "dapo", {**twice, "loss_type": "dapo", "epsilon_high": 0.28}),
        Case("trl", "dapo", {**twice, "loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True}),
        Case("trl", "dapo", {**twice, "loss_type": "dapo", "epsilon_high": 0.28, "delta": 3.0}),
        Case("trl", "dapo", {**twice, "loss_type": "bnpo", "epsilon_high": 0.28}),
        Case("trl", "dr_grpo", {**twice, "loss_type": "dr_grpo", "scale_rewards": "none"}),
        Case("trl", "dr_grpo", {**twice, "loss_type": "dr_grpo"}),
        Case("trl", "lite_ppo", {**twice, "scale_rewards": "batch"}),
        Case("trl", "gspo", {**twice, "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4,
                             "epsilon_high": 4e-4}),
        Case("trl", "gspo", {**twice, "loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 3e-4,
                             "epsilon_high": 4e-4, "max_completion_length": MAX_TOKENS}),
        Case("trl", "cispo", {**twice, "loss_type": "cispo", "epsilon_high": 5.0}),
        Case("trl", "cispo", {**twice, "loss_type": "cispo"}),
        Case("trl", "sapo", {**twice, "loss_type": "sapo"}),
        Case("trl", "tis", {**vllm, "epsilon_high": 0.28, "vllm_importance_sampling_mode": "token_truncate",
                            "vllm_importance_sampling_clip_max": 2.0}, gap=True),
        Case("trl", "tis", {**vllm, "epsilon_high": 0.28}, gap=True),
        Case("trl", "icepop", {**vllm, "loss_type": "grpo", "vllm_importance_sampling_mode": "token_mask",
                               "vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": 5.0}, gap=True),
        Case("trl", "deepseek_v32", {**twice, "loss_type": "grpo", "scale_rewards": "none", "beta": 0.001,
                                     "off_policy_mask_threshold": 0.1}),
        Case("trl", "deepseek_v32", {**vllm, "loss_type": "grpo", "scale_rewards": "none", "beta": 0.001,
                                     "off_policy_mask_threshold": 0.1, "vllm_importance_sampling_correction": False}, gap=True),
        Case("verl", "solid", {"algorithm.adv_estimator": "rloo", **whole}),
        Case("verl", "rloo", {"algorithm.adv_estimator": "rloo", **whole, "algorithm.use_kl_in_reward": True,
                              "algorithm.kl_ctrl.kl_coef": 0.05}),
        Case("verl", "grpo", {**own_mean, actor + "use_kl_loss": True, actor + "kl_loss_coef": 0.04}),
        Case("verl", "dapo", {**higher, actor + "clip_ratio_c": 10.0, **overlong, "data.max_response_length": MAX_TOKENS}),
        Case("verl", "dr_grpo", {**group, "algorithm.norm_adv_by_std_in_grpo": False, aggregate: "seq-mean-token-sum-norm",
                                 "data.max_response_length": MAX_TOKENS, actor + "loss_scale_factor": MAX_TOKENS}),
        Case("verl", "gspo", {**own_mean, mode: "gspo", actor + "clip_ratio_low": 3e-4, actor + "clip_ratio_high": 4e-4}),
        Case("verl", "cispo", {**group, mode: "cispo", actor + "clip_ratio_low": 1.0, actor + "clip_ratio_high": 4.0}),
        Case("verl", "cispo", {**group, mode: "cispo"}),
        Case("verl", "sapo", {**group, mode: "sapo"}),
        Case("verl", "gmpo", {**group, mode: "geo_mean", actor + "clip_ratio_low": 0.4, actor + "clip_ratio_high": 0.4}),
        Case("verl", "reinforce_pp", {"algorithm.adv_estimator": "reinforce_plus_plus", "algorithm.use_kl_in_reward": True,
                                      "algorithm.kl_ctrl.kl_coef": 0.01}),
        Case("verl", "reinforce_pp_baseline", {"algorithm.adv_estimator": "reinforce_plus_plus_baseline",
                                               actor + "use_kl_loss": True, actor + "kl_loss_type": "mse"}),
        Case("verl", "tis", {**higher, correction + "rollout_is": "token"}, gap=True),
        Case("verl", "icepop", {**own_mean, correction + "rollout_is": "token",
                                correction + "rollout_is_threshold": "0.5_5.0"}, gap=True),
        Case("openrlhf", "grpo", {**by_row, "algo.kl.init_coef": 0.04, "algo.kl.use_loss": True, "algo.kl.estimator": "k3"}),
        Case("openrlhf", "dapo", {**clip_higher, "reward.overlong_buffer_len": 2, "reward.overlong_penalty_factor": 0.5}),
        Case("openrlhf", "dr_grpo", {"algo.advantage.estimator": "dr_grpo", "algo.kl.init_coef": 0.0}),
        Case("openrlhf", "gspo", {**normed, "actor.policy_loss_type": "gspo", "actor.eps_clip_low_high": (3e-4, 4e-4)}),
        Case("openrlhf", "rloo", {"algo.advantage.estimator": "rloo", "algo.kl.init_coef": 0.05}),
        Case("openrlhf", "reinforce_pp", {"algo.advantage.estimator": "reinforce"}),
        Case("openrlhf", "reinforce_pp_baseline", {"algo.advantage.estimator": "reinforce_baseline", "algo.kl.init_coef": 0.001,
                                                   "algo.kl.use_loss": True, "algo.kl.estimator": "k2"}),
        Case("openrlhf", "tis", {**clip_higher, level: "token", "algo.advantage.is_correction_mode": "clip",
                                 threshold: (0.0, 2.0)}, gap=True),
        Case("openrlhf", "icepop", {**by_row, level: "token"}, gap=True),
    )  # fmt: skip


CASES = _cases()
