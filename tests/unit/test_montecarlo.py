"""Gradients compared by sampling: where the truth is known, the intervals hold it, and noise is not taken for signal."""

import itertools
import json
import math
from dataclasses import dataclass, replace

import pytest
import torch

from keel.audit.comparison import MonteCarlo, Sampled, against, alone
from keel.audit.jackknife import exactly, mean, multiple, product, ratio, spread
from keel.audit.montecarlo import audit_model, measure, perturbed, trained_on
from keel.audit.projection import Projection
from keel.errors import KeelError
from keel.objectives.advantages import centred, none
from keel.objectives.aggregate import sequence_mean
from keel.objectives.kl import LossKL, k1, k2
from keel.objectives.objective import Objective
from keel.objectives.surrogates import Clip, Unclipped
from keel.training.batch import batch_from_groups
from keel.training.step import accumulate_gradient
from keel.types import Group, Prompt, Sampling, Score

# ---- projection ------------------------------------------------------------------------------------------------------


def vectors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


def flat(named):
    return torch.cat([x.flatten() for x in named.values()]).double()


def test_projection_keeps_inner_products_within_its_error():
    a, b = vectors(0, (300, 20), (1000,)), vectors(1, (300, 20), (1000,))
    a = {name: a[name] + 0.5 for name in a}  # without signs, equal signs would add up
    b = {name: b[name] + a[name] for name in a}
    errors = []
    for seed in range(60):
        project = Projection(a, size=256, seed=seed)
        errors.append(float(project(a) @ project(b) - flat(a) @ flat(b)) / float(flat(a).norm() * flat(b).norm()))
    errors = torch.tensor(errors)
    assert abs(float(errors.mean())) < 3 * float(errors.std()) / math.sqrt(60)  # no bias
    assert 0.3 / math.sqrt(256) < float(errors.std()) < 2 / math.sqrt(256)


def test_projection_is_linear_seeded_and_exact_where_it_can_be():
    a, b = vectors(0, (40, 5), (7,)), vectors(1, (40, 5), (7,))
    project = Projection(a, size=64, seed=3)
    both = {name: 2 * a[name] - b[name] for name in a}
    assert torch.allclose(project(both), 2 * project(a) - project(b), atol=1e-5)
    assert torch.equal(project(a), Projection(a, size=64, seed=3)(a))
    assert not torch.equal(project(a), Projection(a, size=64, seed=4)(a))
    whole = Projection(a, size=207)
    assert whole.error == 0.0 and torch.equal(whole(a), flat(a))


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_product_is_the_mean_over_different_pairs_with_each_sample_left_out():
    a, b = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def in_loops(rows):
        pairs = list(itertools.permutations(rows, 2))
        return sum(float(a[i] @ b[j]) for i, j in pairs) / len(pairs)

    wanted = [in_loops(range(6))] + [in_loops([i for i in range(6) if i != out]) for out in range(6)]
    assert torch.allclose(product(a, b), torch.tensor(wanted, dtype=torch.float64))
    assert float(spread(a)[0]) == pytest.approx(float(torch.cov(a.T).trace()))
    assert float(spread(a)[3]) == pytest.approx(float(torch.cov(torch.cat([a[:2], a[3:]]).T).trace()))
    assert float(mean(a[:, 0])[2]) == pytest.approx(float(a[[0, 2, 3, 4, 5], 0].mean()))


def test_fieller_interval_of_a_plain_ratio():
    """x = 2y + noise: an interval around 2; y around zero: no end."""
    generator = torch.Generator().manual_seed(0)
    y = 1 + 0.3 * torch.randn(400, generator=generator, dtype=torch.float64)
    x = 2 * y + 0.1 * torch.randn(400, generator=generator, dtype=torch.float64)
    found = ratio(mean(x), mean(y))
    half = 1.96 * float((x - 2 * y).std()) / 20 / float(y.mean())
    assert found.enough and found.low < 2 < found.high and found.high - found.low == pytest.approx(2 * half, rel=0.1)
    lost = ratio(mean(x), mean(y - 1))
    assert not lost.enough and (lost.low, lost.high) == (-math.inf, math.inf) and lost.more > 0


