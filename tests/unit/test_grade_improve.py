"""A judge of worked sums: what is true is computed, errors are mined, and nothing that is measured on was trained on."""

from __future__ import annotations

import random

import pytest

from keel.grade.improve import loop
from keel.grade.improve.command import gain, told
from keel.grade.improve.examples import FIRST, balanced, drawn, frozen_set
from keel.grade.improve.judge import Judge, JudgeGrader, judgement, parts_of, question, read, verdict
from keel.grade.improve.loop import Improved, Sizes, errors_of, improve, judged, measure
from keel.grade.improve.solutions import KINDS, Truth, truth, worked
from keel.grade.improve.training import judging, mixed, verdict_reward
from keel.models.characters import CHARACTERS
from keel.models.load import load_policy
from keel.tasks.problems import SUMS
from keel.tasks.task import get_task

PARTS = (17, 13, 8)


@pytest.mark.parametrize(
    ("text", "level", "step"),
    [
        ("17+13=30\n30+8=38\nA:38", 1.0, 0),
        ("17+13=31\n31+8=39\nA:39", 0.5, 1),
        ("17+13=30\n30+8=37\nA:37", 0.5, 2),
        ("17+13=31\n31+8=38\nA:38", 0.0, 1),  # two slips that meet in the right answer
        ("17+13=31\n30+8=38\nA:38", 0.0, 1),  # a slip that is not carried on
        ("17+13=30\n30+8=38\nA:39", 0.0, 3),
        ("17+13=30\n30+9=39\nA:39", 0.0, 2),
        ("17+13=30\nA:38", 0.0, 2),
        ("A:38", 0.0, 1),
        ("17+13=30\n30+8=38\n", 0.0, 3),
        ("17+13=30\n30+8=38\nA:38\nA:38", 0.0, 3),
        ("17+13=30\n30+8=38", 0.0, 3),
        ("17 + 13 = 30\n30+8=38\nA:38", 0.0, 1),
        ("", 0.0, 1),
    ],
)
def test_what_is_true_is_computed(text, level, step):
    assert truth(PARTS, text) == Truth(level, step)


@pytest.mark.parametrize("kind", KINDS)
def test_ways_of_going_wrong_are_what_they_say(kind):
    rng = random.Random(kind)
    levels = {truth(parts, KINDS[kind](parts, rng)).level for parts in (SUMS[3].draw(rng) for _ in range(200))}
    expected = {"right": {1.0}, "far slip": {0.5}, "near slip": {0.5}}.get(kind, {0.0})
    assert levels - {1.0} == expected - {1.0} and (kind == "miscopied" or levels == expected)


def test_verdicts_are_written_and_read():
    for true in (Truth(1.0, 0), Truth(0.5, 2), Truth(0.0, 3)):
        assert read(verdict(true)) == true
    assert [read(text) for text in ("", "c", "d0", "c00", "cx", "c٣")] == [None] * 6


@pytest.mark.parametrize(
    ("said", "true", "reward"),
    [
        (Truth(1.0, 0), Truth(1.0, 0), 1.0),
        (Truth(0.5, 1), Truth(0.0, 1), 0.5),
        (Truth(0.5, 2), Truth(0.5, 1), 0.0),  # the level holds, the reason does not
        (Truth(1.0, 0), Truth(0.0, 1), 0.0),
        (None, Truth(1.0, 0), 0.0),
    ],
)
def test_a_verdict_is_worth_its_level_if_its_reason_holds(said, true, reward):
    assert verdict_reward(said, true) == reward


def test_what_the_judge_reads_is_in_its_alphabet():
    asked = question(PARTS, "17+13=30\n\x00ü€<end>")
    assert set(asked) <= set(CHARACTERS)
    assert asked == "17+13=30\n???<end>\nQ:17+13+8=\n"
    assert judgement(PARTS, "17+13=31\n31+8=39\nA:39") == "17+13=30/31x\n30+8=38/39x\nA:38/39x\nb1"
    assert judgement(PARTS, "A:38") == "17+13=30/38x\n30+8=38/x\nA:38/x\na1"
    assert read(judgement(PARTS, "17+13=31\n31+8=39\nA:39")) == Truth(0.5, 1)


