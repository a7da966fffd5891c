"""What the trainer says of tokens: twice the same, alone as in company, and as the model itself says it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.subject import Subject, in_double
from keel.types import Batch

SLACK = 20  # times the rounding that two ways to the same number may differ by
EXACT, ROUTED = 1e-4, 1e-2  # of a gradient's norm; transformers has norms in 32 bits, and a router's near-tie goes elsewhere
LOGITS = 2e7  # numbers of a table [rows, T, V] that is made at once, at most


def repeats(subject: Subject) -> Check:
    """Two forward passes of one batch, bit for bit."""
    first, second = subject.look(subject.batch), subject.look(subject.batch)
    if torch.equal(first, second):
        return Check("repeat", "two forward passes of one batch agree bit for bit")
    largest = float((first - second).abs().max())
    says = f"two forward passes of one batch differ by up to {largest:.2g} nats, with the same weights and tokens"
    return Check("repeat", says, (Finding(fault("K145"), says, largest, 0.0),))


def unsteady(subject: Subject, name: str) -> Check | None:
    """The check that cannot be made because nothing repeats, or because of what was found before; None where all is well."""
    if "steady" not in subject.facts:
        subject.facts["steady"] = torch.equal(subject.look(subject.batch), subject.look(subject.batch))
    if not subject.facts["steady"]:
        return Check(name, "", skipped="two forward passes of one batch differ, so nothing can be compared before that is mended")
    return subject.blocked(name, "forward")


def alone(subject: Subject) -> Check:
    """Every completion by itself, in a wider table, and in the batch: the same log-probabilities in 64-bit arithmetic."""
    if (skip := unsteady(subject, "padding") or subject.no_double("padding")) is not None:
        return skip
    batch, narrow = subject.batch, subject.seen.double()
    with subject.double():
        wide = in_double(batch)
        whole = subject.look(wide)
        ways = {
            "each completion alone": torch.cat(
                [_padded(subject.look(_cut(wide.rows(torch.tensor([i])))), whole) for i in range(len(batch))]
            ),
            "seven more columns of padding": subject.look(widened(wide, 7))[:, : whole.shape[1]],
            "rows in reverse": subject.look(wide.rows(torch.arange(len(batch)).flip(0))).flip(0),
        }
    subject.facts["floor"] = floor = _largest(whole - narrow, batch.mask)
    differ = {name: _largest(other - whole, batch.mask) for name, other in ways.items()}
    name, largest = max(differ.items(), key=lambda each: each[1])
    told = f"a completion's log-probabilities depend on its company by {largest:.1e} nats in 64 bits ({name})"
    says = f"{told}; 32-bit rounding is {floor:.1e}"
    if largest <= floor:
        return Check("padding", says)
    subject.block("forward", "a completion's log-probabilities depend on its company; see padding")
    return Check("padding", says, (Finding(fault("K140"), says, largest, floor, evidence=differ),))


def own_logits(subject: Subject) -> Check:
    """The trainer's log-probabilities against the model's own logits, divided by the temperature."""
    if (skip := unsteady(subject, "own logits")) is not None:
        return skip
    if "floor" not in subject.facts:
        alone(subject)
        if (skip := subject.blocked("own logits", "forward")) is not None:
            return skip
    batch, temperature = few_rows(subject), subject.sampling.temperature
    with torch.no_grad():
        logits = model_logits(subject, batch)
    mask, ours = batch.mask, subject.look(batch)
    far = {t: (of_logits(logits, batch, t) - ours)[mask].abs() for t in {temperature, 1.0}}
    floor = max(subject.facts.get("floor", 1e-5), 1e-6)
    at_asked, bound = far[temperature], SLACK * floor
    allowed = 0.02 if subject.policy.routing is not None else 0.0  # a router's near-tie sends a token elsewhere
    value = float(at_asked.max())
    says = f"the trainer's log-probabilities are within {value:.1e} nats of the model's own logits at temperature {temperature:g}"
    if float((at_asked > bound).double().mean()) <= allowed:
        return Check("own logits", f"{says}; rounding is {floor:.1e}", tuple(_of_the_old(subject, floor)))
    forgot = temperature != 1.0 and float((far[1.0] > bound).double().mean()) <= allowed
    says = f"the trainer's log-probabilities are up to {value:.2g} nats from the model's own logits at temperature {temperature:g}"
    why = ", and agree with those at temperature 1" if forgot else f"; rounding is {floor:.1e}"
    subject.block("forward", "the trainer's own log-probabilities are wrong; see own logits")
    return Check("own logits", says + why, (Finding(fault("K109" if forgot else "K188"), says + why, value, bound),))


def backward(subject: Subject) -> Check:
    """The gradient of the trainer's log-probabilities against that of the model's own logits, in 64 bits.

    Over all tokens and not below a temperature of 1: of one that is all but certain no gradient is left, only rounding.
    """
    if (skip := unsteady(subject, "backward") or subject.no_double("backward")) is not None:
        return skip
    if subject.large:
        return Check("backward", "", skipped="gradients in 64 bits of a model of this size take too much memory")
    temperature, bound = max(1.0, subject.sampling.temperature), EXACT if subject.policy.routing is None else ROUTED
    with subject.double():
        few = few_rows(subject)
        batch = replace(in_double(few.rows(torch.arange(min(2, len(few))))), kept=None)
        weight = torch.linspace(-1.0, 1.0, batch.mask.numel(), dtype=torch.float64).view(batch.mask.shape) * batch.mask
        ours = subject.policy.logp(batch, temperature=temperature).logp
        try:
            own = of_logits(model_logits(subject, batch), batch, temperature)
        except RuntimeError:
            return Check("backward", "", skipped="transformers does not compute this model in 64 bits")
        parameters = list(subject.trainer.parameters.values())
        found, due = (_flat_gradient((weight * torch.where(batch.mask, logp, 0.0)).sum(), parameters) for logp in (ours, own))
    off = float((found - due).norm() / due.norm().clamp(min=1e-300))
    says = f"the gradient of the trainer's log-probabilities is within {off:.1e} of its norm from that of the model's own logits"
    if off <= bound:
        return Check("backward", says)
    says = f"the gradient of the trainer's log-probabilities is {off:.2g} of its norm off that of the model's own logits"
    subject.block("gradient", "the gradient of log-probabilities is wrong; see backward")
    return Check("backward", says, (Finding(fault("K189"), says, off, bound),))


def _flat_gradient(loss: Tensor, parameters: list[Tensor]) -> Float[Tensor, " n"]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)])


def _of_the_old(subject: Subject, floor: float) -> Iterator[Finding]:
    """Whether logp_old, taken before the first update, is what the same weights say in it."""
    batch, temperature = subject.batch, subject.sampling.temperature
    if batch.logp_old is None or subject.config.train.bypass_old or subject.policy.routing is not None:
        return
    far = float((batch.logp_old - subject.seen)[batch.mask].abs().max())
    if far <= SLACK * floor:
        return
    at_one = (
        temperature != 1.0
        and float((batch.logp_old - subject.look(batch, temperature=1.0))[batch.mask].abs().max()) <= SLACK * floor
    )
    subject.block("forward", "logp_old is not what the policy says; see own logits")
    says = f"logp_old is up to {far:.2g} nats from what the same weights say in the update" + (
        ", and agrees with temperature 1" if at_one else f"; rounding is {floor:.1e}"
    )
    yield Finding(fault("K109" if at_one else "K188"), says, far, SLACK * floor)


# ── tables of logits ──────────────────────────────────────────────────────────────────────────────────────────────────


def few_rows(subject: Subject, batch: Batch | None = None) -> Batch:
    """As many rows as a table of all their logits may have."""
    batch = subject.batch if batch is None else batch
    size = batch.tokens.shape[1] * subject.policy.base.get_output_embeddings().weight.shape[0]
    return batch.rows(torch.arange(max(1, min(len(batch), int(LOGITS // size)))))


def model_logits(subject: Subject, batch: Batch) -> Float[Tensor, "B T V"]:
    """The model's own logits at each completion token, by transformers and nothing of keel's."""
    length = batch.prompt_len + batch.completion_len
    inside = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) < length[:, None]
    ids = torch.where(inside, batch.tokens, 0)
    position = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    logits = subject.policy.base(input_ids=ids, attention_mask=inside.long(), position_ids=position, use_cache=False).logits
    column = (batch.prompt_len[:, None] + torch.arange(batch.mask.shape[1], device=ids.device) - 1).clamp(max=ids.shape[1] - 1)
    chosen = logits.gather(1, column[:, :, None].expand(-1, -1, logits.shape[-1]))
    return chosen if chosen.dtype == torch.float64 else chosen.float()


def of_logits(logits: Float[Tensor, "B T V"], batch: Batch, temperature: float) -> Float[Tensor, "B T"]:
    """Log-probabilities of the batch's tokens under logits at a temperature, over the kept set where there is one."""
    log_probs = distribution(logits, batch, temperature)
    column = (batch.prompt_len[:, None] + torch.arange(batch.mask.shape[1])).clamp(max=batch.tokens.shape[1] - 1)
    return log_probs.gather(2, batch.tokens.gather(1, column)[:, :, None])[:, :, 0]