def synthetic(seed, *, n=150, m=60, noise=3.0, turn=0.4, scale=0.7, live=1.0):
    """Paired samples with E a = scale · e₀ and E b at an angle `turn` to it; noise in part shared, and uneven over directions.

    `live` is the share of samples that have any noise: heavy tails.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, n, m, generator=generator, dtype=torch.float64) * UNEVEN[:m] / UNEVEN[:m].norm()
    draw = draw * (torch.rand(n, 1, generator=generator) < live) / math.sqrt(live)
    e = torch.eye(m, dtype=torch.float64)
    a = scale * (e[0] + noise * draw[0])
    return a, math.cos(turn) * e[0] + math.sin(turn) * e[1] + noise * (0.8 * draw[0] + 0.6 * draw[1])


UNEVEN = torch.exp(-torch.arange(60, dtype=torch.float64) / 15)


def truths(noise=3.0, turn=0.4, scale=0.7):
    """By hand: both noises have trace noise²; a's is multiplied by scale²."""
    return {
        "signal_to_noise": 1 / noise,
        "scale": scale * math.cos(turn),
        "relative_bias": math.sqrt(scale**2 + 1 - 2 * scale * math.cos(turn)),
        "bias_after_scale": math.sin(turn),
        "cosine": math.cos(turn),
        "variance_ratio": scale**2,
        "groups_ratio": 1.0,
    }


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"turn": 0.0},
        {"turn": 1.3},
        {"noise": 1.0},
        {"noise": 6.0},
        {"live": 0.3},
        {"n": 30, "noise": 1.0},
        {"turn": 0.0, "scale": 1.0},
    ],
    ids=str,
)
def test_intervals_hold_the_truth_at_their_rate(knobs):
    """Over 150 seeds; an interval that claims 95 % may hold the truth more often, never much less."""
    wanted = truths(**{key: knobs[key] for key in knobs if key in ("noise", "turn", "scale")})
    held = dict.fromkeys(wanted, 0)
    for seed in range(150):
        a, b = synthetic(seed, **knobs)
        found = vars(against(a, b)) | vars(alone(a))
        for name, truth in wanted.items():
            held[name] += found[name].low - 1e-9 <= truth <= found[name].high + 1e-9
    assert min(held.values()) >= 0.89 * 150, held  # 95 % less 3.4 standard deviations


def test_the_noise_floor_is_gone():
    """Noise far above the signal: plain means look longer and less alike than they are, these estimates do not."""
    pairs = [synthetic(seed, n=200, noise=8.0, turn=0.3, m=60) for seed in range(100)]
    plain = torch.tensor([float(a.mean(0).square().sum()) for a, _ in pairs])
    ours = torch.tensor([float(product(a, a)[0]) for a, _ in pairs])
    error = float(ours.std()) / 10
    assert abs(float(ours.mean()) - 0.49) < 3 * error
    assert float(plain.mean()) > 0.49 + 0.49 * 64 / 200 - 3 * error


