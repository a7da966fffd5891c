"""Estimates against enumeration, and evaluation of an engine whose answers are known."""

from __future__ import annotations

import math
from itertools import combinations
from random import Random

import pytest
import torch

from keel.errors import KeelError
from keel.evaluate import evaluate, interval, panel, pass_at_k, tier, tiers
from keel.evaluate.estimates import wilson
from keel.evaluate.suite import grade
from keel.rollout.engine import Engine, Seed
from keel.tasks.task import PromptTask
from keel.types import Completion, Prompt, Sampling, Score

SEED, SAMPLING = Seed(0, 0), Sampling(max_completion_tokens=8)
PROMPTS = [Prompt(f"p{i}", f"say {i}", str(i), token_ids=(5,)) for i in range(4)]


def right_or_wrong(prompt: Prompt, text: str) -> Score:
    if text == "broken":
        return Score(None, reason="the grader broke")
    return Score(float(text == prompt.answer), text == prompt.answer)


TASK = PromptTask("echo", PROMPTS[:2], PROMPTS[2:], right_or_wrong)


class SaysEngine:
    """Answers from a table: prompt id → one text per sample; "…" is cut off, "error" fails."""

    version = 0

    def __init__(self, says: dict[str, list[str]]):
        self.says, self.asked = says, []

    def load(self, weights, version):
        raise AssertionError("evaluation never changes weights")

    def sleep(self):
        raise AssertionError("evaluation never puts an engine to sleep")

    def describe(self):
        return {}

    def generate(self, prompts, sampling, seed, group_size):
        self.asked.append((sampling, seed, group_size))
        return [self._one(p, i) for p in prompts for i in range(group_size) if i < len(self.says[p.id])]

    def _one(self, prompt, sample):
        text = self.says[prompt.id][sample]
        finish = {"…": "length", "error": "error"}.get(text, "stop")
        tokens = torch.zeros(len(text), dtype=torch.long)
        return Completion(
            prompt.id, sample, tokens, tokens.float(), finish, text, tokens, torch.ones(len(text), dtype=torch.bool),
            error="scripted" if finish == "error" else "",
        )  # fmt: skip


SAYS = {
    "p0": ["0", "0", "1", "1"],
    "p1": ["1", "1", "1", "1"],
    "p2": ["…", "0", "0", "0"],
    "p3": ["3", "broken", "error", "…"],
}


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n, c in [(1, 0), (1, 1), (5, 2), (6, 3), (7, 1), (6, 6)]:
        for k in range(1, n + 1):
            subsets = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    # n 16, p .05, k 8: the truth is 1 − .95^8 = .337, the plug-in gives .281
    binomial = [math.comb(16, c) * 0.05**c * 0.95 ** (16 - c) for c in range(17)]
    ours = sum(p * pass_at_k(16, c, 8) for c, p in enumerate(binomial))
    plug_in = sum(p * (1 - (1 - c / 16) ** 8) for c, p in enumerate(binomial))
    assert ours == pytest.approx(1 - 0.95**8, abs=1e-12)
    assert plug_in == pytest.approx(0.281, abs=5e-4)


def test_pass_at_k_of_many_samples_neither_overflows_nor_leaves_the_unit_interval():
    for c in (0, 1, 50_000, 100_000):
        assert 0.0 <= pass_at_k(100_000, c, 1_000) <= 1.0
    assert pass_at_k(100_000, 1, 1_000) == pytest.approx(0.01, rel=1e-9)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(KeelError, match=f"pass@{k} from {c} right of {n}"):
        pass_at_k(n, c, k)


def test_wilson_by_hand():
    # p̂ = ½, n = 16, z = 2: centre (.5 + 4/32)/(1 + ¼) = .5, half 2/1.25·√(.25/16 + 4/1024) = 1.6·.139754 = .223607
    low, high = wilson(0.5, 16, z=2.0)
    assert (low, high) == pytest.approx((0.5 - 0.2236068, 0.5 + 0.2236068), abs=1e-6)


def test_interval_counts_prompts_that_differ_and_not_completions():
    alike, apart = interval([4] * 50, 8), interval([0] * 25 + [8] * 25, 8)
    assert alike == wilson(0.5, 400)  # no prompt differs from another: every completion counts
    assert apart == wilson(0.5, 50)  # completions of one prompt all agree: only prompts count
    assert interval([8] * 50, 8) == wilson(1.0, 50) and interval([8] * 50, 8)[1] == 1.0


