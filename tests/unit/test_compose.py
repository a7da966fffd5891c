"""Graders made of graders, gates, and what the parts are worth."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel.diagnostics.metrics import check_names
from keel.diagnostics.parts import beyond_correct, part_metrics
from keel.errors import KeelError
from keel.rewards.compose import Gated, Part, Weighted, described, grade_many, spent
from keel.rewards.exact import exact_anywhere
from keel.rewards.format import form_of, matches, tagged, written
from keel.tasks.task import PromptTask, get_task, reward_many
from keel.training.buffer import PromptStream, collect, score_groups
from keel.types import Group, Prompt, Score

PROMPT = Prompt("p", "2 + 2", "4")


def shortness(prompt, text):
    return Score(1.0 / len(text), parts={"chars": float(len(text))})


class Together:
    """Counts how it is asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompt, text):
        return self.many([(prompt, text)])[0]

    def many(self, asked):
        self.calls.append(len(asked))
        return [Score(float(text == prompt.answer), text == prompt.answer) for prompt, text in asked]


def test_a_weighted_sum_keeps_its_parts():
    grader = Weighted({"answer": exact_anywhere, "short": Part(shortness, 0.5)})
    score = grader(PROMPT, "4")
    assert score.value == 1.5 and score.correct and score.parts == {"answer": 1.0, "short": 0.5, "short.chars": 1.0}
    assert grader(PROMPT, "5").value == 0.5 and not grader(PROMPT, "5").correct


def test_what_is_right_is_said_by_one_part():
    grader = Weighted({"short": shortness, "answer": Part(exact_anywhere, 0.0)}, correct="answer")
    assert grader(PROMPT, "4").correct and not grader(PROMPT, "x").correct


def test_the_answer_is_that_of_the_part_that_decides():
    grader = Weighted({"short": shortness, "answer": exact_anywhere}, correct="answer")
    assert Gated(tagged("answer"), grader)(PROMPT, "<answer>5</answer>").said == "5"
    assert Gated(tagged("answer"), grader)(PROMPT, "5").said == ""


@pytest.mark.parametrize("bad", [Score(None, reason="server down"), Score(math.nan), Score(math.inf)])
def test_one_part_without_a_verdict_leaves_none(bad):
    score = Weighted({"answer": exact_anywhere, "judge": Part(lambda *_: bad, 0.0)})(PROMPT, "4")
    assert score.value is None and score.reason.startswith("judge: ")


@pytest.mark.parametrize(
    ("parts", "correct", "said"),
    [
        ({}, "", "no parts"),
        ({"a b": exact_anywhere}, "", "letters"),
        ({"a.b": exact_anywhere}, "", "letters"),
        ({"a": Part(exact_anywhere, math.nan)}, "", "finite"),
        ({"answer": exact_anywhere}, "anser", "did you mean 'answer'"),
    ],
)
def test_sums_that_cannot_be(parts, correct, said):
    with pytest.raises(KeelError, match=said):
        Weighted(parts, correct)


def test_lists_are_handed_on_to_the_innermost_grader():
    inner = Together()
    grader = Gated(tagged("answer"), Weighted({"a": inner, "b": shortness}))
    texts = ["<answer>4</answer>", "4", "<answer>5</answer>"]
    scores = grader.many([(PROMPT, text) for text in texts])
    assert inner.calls == [2] and [score.parts["format.open"] for score in scores] == [1, 0, 1]
    assert scores == [grader(PROMPT, text) for text in texts]
    with pytest.raises(KeelError, match="one each"):
        grade_many(type("Short", (), {"many": lambda self, asked: [], "__call__": exact_anywhere})(), [(PROMPT, "4")])


@given(st.text(alphabet="<>/answer4 \n", max_size=40))
def test_form_earns_nothing(text):
    """Whatever is written, the gate never gives more than the grader behind it."""
    inner, gated = exact_anywhere(PROMPT, text), Gated(tagged("answer"), exact_anywhere)(PROMPT, text)
    assert gated.value <= inner.value and (inner.correct or not gated.correct)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>a</think><answer>b</answer>", True),
        (" <think>\na\n</think>\n\n<answer>b</answer>\n", True),
        ("<think>a</think>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a<answer>b</answer></think>", False),
        ("<think>a</think>x<answer>b</answer>", False),
        ("<think>a</think><answer>b</answer>x", False),
        ("<think> </think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<think>a</think><answer></answer>b</answer>", False),
        ("", False),
    ],
)
def test_tags(text, right):
    assert (tagged("think", "answer")(text) == "") is right


def test_forms_by_name():
    assert form_of("tags:think,answer")(written("tags:think,answer", "4")) == ""
    assert form_of("regex:a.*b")("a\nb") == "" and form_of("regex:a.*b")("a\nbc")
    assert written("regex:a", "4") is None
    for spec in ("tag:a", "tags:a b", "tags:", "regex:("):
        with pytest.raises(KeelError):
            form_of(spec)
    with pytest.raises(KeelError, match="regular"):
        matches("(")


def test_a_task_with_a_form(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i} + 0", "answer": "{i}"}}\n' for i in range(20)))
    task = get_task(f"jsonl:{rows}?form=tags:think,answer&extract=tag")
    prompt = task.train[0]
    assert task.reward(prompt, task.gold(prompt), "stop").value == 1.0
    assert task.reward(prompt, f"<answer>{prompt.answer}</answer>", "stop").value == 0.0
    with pytest.raises(KeelError, match="did you mean 'answer'"):
        get_task(f"jsonl:{rows}?answr=gold")
    with pytest.raises(KeelError, match="did you mean 'judge'"):
        get_task(f"jsonl:{rows}?grader=juge")


