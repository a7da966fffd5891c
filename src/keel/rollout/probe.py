"""A start-up question to any engine: are your log-probabilities those of the distribution that you sample from, at these weights?

The answer is measured on a few tokens at temperature .8, against a forward pass of the policy's own architecture. At that
temperature raw log-probabilities, old weights and a stale prefix cache all give themselves away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from keel.errors import KeelError
from keel.models.policy import Policy
from keel.rollout.engine import Engine, Seed
from keel.types import Completion, Prompt, Sampling

TEMPERATURE = 0.8
STEP = 2**31 + 1  # the step that probes draw under: never training's, nor an evaluation's
PROMPTS = (5, 150)  # tokens; the long one fills a block of any prefix cache
TOKENS, SAMPLES = 8, 2
TOLERANCE = {"float32": 2e-3, "float16": 0.3, "bfloat16": 1.0}  # nats at the worst token


@dataclass(frozen=True)
class Probe:
    """What a probe found, in nats over all of its tokens.

    Args:
        mean, largest: |log-probability of the engine − of the reference|.
        raw_mean, raw_largest: the same against log-probabilities at temperature 1.
    """

    mean: float
    largest: float
    raw_mean: float
    raw_largest: float


class Reference:
    """The policy's architecture without weights of its own: log-probabilities of tokens under any weights that it is handed."""

    def __init__(self, policy: Policy):
        base = policy.base
        with torch.device("meta"):
            self.skeleton = type(base)(base.config).to(base.dtype).eval()
        names = {name for name, _ in self.skeleton.named_buffers()}
        self.buffers = {name: buffer for name, buffer in base.named_buffers() if name in names}

    @torch.no_grad()
    def logits(self, weights: Mapping[str, Tensor], prompt: Sequence[int], completion: Tensor) -> Float[Tensor, "T V"]:
        """Those that each token of the completion was drawn from."""
        device = next(iter(weights.values())).device
        ids = torch.cat((torch.tensor(prompt), completion.cpu()))[None].to(device)
        state = {**self.buffers, **weights}
        out = functional_call(self.skeleton, state, kwargs=dict(input_ids=ids, use_cache=False), tie_weights=False)
        return out.logits[0, len(prompt) - 1 : -1].float().cpu()


def probe(engine: Engine, policy: Policy, weights: Mapping[str, Tensor], context: int, reference: Reference | None = None) -> Probe:
    """Have the engine complete a few random prompts, and compare."""
    reference = reference or Reference(policy)
    prompts = _prompts(policy, context)
    sampling = Sampling(temperature=TEMPERATURE, max_completion_tokens=min(TOKENS, context - 1))
    completions = engine.generate(prompts, sampling, Seed(0, STEP), SAMPLES)
    alive = [c for c in completions if c.finish != "error"]
    if not alive:
        raise KeelError(f"The engine failed on every prompt of a probe: {completions[0].error}. Expected completions.")
    by_id = {prompt.id: prompt.token_ids for prompt in prompts}
    logits = [reference.logits(weights, by_id[c.prompt_id], c.token_ids) for c in alive]
    tempered, raw = (_gaps(alive, logits, temperature) for temperature in (TEMPERATURE, 1.0))
    return Probe(float(tempered.mean()), float(tempered.max()), float(raw.mean()), float(raw.max()))


def check_probe(found: Probe, dtype: str, version: int) -> None:
    """Refuse an engine whose log-probabilities are not those that it should have sampled from.

    Raises:
        KeelError: they are raw ones, or those of other weights.
    """
    limit = TOLERANCE[dtype]
    if found.mean > 2 * found.raw_mean and found.mean > limit / 20:
        raise KeelError(
            f"Probe at temperature {TEMPERATURE}: the engine's log-probabilities differ by up to {found.largest:.2g} nats from "
            f"those of the distribution that it samples from, and by {found.raw_largest:.2g} from those at temperature 1. It "
            "returns *raw* log-probabilities; expected processed ones. Ask it for those (vLLM: logprobs_mode = processed_logprobs)."
        )
    if not found.largest <= limit:
        raise KeelError(
            f"Probe of version {version}: the engine's log-probabilities differ by up to {found.largest:.2g} nats "
            f"({found.mean:.2g} in the mean) from a forward pass at the weights that it was sent; at most {limit:g} was "
            f"expected in {dtype}. It samples from other weights, keeps a prefix cache of older ones, or computes this "
            "architecture otherwise. Do not train on it."
        )


def _prompts(policy: Policy, context: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    rows = policy.base.get_output_embeddings().weight.shape[0]
    room = max(1, context - TOKENS)
    draws = [torch.randint(0, rows, (min(length, room),), generator=generator).tolist() for length in PROMPTS]
    return [Prompt(f"probe-{i}", "", "", tuple(ids)) for i, ids in enumerate(draws)]


def _gaps(completions: Sequence[Completion], logits: Sequence[Tensor], temperature: float) -> Float[Tensor, " N"]:
    """|engine's − reference's log-probability| of every token."""
    rows = []
    for c, row in zip(completions, logits, strict=True):
        reference = (row / temperature).log_softmax(-1).gather(1, c.token_ids.long()[:, None])[:, 0]
        rows.append((c.logp_rollout - reference).abs())
    return torch.cat(rows)