def test_too_few_samples_are_called_too_few_and_more_do_suffice():
    a, b = synthetic(0, n=20, noise=9.0)
    pair = against(a, b)
    assert not pair.cosine.enough and (pair.cosine.low, pair.cosine.high) == (-1.0, 1.0)
    assert not pair.bias_after_scale.enough and pair.bias_after_scale.high == 1.0
    unsure = [against(*synthetic(seed, n=60, noise=6.0)).cosine for seed in range(40)]
    more = [e.more for e in unsure if not e.enough]
    assert more
    wanted = 60 + sorted(more)[len(more) // 2]
    assert sum(against(*synthetic(seed, n=wanted, noise=6.0)).cosine.enough for seed in range(40)) > 20


def test_words_for_how_many_more():
    assert exactly(1.0, 100).enough
    few = ratio(mean(torch.randn(100, dtype=torch.float64)), mean(-torch.ones(100, dtype=torch.float64)))
    assert few.wanted() == "at least 300 more" and few.wanted(4) == "at least 1,200 more"
    assert not few.enough and math.isnan(few.value)


def test_proportional_in_every_sample_needs_no_interval():
    """a = 3/4 b: whatever the noise, scale .75, cosine 1 and variance .5625."""
    b = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pair = against(0.75 * b, b)
    assert pair.proportional
    assert pair.scale.value == pytest.approx(0.75) and pair.cosine == exactly(1.0, 9)
    assert pair.variance_ratio.value == pytest.approx(0.5625) and pair.relative_bias.value == pytest.approx(0.25)
    assert against(-b, b).cosine == exactly(-1.0, 9)  # a flipped sign
    assert multiple(b + 1e-2 * b.flip(0), b) is None


def test_gradients_that_are_exactly_zero():
    b = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros_like(b)
    assert alone(nothing).live == 0.0 and alone(nothing).signal_to_noise == exactly(0.0, 9)
    assert against(nothing, b).scale == exactly(0.0, 9) and against(nothing, b).relative_bias == exactly(1.0, 9)
    assert math.isnan(against(b, nothing).scale.value)
    told = MonteCarlo(sampled(9), {"nothing": nothing, "b": b}, "b")
    assert "exactly zero" in told.says("nothing")
    json.dumps(told.as_json(), allow_nan=False)


def sampled(groups):
    return Sampled("m", "t", groups, 4, 1, 0, 0.5, 0.5, 3.0, 0.0, 0.0, 10, 5, 0.0)


def test_one_sentence_for_each_verdict():
    _, b = synthetic(0, noise=1.0, turn=1.0)
    same, _ = synthetic(0, noise=0.1)
    rows = {"turned": b, "same": same + 0.01 * same.flip(0), "alike": synthetic(0, noise=2.0, turn=0.0)[1]}
    told = MonteCarlo(sampled(150), rows | {"b": same}, "b")
    assert told.says("turned").startswith("turned is no multiple of b: after the best scale, 0.8")
    assert told.says("same").startswith("same points where b points")
    assert "shows no other direction" in told.says("alike")
    unsure = MonteCarlo(sampled(150), {"a": synthetic(0, noise=40.0)[0], "b": b}, "b")
    assert "too few samples to compare their directions; at least" in unsure.says("a")
    flipped = MonteCarlo(sampled(150), {"a": -2 * b, "b": b}, "b")
    assert flipped.says("a") == "a is -2 times b in every step: the opposite direction, the same noise."


# ---- real policies ---------------------------------------------------------------------------------------------------


class FirstTokenTask:
    """Right where the answer begins with "0"."""

    name = "first-token"

    def __init__(self, texts=("0",)):
        self.train = self.test = [Prompt(id=f"p{i}", text=text, answer="0") for i, text in enumerate(texts)]

    def reward(self, prompt, text, finish):
        return Score(float(text.startswith("0")), correct=text.startswith("0"))

    def gold(self, prompt):
        return "0"

    def check(self): ...


TWO_TOKENS = Sampling(max_completion_tokens=2)


@pytest.fixture
def few_tokens(make_policy):
    """A random policy over four tokens: <pad>, <end>, <unk> and "0"; its head made uneven."""
    policy = make_policy(vocab_size=4, tie_word_embeddings=False)
    with torch.no_grad():
        policy.base.get_output_embeddings().weight *= 10
    return policy


def every_completion():
    """Token 1 ends; at most two tokens."""
    rest = (0, 2, 3)
    return [(1,)] + [(x, 1) for x in rest] + [(x, y) for x in rest for y in rest]


def enumerated(policy, task, objectives, make_completion, group_size=2):
    """What each objective does over every group of two, by the trainer's own step."""
    prompt = policy.template.render(task.train[0], policy.tokenizer)
    made = []
    for tokens in every_completion():
        text = policy.tokenizer.decode([t for t in tokens if t != 1])
        made.append((make_completion(list(tokens), text=text), task.reward(prompt, text, "stop")))

    def batch_of(picked):
        completions, scores = zip(*(made[i] for i in picked), strict=True)
        return batch_from_groups([Group(prompt, completions, scores)])

    chance = policy.logp(batch_of(range(len(made)))).logp.sum(1).exp().double().detach()
    assert float(chance.sum()) == pytest.approx(1.0, abs=1e-5)
    weights, rows = [], {name: [] for name in objectives}
    for pair in itertools.combinations_with_replacement(range(len(made)), group_size):
        weights.append(float(chance[list(pair)].prod()) * len(set(itertools.permutations(pair))))
        for name, gradient in trained(policy, objectives, batch_of(pair)).items():
            rows[name].append(-gradient)
    weights = torch.tensor(weights, dtype=torch.float64)
    return {name: Exact.of(weights, torch.stack(gradients)) for name, gradients in rows.items()}


@dataclass
class Exact:
    """Mean, trace of the covariance, signal-to-noise, and mean cosine of a gradient that is not zero to the mean."""

    mean: torch.Tensor
    trace: float
    signal_to_noise: float
    step_cosine: float

    @classmethod
    def of(cls, weights, rows):
        mean, size = weights @ rows, rows.norm(dim=1)
        trace = float(weights @ size.square() - mean.square().sum())
        live = size > 0
        cosine = float(weights[live] @ (rows[live] @ mean / size[live])) / float(weights[live].sum() * mean.norm())
        return cls(mean, trace, float(mean.norm()) / math.sqrt(trace), cosine)


def trained(policy, objectives, batch, cap=2):
    """Each objective's gradient, as `accumulate_gradient` leaves it."""
    found = {}
    for name, objective in objectives.items():
        policy.model.zero_grad()
        prepared = objective.prepare(batch, cap)
        counts = objective.counts(batch, prepared, cap)
        accumulate_gradient(policy, objective, batch, prepared, counts, [torch.arange(len(batch))], 1.0)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters().values()]
        found[name] = torch.cat([g.flatten() for g in grads]).double()
    policy.model.zero_grad()
    return found


