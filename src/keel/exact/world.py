"""Worlds of a few tokens, in float64, of which every completion is known.

A policy is a table of log-probabilities [P, K, V]: for each of P prompts and K prefixes (`Tree`), the next token's. Four of them
may differ: `policy` (now, a function of the parameters), `old` (at the sampling weights), `sampler` (the engine) and `ref`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.errors import KeelError, nearest

Table = Float[Tensor, "P K V"]


@dataclass(frozen=True)
class Setting:
    """The knobs of a world. The defaults are on-policy, without engine gap, graded without error.

    Args:
        vocabulary: tokens, of which token 0 ends a completion.
        max_tokens: the cap; a completion that reaches it without token 0 is truncated.
        prompts: prompts of the world, and groups of a batch.
        group_size: completions of a group.
        reward: "answer": 1 where the first token is the prompt's own, so that correctness and length are two decisions; "real":
            any number for each completion; "zero"; "coin": ±1 by a coin, whatever the completion.
        drift: norm of a random step per logit from π_old to π (staleness), nats.
        gap: norm of a random step per logit from μ to π_old (engine gap), nats.
        ref: the same from the reference to π_old.
        top_p: nucleus of the sampler's distribution; 1 samples from all of it.
        replay_mask: the trainer's log-probabilities are taken over the sampler's nucleus too.
        tpr, fpr: chance that the grader accepts a right and a wrong answer.
        favours_long: added to `fpr` for completions of full length: an error that depends on a surface feature.
        policy: "table", a logit for each prefix and token; "shared", logits through features that prefixes share; "moe", through
            the likelier of two experts, chosen by a router.
        live_only: groups without both right and wrong answers are drawn again, prompts too (dynamic sampling).
        cuts: micro-batches that the batch is cut into.
    """

    vocabulary: int = 3
    max_tokens: int = 2
    prompts: int = 2
    group_size: int = 2
    reward: str = "answer"
    drift: float = 0.0
    gap: float = 0.0
    ref: float = 0.7
    top_p: float = 1.0
    replay_mask: bool = False
    tpr: float = 1.0
    fpr: float = 0.0
    favours_long: float = 0.0
    policy: str = "table"
    live_only: bool = False
    cuts: int = 2

    def __post_init__(self):
        for name, known in (("reward", ("answer", "real", "zero", "coin")), ("policy", ("table", "shared", "moe"))):
            if getattr(self, name) not in known:
                raise KeelError(f"{name} is {getattr(self, name)!r}; {nearest(getattr(self, name), known)}Expected {known}.")
        for name, least in (("vocabulary", 2), ("max_tokens", 1), ("prompts", 1), ("group_size", 1), ("cuts", 1)):
            if getattr(self, name) < least:
                raise KeelError(f"A world with {name}={getattr(self, name)}: expected at least {least}.")
        if not (0 <= self.fpr <= self.fpr + self.favours_long <= 1 and 0 <= self.tpr <= 1 and 0 < self.top_p <= 1):
            raise KeelError(f"{self}: expected chances tpr, fpr and fpr + favours_long between 0 and 1, and 0 < top_p ≤ 1.")

    @classmethod
    def of(cls, conditions: dict[str, Any]) -> Setting:
        """A setting from named knobs. Raises KeelError for an unknown one, with the nearest."""
        known = [item.name for item in fields(cls)]
        for name in conditions:
            if name not in known:
                raise KeelError(f"A world has no knob {name!r}; {nearest(name, known)}Expected one of: {', '.join(known)}.")
        return cls(**conditions)


@dataclass(frozen=True)
class Tree:
    """Every completion over a vocabulary: N of them, of at most T tokens, over K prefixes.

    Args:
        tokens, mask: [N, T]; right-padded.
        node: [N, T] the prefix that each token was drawn after; 0 where masked.
        parent: [K] the prefix before its last token, −1 for the empty one; last: [K] that token.
    """

    tokens: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    node: Int[Tensor, "N T"]

    @classmethod
    def of(cls, vocabulary: int, max_tokens: int) -> Tree:
        """Prefixes hold no end token; a completion is a prefix and an end token, or a whole prefix of `max_tokens` tokens."""
        words = [list(itertools.product(range(1, vocabulary), repeat=size)) for size in range(max_tokens + 1)]
        number = {prefix: k for k, prefix in enumerate(itertools.chain(*words[:-1]))}
        completions = [(*prefix, 0) for prefix in number] + words[-1]
        pad = [(*y, *[0] * (max_tokens - len(y))) for y in completions]
        node = [[number[y[:t]] if t < len(y) else 0 for t in range(max_tokens)] for y in completions]
        mask = [[t < len(y) for t in range(max_tokens)] for y in completions]
        return cls(torch.tensor(pad), torch.tensor(mask), torch.tensor(node))

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        return self.mask.sum(1)

    @property
    def truncated(self) -> Bool[Tensor, " N"]:
        """Completions that the cap cut off."""
        last = self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]
        return last != 0

    def of_tokens(self, table: Float[Tensor, "P K V"]) -> Float[Tensor, "P N T"]:
        """Each token's entry of a table; 0 where masked."""
        return torch.where(self.mask, table[:, self.node, self.tokens], 0.0)

    def of_completions(self, table: Table) -> Float[Tensor, "P N"]:
        """Each completion's log-probability."""
        return self.of_tokens(table).sum(-1)

    def reach(self, table: Table) -> Float[Tensor, "P K"]:
        """Probability of each prefix: that of all completions that pass it."""
        chance = self.of_completions(table).exp()
        through = torch.zeros(len(self.tokens), table.shape[1], dtype=chance.dtype)
        through[torch.arange(len(self.tokens))[:, None].expand_as(self.node)[self.mask], self.node[self.mask]] = 1.0
        return chance @ through


