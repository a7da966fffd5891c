"""What holds for every way of sampling in the local engine: exact log-probabilities, a seed for each sample, no old weights."""

import dataclasses

import pytest
import torch

from keel.diagnostics.routing import at_predictions
from keel.errors import KeelError
from keel.rollout.engine import Seed, check_completions
from keel.rollout.local import LocalEngine
from keel.rollout.sampling import distribution, draw
from keel.rollout.serving import TransformersForward
from keel.training.batch import batch_from_groups
from keel.types import Group, Prompt, Sampling, Score

KINDS = ["qwen3", "llama", "qwen3_moe", "gpt2"]
SAMPLINGS = {
    "plain": Sampling(max_completion_tokens=12),
    "cool": Sampling(temperature=0.6, max_completion_tokens=12),
    "hot": Sampling(temperature=1.3, max_completion_tokens=12),
    "top_p": Sampling(temperature=0.9, top_p=0.7, max_completion_tokens=12),
    "top_k": Sampling(top_k=5, max_completion_tokens=12),
    "min_p": Sampling(min_p=0.3, max_completion_tokens=12),
}
SEED = Seed(run=3, step=7)


def prompts():
    return [Prompt(id=f"p{i}", text="", answer="", token_ids=tuple(range(5, 5 + 2 + i))) for i in range(4)]


def sharpened(make_policy, kind):
    """A random policy with a spread-out distribution, so that truncation truncates and samples end."""
    policy = make_policy(kind)
    policy.base.get_output_embeddings().weight.data.mul_(12.0)
    return policy


def as_batch(asked, completions, group_size):
    rows = [completions[i : i + group_size] for i in range(0, len(completions), group_size)]
    return batch_from_groups([Group(p, tuple(r), (Score(1.0),) * group_size) for p, r in zip(asked, rows, strict=True)])


def same(a, b):
    return torch.equal(a.token_ids, b.token_ids) and a.finish == b.finish


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_log_probabilities_are_those_of_the_distribution_sampled_from(make_policy, kind, name):
    policy, sampling = sharpened(make_policy, kind), SAMPLINGS[name]
    completions = LocalEngine(policy).generate(prompts(), sampling, SEED, 6)
    vocab = policy.base.get_output_embeddings().weight.shape[0]
    check_completions(prompts(), completions, 6, sampling, end_ids=policy.end_ids, vocab_size=vocab, version=0)
    batch = as_batch(prompts(), completions, 6)
    with torch.no_grad():
        seen = policy.logp(batch, temperature=sampling.temperature)
    assert (seen.logp - batch.logp_rollout)[batch.mask].abs().max() < 1e-4
    if sampling.truncated:  # without the kept set the trainer would see another distribution
        blind = policy.logp(dataclasses.replace(batch, kept=None), temperature=sampling.temperature)
        assert (blind.logp - batch.logp_rollout)[batch.mask].abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "top_p"])