def distribution(logits: Float[Tensor, "B T V"], batch: Batch, temperature: float) -> Float[Tensor, "B T V"]:
    """Log-probabilities of all tokens."""
    scaled = logits / temperature
    return (scaled if batch.kept is None else scaled.masked_fill(~batch.kept, float("-inf"))).log_softmax(-1)


def widened(batch: Batch, columns: int) -> Batch:
    """The same batch with more padding, and junk in it."""
    fills = dict(tokens=3, mask=False, versions=-1, logp_rollout=torch.nan, logp_old=torch.inf, logp_ref=torch.nan, kept=True)
    fills |= dict(experts=-1, experts_rollout=-1, experts_old=-1)

    def wider(name: str, fill: object) -> Tensor:
        value = getattr(batch, name)
        return torch.cat((value, torch.full((len(value), columns, *value.shape[2:]), fill, dtype=value.dtype)), 1)

    return replace(batch, **{name: wider(name, fill) for name, fill in fills.items() if getattr(batch, name) is not None})


def _cut(row: Batch) -> Batch:
    """A batch of one row without any padding."""
    length, tokens = int(row.prompt_len + row.completion_len), int(row.completion_len)
    per_token = {
        n: getattr(row, n)[:, :tokens]
        for n in ("mask", "logp_rollout", "versions", "logp_old", "logp_ref", "kept")
        if getattr(row, n) is not None
    }
    per_place = {
        n: getattr(row, n)[:, :length]
        for n in ("tokens", "experts", "experts_rollout", "experts_old")
        if getattr(row, n) is not None
    }
    return replace(row, **per_token, **per_place)


def _padded(row: Float[Tensor, "1 t"], like: Float[Tensor, "B T"]) -> Float[Tensor, "1 T"]:
    return torch.nn.functional.pad(row, (0, like.shape[1] - row.shape[1]))


def _largest(difference: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> float:
    return float(difference[mask].abs().max())
