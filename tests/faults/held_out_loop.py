"""Faults of the training loop that the probes were not written against, a second table: see `held_out.py`.

They stand where gradients are accumulated and stepped on, in the forward and the backward pass, in the objective, in what is
trained on and in what is resumed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from held_out_tasks import SIZES
from seeded import LOOP

import keel.rollout.serving  # noqa: F401  so that the engine has its own names before the trainer's are spoiled
from keel.objectives.advantages import RawBatchStd
from keel.objectives.log_ratios import geometric_mean
from keel.objectives.signals import keep
from keel.training import loop

# ── accumulation and the optimizer ────────────────────────────────────────────────────────────────────────────────────


def clipped_in_the_loop(ground):
    """clip_grad_norm stands in the loop over micro-batches: what was accumulated is cut down again and again, early parts most."""
    most: list[float | None] = [1.0]

    def begun(old):
        def init(self, *given, **named):
            old(self, *given, **named)
            most[0] = self.config.train.max_grad_norm

        return init

    def spoil(old):
        def accumulate(policy, objective, batch, prepared, counts, cuts, temperature, *idle):
            if most[0] is None or len(cuts) < 2:
                return old(policy, objective, batch, prepared, counts, cuts, temperature, *idle)
            told = []
            for place, rows in enumerate(cuts):
                told.append(old(policy, objective, batch, prepared, counts, [rows], temperature, *(idle if not place else ())))
                torch.nn.utils.clip_grad_norm_([p for p in policy.parameters().values() if p.grad is not None], most[0])
            experts = None
            if told[0].experts is not None:
                experts = told[0].experts.clone()
                for rows, part in zip(cuts, told, strict=True):
                    experts[rows] = part.experts[rows]
            loss, logp, entropy = (sum(getattr(part, name) for part in told) for name in ("loss", "logp", "entropy"))
            return replace(told[0], loss=loss, logp=logp, entropy=entropy, experts=experts)

        return accumulate

    ground.put(f"{LOOP}:Trainer.__init__", begun)
    ground.put(f"{LOOP}:accumulate_gradient", spoil)


def schedule_of_another(ground):
    """The scheduler holds an optimizer that was replaced since: rates are worked out and told, and the steps are at the peak."""

    def spoil(old):
        def apply(parameters, optimizer, max_grad_norm):
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"]
            return old(parameters, optimizer, max_grad_norm)

        return apply

    ground.put(f"{LOOP}:apply_gradient", spoil)


def filled_up(ground):
    """The last micro-batch is filled up with the batch's first rows, as padding to an equal size does, and they count again."""

    def spoil(old):
        def accumulate(policy, objective, batch, prepared, counts, cuts, temperature, *idle):
            if len(cuts) > 1 and len(cuts[-1]) < len(cuts[0]):
                cuts = [*cuts[:-1], torch.cat((cuts[-1], cuts[0][: len(cuts[0]) - len(cuts[-1])]))]
            return old(policy, objective, batch, prepared, counts, cuts, temperature, *idle)

        return accumulate

    ground.put(f"{LOOP}:accumulate_gradient", spoil)


def whitened_by_cut(ground):
    """Advantages are whitened once more inside every micro-batch."""

    def spoil(old):
        def accumulate(policy, objective, batch, prepared, counts, cuts, temperature, *idle):
            advantage = prepared.advantage.clone()
            for rows in cuts:
                mask, own = prepared.mask[rows], advantage[rows]
                seen = own[mask]
                if len(seen) > 1:
                    advantage[rows] = keep((own - seen.mean()) / (seen.std() + 1e-6), mask)
            return old(policy, objective, batch, replace(prepared, advantage=advantage), counts, cuts, temperature, *idle)

        return accumulate

    ground.put(f"{LOOP}:accumulate_gradient", spoil)


# ── the forward and the backward pass ─────────────────────────────────────────────────────────────────────────────────


def rows_see_the_row_before(ground):
    """Rows are packed one behind another, and the attention is not cut at their seams: each also sees the row before it."""

    def spoil(old):
        def attention(q, k, v, packing):
            rows, width = packing.leaves.shape
            if rows == 1:
                return old(q, k, v, packing)

            def gather(x):
                return x.index_select(0, packing.leaves.flatten()).view(rows, width, *x.shape[1:]).transpose(1, 2)

            mine, keys, values = gather(q), gather(k), gather(v)
            before = torch.ones(rows, 1, width, width, dtype=torch.bool, device=q.device)
            before[0] = False
            own = torch.ones(width, width, dtype=torch.bool, device=q.device).tril().expand(rows, 1, -1, -1)
            keys, values = (torch.cat((x.roll(1, 0), x), 2) for x in (keys, values))
            grouped = k.shape[1] != q.shape[1]
            out = F.scaled_dot_product_attention(mine, keys, values, torch.cat((before, own), 3), enable_gqa=grouped)
            return out.transpose(1, 2).reshape(rows * width, -1).index_select(0, packing.place)

        return attention

    ground.put("keel.models.decoder:forest_attention", spoil)


