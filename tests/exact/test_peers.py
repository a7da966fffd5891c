"""What do other frameworks' own losses compute? The same as keel's recipes, but for differences that have a name."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from keel.audit import conformance
from keel.audit.conformance import CASES, MAX_TOKENS, TOLERANCE, Case, compare, conformance_table, random_batch
from keel.audit.peers import WRITTEN_FOR, installed, loss_and_gradient, peer_loss, source, version
from keel.audit.peers.overlay import overlay
from keel.errors import KeelError
from keel.exact.expectation import expect
from keel.exact.world import Setting, World
from keel.objectives.advantages import TokenWhitening
from keel.objectives.aggregate import token_mean
from keel.objectives.parts import vary
from keel.objectives.recipes import recipe
from keel.objectives.signals import keep
from keel.objectives.surrogates import Surrogate

ACTOR = "actor_rollout_ref.actor."
MODE = ACTOR + "policy_loss.loss_mode"
GRPO = {"algorithm.adv_estimator": "grpo"}


def needs(*peers: str):
    missing = [f"{peer} is not installed" for peer in peers if not installed(peer)]
    missing += [f"{peer} {version(peer)} is not {WRITTEN_FOR.get(peer)}" for peer in peers if installed(peer) and other(peer)]
    return pytest.mark.skipif(bool(missing), reason=", ".join(missing))


def other(peer: str) -> bool:
    return peer in WRITTEN_FOR and version(peer) != WRITTEN_FOR[peer]


# for each framework, the agreement of its cases in their order: exact, by overlay, up to a factor, differs
AGREEMENT = {
    "trl": "e o o o o d e o e e f e d e e o e e d",
    "verl": "e e o o o o o d o f f d o o",
    "openrlhf": "d o o o o e e o o",
}
WORD = {"e": "exact", "o": "by overlay", "f": "up to a factor", "d": "differs"}


@pytest.mark.parametrize("peer", [pytest.param(peer, marks=needs(peer)) for peer in AGREEMENT])
def test_every_case_agrees_as_it_did_and_every_difference_has_a_name(peer):
    rows = conformance_table([peer])
    assert [row.agreement for row in rows] == [WORD[letter] for letter in AGREEMENT[peer].split()]
    for row in rows:
        assert row.holds and row.version == version(peer)
        assert row.recipe_error <= TOLERANCE if row.agreement == "exact" else row.recipe_error > 10 * TOLERANCE, row.text()
        assert row.error <= TOLERANCE if row.agreement != "differs" else row.error > 10 * TOLERANCE, row.text()
        assert bool(row.differences) == bool(row.overlay) and row.as_json()["holds"]


def errors(theirs, ours, gap=False, cuts=2) -> tuple[float, float]:
    """Relative distance of loss and gradient on one batch."""
    batch, logp = random_batch(7, gap)
    (loss, slope), (own, own_slope) = (loss_and_gradient(one, logp, batch, MAX_TOKENS, cuts) for one in (theirs, ours))
    return abs(float(loss - own)) / abs(float(own)), float((slope - own_slope).norm() / own_slope.norm())


def read_as(case: Case):
    """keel's objective for a case's configuration."""
    own = recipe(case.recipe).objective
    return vary(own, overlay(own, case.reading.objective))


def only(peer: str, knob: str) -> Case:
    """The one case of a framework in which this is beyond keel's choices."""
    (case,) = (case for case in CASES if case.peer == peer and any(item.knob.endswith(knob) for item in case.reading.beyond))
    return case


# ── what keel has no choice for is what it is said to be: with a part that does it, the two agree ─────────────────────────


@needs("trl")
def test_bnpo_is_a_token_mean_of_the_micro_batch_and_so_exact_where_there_is_one():
    case = next(case for case in CASES if case.configuration.get("loss_type") == "bnpo")
    theirs = peer_loss("trl", case.configuration)
    assert max(errors(theirs, read_as(case), cuts=1)) < TOLERANCE
    assert max(errors(theirs, read_as(case), cuts=2)) > 0.01


@dataclass(frozen=True)
class Capped(Surrogate):
    """Cispo with bounds that keel's refuses or does not have."""

    low: float = 0.0
    high: float = 5.0

    def __call__(self, view):
        return -view.importance.detach().exp().clamp(self.low, self.high) * view.advantage * view.logp


