"""Routing, heard and replayed, in real mixtures of experts: keel's own decoder and transformers' models alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from keel.errors import KeelError
from keel.models.packing import pack
from keel.models.routing import Routers, check_recorded, check_replayable, followed, is_mixture
from keel.rollout.engine import Seed
from keel.rollout.local import LocalEngine
from keel.types import Batch, Prompt, Sampling

STYLES = ["qwen3_moe", "qwen3_moe-transformers", "qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3"]
NUMBER = {"deepseek_v2": 8, "deepseek_v3": 8}  # of experts; the others have 4


@pytest.fixture(params=STYLES)
def style(request):
    return request.param


@pytest.fixture
def policy(make_policy, style):
    kind, _, through = style.partition("-")
    made = make_policy(kind)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in made.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if through:
        made.__dict__["decoder"] = None
    assert (made.decoder is None) == (style != "qwen3_moe")
    return made


def make_batch(rows=8):
    generator = torch.Generator().manual_seed(2)
    prompt_len = torch.tensor([3, 6])[torch.arange(rows) % 2]
    completion_len = torch.randint(1, 8, (rows,), generator=generator)
    tokens = torch.randint(5, 9, (rows, int((prompt_len + completion_len).max())), generator=generator)
    tokens[:, :3] = 7
    mask = torch.arange(int(completion_len.max())) < completion_len[:, None]
    zeros = torch.zeros(mask.shape)
    return Batch(
        tokens=tokens, prompt_len=prompt_len, completion_len=completion_len, mask=mask, logp_rollout=zeros,
        group=torch.arange(rows) % 2, reward=zeros[:, 0], scorable=mask[:, 0], correct=mask[:, 0], truncated=~mask[:, 0],
        versions=zeros.long(),
    )  # fmt: skip


def elsewhere(experts, number):
    """Other experts than those, still different from each other."""
    return torch.where(experts < 0, experts, (experts + 1) % number)


def value_and_gradient(policy, batch):
    policy.model.zero_grad()
    seen = policy.logp(batch, replay_experts=True)
    weights = torch.sin(torch.arange(seen.logp.numel(), dtype=torch.float32)).view_as(seen.logp)
    (seen.logp * weights).sum().backward()
    return seen, {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def test_what_is_heard_is_what_the_router_prefers(policy, style):
    """Against transformers' own router logits, where the model gives them."""
    batch = make_batch()
    experts = policy.logp(batch).experts
    kind = style.partition("-")[0]
    inside = torch.arange(batch.tokens.shape[1]) < (batch.prompt_len + batch.completion_len)[:, None]
    assert (experts[inside] >= 0).all() and (experts[inside] < NUMBER.get(kind, 4)).all() and (experts[~inside] == -1).all()
    assert experts.shape[2:] == (policy.routing.layers, policy.routing.top_k)
    if not kind.startswith("deepseek"):
        out = policy.model(input_ids=batch.tokens, output_router_logits=True)
        logits = torch.stack([layer.view(*batch.tokens.shape, -1) for layer in out.router_logits], 2)
        assert torch.equal(experts[inside].sort(-1).values.long(), logits.topk(2, -1).indices[inside].sort(-1).values)


def test_replaying_what_it_chose_changes_no_bit(policy):
    batch = make_batch()
    free, free_gradient = value_and_gradient(policy, batch)
    replayed, gradient = value_and_gradient(policy, replace(batch, experts=free.experts))
    assert torch.equal(free.logp, replayed.logp) and torch.equal(free.experts, replayed.experts)
    assert all(torch.equal(free_gradient[name], gradient[name]) for name in free_gradient)


def test_other_experts_give_other_values_and_the_router_learns(policy):
    batch = make_batch()
    free, before = value_and_gradient(policy, batch)
    moved, gradient = value_and_gradient(policy, replace(batch, experts=elsewhere(free.experts, policy.routing.experts)))
    assert (free.logp - moved.logp).abs().max() > 1e-3
    routers = [name for name in gradient if name.endswith(".mlp.gate.weight")]
    assert len(routers) == policy.routing.layers
    for name in routers:
        assert gradient[name].abs().max() > 0 and not torch.equal(gradient[name], before[name])