def normaliser_without_gradient(ground):
    """A head that saves memory computes the softmax's normaliser without gradient: only the token's own logit is moved."""

    def spoil(old):
        def logp(hidden, weight, state, token, *, temperature=1.0, softcap=None, **more):
            told, entropy = old(hidden, weight, state, token, temperature=temperature, softcap=softcap, **more)
            chosen = (hidden[state] * weight[token]).sum(-1) / temperature
            return told.detach() + (chosen - chosen.detach()), entropy

        return logp

    ground.put("keel.models.policy:token_logp", spoil)


def cut_off_below(ground):
    """The second layer's input is detached, as a re-entrant checkpoint does with inputs that ask for no gradient."""

    def spoil(old):
        def layer_(self, layer, x, *rest):
            return old(self, layer, x.detach() if layer is self.trunk.layers[1] else x, *rest)

        return layer_

    ground.put("keel.models.decoder:Decoder._layer", spoil)


def in_order_of_length(ground):
    """For the passes without gradient rows are sorted by length, and their log-probabilities are never put back in order."""

    def spoil(old):
        def looked(policy, batch, *rest):
            seen = old(policy, batch, *rest)
            order = (batch.prompt_len + batch.completion_len).argsort(descending=True, stable=True)
            return replace(seen, logp=seen.logp[order], entropy=seen.entropy[order])

        return looked

    ground.put(f"{LOOP}:look", spoil)


# ── the objective ─────────────────────────────────────────────────────────────────────────────────────────────────────

OBJECTIVE = "keel.objectives.objective:Objective"