@pytest.mark.parametrize(
    ("peer", "knob", "bounds"),
    [
        pytest.param("trl", "epsilon_high", (0.0, 0.2), marks=needs("trl")),
        pytest.param("verl", "clip_ratio_low", (0.8, 1.2), marks=needs("verl")),
    ],
)
def test_cispo_caps_weights_at_epsilon_in_trl_and_from_both_sides_in_verl(peer, knob, bounds):
    case = only(peer, knob)
    ours = replace(read_as(case), surrogate=Capped(*bounds))
    assert max(errors(peer_loss(peer, case.configuration), ours)) < TOLERANCE


@needs("trl")
def test_trls_kl_ratio_leaves_the_engine_gap_out():
    case = only("trl", "use_bias_correction_kl")
    theirs = peer_loss("trl", case.configuration)
    without = replace(read_as(case), loss_kl=None)
    beta = peer_loss("trl", {**case.configuration, "beta": 0.0})
    assert max(errors(beta, without, gap=True)) < TOLERANCE  # all of the difference is in the KL …
    assert max(errors(theirs, read_as(case), gap=False)) < TOLERANCE  # … and none of it without a gap


@needs("trl")
def test_trls_off_policy_mask_looks_at_the_engine_where_there_is_one():
    knobs = {"num_iterations": 2, "loss_type": "grpo", "off_policy_mask_threshold": 0.05, "use_vllm": True,
             "vllm_importance_sampling_correction": False}  # fmt: skip
    ours = read_as(Case("trl", "grpo", knobs))
    trainers = vary(ours, {"corrections.off_policy_mask.against_sampler": False})
    assert max(errors(peer_loss("trl", knobs), ours, gap=True)) < TOLERANCE
    assert max(errors(trainers, ours, gap=True)) > 0.01


@dataclass(frozen=True)
class BesselWhitening(TokenWhitening):
    """Whitening by the sample variance, as verl does."""

    def __call__(self, advantage, centred, scored):
        count = scored.mask.sum()
        mean = keep(advantage, scored.mask).sum() / count
        variance = keep((advantage - mean).square(), scored.mask).sum() / (count - 1)
        return (advantage - mean) / (variance + self.eps).sqrt()


@needs("verl")
@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_verl_whitens_with_bessels_correction(name):
    (case,) = (case for case in CASES if (case.peer, case.recipe) == ("verl", name))
    ours = vary(read_as(case), {"advantage.scale": BesselWhitening()})
    assert max(errors(peer_loss("verl", case.configuration), ours)) < TOLERANCE


@needs("verl")
def test_verls_geometric_mean_is_multiplied_by_the_number_of_micro_batches():
    (case,) = (case for case in CASES if case.peer == "verl" and case.recipe == "gmpo")
    theirs = peer_loss("verl", case.configuration)
    assert max(errors(theirs, read_as(case), cuts=1)) < TOLERANCE
    assert [compare(case).factor, errors(theirs, read_as(case), cuts=3)[1]] == pytest.approx([2.0, 2.0])


class TwoMeans:
    """A policy loss averaged as its objective says, and a KL averaged over tokens."""

    def __init__(self, objective):
        self.policy = replace(objective, loss_kl=None)
        self.kl = replace(objective, aggregate=token_mean)
        self.prepare, self.counts = self.policy.prepare, self.policy.counts

    def loss(self, logp, entropy, batch, prepared, counts):
        flat = replace(prepared, advantage=torch.zeros_like(prepared.advantage))
        return self.policy.loss(logp, entropy, batch, prepared, counts) + self.kl.loss(logp, entropy, batch, flat, counts)


@needs("openrlhf")
def test_openrlhfs_kl_is_a_token_mean_whatever_the_policy_loss_is():
    case = only("openrlhf", "use_loss")
    assert max(errors(peer_loss("openrlhf", case.configuration), TwoMeans(read_as(case)))) < TOLERANCE


# ── knobs that do nothing ─────────────────────────────────────────────────────────────────────────────────────────────────