def test_the_routers_gradient_under_replay_is_that_of_finite_differences(policy):
    if policy.decoder is None:
        policy.model.set_experts_implementation("eager")  # their grouped product has no float64
    policy.model.double()
    batch = make_batch()
    batch = replace(batch, experts=elsewhere(policy.logp(batch).experts, policy.routing.experts))
    _, gradient = value_and_gradient(policy, batch)
    name = [n for n in gradient if n.endswith(".mlp.gate.weight")][-1]
    weight = dict(policy.model.named_parameters())[name]
    place = divmod(int(gradient[name].abs().argmax()), weight.shape[1])
    step = 3e-3  # routers compute in fp32 whatever the model is in

    def value():
        with torch.no_grad():
            logp = policy.logp(batch, replay_experts=True).logp
            return float((logp * torch.sin(torch.arange(logp.numel(), dtype=torch.float32)).view_as(logp)).sum())

    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * step
            ends.append(value())
            weight[place] -= sign * step
    assert float(gradient[name][place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2, abs=1e-5)


def test_unknown_experts_are_chosen_anew(policy):
    batch = make_batch()
    free = policy.logp(batch)
    unknown = replace(batch, experts=torch.full_like(free.experts, -1))
    assert torch.equal(policy.logp(unknown, replay_experts=True).logp, free.logp)


def test_rows_cut_apart_are_replayed_alike(policy):
    batch = make_batch()
    batch = replace(batch, experts=elsewhere(policy.logp(batch).experts, policy.routing.experts))
    whole = policy.logp(batch, replay_experts=True).logp
    parts = [policy.logp(batch.rows(torch.tensor(rows)), replay_experts=True).logp for rows in ([0, 3], [1, 2, 4], [5, 6, 7])]
    assert (whole[torch.tensor([0, 3, 1, 2, 4, 5, 6, 7])] - torch.cat(parts)).abs().max() < 1e-5


def test_gradient_checkpointing_is_led_the_second_time_too(policy):
    batch = make_batch()
    batch = replace(batch, experts=elsewhere(policy.logp(batch).experts, policy.routing.experts))
    _, plain = value_and_gradient(policy, batch)
    policy.model.activation_checkpointing_enable()
    policy.model.train()
    _, recomputed = value_and_gradient(policy, batch)
    assert all((plain[name] - recomputed[name]).abs().max() < 1e-5 * plain[name].abs().max().clamp(min=1e-3) for name in plain)


@pytest.mark.parametrize("form", [{"use_reentrant": True}])
def test_checkpointing_that_cannot_be_led_is_refused(make_policy, form):
    policy, batch = make_policy("mixtral"), make_batch()
    batch = replace(batch, experts=policy.logp(batch).experts)
    policy.model.activation_checkpointing_enable(form)
    policy.model.train()
    with pytest.raises(KeelError, match="cannot follow"):
        policy.logp(batch, replay_experts=True)


def test_the_engine_records_what_the_trainer_would_choose(policy):
    """Through prompts of several lengths: transformers' models get them left-padded."""
    prompts = [Prompt(id=f"p{n}", text="", answer="", token_ids=tuple(range(5, 5 + n))) for n in (2, 5, 3)]
    made = LocalEngine(policy).generate(prompts, Sampling(max_completion_tokens=6), Seed(0, 0), 4)
    for c, prompt in zip(made, [p for p in prompts for _ in range(4)], strict=True):
        tokens = torch.cat((torch.tensor(prompt.token_ids), c.token_ids))[None]
        ours = policy.logp(one_row(tokens, len(prompt.token_ids))).experts[0]
        recorded = torch.cat((c.prompt_experts, c.experts))
        assert (recorded[-1] == -1).all()
        assert torch.equal(recorded[:-1].sort(-1).values, ours[:-1].sort(-1).values)


def one_row(tokens, prompt):
    completion = torch.tensor([tokens.shape[1] - prompt])
    mask = torch.ones(1, int(completion), dtype=torch.bool)
    zeros = torch.zeros(mask.shape)
    return Batch(
        tokens=tokens, prompt_len=torch.tensor([prompt]), completion_len=completion, mask=mask, logp_rollout=zeros,
        group=torch.zeros(1).long(), reward=zeros[:, 0], scorable=mask[:, 0], correct=mask[:, 0], truncated=~mask[:, 0],
        versions=zeros.long(),
    )  # fmt: skip


def test_prefixes_that_go_to_other_experts_are_not_shared():
    tokens = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 8]])
    lengths, routing = torch.tensor([3, 3, 3]), torch.zeros(3, 3, 1, 2, dtype=torch.int16)
    assert len(pack(tokens, lengths)) == len(pack(tokens, lengths, routing=routing)) == 4
    routing[1, 1] = 1
    packing = pack(tokens, lengths, routing=routing)
    assert len(packing) == 6  # the second row leaves the others at its second token
    assert torch.equal(packing.tokens[packing.node], tokens)


def test_followed_takes_the_recorded_ones_where_they_are_known():
    own, chosen = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[-1, -1], [1, 0]], dtype=torch.int16)
    assert followed(own, chosen).tolist() == [[0, 1], [1, 0]]


def test_models_that_cannot_be_led_are_refused(make_policy):
    dense, unknown = make_policy("qwen3"), make_policy("phimoe")
    assert dense.routing is None and unknown.routing is None and Routers.of(unknown.base) is None
    assert is_mixture(unknown.base.config) and not is_mixture(dense.base.config)
    with pytest.raises(KeelError, match="is dense"):
        check_replayable(dense.name, dense.base.config, dense.routing)
    with pytest.raises(KeelError, match="routers keel cannot lead"):
        check_replayable(unknown.name, unknown.base.config, unknown.routing)
    batch = replace(make_batch(), experts=torch.zeros(8, make_batch().tokens.shape[1], 2, 2, dtype=torch.int16))
    for policy in (dense, unknown):
        with pytest.raises(KeelError, match="Routing was to be replayed"):
            policy.logp(batch, replay_experts=True)


def test_records_that_do_not_fit_the_model_are_refused(make_policy):
    routing = make_policy("qwen3_moe").routing
    with pytest.raises(KeelError, match="did not say which experts"):
        check_recorded(None, routing)
    for wrong in (torch.zeros(1, 3, 3, 2), torch.zeros(1, 3, 2, 1), torch.full((1, 3, 2, 2), 4)):
        with pytest.raises(KeelError, match="it serves another model"):
            check_recorded(wrong.to(torch.int16), routing)
