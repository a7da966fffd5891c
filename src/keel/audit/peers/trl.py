"""TRL's own GRPO loss: two methods of the installed `GRPOTrainer`, called on a stand-in for the trainer.

`_generate_and_score_completions` makes advantages and corrections, `_compute_loss` the loss. The stand-in hands out completions,
rewards and log-probabilities where the trainer would generate, grade and run the model; everything between is TRL's.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from keel.audit.peers.defaults import TRL, TRL_VERSION
from keel.audit.peers.loss import PeerLoss, PeerPrepared, Rows
from keel.audit.peers.source import folder
from keel.errors import KeelError, nearest

END, OTHER, PAD = 0, 1, 2  # token ids of the stand-in; their values mean nothing but "ended", "not ended" and "padding"


def grpo_trainer() -> type:
    """The installed class. Raises KeelError where TRL is not installed."""
    folder("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer


@dataclass(frozen=True)
class TrlLoss(PeerLoss):
    """TRL's loss under a GRPOConfig, of which only what differs from the defaults is given.

    Groups are found by position, as TRL finds them; rows are put in order of their group first.
    """

    peer: ClassVar[str] = "trl"
    written_for: ClassVar[str] = TRL_VERSION

    def __post_init__(self):
        for name in self.configuration:
            if name not in TRL:
                hint = nearest(name, TRL)
                raise KeelError(f"GRPOConfig has no {name!r} that touches the loss; {hint}Expected a name of its own.")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every knob of the loss, defaults included, as `GRPOConfig.__post_init__` leaves it."""
        settings = {**TRL, **self.configuration}
        settings["scale_rewards"] = {True: "group", False: "none"}.get(settings["scale_rewards"], settings["scale_rewards"])
        if settings["vllm_importance_sampling_cap"] is not None:
            settings["vllm_importance_sampling_clip_max"] = settings["vllm_importance_sampling_cap"]
        return settings

    def advantages(self, rows: Rows, max_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        order = rows.group.argsort(stable=True)
        sizes = rows.group.unique(return_counts=True)[1].tolist()
        if len(set(sizes)) > 1:
            raise KeelError(f"TRL's groups have one size, and these have {sizes}. Expected groups of num_generations completions.")
        ordered = Rows(*(tensor[order] for tensor in rows.tensors()))
        trainer = self._stand_in(ordered, sizes[0])
        made = grpo_trainer()._generate_and_score_completions(trainer, [{"prompt": ""} for _ in range(len(order))])
        back, width = order.argsort(), rows.mask.shape[1]

        def restored(name: str, otherwise: float) -> Tensor:
            if name not in made:
                return torch.full_like(rows.logp_old, otherwise)
            value = made[name].to(rows.logp_old.dtype).expand(len(order), made["completion_ids"].shape[1])
            return torch.nn.functional.pad(value, (0, width - value.shape[1]))[back]

        mask = restored("completion_mask", 0.0) * rows.mask
        advantage = made["advantages"].to(rows.logp_old.dtype)[back][:, None] * mask
        return advantage, mask, restored("importance_sampling_ratio", 1.0), restored("old_per_token_logps", float("nan"))

    def step(self, logp: Tensor, entropy: Tensor, rows: Rows, prepared: PeerPrepared, tokens: Tensor, max_tokens: int) -> Tensor:
        steps = prepared.whole // len(logp)
        trainer = SimpleNamespace(
            **self._knobs(),
            **self._quiet(),
            args=SimpleNamespace(**{**self.settings, "steps_per_generation": steps}),
            current_gradient_accumulation_steps=steps,
            max_completion_length=max_tokens,
            _get_per_token_logps_and_entropies=lambda *_, **__: (logp, entropy.detach() if not self._bonus else entropy, None),
            get_off_policy_mask=grpo_trainer().get_off_policy_mask,
            get_gamma_weights=grpo_trainer().get_gamma_weights,
        )
        trainer.get_high_entropy_mask = lambda *given: grpo_trainer().get_high_entropy_mask(trainer, *given)
        ids = torch.zeros_like(prepared.mask, dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": torch.ones_like(ids[:, :1]),
            "completion_ids": ids,
            "completion_mask": prepared.mask.to(logp.dtype),
            "advantages": prepared.advantage[:, 0],
            "num_items_in_batch": tokens,
            "importance_sampling_ratio": prepared.weight,
            "ref_per_token_logps": rows.logp_ref,
        }
        if self.settings["use_vllm"]:
            inputs["sampling_per_token_logps"] = rows.logp_rollout
        if not prepared.old.isnan().any():
            inputs["old_per_token_logps"] = prepared.old
        return grpo_trainer()._compute_loss(trainer, None, inputs)

    @property
    def _bonus(self) -> bool:
        return self.settings["entropy_coef"] != 0.0 or self.settings["use_adaptive_entropy"]

    def _knobs(self) -> dict[str, Any]:
        """Attributes that `GRPOTrainer.__init__` copies from its arguments, under the names that it gives them."""
        settings = self.settings
        own = ("loss_type", "beta", "importance_sampling_level", "off_policy_mask_threshold", "top_entropy_quantile", "use_vllm",
               "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
               "vllm_importance_sampling_clip_min", "scale_rewards", "multi_objective_aggregation", "num_iterations",
               "mask_truncated_completions", "entropy_coef", "use_adaptive_entropy")  # fmt: skip
        high = settings["epsilon_high"]
        return {
            **{name: settings[name] for name in own},
            "epsilon_low": settings["epsilon"],
            "epsilon_high": settings["epsilon"] if high is None else high,
            "_entropy_bonus_enabled": self._bonus,
            "_last_world_entropy": float("inf"),
            "_entropy_window_stats": None,
            "aux_loss_enabled": False,
        }

    def _quiet(self) -> dict[str, Any]:
        """One process, and somewhere to put metrics."""
        same = SimpleNamespace(
            device=torch.device("cpu"), num_processes=1, process_index=0, sync_gradients=True,
            gather=lambda value: value, gather_for_metrics=lambda value: value, reduce=lambda value, reduction: value,
            pad_across_processes=lambda value, dim, pad_index: value,
        )  # fmt: skip
        model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        return {"accelerator": same, "model": model, "_metrics": defaultdict(lambda: defaultdict(list))}

    def _stand_in(self, rows: Rows, group_size: int) -> SimpleNamespace:
        """A trainer that hands out these rows."""
        lengths = rows.length.tolist()
        ids = [[OTHER] * (n - 1) + [OTHER if cut else END] for n, cut in zip(lengths, rows.truncated.tolist(), strict=True)]
        sampled = [row[:n].tolist() for row, n in zip(rows.logp_rollout, lengths, strict=True)]
        sampled = sampled if self.settings["use_vllm"] else None
        generated = ([[OTHER]] * len(ids), ids, None, [""] * len(ids), sampled, {}, None, None)
        reference = object()

        def scored(model, *_, **__):
            logp = rows.logp_ref if model is reference else rows.logp_old
            return logp[:, : max(lengths)], None, None

        accumulation = dict(steps_per_generation=1, gradient_accumulation_steps=1, per_device_train_batch_size=len(ids))
        return SimpleNamespace(
            **self._knobs(),
            **self._quiet(),
            args=SimpleNamespace(**{**self.settings, **accumulation, "gradient_checkpointing_kwargs": None}),
            environment_factories=None, environments=None, tools=None, pad_to_multiple_of=None, ref_model=reference,
            log_multimodal=False,
            num_generations=group_size, num_generations_eval=group_size, eos_token_ids=[END],
            _tokenizer=SimpleNamespace(pad_token_id=PAD), _is_vlm=False,
            reward_funcs=[None], reward_func_names=["reward"], reward_weights=torch.ones(1, dtype=rows.reward.dtype),
            _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
            _pending_extra_logs={}, _pending_metrics={},
            _generate=lambda prompts: generated,
            _calculate_rewards=lambda *_: rows.reward[:, None].clone(),
            _get_per_token_logps_and_entropies=scored,
        )  # fmt: skip
