"""Building data: gold that is verified, a selection that does what it says, the same rows from the same seed."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from dataclasses import replace

import numpy as np
import pytest

from keel.data.arguments import add_build_arguments, add_check_arguments, build_options, check_options
from keel.data.build import AGAIN, Plan, build, candidates
from keel.data.command import run_build
from keel.data.curriculum import FLOOR, Record, draw, importance, information, weights
from keel.data.near import normalised
from keel.data.select import Candidate, effective_answers, select
from keel.data.sources import sources
from keel.data.verify import solve, verify
from keel.errors import KeelError
from keel.rollout.local import LocalEngine
from keel.tasks.task import get_task
from keel.types import Prompt, Sampling, Score

# ── gold ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Q:12+5+20=\n", "37"),
        ("Q:31-14=\n", "17"),
        ("S:40291\n", "01249"),
        ("R:abc\n", "cba"),
        ("M:12,45,7\n", "45"),
        ("Calculate 17 + 25. Write only the result.", "42"),
        ("There are 3 boxes with 4 apples each. How many are there together?", None),
        ("What is the sum of the first 5 primes up to 11?", None),
    ],
)
def test_solvers(text, answer):
    assert solve(text) == answer


def test_every_shipped_source_is_worked_out_alike():
    for spec in ("arithmetic:hard", "sums:2digit", "skills:sort", "skills:reverse", "skills:max", "skills:subtract"):
        for source in sources(f"{spec}?train_size=20&test_size=4", True, 20):
            for a, b in zip(source.task.train[:20], source.task.train[1:21], strict=False):
                assert verify(source.task, a, b) == "recomputed", (source.name, a)


def test_variations_ask_nothing_that_is_held_out():
    held = {normalised(p.text) for terms in ("easy", "medium", "hard") for p in get_task(f"arithmetic:{terms}").test}
    assert not held & {normalised(p.text) for source in sources("arithmetic:easy", True, 500) for p in source.task.train}


def test_bad_gold_is_not_taken():
    task = get_task("arithmetic:easy")
    a, b = task.train[:2]
    assert verify(task, replace(a, answer=str(int(a.answer) + 1)), b) == "wrong"
    strict = replace(task, grade=lambda prompt, text: Score(0.0))
    assert verify(strict, a, b) == "ungradable"
    lax = replace(task, grade=lambda prompt, text: Score(1.0, True))
    assert verify(lax, a, b) == "lax"
    assert verify(task, replace(a, text="How many?"), b) == "graded"


def test_candidates_stand_nowhere_held_out_and_once():
    plan = Plan(("arithmetic:easy", "skills:max"), 10, pool=400, variations=True)
    pool = candidates(plan)
    texts = [normalised(c.prompt.text) for c in pool.candidates]
    assert len(set(texts)) == len(texts) == 400 and not set(texts) & {normalised(p.text) for p in pool.held_out}
    assert len({c.source for c in pool.candidates}) == 14
    assert [c.prompt.id for c in candidates(plan).candidates] == [c.prompt.id for c in pool.candidates]
    other = candidates(Plan(("arithmetic:easy",), 10, pool=20, against=("skills:max?train_size=20&test_size=4",)))
    assert len(other.held_out) == len(get_task("arithmetic:easy").test) + 4


def test_a_source_that_two_tasks_share_is_one_source():
    specs = [f"arithmetic:{tier}?train_size=20&test_size=4" for tier in ("easy", "medium")]
    pool = candidates(Plan(tuple(specs), 10, pool=140, variations=True))
    names = [source.name for source in pool.sources]
    assert len(set(names)) == len(names) == 14
    assert {c.source for c in pool.candidates} == set(names)
    assert [source.name for source in pool.sources if not source.of] == ["arithmetic:easy", "arithmetic:medium"]


# ── selection ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def some(counts, answers=lambda i: str(i), source=lambda i: "a"):
    return [Candidate(Prompt(str(i), f"Q{i}", answers(i)), source(i), "graded", right, 8) for i, right in enumerate(counts)]


def test_selection_keeps_to_its_bounds_and_says_why():
    chosen = select(some([0, 1, 4, 4, 7, 8]), 3, 0.1, 0.8, seed=0)
    assert {c.right for c in chosen.candidates} == {1, 4}
    assert chosen.left == {"too hard": 1, "too easy": 2}


def test_middling_prompts_are_likelier():
    taken = [select(some([1, 4] * 50), 20, 0.0, 1.0, seed=s).candidates for s in range(30)]
    assert np.mean([c.right == 4 for each in taken for c in each]) == pytest.approx(0.64, abs=0.05)


def test_sources_take_turns_and_answers_do_not_crowd():
    mixed = some([4] * 60, source=lambda i: "ab"[i >= 50])
    assert sum(c.source == "b" for c in select(mixed, 20, 0.0, 1.0, 0).candidates) == 10
    crowded = select(some([4] * 100, answers=lambda i: "0" if i < 80 else str(i)), 40, 0.0, 1.0, 0)
    assert sum(c.prompt.answer == "0" for c in crowded.candidates) == 6  # ⌈3 · 40 / 21⌉
    assert crowded.left["answer is crowded"] == 74
    assert effective_answers(some([4] * 10)) == pytest.approx(10)
    assert effective_answers([]) == 0.0


# ── the whole ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tiny():
    from keel.models.load import load_policy

    policy = load_policy("tiny-dense")
    return policy, LocalEngine(policy)


PLAN = Plan(("arithmetic:easy",), 12, pool=48, samples=4, variations=True, sampling=Sampling(max_completion_tokens=12))


def test_the_same_plan_gives_the_same_rows(tiny):
    a, b = build(PLAN, *tiny), build(PLAN, *tiny)
    assert a.chosen == b.chosen and a.control == b.control and a.again == b.again
    assert len(a.chosen.candidates) == 12 and len(a.measured) == 48 and not a.stopped
    assert all(0.1 <= c.pass_rate <= 0.9 and c.tries == 4 for c in a.chosen.candidates)
    assert [c.prompt.id for c in a.again] == [c.prompt.id for c in a.chosen.candidates]
    other = build(replace(PLAN, seed=1), *tiny)
    assert other.chosen != a.chosen
    assert [c.right for c in a.again] != [c.right for c in a.chosen.candidates]  # fresh samples, under another step
    assert AGAIN < 2**31


def test_time_is_a_bound(tiny):
    with pytest.raises(KeelError, match="Only 0 of 0 candidates"):
        build(replace(PLAN, minutes=1e-9), *tiny)


@pytest.mark.parametrize("change", [{"size": 0}, {"size": 3000}, {"specs": ()}, {"samples": 1}, {"low": 0.9, "high": 0.1}])
def test_impossible_plans(change):
    with pytest.raises(KeelError, match="Expected"):
        replace(PLAN, **change)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "mine.jsonl"
    arguments = dict(size=12, pool=48, samples=4, variations=True, max_completion_tokens=12)
    assert run_build(["arithmetic:easy"], out=str(out), as_json=True, **arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 12 and told["selected"]["again"] > 0
    task = get_task(told["spec"])
    assert len(task.train) == 12 and task.reward(task.train[0], f"A:{task.train[0].answer}").correct
    assert len(task.test) == len(get_task("arithmetic:easy").test)
    assert len(get_task(told["spec"].replace("mine.jsonl", "mine.unselected.jsonl", 1)).train) == 12
    card = (tmp_path / "mine.md").read_text()
    for words in ("pass rate, again", "sums of 5 up to 9 (variation)", "too hard", "SHA-256", told["spec"]):
        assert words in card
    with pytest.raises(KeelError, match="exists already"):
        run_build(["arithmetic:easy"], out=str(out), **arguments)


def test_arguments_reach_the_commands(tmp_path, capsys):
    parser = ArgumentParser()
    add_build_arguments(parser)
    arguments = ["arithmetic:easy", "--size", "6", "--pool", "24", "--samples", "4", "--max-completion-tokens", "12", "--json"]
    assert build_options(parser.parse_args([*arguments, "--out", str(tmp_path / "b.jsonl")])) == 0
    spec = json.loads(capsys.readouterr().out)["spec"]
    parser = ArgumentParser()
    add_check_arguments(parser)
    assert check_options(parser.parse_args([spec, "--against", "arithmetic:easy", "--also", "nobody", "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == {"train": 6, "test": len(get_task("arithmetic:easy").test)}


# ── curriculum ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_information_by_hand():
    # Beta(1, 1): E[p] − E[p²] = 1/2 − 1/3; Beta(3, 3): 1/2 − 3·4/(6·7)
    assert information(np.array([0.0, 2.0]), np.array([0.0, 4.0])) == pytest.approx([1 / 6, 0.5 - 12 / 42])


def test_weights_sum_to_one_and_keep_a_floor():
    record = Record(np.array([0.0, 4.0, 8.0, 0.0]), np.array([8.0, 8.0, 8.0, 0.0]))
    w = weights(record)
    assert w.sum() == pytest.approx(1) and w.min() >= FLOOR / 4
    assert w.argmax() == 1 and w[0] == pytest.approx(w[2])
    assert weights(Record.empty(5)) == pytest.approx(np.full(5, 0.2))
    with pytest.raises(KeelError, match="floor"):
        weights(record, floor=0.0)


def test_draws_follow_the_weights_without_repeats():
    w = np.array([0.6, 0.3, 0.1])
    first = np.bincount([draw(w, 1, 0, step)[0] for step in range(4000)], minlength=3) / 4000
    assert first == pytest.approx(w, abs=0.025)
    assert sorted(draw(w, 3, 0, 0)) == [0, 1, 2]
    assert draw(w, 2, 5, 8).tolist() == draw(w, 2, 5, 8).tolist()
    with pytest.raises(KeelError, match="3 prompts"):
        draw(w, 4, 0, 0)


def test_a_record_forgets():
    record = Record.empty(3).updated(np.array([1, 2]), np.array([8.0, 0.0]), np.array([8.0, 0.0]))
    assert record.tries.tolist() == [0, 8, 0]
    later = record.updated(np.array([1]), np.array([0.0]), np.array([8.0]))
    assert (later.right[1], later.tries[1]) == (4.0, 12.0)
    assert record.tries[1] == 8  # the old one is as it was


def test_importance_takes_the_weights_back():
    w = weights(Record(np.array([0.0, 4.0, 8.0]), np.array([8.0, 8.0, 8.0])))
    gradient = np.array([1.0, -2.0, 5.0])
    assert (w * importance(w) * gradient).sum() == pytest.approx(gradient.mean())
    assert importance(w).max() <= 1 / FLOOR


def test_a_curriculum_finds_the_prompts_between():
    """A policy that solves a third of the prompts never, a third at random and a third always."""
    rng, rate = np.random.default_rng(0), np.repeat([0.0, 0.5, 1.0], 100)
    record = Record.empty(300)
    for step in range(60):
        index = draw(weights(record), 16, 0, step)
        record = record.updated(index, rng.binomial(8, rate[index]).astype(float), np.full(16, 8.0))
    share = weights(record)[100:200].sum()
    assert share > 0.55