Policy = Callable[[Float[Tensor, " D"]], Table]


@dataclass(frozen=True, eq=False)
class World:
    """Prompts, completions, four policies, a reward and a grader; everything about them is known.

    Args:
        setting: the knobs that it was made with.
        tree: the completions.
        policy: parameters → log-probabilities.
        theta, theta_old: parameters now and at sampling.
        old, sampler, ref: tables of log-probabilities; −inf where the sampler's nucleus leaves a token out.
        reward: [P, N] of each completion, if it was graded without error.
    """

    setting: Setting
    tree: Tree
    policy: Policy
    theta: Float[Tensor, " D"]
    theta_old: Float[Tensor, " D"]
    sampler: Table
    ref: Table
    reward: Float[Tensor, "P N"]

    @classmethod
    def random(cls, setting: Setting, seed: int) -> World:
        """The world of these knobs and this seed; knobs that are only numbers change nothing else in it."""
        generator = torch.Generator().manual_seed(seed)
        tree = Tree.of(setting.vocabulary, setting.max_tokens)
        policy, size = _policy(setting, tree, generator)
        old, drift, gap, ref = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(4))
        reward = torch.randn(setting.prompts, len(tree.tokens), generator=generator, dtype=torch.float64)
        sampler = _nucleus(policy(old - setting.gap * gap), setting.top_p)
        if setting.replay_mask:
            policy = _replaying(policy, sampler.isfinite())
        return cls(
            setting=setting,
            tree=tree,
            policy=policy,
            theta=old + setting.drift * drift,
            theta_old=old,
            sampler=sampler,
            ref=policy(old + setting.ref * ref),
            reward=_reward(setting, tree, reward),
        )

    @classmethod
    def of_pass_rates(cls, rates: Sequence[float], **knobs: Any) -> World:
        """Prompts of these pass rates, each answered by one token, right or wrong."""
        setting = Setting(vocabulary=2, max_tokens=1, prompts=len(rates), **knobs)
        right = torch.tensor(rates, dtype=torch.float64).logit()
        theta = torch.stack([torch.zeros_like(right), right], 1).flatten()
        world = cls.random(setting, seed=0)
        table = world.policy(theta)
        return replace(world, theta=theta, theta_old=theta, sampler=table, ref=table)

    @cached_property
    def old(self) -> Table:
        return self.policy(self.theta_old)

    @cached_property
    def now(self) -> Table:
        return self.policy(self.theta)

    @cached_property
    def accepted(self) -> Float[Tensor, "P N"]:
        """Chance that the grader accepts each completion; for rewards of 0 and 1."""
        longest = (self.tree.lengths == self.setting.max_tokens).double()
        wrongly = self.setting.fpr + self.setting.favours_long * longest
        return self.reward * self.setting.tpr + (1 - self.reward) * wrongly

    @cached_property
    def noisy(self) -> bool:
        """Whether the same completion may get different rewards."""
        graded = (self.setting.tpr, self.setting.fpr, self.setting.favours_long) != (1.0, 0.0, 0.0)
        return self.setting.reward == "coin" or graded

    @cached_property
    def graded(self) -> tuple[Float[Tensor, "P N R"], Float[Tensor, "P N R"]]:
        """The rewards that each completion may get, and the chance of each."""
        if self.setting.reward == "coin":
            return torch.ones_like(self.reward)[..., None] * torch.tensor([1.0, -1.0]), torch.full(
                (*self.reward.shape, 2), 0.5
            ).double()
        if self.noisy:
            value = torch.stack([torch.ones_like(self.reward), torch.zeros_like(self.reward)], -1)
            return value, torch.stack([self.accepted, 1 - self.accepted], -1)
        return self.reward[..., None], torch.ones_like(self.reward)[..., None]

    @cached_property
    def effective_share(self) -> float:
        """Effective sample size of whole-completion importance weights π/μ, as a share of the samples: 1/E_μ[(π/μ)²]."""
        now, sampled = self.tree.of_completions(self.now), self.tree.of_completions(self.sampler)
        second = torch.where(sampled.isfinite(), (2 * now - sampled).exp(), 0.0).sum(1)
        return float((1 / second).mean())