def test_the_frozen_set_is_held_out_and_even():
    found = frozen_set(load_policy("tiny-dense"), get_task("arithmetic:medium").test[:64], 120)
    assert all(SUMS[3].in_test(example.parts) for example in found)
    counts = [sum(example.truth.level == level for example in found) for level in (0.0, 0.5, 1.0)]
    assert min(counts) >= 30 and {"sampled"} < {example.kind for example in found}
    rng = random.Random(0)
    assert not any(SUMS[3].in_test(drawn(rng, FIRST).parts) for _ in range(300))


class Fixed(Judge):
    """A judge that says what a function says."""

    def __init__(self, say):
        object.__setattr__(self, "say", say)

    def judge(self, asked):
        return [self.say(parts, text) for parts, text in asked]


def test_measuring_and_mining_by_hand():
    rng = random.Random(1)
    examples = balanced([drawn(rng, dict.fromkeys(KINDS, 1.0)) for _ in range(400)], 90)
    perfect, lenient = Fixed(truth), Fixed(lambda parts, text: Truth(1.0, 0))
    best, worst = measure(perfect, examples, "best", 0), measure(lenient, examples, "worst", 0)
    assert (best.tpr.mean, best.fpr.mean, best.j.mean, best.level, best.reason) == (1.0, 0.0, 1.0, 1.0, 1.0)
    assert (worst.tpr.mean, worst.fpr.mean, worst.j.mean) == (1.0, 1.0, 0.0) and worst.level == pytest.approx(1 / 3)
    wrong, right = errors_of(lenient, examples)
    assert {e.truth.level for e in wrong} == {0.0, 0.5} and {e.truth.level for e in right} == {1.0}
    silent = measure(Fixed(lambda parts, text: None), examples, "silent", 0)
    assert silent.tpr.mean == silent.fpr.mean == 0.0


def test_mined_examples_are_drawn_as_often_as_asked():
    rng, mined = random.Random(0), [drawn(random.Random(5), {"guessed": 1.0})]
    found = [mixed(lambda rng: drawn(rng, {"right": 1.0}), mined, 0.7)(rng).kind for _ in range(1000)]
    assert 650 < found.count("guessed") < 750
    assert mixed(lambda rng: drawn(rng, {"right": 1.0}), [], 0.7)(rng).kind == "right"


def test_the_judging_task_rewards_true_verdicts():
    rng = random.Random(2)
    examples = list(dict.fromkeys(drawn(rng, dict.fromkeys(KINDS, 1.0)) for _ in range(50)))
    task = judging(examples[1:], examples[:1])
    for prompt in task.train:
        assert task.reward(prompt, prompt.answer).value == 1.0 and task.reward(prompt, "zz").value == 0.0


def test_the_judge_grades_sums_and_asks_equal_questions_once(monkeypatch):
    policy, task = load_policy("tiny-dense"), get_task("arithmetic:medium")
    judge, prompt = Judge.of(policy), task.train[0]
    asked = []
    generate = judge.engine.generate
    monkeypatch.setattr(judge.engine, "generate", lambda prompts, *rest: asked.append(len(prompts)) or generate(prompts, *rest))
    scores = JudgeGrader(judge).many([(prompt, worked(parts_of(prompt)))] * 5 + [(prompt, "x" * 1000)])
    assert asked == [1] and len(scores) == 6 and scores[5].value == 0.0
    assert judged(policy).name == "judged"


@pytest.mark.slow
def test_the_whole_loop_in_small(monkeypatch):
    small = Sizes(
        frozen=60, pool=64, block=40, most_blocks=1, round_steps=4, rounds=1, judge_steps=1, policy_steps=1, prompts=2, evaluated=4
    )
    said = []
    found = improve(seeds=2, sizes=small, say=said.append)
    assert [m.after for m in found.stages] == ["first", "round 1", "reinforced"] and found.stages[1].mined > 0
    assert len(found.before) == len(found.after) == len(found.believed_before) == 2 and "True pass@1" in told(found)
    assert any("seed 1, judge after" in text for text in said)


def test_the_gain_is_paired():
    found = Improved([], 0.5, before=[0.5, 0.6, 0.7], after=[0.6, 0.7, 0.8], believed_before=[], believed_after=[])
    made = gain(found)
    assert (made.mean, made.low, made.high) == pytest.approx((0.1, 0.1, 0.1))
    assert loop.TASK == "arithmetic:medium"