@needs("verl")
@pytest.mark.parametrize("loss_mode", ["vanilla", "cispo", "gspo"])
def test_verls_clip_ratio_does_nothing_while_low_and_high_stand_at_their_defaults(loss_mode):
    base = {**GRPO, MODE: loss_mode}
    same = errors(peer_loss("verl", {**base, ACTOR + "clip_ratio": 0.01}), peer_loss("verl", base))
    other = errors(peer_loss("verl", {**base, ACTOR + "clip_ratio_high": 0.01}), peer_loss("verl", base))
    assert max(same) == 0.0 and max(other) > 0.01


@needs("verl")
def test_verls_vectorized_grpo_does_not_read_norm_adv_by_std():
    base = {"algorithm.adv_estimator": "grpo_vectorized"}
    unscaled = peer_loss("verl", {**base, "algorithm.norm_adv_by_std_in_grpo": False})
    assert max(errors(unscaled, peer_loss("verl", base))) == 0.0


@needs("trl")
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "sapo"])
def test_with_one_iteration_trl_clips_nothing_however_stale_the_policy(loss_type):
    loose, tight = ({"loss_type": loss_type, "epsilon": eps, "sapo_temperature_pos": 1 + eps} for eps in (0.9, 0.01))
    batch, logp = random_batch(0, False)
    slopes = [loss_and_gradient(peer_loss("trl", knobs), logp, batch, MAX_TOKENS, 2)[1] for knobs in (loose, tight)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


# ── in the exact worlds ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("peer", "knobs", "name", "changes"),
    [
        pytest.param("trl", {"loss_type": "dr_grpo", "scale_rewards": "none"}, "dr_grpo", {}, marks=needs("trl")),
        pytest.param(
            "trl", {"loss_type": "grpo", "beta": 0.04, "num_iterations": 2}, "grpo", {"loss_kl.ratio": "token"}, marks=needs("trl")
        ),
        pytest.param(
            "verl", {**GRPO, ACTOR + "loss_agg_mode": "seq-mean-token-mean"}, "grpo",
            {"loss_kl": "none", "surrogate": "dual_clip", "advantage.scale.eps": 1e-6}, marks=needs("verl"),
        ),
        pytest.param(
            "openrlhf", {"algo.advantage.estimator": "dr_grpo", "algo.kl.init_coef": 0.0}, "dr_grpo",
            {"aggregate": "token_mean"}, marks=needs("openrlhf"),
        ),
    ],
)  # fmt: skip
def test_a_frameworks_loss_is_enumerated_as_an_objective_is(peer, knobs, name, changes):
    world = World.random(Setting(vocabulary=2, drift=0.5 if "num_iterations" in knobs or peer != "trl" else 0.0), seed=0)
    theirs, ours = expect(world, peer_loss(peer, knobs)), expect(world, vary(recipe(name).objective, changes))
    assert float((theirs.direction - ours.direction).norm()) <= 1e-6 * float(ours.direction.norm())
    assert theirs.second_moment == pytest.approx(ours.second_moment, rel=1e-6)


# ── another oracle for single steps ──────────────────────────────────────────────────────────────────────────────────────


@needs("polgrad")
@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "rloo"])
def test_polgrads_reference_losses_are_keels(name):
    import polgrad

    spec = polgrad.get_algorithm(name)
    batch, logp = random_batch(3, gap=False)
    ours = replace(recipe(name).objective, shaping=(), reward_kl=None)
    advantage = (
        polgrad.rloo_advantages(batch.reward, batch.group)
        if spec.advantage == "rloo"
        else polgrad.grpo_advantages(batch.reward, batch.group, spec.advantage_config)
    )
    config = replace(spec.loss, norm_len=MAX_TOKENS) if spec.loss.aggregation is polgrad.Aggregation.TOKEN_SUM_NORM else spec.loss
    logp = logp.requires_grad_()
    loss = polgrad.policy_loss(
        config, logprobs=logp, old_logprobs=batch.logp_old, advantages=advantage, response_mask=batch.mask,
        ref_logprobs=batch.logp_ref if config.kl else None,
    ).loss  # fmt: skip
    (slope,) = torch.autograd.grad(loss, logp)
    own, own_slope = loss_and_gradient(ours, logp, batch, MAX_TOKENS)
    scale = MAX_TOKENS if name == "rloo" else 1  # polgrad sums each completion, as the paper does
    torch.testing.assert_close(slope, scale * own_slope, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.detach(), scale * own, rtol=1e-9, atol=1e-12)