def repeated_not_interleaved(ground):
    """Advantages were made sample-major, the rows of the batch are prompt-major: repeat where repeat_interleave was meant."""

    def spoil(old):
        def advantage(self, batch, scored):
            found = old(self, batch, scored)
            n, prompts = len(found), len(scored.group.unique())
            if n % prompts:
                return found
            each = found.sum(1) / scored.mask.sum(1).clamp(min=1)
            turned = each.view(prompts, n // prompts).T.reshape(n)
            return keep(turned[:, None].expand_as(found), scored.mask)

        return advantage

    ground.put(f"{OBJECTIVE}._advantage", spoil)


def credit_fades(ground):
    """A discount of .9 a token was left in from a control task: what stands far before the end is hardly trained."""

    def spoil(old):
        def advantage(self, batch, scored):
            found = old(self, batch, scored)
            to_end = (batch.completion_len[:, None] - 1 - torch.arange(found.shape[1])).clamp(min=0)
            return found * 0.9**to_end

        return advantage

    ground.put(f"{OBJECTIVE}._advantage", spoil)


def batch_std_for_group_std(ground):
    """Asked for the group's standard deviation, it divides by the batch's."""

    def spoil(old):
        return lambda self, advantage, centred, scored: RawBatchStd(self.ddof, self.eps)(advantage, centred, scored)

    ground.put("keel.objectives.advantages:GroupStd.__call__", spoil)


def entropy_pushed_down(ground):
    """The entropy bonus is a penalty."""

    def spoil(old):
        def per_token(self, logp, entropy, batch, prepared):
            found = old(self, logp, entropy, batch, prepared)
            return found + 2 * self.entropy_coef * keep(entropy, prepared.mask) if self.entropy_coef else found

        return per_token

    ground.put(f"{OBJECTIVE}.per_token", spoil)


def ratio_over_the_padded_width(ground):
    """The mean log-ratio of a completion is taken over the padded width, not over its own tokens."""

    def padded(log_ratio, mask):
        return log_ratio.sum(1, keepdim=True).div(mask.shape[1]).expand_as(log_ratio)

    def spoil(old):
        def view(self, *seen):
            return old(replace(self, log_ratio=padded) if self.log_ratio is geometric_mean else self, *seen)

        return view

    ground.put(f"{OBJECTIVE}.view", spoil)


def weight_upside_down(ground):
    """The importance weight is π_old/π in place of π/π_old."""

    def spoil(old):
        def view(self, *seen):
            found = old(self, *seen)
            value = found.importance.detach()
            return replace(found, importance=found.importance - 2 * value)

        return view

    ground.put(f"{OBJECTIVE}.view", spoil)


# ── data and checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────


def always_the_first_prompts(ground):
    """next(iter(loader)): every batch begins the data anew, so all batches are the same prompts."""

    def spoil(old):
        def take(self, count):
            self.taken = 0
            return old(self, count)

        return take

    ground.put("keel.training.buffer:PromptStream.take", spoil)


def solved_groups_are_kept(ground):
    """Dynamic sampling leaves out what nobody solved, and keeps what everybody solved."""

    def spoil(old):
        def add(self, groups):
            if not self.live_only:
                return old(self, groups)
            self.live_only = False
            try:
                return old(self, [group for group in groups if group.accuracy > 0] or groups)
            finally:
                self.live_only = True

        return add

    ground.put("keel.training.buffer:Filling.add", spoil)


def reference_anew_on_resuming(ground):
    """A resumed run takes the policy that it finds in the checkpoint for its reference."""

    def spoil(old):
        def restore(self, tensors, clocks):
            old(self, tensors, clocks)
            if self.reference is not None:
                self.reference = loop._reference(self.policy, self.ranks, self.config.train.device)

        return restore

    ground.put(f"{LOOP}:Trainer.restore", spoil)


def layer_not_restored(ground):
    """One layer's names differ in the checkpoint and are passed over in silence: it stays as the base model has it."""

    def spoil(old):
        def restore(self, tensors, clocks):
            here = {f"weights.{name}": p.detach().clone() for name, p in self.parameters.items() if "layers.1." in name}
            old(self, {**tensors, **here}, clocks)

        return restore

    ground.put(f"{LOOP}:Trainer.restore", spoil)


SEVERAL = {"train.micro_batch_tokens": 1000}
TRAINING = {  # fault: how, component, museum, settings
    "clipped inside the loop": (
        clipped_in_the_loop,
        "clip|norm|accumul|micro|gradient",
        "F32",
        SEVERAL | {"train.max_grad_norm": 0.02},
    ),
    "the schedule is another optimizer's": (
        schedule_of_another,
        "learning rate|schedule|lr|optimi|step|update",
        "",
        {"train.lr_schedule": "linear", "train.warmup_steps": 10},
    ),
    "the last micro-batch is filled up": (filled_up, "accumul|micro|cut|rows|denominator|twice", "F23", SEVERAL),
    "whitened in every micro-batch": (
        whitened_by_cut,
        "accumul|micro|cut|advantage|denominator|batch",
        "F01",
        {"train.micro_batch_tokens": 250},
    ),
    "rows see the row before": (
        rows_see_the_row_before,
        "attention|packing|padding|log-prob|logp|forward|batch|row|cut|micro",
        "F40",
        {},
    ),
    "the normaliser has no gradient": (
        normaliser_without_gradient,
        "gradient|backward|log-prob|logp|head|softmax|differ",
        "F05",
        {},
    ),
    "the first layer is cut off": (cut_off_below, "parameter|gradient|tensor|layer|detach|backward|differ", "F53", {}),
    "log-probabilities in order of length": (
        in_order_of_length,
        "log-prob|logp|ratio|reference|align|order|row|pairing|old",
        "F39",
        {"recipe": "dr_grpo", "train.updates_per_batch": 2},
    ),
    "repeated, not interleaved": (repeated_not_interleaved, "advantage|group|pairing|align|order|row", "F33", {}),
    "credit fades from the end": (credit_fades, "advantage|discount|credit|return|token|length", "F35", {}),
    "the batch's deviation for the group's": (
        batch_std_for_group_std,
        "advantage|deviation|std|scale|normal|group",
        "F25",
        {"recipe": "grpo", "task": f"arithmetic:easy?{SIZES}", "train.group_size": 16, "train.prompts_per_step": 16},
    ),
    "the entropy bonus is a penalty": (
        entropy_pushed_down,
        "entropy|loss|objective|sign|gradient",
        "F04",
        {"objective.entropy_coef": 0.05},
    ),
    "the sequence ratio over the padded width": (
        ratio_over_the_padded_width,
        "ratio|clip|padding|length|sequence|surrogate|objective",
        "F35",
        {"recipe": "gspo", "train.updates_per_batch": 2},
    ),
    "the weight is upside down": (
        weight_upside_down,
        "ratio|importance|weight|surrogate|objective",
        "F22",
        {"recipe": "cispo", "train.dynamic_sampling": False, "train.updates_per_batch": 2, "train.lr": 3e-4},
    ),
    "always the first prompts": (
        always_the_first_prompts,
        "data|prompt|stream|order|epoch|repeat|loader|sampler|duplicate",
        "F69",
        {},
    ),
    "solved groups are kept": (
        solved_groups_are_kept,
        "dynamic|filter|group|live|sampling",
        "F30",
        {"train.dynamic_sampling": True, "task": f"arithmetic:easy?{SIZES}", "train.group_size": 4},
    ),
    "resuming takes a new reference": (
        reference_anew_on_resuming,
        "checkpoint|resum|restor|reference|kl",
        "F52",
        {"recipe": "grpo", "objective.loss_kl.kl_coef": 0.2, "train.lr": 3e-4},
    ),
    "resuming misses a layer": (layer_not_restored, "checkpoint|resum|restor", "F70", {}),
}