def test_a_real_policy_against_its_own_enumeration(few_tokens, make_completion):
    """Everything measured by sampling lies where enumerating all 91 groups says, through sampler, step and projection."""
    task, objectives = FirstTokenTask(), {"per_length": Objective(aggregate=sequence_mean), "solid": Objective()}
    exact = enumerated(few_tokens, task, objectives, make_completion)
    a, b = (e.mean for e in exact.values())
    cosine = float(a @ b / (a.norm() * b.norm()))
    wanted = {
        "scale": float(a @ b / b.square().sum()),
        "relative_bias": float((a - b).norm() / b.norm()),
        "bias_after_scale": math.sqrt(1 - cosine**2),
        "cosine": cosine,
        "variance_ratio": exact["per_length"].trace / exact["solid"].trace,
        "groups_ratio": (exact["solid"].signal_to_noise / exact["per_length"].signal_to_noise) ** 2,
    }
    found = measure(few_tokens, task, objectives, groups=300, group_size=2, sampling=TWO_TOKENS, projection=2048)
    assert found.sampled.projection_error > 0
    for name, truth in wanted.items():
        e = getattr(found.pairs["per_length"], name)
        slack = 0.25 * (e.high - e.low)  # one seed: a 95 % interval and half as much again
        assert e.enough and e.low - slack <= truth <= e.high + slack, (name, truth, str(e))
        assert e.high - e.low < 0.5 * max(1, truth), (name, str(e))
    for name, key in itertools.product(objectives, ("signal_to_noise", "step_cosine")):
        e, truth = getattr(found.alone[name], key), getattr(exact[name], key)
        slack = 0.25 * (e.high - e.low)
        assert e.low - slack <= truth <= e.high + slack, (name, key, truth, str(e))


def test_every_step_is_the_trainers_own(tiny_policy):
    """Stale, clipped, with entropy and KL, cut into micro-batches: row i is the update direction of group i, number by number."""
    task, sampling = FirstTokenTask(("0", "1+1=", "ab")), Sampling(max_completion_tokens=5)
    now, reference = perturbed(tiny_policy, 0.05, seed=1), perturbed(tiny_policy, 0.05, seed=2)
    objectives = {
        "clip": Objective(advantage=none, surrogate=Clip(0.1, 0.1), loss_kl=LossKL(0.1, k2), entropy_coef=0.01),
        "plain": Objective(advantage=none),
    }
    settings = dict(group_size=3, sampling=sampling, seed=5)
    found = measure(
        now,
        task,
        objectives,
        groups=9,
        sampler=tiny_policy,
        reference=reference,
        projection=10**6,
        micro_batch_tokens=9,
        **settings,
    )
    from keel.audit.montecarlo import sample_groups

    groups = [g for part in sample_groups(tiny_policy, task, sampling, 5, 9, 3, 1) for g in part]
    for i in (0, 4, 8):
        batch = batch_from_groups([groups[i]])
        with torch.no_grad():
            batch = replace(batch, logp_old=tiny_policy.logp(batch).logp, logp_ref=reference.logp(batch).logp)
        for name, wanted in trained(now, objectives, batch, cap=5).items():
            assert torch.allclose(found.gradients[name][i], -wanted, atol=1e-6, rtol=1e-4), (name, i)
    assert float(found.gradients["clip"].norm()) > 0
    assert found.sampled.staleness > 0 and found.sampled.from_reference > 0