# ---- grading together ------------------------------------------------------------------------------------------------


def test_a_round_is_graded_at_once(make_completion):
    inner = Together()
    prompts = [Prompt(str(i), str(i), str(i)) for i in range(4)]
    task = PromptTask("mine", prompts[:3], prompts[3:], inner)

    def generate(asked):
        said = {0: dict(text="", finish="stop"), 1: dict(finish="error", error="gone"), 2: dict(finish="length")}
        return list(asked), [
            make_completion([3, 1], p.id, s, **(dict(text=p.id) | said.get(s, {}))) for p in asked for s in range(5)
        ]

    together = collect(generate, PromptStream(prompts[:3], 0), task.reward, prompts=3, reward_many=task.reward_many)
    assert inner.calls == [6], "empty, failed and truncated ones need no grader"
    alone = collect(generate, PromptStream(prompts[:3], 0), task.reward, prompts=3)
    assert [g.scores for g in together.groups] == [g.scores for g in alone.groups]
    assert together.groups[0].scores[1].reason == "engine: gone"


def test_a_subclass_keeps_its_own_reward():
    class Mine(PromptTask):
        def reward(self, prompt, text, finish="stop"):
            return Score(0.5)

    task = Mine("mine", [PROMPT], [PROMPT], Together())
    assert [score.value for score in reward_many(task, [(PROMPT, "4", "stop")])] == [0.5]


def test_a_lost_score_is_noticed(make_completion):
    with pytest.raises(KeelError, match="0 scores for 1"):
        score_groups([(PROMPT, [make_completion([3, 1])])], lambda asked: [])


# ---- what parts are worth --------------------------------------------------------------------------------------------


class Paid:
    """A grader that counts."""

    def __call__(self, prompt, text):
        return Score(1.0)

    def describe(self):
        return {"model": "m"}

    def spent(self):
        return {"requests": 3.0}


def test_what_a_made_grader_says_of_itself():
    made = Gated(form_of("tags:answer"), Weighted({"a": Part(Paid(), 2.0), "b": Paid(), "c": shortness}))
    assert spent(made) == {"requests": 6.0} and spent(shortness) == {}
    told = described(made)
    assert told["gate"] == "format" and told["grader"]["weighted"]["a"] == {"weight": 2.0, "grader": {"model": "m"}}
    assert described(shortness) == ""


def beyond(reward, correct, group, scorable=None):
    b = len(reward)
    flags = torch.tensor(scorable or [True] * b)
    return float(beyond_correct(torch.tensor(reward), torch.tensor(correct), torch.tensor(group), flags))


def test_share_beyond_correctness():
    assert beyond([1.0, 0.0, 0.0], [True, False, False], [0, 0, 0]) == pytest.approx(0, abs=1e-12)
    assert beyond([3.0, 1.0], [True, False], [0, 0]) == pytest.approx(0, abs=1e-12), "a factor and a shift change nothing"
    assert beyond([1.0, 0.5], [True, True], [0, 0]) == 1.0, "two right answers, told apart by something else"
    # group 0: a = ±.5, c = ±.5; group 1: a = ±.25, c = 0 → 1 − .5² / ((.5 + .125) · .5) = .2
    assert beyond([1.0, 0.0, 0.5, 0.0], [True, False, False, False], [5, 5, 2, 2]) == pytest.approx(0.2)
    assert math.isnan(beyond([0.1, 0.1, 0.1], [True, True, True], [0, 0, 0])), "no signal at all"
    # an unscorable row changes nothing
    assert beyond([1.0, 0.0, 99.0], [True, False, False], [0, 0, 0], [True, True, False]) == pytest.approx(0, abs=1e-12)


def test_metrics_of_parts(make_completion):
    def group(id, rows):
        done = tuple(make_completion([3, 1], id, i) for i in range(len(rows)))
        return Group(Prompt(id, "", ""), done, tuple(rows))

    def score(answer, short):
        return Score(answer + short, answer > 0, parts={"answer": answer, "short": short, "short.chars": 10.0})

    groups = [
        group("a", [score(1.0, 0.5), score(0.0, 0.5), Score(None, parts={"answer": 9.0})]),
        group("b", [score(0.0, 0.0), score(0.0, 0.5)]),
    ]
    got = part_metrics(groups)
    check_names(got)
    assert got["reward/part/answer_mean"] == 0.25 and got["reward/part/short.chars_mean"] == 10.0
    # within groups: answer ±.5 in a; short ±.25 in b → Σa² = .5 + .125; shares .8 and .2
    assert got["reward/part/answer_share"] == pytest.approx(0.8) and got["reward/part/short_share"] == pytest.approx(0.2)
    clipped = [group("a", [Score(1.0, parts={"answer": 3.0}), Score(0.0, parts={"answer": 0.0})])]
    assert set(part_metrics(clipped)) == {"reward/part/answer_mean"}, "parts that do not sum up have no shares"
    assert part_metrics([group("a", [Score(1.0), Score(0.0)])]) == {}
    check_names(part_metrics([group("a", [Score(1.0, parts={"odd name/é!": 1.0})])]))