def test_a_sample_does_not_depend_on_its_batch(make_policy, kind, name):
    engine = LocalEngine(sharpened(make_policy, kind))
    together = engine.generate(prompts(), SAMPLINGS[name], SEED, 6)
    alone = engine.generate(prompts()[2:3], SAMPLINGS[name], SEED, 6)
    fewer = engine.generate(prompts(), SAMPLINGS[name], SEED, 2)
    engine.max_branches = 6
    in_turn = engine.generate(prompts(), SAMPLINGS[name], SEED, 6)
    assert all(same(a, b) for a, b in zip(alone, together[12:18], strict=True))
    assert all(same(a, together[6 * (i // 2) + i % 2]) for i, a in enumerate(fewer))
    assert all(same(a, b) for a, b in zip(in_turn, together, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["cool", "top_p"])
def test_weights_that_come_in_the_middle_are_used_from_the_next_token_on(make_policy, kind, name):
    """Each token has the log-probability, and the experts, of the weights whose version it carries."""
    old, new, sampling = sharpened(make_policy, kind), make_policy(kind, seed=5), SAMPLINGS[name]
    new.base.get_output_embeddings().weight.data.mul_(12.0)
    engine, asked = LocalEngine(old), []

    def renew():
        asked.append(engine.version)
        if len(asked) == 3:
            engine.load(new.weights(), 1)
        return len(asked) == 3

    engine.renew = renew
    made = engine.generate(prompts(), sampling, SEED, 6)
    batch = as_batch(prompts(), made, 6)
    assert any(len(c.versions.unique()) == 2 for c in made)
    assert all(c.versions.tolist() == sorted(c.versions.tolist()) and int((c.versions == 0).sum()) <= 3 for c in made)
    for version, policy in enumerate((old, new)):
        with torch.no_grad():
            seen = policy.logp(batch, temperature=sampling.temperature)
        mine = batch.mask & (batch.versions == version)
        assert (seen.logp - batch.logp_rollout)[mine].abs().max() < 1e-4
        if kind == "qwen3_moe":  # a token is read by the weights that draw the next one
            ours, theirs = (at_predictions(experts, batch) for experts in (seen.experts, batch.experts_rollout))
            assert torch.equal(ours[mine].sort(-1).values, theirs[mine].sort(-1).values)


def test_other_seeds_draw_other_tokens(make_policy):
    engine = LocalEngine(make_policy())
    first, again, other_step, other_run = (
        engine.generate(prompts(), SAMPLINGS["plain"], seed, 6) for seed in (SEED, SEED, Seed(run=3, step=8), Seed(run=4, step=7))
    )
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other_step, strict=True) if len(a.token_ids) > 3)
    assert not any(same(a, b) for a, b in zip(first, other_run, strict=True) if len(a.token_ids) > 3)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_moe"])
def test_the_compact_engine_draws_what_transformers_draws(make_policy, kind):
    policy = sharpened(make_policy, kind)
    engine = LocalEngine(policy)
    ours = engine.generate(prompts(), SAMPLINGS["cool"], SEED, 6)
    engine.forward = TransformersForward(policy.base)
    theirs = engine.generate(prompts(), SAMPLINGS["cool"], SEED, 6)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_no_cache_and_no_weight_of_an_older_version_survives(make_policy, kind):
    policy, other = make_policy(kind), make_policy(kind, seed=5)
    engine = LocalEngine(policy)
    before = engine.generate(prompts(), SAMPLINGS["plain"], SEED, 4)
    policy.base.load_state_dict(other.base.state_dict())  # in place: the engine must not see it before it is told
    assert all(same(a, b) for a, b in zip(before, engine.generate(prompts(), SAMPLINGS["plain"], SEED, 4), strict=True))
    engine.load(policy.weights(), 1)
    after = engine.generate(prompts(), SAMPLINGS["plain"], SEED, 4)
    fresh = LocalEngine(other).generate(prompts(), SAMPLINGS["plain"], SEED, 4)
    assert all(same(a, b) for a, b in zip(after, fresh, strict=True))
    assert all(int(c.versions[0]) == 1 for c in after)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt2"])
def test_a_missing_tensor_is_named(make_policy, kind):
    policy = make_policy(kind)
    engine = LocalEngine(policy)
    for name in policy.weights():
        partial = {k: v for k, v in policy.weights().items() if k != name}
        with pytest.raises(KeelError, match=name.replace(".", r"\.")):
            engine.load(partial, 1)
    assert engine.version == 0


def test_a_sampled_pad_token_stays_a_token(make_policy):
    policy = make_policy()
    with torch.no_grad():  # make <pad> (id 0) likely by copying the embedding of a likely token
        policy.base.get_output_embeddings().weight[0] *= 30
    completions = LocalEngine(policy).generate(prompts(), Sampling(max_completion_tokens=30), SEED, 8)
    padded = [c for c in completions if (c.token_ids[:-1] == 0).any()]
    assert padded, "no pad token was sampled; the test says nothing"
    batch = as_batch(prompts(), completions, 8)
    assert batch.mask.sum() == sum(len(c.token_ids) for c in completions)
    assert (policy.logp(batch).logp - batch.logp_rollout)[batch.mask].abs().max() < 1e-4


def test_every_end_token_ends(make_policy):
    policy = make_policy()
    policy.end_ids = frozenset({1, 20, 21, 22, 23, 24, 25, 26})
    completions = LocalEngine(policy).generate(prompts(), Sampling(max_completion_tokens=40), SEED, 16)
    ends = {int(c.token_ids[-1]) for c in completions if c.finish == "stop"}
    assert len(ends) > 2
    for c in completions:
        assert not set(c.token_ids[:-1].tolist()) & policy.end_ids


def test_prompt_longer_than_the_context_is_refused(make_policy):
    policy = make_policy()
    prompt = Prompt(id="long", text="", answer="", token_ids=(5,) * 120)
    with pytest.raises(KeelError, match="needs 132, and the context .* is 128"):
        LocalEngine(policy).generate([prompt], SAMPLINGS["plain"], SEED, 2)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    log_probs, _ = distribution(logits, Sampling(temperature=0.8))
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = draw(log_probs, torch.zeros(20000, dtype=torch.long), uniform)
    expected = (logits / 0.8).softmax(-1)[0] * 20000
    chi_square = ((torch.bincount(tokens, minlength=4) - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # 99.9 % point with 3 degrees of freedom


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 1e-16])
def test_extreme_draws_stay_inside_the_kept_set(uniform):
    log_probs, kept = distribution(torch.tensor([[-5.0, 3.0, 2.0, -4.0]]), Sampling(top_k=2))
    token = draw(log_probs, torch.tensor([0]), torch.tensor([uniform], dtype=torch.float64))
    assert kept[0, token]


def test_top_p_keeps_the_shortest_head_that_reaches_p():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    assert distribution(logits, Sampling(top_p=0.5))[1].tolist() == [[True, False, False, False]]
    assert distribution(logits, Sampling(top_p=0.6))[1].tolist() == [[True, True, False, False]]
    log_probs, _ = distribution(logits, Sampling(top_p=0.6))
    assert log_probs[0, 0].exp().item() == pytest.approx(0.5 / 0.7)