def test_interval_covers_the_truth_about_as_often_as_it_says():
    # 300 experiments of 40 prompts with their own p ~ U(0, 1) and 4 samples: 95 % covers in 285 ± 3.8 of them
    rng, covered = Random(7), 0
    for _ in range(300):
        counts = [sum(rng.random() < p for _ in range(4)) for p in (rng.random() for _ in range(40))]
        low, high = interval(counts, 4)
        covered += low <= 0.5 <= high
    assert 0.91 <= covered / 300 <= 0.985


def test_evaluate_by_hand():
    engine = SaysEngine(SAYS)
    assert isinstance(engine, Engine)
    told = evaluate(engine, PROMPTS, TASK, SAMPLING, 4, SEED, (1, 2, 4))
    # right: 2, 4, 0 and 1 of 4; what broke or failed is not right
    assert told["pass@1"] == pytest.approx((2 + 4 + 0 + 1) / 16)
    assert told["pass@2"] == pytest.approx((5 / 6 + 1 + 0 + 1 / 2) / 4)  # of 6 pairs, 1 and 3 hold no right one
    assert told["pass@4"] == pytest.approx(3 / 4)
    assert told["truncated_frac"] == 2 / 16
    assert told["unscorable"] == 2
    assert told["reward_mean"] == pytest.approx(7 / 14)
    assert told["length_mean"] == pytest.approx((4 + 4 + 4 + (1 + 6 + 5 + 1)) / 16)
    assert (told["prompts"], told["samples"]) == (4, 4)
    assert told["low"] < told["pass@1"] < told["high"]
    assert engine.asked == [(SAMPLING, SEED, 4)]


def test_evaluate_is_deterministic_and_always_tells_the_same_keys():
    once, twice = (evaluate(SaysEngine(SAYS), PROMPTS, TASK, SAMPLING, 4, SEED) for _ in range(2))
    assert once == twice
    assert list(once) == [
        "pass@1", "low", "high", "reward_mean", "length_mean", "truncated_frac", "unscorable", "prompts", "samples"
    ]  # fmt: skip


def test_rows_are_matched_by_id():
    class Shuffled(SaysEngine):
        def generate(self, *args):
            return super().generate(*args)[::-1]

    assert evaluate(Shuffled(SAYS), PROMPTS, TASK, SAMPLING, 4, SEED) == evaluate(
        SaysEngine(SAYS), PROMPTS, TASK, SAMPLING, 4, SEED
    )


def test_nothing_scorable_is_nan_and_not_zero():
    broken = SaysEngine({p.id: ["broken"] for p in PROMPTS})
    told = evaluate(broken, PROMPTS, TASK, SAMPLING, 1, SEED)
    assert math.isnan(told["reward_mean"]) and told["unscorable"] == 4 and told["pass@1"] == 0.0


def test_missing_and_unasked_completions_are_named():
    lost = SaysEngine(SAYS | {"p1": ["1"]})
    with pytest.raises(KeelError, match="1 completions of prompt 'p1'"):
        evaluate(lost, PROMPTS, TASK, SAMPLING, 4, SEED)

    class Foreign(SaysEngine):
        def generate(self, prompts, *args):
            return super().generate(PROMPTS, *args)

    with pytest.raises(KeelError, match="'p3', which evaluation did not ask"):
        evaluate(Foreign(SAYS), PROMPTS[:3], TASK, SAMPLING, 4, SEED)
    with pytest.raises(KeelError, match="0 prompts"):
        evaluate(lost, [], TASK, SAMPLING, 4, SEED)


def test_panel_evaluates_every_task():
    other = PromptTask("other", PROMPTS[:1], PROMPTS[3:], right_or_wrong)
    told = panel(SaysEngine(SAYS), {"echo": PROMPTS[:2], "other": PROMPTS[3:]}, [TASK, other], SAMPLING, 4, SEED)
    assert {name: numbers["pass@1"] for name, numbers in told.items()} == {"echo": 6 / 8, "other": 1 / 4}


def test_tiers_of_eight_tries():
    assert [tier(c) for c in range(9)] == ["hard"] * 3 + ["medium"] * 3 + ["easy"] * 3
    with pytest.raises(KeelError, match="9 right of 8"):
        tier(9)
    graded = grade(SaysEngine(SAYS), PROMPTS, TASK, SAMPLING, 4, SEED)
    found = {name: [prompt.id for prompt in prompts] for name, prompts in tiers(graded).items()}
    assert found == {"easy": ["p1"], "medium": ["p0"], "hard": ["p2", "p3"]}