def _policy(setting: Setting, tree: Tree, generator: torch.Generator) -> tuple[Policy, int]:
    """The function from parameters to log-probabilities, and how many parameters it takes."""
    prompts, nodes, vocabulary = setting.prompts, int(tree.node.max()) + 1, setting.vocabulary
    if setting.policy == "table":
        shape = (prompts, nodes, vocabulary)
        return (lambda theta: theta.view(shape).log_softmax(-1)), prompts * nodes * vocabulary
    width = 4
    features = torch.randn(prompts, nodes, width, generator=generator, dtype=torch.float64)
    if setting.policy == "shared":
        return (lambda theta: (features @ theta.view(width, vocabulary)).log_softmax(-1)), width * vocabulary
    return MoePolicy(features, experts=2, vocabulary=vocabulary), width * 2 * (1 + vocabulary)


@dataclass(frozen=True)
class MoePolicy:
    """Logits of the likeliest expert, times its router probability.

    Args:
        features: [P, K, width] of each prefix.
        routing: [P, K] experts to replay, or None to choose them; the router's probability is recomputed and keeps its gradient.
    """

    features: Float[Tensor, "P K width"]
    experts: int
    vocabulary: int
    routing: Int[Tensor, "P K"] | None = None

    def __call__(self, theta: Float[Tensor, " D"]) -> Table:
        width = self.features.shape[-1]
        router, experts = theta.split([width * self.experts, width * self.experts * self.vocabulary])
        chance = (self.features @ router.view(width, self.experts)).softmax(-1)
        logits = torch.einsum("pkw,wev->pkev", self.features, experts.view(width, self.experts, self.vocabulary))
        chosen = (chance.argmax(-1) if self.routing is None else self.routing)[..., None]
        picked = logits.gather(2, chosen[..., None].expand(*chosen.shape, self.vocabulary))[:, :, 0]
        return (picked * chance.gather(-1, chosen)).log_softmax(-1)

    def chosen(self, theta: Float[Tensor, " D"]) -> Int[Tensor, "P K"]:
        """The experts that the router chooses at these parameters."""
        width = self.features.shape[-1]
        return (self.features @ theta[: width * self.experts].view(width, self.experts)).argmax(-1)

    def replaying(self, routing: Int[Tensor, "P K"]) -> MoePolicy:
        """The same policy with the choice of experts held fixed."""
        return replace(self, routing=routing)


def _nucleus(table: Table, top_p: float) -> Table:
    """Renormalised over the fewest likeliest tokens that together reach `top_p`; −inf elsewhere."""
    if top_p >= 1.0:
        return table
    ordered, place = table.exp().sort(-1, descending=True)
    left = ordered.cumsum(-1) - ordered < top_p
    kept = torch.zeros_like(left).scatter(-1, place, left)
    return table.masked_fill(~kept, float("-inf")).log_softmax(-1)


def _replaying(policy: Policy, kept: Bool[Tensor, "P K V"]) -> Policy:
    impossible = -1e9  # finite, so that derivatives of what is never sampled are zero and not NaN
    return lambda theta: policy(theta).masked_fill(~kept, impossible).log_softmax(-1)


def _reward(setting: Setting, tree: Tree, real: Float[Tensor, "P N"]) -> Float[Tensor, "P N"]:
    if setting.reward == "real":
        return real
    if setting.reward != "answer":
        return torch.zeros_like(real)
    own = 1 + torch.arange(setting.prompts) % (setting.vocabulary - 1)
    return (tree.tokens[:, 0] == own[:, None]).double()