def test_samples_are_shared_paired_and_seeded(tiny_policy):
    task = FirstTokenTask(("0", "1+1="))
    settings = dict(groups=8, group_size=2, sampling=Sampling(max_completion_tokens=3))
    one = measure(tiny_policy, task, {"a": Objective(advantage=none)}, **settings)
    two = measure(tiny_policy, task, {"b": Objective(advantage=centred), "a": Objective(advantage=none)}, **settings)
    other = measure(tiny_policy, task, {"a": Objective(advantage=none)}, seed=1, **settings)
    assert torch.equal(one.gradients["a"], two.gradients["a"])
    assert not torch.equal(one.gradients["a"], other.gradients["a"])
    halves = measure(tiny_policy, task, {"a": Objective(advantage=none)}, groups_per_step=2, **(settings | {"groups": 17}))
    assert halves.gradients["a"].shape[0] == 8 and halves.sampled.groups == 16 and halves.records()[0]["groups"] == 16


def test_importance_weights_bring_a_stale_policy_back(few_tokens):
    """Sampled by other weights, the reweighted gradient points where the on-policy one does."""
    task = FirstTokenTask()
    now = perturbed(few_tokens, 0.15, seed=3)
    settings = dict(groups=100, group_size=4, sampling=TWO_TOKENS, projection=10**6)
    plain = {"weighted": Objective(surrogate=Unclipped()), "solid": Objective()}
    stale = measure(now, task, plain, sampler=few_tokens, **settings)
    fresh = measure(now, task, {"solid": Objective()}, **settings)
    assert stale.sampled.staleness > 0.01 and "Stale by" in stale.text()
    assert against(stale.gradients["weighted"], fresh.gradients["solid"]).cosine.high > 0.98


# ---- tiny-dense ------------------------------------------------------------------------------------------------------

KNOWN = {
    "centred": Objective(advantage=centred),
    "per_length": Objective(aggregate=sequence_mean),
    "k1_in_loss": Objective(loss_kl=LossKL(0.1, k1)),
    "solid": Objective(),
}


def test_tiny_dense_from_its_name():
    """Centred is (G−1)/G of leave-one-out in every step; a mean per completion is biased; k1 in the loss only adds noise."""
    found = audit_model(list(KNOWN), "tiny-dense", "arithmetic:medium", 64, 4, objectives=KNOWN, drift=0.01)
    share = found.pairs["centred"]
    assert share.proportional and share.cosine.value == 1.0
    assert share.scale.value == pytest.approx(0.75, rel=1e-5) and share.variance_ratio.value == pytest.approx(0.5625, rel=1e-5)
    biased, silent = found.pairs["per_length"], found.pairs["k1_in_loss"]
    assert biased.relative_bias.low > 1 and biased.variance_ratio.low > 10
    assert silent.relative_bias.low == 0.0 and silent.variance_ratio.low > 1
    text = found.text()
    assert "tiny-dense on arithmetic:medium: 64 groups of 4" in text and "centred is 0.75 times solid in every step" in text
    records = found.as_json()["estimates"]
    json.dumps(records, allow_nan=False)
    assert {r["groups"] for r in records} == {64} and {r["objective"] for r in records} == set(KNOWN)


def test_training_moves_a_copy():
    from keel.models.load import load_policy
    from keel.tasks.task import get_task

    policy = load_policy("tiny-dense")
    before = flat(policy.weights())
    later = trained_on(policy, get_task("arithmetic:easy"), 1, 1e-3, Sampling(max_completion_tokens=16), 4)
    assert torch.equal(before, flat(policy.weights()))
    assert not torch.equal(flat(policy.weights()), flat(later.weights()))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(tiny_policy):
    task, solid = FirstTokenTask(), {"solid": Objective()}
    with pytest.raises(KeelError, match="at least one"):
        measure(tiny_policy, task, {}, groups=20)
    with pytest.raises(KeelError, match="did you mean 'solid'"):
        measure(tiny_policy, task, solid, groups=20, against="sold")
    with pytest.raises(KeelError, match="make 5 steps"):
        measure(tiny_policy, task, solid, groups=20, groups_per_step=4)
    with pytest.raises(KeelError, match="No objective is named 'soild'"):
        audit_model(["soild"], "tiny-dense", "arithmetic:easy", 20, objectives=solid)


def test_a_gradient_that_is_not_finite_is_named(tiny_policy):
    class Broken(Objective):
        def loss(self, logp, entropy, batch, prepared, counts):
            return (logp * 0).sqrt().sum()

    objectives = {"broken": Broken(advantage=none)}
    with pytest.raises(KeelError, match="'broken': its gradient"):
        measure(tiny_policy, FirstTokenTask(), objectives, groups=8, group_size=2, sampling=TWO_TOKENS)
