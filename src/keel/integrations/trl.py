"""keel's objectives in TRL's GRPOTrainer: TRL generates, grades and runs the model; the loss is keel's, from rewards to gradient.

trainer = KeelGRPOTrainer(objective="dapo", model=…, reward_funcs=…, args=GRPOConfig(…), train_dataset=…)
trainer.train()

Groups are those of a row's id in the data set, advantages are taken over the whole rollout batch of all ranks, and every
denominator over the whole optimizer step: gradient accumulation and ranks change nothing. What belongs to the loop stays with
`args`: how many updates a batch (`steps_per_generation`, `num_iterations`), sampling, the optimizer. TRL has no dynamic sampling,
and deals the rows of a batch out to its updates at random.

Written for TRL 1.16: `_generate_and_score_completions`, `_calculate_rewards`, `_prepare_inputs` and `_compute_loss` of
GRPOTrainer.
"""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from keel.audit.peers.defaults import TRL, TRL_VERSION
from keel.errors import KeelError
from keel.integrations.objectives import objective_of, rows_of
from keel.objectives.aggregate import count
from keel.objectives.objective import Objective
from keel.objectives.registry import Recipe
from keel.objectives.signals import Prepared
from keel.types import Batch, StepCounts

try:
    import trl
    from trl import GRPOConfig, GRPOTrainer
except ImportError as missing:
    raise KeelError(
        f"keel's objectives in TRL need the package trl, which cannot be imported ({missing}). "
        "Install it: pip install 'keel-rl[peers]'."
    ) from missing

GROUP = "keel_group"  # the column that says which prompt a row is
# knobs in keel's table of TRL's loss that say how batches are made, not what is minimised
LOOP = frozenset(
    """
    num_generations max_completion_length generation_batch_size steps_per_generation temperature top_p top_k min_p
    repetition_penalty use_vllm num_iterations sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
    gradient_accumulation_steps per_device_train_batch_size reward_weights
    """.split()
)


class KeelGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with an objective of keel's in the place of its loss.

    Args:
        objective: a recipe, its name, or an objective.
        others: as GRPOTrainer takes them.

    Raises:
        KeelError: another TRL; a knob of TRL's own loss in `args`, which would do nothing; or an optimizer step that ends within
            a rollout batch's successor, so that its denominators are not known when it begins.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        objective: str | Recipe | Objective = "solid",
        **others: Any,
    ):
        _refuse_version(trl.__version__)
        self.objective = objective_of(objective)
        args = _with_loss_off(GRPOConfig() if args is None else args, self.objective)
        super().__init__(model, reward_funcs, args, with_groups(train_dataset), with_groups(eval_dataset), **others)

    def _calculate_rewards(self, *given: Any) -> Tensor:
        of_each = super()._calculate_rewards(*given)
        total = (of_each * self.reward_weights.to(of_each.device)).nansum(1)
        self._rewards = total.masked_fill(of_each.isnan().all(1), float("nan"))  # of all ranks
        return of_each

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        groups = torch.tensor([row[GROUP] for row in inputs], device=self.accelerator.device)
        made = super()._generate_and_score_completions([{k: v for k, v in row.items() if k != GROUP} for row in inputs])
        everyone = self._everyone(made, groups)
        prepared = self.objective.prepare(everyone, self.max_completion_length)
        own = torch.arange(len(inputs), device=groups.device) + self.accelerator.process_index * len(inputs)
        return made | _columns(everyone.rows(own), prepared.rows(own), made["completion_ids"].shape[1])

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        return inputs | {"counts": self._counts(inputs)}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        batch, prepared = _rows(inputs)
        logp, entropy = self._log_probabilities(model, inputs)
        old = logp.detach() if batch.logp_old is None else batch.logp_old
        batch = replace(batch, logp_rollout=torch.where(batch.logp_rollout.isnan(), old, batch.logp_rollout))
        loss = self.objective.loss(logp, entropy, batch, prepared, inputs["counts"])
        self._note(self.objective.clipped(logp, batch, prepared), entropy.detach(), prepared.mask)
        return loss * self.accelerator.num_processes  # whose gradients are averaged

    def _everyone(self, made: dict[str, Any], groups: Tensor) -> Batch:
        """The rollout batch of all ranks. The sampler's log-probabilities are NaN where nobody knows them: they are then the
        trainer's own.
        """
        _refuse_images(made)
        mask, ids = made["completion_mask"].bool(), made["completion_ids"]
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=ids.device)
        last = ids.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0))
        trained = mask & made["tool_mask"].bool() if "tool_mask" in made else mask
        old, rollout = made.get("old_per_token_logps"), made.get("sampling_per_token_logps")
        if old is None and "logp_old" in self.objective.needs:
            with torch.no_grad():
                old, _ = self._log_probabilities(self.model, made)
        rollout = torch.full(mask.shape, float("nan"), device=mask.device) if rollout is None else rollout
        rollout = rollout if old is None else torch.where(rollout.isnan(), old, rollout)
        batch = rows_of(
            self._gather(trained),
            None if old is None else self._gather(old),
            self._gather(rollout),
            self._rewards,
            torch.unique(self._gather(groups), return_inverse=True)[1],
            self._gather(~torch.isin(last, ends)[:, 0]),
        )
        ref = made.get("ref_per_token_logps")
        batch = replace(batch, completion_len=self._gather(mask.sum(1)), mask=batch.mask & batch.scorable[:, None])
        return batch if ref is None else replace(batch, logp_ref=self._gather(ref))

    def _counts(self, inputs: dict[str, Any]) -> StepCounts:
        """Denominators of the optimizer step that these inputs belong to, over its micro-batches and all ranks."""
        step = [inputs]
        if self.model.training:
            accumulated = self.args.gradient_accumulation_steps
            first = (self._step % self.args.steps_per_generation) // accumulated * accumulated
            step = self._buffered_inputs[first : first + accumulated]
        rows = [_rows(part)[1] for part in step]
        whole = (torch.cat([getattr(part, item.name) for part in rows]) for item in fields(Prepared))
        return count(Prepared(*map(self._gather, whole)), self.max_completion_length)

    def _log_probabilities(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        rows = self.args.per_device_train_batch_size
        width = inputs["completion_ids"].shape[1]
        logp, entropy, _ = self._get_per_token_logps_and_entropies(model, ids, seen, width, batch_size=rows, compute_entropy=True)
        return logp, entropy

    def _gather(self, value: Tensor) -> Tensor:
        """The rows of all ranks, rank after rank, padded to one width."""
        padded = self.accelerator.pad_across_processes(value, dim=1) if value.dim() > 1 else value
        return self.accelerator.gather(padded.contiguous()).to(value.dtype)

    def _note(self, clipped: Tensor, entropy: Tensor, mask: Tensor) -> None:
        tokens = mask.sum().clamp(min=1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["entropy"].append(float(torch.where(mask, entropy, 0.0).sum() / tokens))
        metrics["clip_ratio/region_mean"].append(float(clipped.sum() / tokens))


def with_groups(data: Any) -> Any:
    """A data set, or several by name, whose rows know which prompt they are, so that groups are found by id."""
    if data is None:
        return None
    if isinstance(data, dict):
        return type(data)({name: with_groups(part) for name, part in data.items()})
    if hasattr(data, "add_column") and hasattr(data, "__len__"):
        return data.add_column(GROUP, list(range(len(data))))
    return data.map(lambda row, place: {GROUP: place}, with_indices=True)


def _with_loss_off(args: GRPOConfig, objective: Objective) -> GRPOConfig:
    """Arguments under which TRL hands out what the objective needs: a reference where it has a KL to one."""
    idle = [name for name in TRL if name not in LOOP and getattr(args, name) != TRL[name]]
    if idle:
        raise KeelError(
            f"{', '.join(idle)} {'is a knob' if len(idle) == 1 else 'are knobs'} of TRL's own loss, which an objective of keel's "
            "replaces. Expected GRPOConfig to say nothing of the loss: leave them out, and change the objective."
        )
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise KeelError(
            f"steps_per_generation is {args.steps_per_generation} and gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps}: an optimizer step would take rows of two rollout batches, and its denominators "
            "would not be known when it begins. Expected a multiple."
        )
    args = copy.copy(args)
    args.beta = 1.0 if "logp_ref" in objective.needs else 0.0
    return args


def _columns(batch: Batch, prepared: Prepared, width: int) -> dict[str, Tensor]:
    """What TRL shuffles and cuts with the rest of its inputs."""
    held = {f"batch.{name}": value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    held |= {f"prepared.{name}": value for name, value in vars(prepared).items()}
    return {name: value[:, :width] if value.dim() == 2 else value for name, value in held.items()}


def _rows(inputs: dict[str, Any]) -> tuple[Batch, Prepared]:
    """The same, read back."""
    batch = {item.name: inputs[f"batch.{item.name}"] for item in fields(Batch) if f"batch.{item.name}" in inputs}
    return Batch(**batch), Prepared(*(inputs[f"prepared.{item.name}"] for item in fields(Prepared)))


def _refuse_version(found: str) -> None:
    if found.split(".")[:2] != TRL_VERSION.split(".")[:2]:
        raise KeelError(
            f"TRL {found} is installed. Expected {'.'.join(TRL_VERSION.split('.')[:2])}, whose methods this adapter stands in for: "
            f"pip install 'trl=={TRL_VERSION}'."
        )


def _refuse_images(made: dict[str, Any]) -> None:
    if "pixel_values" in made or "num_images" in made:
        raise KeelError("The data holds images. Expected text: keel's adapter hands TRL's model token ids alone. Use GRPOTrainer.")