# ── the harness itself ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_reading_is_seen(monkeypatch):
    class Wrong:
        """keel's own recipe in the place of a framework, with another ε."""

        def __init__(self, *_):
            objective = vary(recipe("dapo").objective, {"surrogate.clip_high": 0.3, "shaping": []})
            self.prepare, self.counts, self.loss = objective.prepare, objective.counts, objective.loss

    monkeypatch.setattr(conformance, "peer_loss", Wrong)
    monkeypatch.setattr(conformance, "version", lambda peer: "0")
    case = next(case for case in CASES if case.peer == "trl" and case.recipe == "dapo")
    row = compare(case)
    assert row.agreement == "differs" and not row.holds


def test_every_framework_has_most_recipes_and_every_case_differs_from_the_others():
    counts = Counter(case.peer for case in CASES)
    assert {peer: len(AGREEMENT[peer].split()) for peer in AGREEMENT} == dict(counts)
    assert len({(case.peer, case.recipe, str(case.configuration), case.gap) for case in CASES}) == len(CASES)


def test_what_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    batch, logp = random_batch(0, False)
    with pytest.raises(KeelError, match='pip install "trl'):
        peer_loss("trl").gradient(logp, batch, MAX_TOKENS)
    for peer in ("verl", "openrlhf"):
        with pytest.raises(KeelError, match=f"pip install --no-deps {peer}"):
            source.run_source(peer, "loss.py")
    assert conformance_table() == []


@pytest.mark.parametrize(("peer", "knob"), [("trl", "epsilon_hi"), ("verl", ACTOR + "clip_ration"), ("openrlhf", "actor.eps_clp")])
def test_an_unknown_knob_is_refused_with_the_nearest(peer, knob):
    with pytest.raises(KeelError, match="did you mean"):
        peer_loss(peer, {knob: 0.1})
    with pytest.raises(KeelError, match="did you mean 'verl'"):
        peer_loss("ver")


@needs("trl")
def test_groups_of_different_size_are_refused_where_a_framework_finds_them_by_position():
    batch, logp = random_batch(0, False)
    with pytest.raises(KeelError, match="groups have one size"):
        peer_loss("trl").prepare(batch.rows(torch.arange(11)), MAX_TOKENS)


def test_a_source_runs_without_what_it_imports_and_says_so_when_that_is_called(tmp_path, monkeypatch):
    package = tmp_path / "verl"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('nobody imports the package itself')")
    (package / "part.py").write_text(
        "from absent_package.deep import Thing, other\nimport absent_package.more\nfrom . import sibling\nimport math\n"
        "def twice(x: Thing) -> float:\n    return 2 * math.sqrt(x)\n"
        "def calls():\n    return other()\n"
        "def reads():\n    return absent_package.more.now()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "verl"]:
        monkeypatch.delitem(sys.modules, name)
    module = source.run_source("verl", "part.py", {"sibling": 3})
    assert module.twice(4.0) == 4.0 and module.sibling == 3
    for broken, name in ((module.calls, "other"), (module.reads, "absent_package.more.now")):
        with pytest.raises(KeelError, match=name):
            broken()
    monkeypatch.setattr(source, "version", lambda peer: "0.0")
    with pytest.raises(KeelError, match="has no gone.py"):
        source.run_source("verl", "gone.py")


def test_another_version_that_asks_for_more_is_told_from_a_fault_of_ours(monkeypatch):
    class Asks(conformance.peer_loss("trl").__class__):
        def advantages(self, rows, max_tokens):
            raise AttributeError("no attribute 'novelty'")

    batch, logp = random_batch(0, False)
    for found, expected in (("9.9", KeelError), (WRITTEN_FOR["trl"], AttributeError)):
        monkeypatch.setattr("keel.audit.peers.loss.version", lambda peer, found=found: found)
        with pytest.raises(expected, match="novelty"):
            Asks().gradient(logp, batch, MAX_TOKENS)
