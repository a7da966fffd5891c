"""Finding tasks, refusing bad data, and what each task asks."""

from __future__ import annotations

import json

import pytest

from keel.errors import KeelError
from keel.rewards.exact import exact, last_number
from keel.tasks import reasoning_gym as gym
from keel.tasks import task as tasks
from keel.tasks.problems import SKILLS, SUMS, running_totals
from keel.tasks.task import PromptTask, check_task, get_task, held_out, register
from keel.types import Prompt, Score

ROWS = [{"question": f"What is {i} and {i}?", "gold": str(2 * i)} for i in range(40)]


@pytest.fixture
def write(tmp_path):
    """write(rows or text) → the path of a JSON lines file."""

    def write(rows, name: str = "rows.jsonl") -> str:
        text = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# ---- finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, says",
    [
        ("arithmetik:easy", "did you mean 'arithmetic'"),
        ("arithmetic:medum", "did you mean 'medium'"),
        ("arithmetic", "needs a variant"),
        ("arithmetic:easy?trainsize=4", "did you mean 'train_size'"),
        ("arithmetic:easy?train_size=none", "train_size is 'none'"),
        ("arithmetic:easy?test_size=0", "test_size is '0'"),
        ("sums:2digit?question=hello", "with {a} and {b}"),
        ("reasoning_gym:basic_arithmetics", "did you mean 'basic_arithmetic'"),
        ("reasoning_gym:chain_sum?max_termz=3", "refuses the settings"),
        ("reasoning_gym:graph_color", "gives no gold answer"),
        ("jsonl:/no/such/file.jsonl", "no file '/no/such/file.jsonl'"),
        ("parquet:/no/such/file.parquet", "no file '/no/such/file.parquet'"),
    ],
)
def test_refusals_say_what_to_do(spec, says):
    with pytest.raises(KeelError) as told:
        get_task(spec)
    assert says in str(told.value)


def test_options_in_the_spec_and_as_arguments():
    assert len(get_task("arithmetic:medium?train_size=10&test_size=3").train) == 10
    assert len(get_task("arithmetic:medium?train_size=10", train_size=20).train) == 20


def test_a_small_table_still_holds_a_row_out(write):
    for rows in range(2, 12):
        task = get_task(f"jsonl:{write(ROWS[:rows])}?prompt=question&answer=gold")
        assert len(task.train) + len(task.test) == rows


def test_a_task_of_ones_own(monkeypatch):
    monkeypatch.setattr(tasks, "_REGISTERED", {})
    prompts = [Prompt(str(i), f"{i}?", str(i)) for i in range(4)]
    own = PromptTask("own", prompts[:2], prompts[2:], exact(last_number))
    register("own", lambda variant: own)
    assert get_task("own:anything") is own
    for name in ("own", "arithmetic", "no name"):
        with pytest.raises(KeelError, match="cannot be registered"):
            register(name, lambda variant: own)


# ---- checking --------------------------------------------------------------------------------------------------------


def _task(train, test, grade=exact(last_number), **changes) -> PromptTask:  # noqa: B008
    return PromptTask("mine", train, test, grade, **changes)


P = [Prompt(f"p{i}", f"say {i}", str(i)) for i in range(4)]


@pytest.mark.parametrize(
    "task, says",
    [
        (_task([], P), "no train prompts"),
        (_task(P, []), "no test prompts"),
        (_task([P[0], P[0]], P[1:]), "two prompts with the id 'p0'"),
        (_task([P[0], Prompt("q", "say 1", "1")], P[1:]), "trains on 1 of its own test prompts"),
        (_task([Prompt("q", "say one", "one")], P), "gold answer of prompt 'q' does not score"),
        (_task(P[:2], P[2:], lambda p, t: Score(1.0, True)), "the gold answer of another prompt"),
        (_task(P[:2], P[2:], lambda p, t: Score(None, reason="no parser")), r"unscorable \(no parser\)"),
        (_task(P[:2], P[2:], lambda p, t: Score(1.0, True), own_gold_only=False), "accept the gold answer of another"),
        (_task(P[:2], P[2:], lambda p, t: Score(1.0, False)), "does not score"),
    ],
)
def test_a_task_that_cannot_be_right_is_refused(task, says):
    with pytest.raises(KeelError, match=says):
        task.check()


def test_an_empty_completion_that_scores_is_refused():
    class Generous(PromptTask):
        def reward(self, prompt, text, finish="stop"):
            return Score(1.0, True) if not text else super().reward(prompt, text, finish)

    with pytest.raises(KeelError, match="the empty completion is graded 1"):
        check_task(Generous("mine", P[:2], P[2:], exact(last_number)))


def test_held_out_is_an_eighth_and_never_moves():
    share = sum(held_out(f"key {i}") for i in range(8000)) / 8000
    assert share == pytest.approx(1 / 8, abs=0.012)  # 3 standard errors
    assert [i for i in range(40) if held_out(f"key {i}")] == [i for i in range(40) if held_out(f"key {i}", share=8)]


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_families_ask_and_answer():
    asked = {name: (SKILLS[name].ask(parts), SKILLS[name].answer(parts)) for name, parts in {
        "subtract": (31, 14), "sort": ("40291",), "reverse": ("abcd",), "max": (12, 45, 7),
    }.items()}  # fmt: skip
    assert asked == {
        "subtract": ("Q:31-14=\n", "17"),
        "sort": ("S:40291\n", "01249"),
        "reverse": ("R:abcd\n", "dcba"),
        "max": ("M:12,45,7\n", "45"),
    }
    assert (SUMS[3].ask((12, 5, 20)), SUMS[3].answer((12, 5, 20))) == ("Q:12+5+20=\n", "37")
    assert running_totals((12, 5, 20)) == [17, 37]


def test_arithmetic_accepts_shown_steps():
    task = get_task("arithmetic:medium", train_size=4, test_size=4)
    a, b, c = map(int, task.train[0].text.strip("Q:=\n").split("+"))
    steps = f"{a}+{b}={a + b}\n{a + b}+{c}={a + b + c}\nA:{a + b + c}"
    assert task.reward(task.train[0], steps, "stop").correct
    assert not task.reward(task.train[0], steps[:-1], "stop").correct
    assert task.reward(task.train[0], steps, "length").value == 0.0


def test_medium_has_every_sum_of_three_terms():
    task = get_task("arithmetic:medium", train_size=8000, test_size=8000)
    assert len(task.train) + len(task.test) == 20**3
    assert len(task.test) == pytest.approx(1000, abs=120)


def test_sums_in_words():
    task = get_task("sums:2digit", question="{a} plus {b}?", train_size=4, test_size=2)
    a, b = map(int, task.train[0].text.rstrip("?").split(" plus "))
    assert 10 <= a <= 99 and 10 <= b <= 99
    assert task.reward(task.train[0], f"{a} + {b} = {a + b}.", "stop").correct
    assert not task.reward(task.train[0], f"{a + b}, or {a + b + 1}", "stop").correct


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_jsonl_with_named_columns(write):
    task = get_task(f"jsonl:{write(ROWS)}?prompt=question&answer=gold&suffix= Be brief.")
    assert len(task.train) + len(task.test) == 40 and len(task.test) >= 1
    assert task.train[0].text.endswith("? Be brief.")
    assert task.reward(task.train[0], f"It is {task.train[0].answer}.", "stop").correct


def test_jsonl_with_a_test_file_of_its_own(write):
    train, test = write(ROWS[:30], "a.jsonl"), write(ROWS[30:], "b.jsonl")
    task = get_task(f"jsonl:{train}?prompt=question&answer=gold&test={test}")
    assert (len(task.train), len(task.test)) == (30, 10)
    with pytest.raises(KeelError, match="trains on 30 of its own test prompts"):
        get_task(f"jsonl:{train}?prompt=question&answer=gold&test={train}")


def test_answer_after(write):
    rows = [row | {"gold": f"so it is #### {row['gold']}"} for row in ROWS]
    task = get_task(f"jsonl:{write(rows)}", prompt="question", answer="gold", answer_after="####")
    assert {p.answer for p in [*task.train, *task.test]} == {row["gold"] for row in ROWS}
    with pytest.raises(KeelError, match="has no '####'"):
        get_task(f"jsonl:{write(ROWS)}", prompt="question", answer="gold", answer_after="####")


@pytest.mark.parametrize(
    "rows, options, says",
    [
        (
            ROWS,
            {"prompt": "qestion", "answer": "gold"},
            r"no column 'qestion': did you mean 'question'\? It has question, gold",
        ),
        (ROWS, {"answer": "answer"}, "no column 'answer'"),
        ([{"question": "a", "gold": None}], {}, "has None in column 'gold'"),
        ([{"question": "a", "gold": " "}], {}, "has ' ' in column 'gold'"),
        ([{"question": "a", "gold": float("nan")}], {}, "has nan in column 'gold'"),
        ([{"question": ["a"], "gold": "1"}], {}, r"has \['a'\] in column 'question'"),
        ('{"question": "a"', {}, "Line 1 .* is no JSON"),
        ("[1]", {}, "Line 1 .* is a list"),
        ("\n\n", {}, "has no rows"),
        (ROWS, {"extract": "numbr"}, "did you mean 'number'"),
        (ROWS[:1], {}, "no train prompts"),
        (
            [row | {"gold": "forty two"} for row in ROWS],
            {"extract": "number"},
            "gold answer of prompt 'row/.*' does not score",
        ),
    ],
)
def test_bad_tables_are_refused(write, rows, options, says):
    with pytest.raises(KeelError, match=says):
        get_task(f"jsonl:{write(rows)}", **({"prompt": "question", "answer": "gold"} | options))


def test_numbers_are_read_as_they_are_written(write):
    task = get_task(f"jsonl:{write([{'prompt': f'q{i}', 'answer': i * 1.0} for i in range(30)])}")
    assert all("." not in p.answer for p in task.train)


def test_a_file_that_is_no_parquet(write):
    with pytest.raises(KeelError, match="cannot be read as Parquet"):
        get_task(f"parquet:{write('hello')}")


def test_a_data_set_that_is_not_there(tmp_path):
    with pytest.raises(KeelError, match="could not be loaded"):
        get_task(f"datasets:{tmp_path / 'nothing'}")


# ---- reasoning-gym ---------------------------------------------------------------------------------------------------

ENTRY = Prompt("g", "?", "7", data={"entry": {}})


def _raises(answer, entry):
    raise IndexError("list index out of range")


@pytest.mark.parametrize(
    "scorer, value, correct, reason",
    [
        (lambda a, e: 1.0, 1.0, True, ""),
        (lambda a, e: 0.01, 0.01, False, ""),
        (lambda a, e: True, 1.0, True, ""),
        (_raises, None, False, "the scorer raised IndexError: list index out of range"),
        (lambda a, e: float("nan"), None, False, "returned nan"),
        (lambda a, e: 1.5, None, False, "returned 1.5"),
        (lambda a, e: -0.1, None, False, "returned -0.1"),
        (lambda a, e: None, None, False, "the scorer raised TypeError"),
        (lambda a, e: "x", None, False, "the scorer raised ValueError"),
    ],
)
def test_what_a_scorer_says_is_believed_only_inside_the_unit_interval(scorer, value, correct, reason):
    score = gym.grader(scorer)(ENTRY, "it is 7")
    assert (score.value, score.correct) == (value, correct) and reason in score.reason


def test_what_never_reaches_a_scorer():
    grade = gym.grader(lambda answer, entry: 1.0)
    assert grade(ENTRY, "no number here").reason == "no answer found"
    assert grade(ENTRY, "<answer>nan</answer>").reason == "not a number"
    assert grade(ENTRY, f"<answer>{'7' * 5000}</answer>").reason == "answer too long"


def test_settings_of_a_data_set_reach_it():
    task = get_task("reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1", train_size=8, test_size=2)
    assert all(p.data["entry"]["metadata"]["num_terms"] == 2 for p in task.train)
    texts = [p.text for p in get_task("reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1").train]
    assert len(set(texts)) == len(texts) < 500  # of some 200 sums of two digits each is asked once
    again = get_task("reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1", train_size=8, test_size=2)
    assert [p.text for p in again.train] == [p.text for p in task.train]


# ---- errors on purpose, and halves of the held-out prompts -------------------------------------------------------------


def test_a_noisy_task_errs_at_its_rates_in_training_and_nowhere_else():
    task, true = get_task("noisy:arithmetic:medium?fpr=.3&fnr=.1"), get_task("arithmetic:medium")
    wrong = [score.value for score in task.reward_many([(p, "A:0", "stop") for p in task.train[:4000]])]
    right = [score.value for score in task.reward_many([(p, task.gold(p), "stop") for p in task.train[:4000]])]
    assert sum(wrong) / 4000 == pytest.approx(0.3, abs=0.03) and sum(right) / 4000 == pytest.approx(0.9, abs=0.02)
    assert all(task.reward(p, task.gold(p)) == true.reward(p, task.gold(p)) for p in task.test)
    same = task.reward_many([(task.train[0], "A:0", "stop")] * 2000)
    assert sum(score.correct for score in same) / 2000 == pytest.approx(0.3, abs=0.04)
    assert task.reward(task.train[0], "A:0", "length").value == 0.0 and task.reward(task.train[0], " ").value == 0.0


def test_a_coin_and_a_reward_turned_round():
    coin, turned = (get_task(f"noisy:arithmetic:easy?fpr={rate}&fnr={rate}") for rate in (0.5, 1))
    asked = [(p, coin.gold(p) if i % 2 else "A:0", "stop") for i, p in enumerate(coin.train)]
    scores = [score.value for score in coin.reward_many(asked)]
    assert abs(sum(scores[1::2]) - sum(scores[::2])) < 0.2 * len(scores[::2])
    assert [score.value for score in turned.reward_many(asked)] == [float(i % 2 == 0) for i in range(len(asked))]


@pytest.mark.parametrize("spec, named", [("noisy:arithmetic:easy?fpr=2", "between 0 and 1"), ("noisy:nothing", "Unknown task")])
def test_noise_that_is_none(spec, named):
    with pytest.raises(KeelError, match=named):
        get_task(spec)


def test_one_half_of_the_held_out_prompts_and_the_other():
    first, whole = get_task("arithmetic:medium?test_size=64"), get_task("arithmetic:medium?test_size=128")
    second = get_task("arithmetic:medium?test_size=128&skip_test=64")
    assert [p.id for p in (*first.test, *second.test)] == [p.id for p in whole.test]
    with pytest.raises(KeelError, match="skip_test"):
        get_task("arithmetic:medium?test_size=64&skip_test=64")


def test_a_weighted_sum_of_graders(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i} + 1", "answer": "{i + 1}"}}\n' for i in range(20)))
    task = get_task(f"jsonl:{rows}?grader=answer,exact*0.5&extract=line")
    score = task.reward(task.train[0], f"So\n\\boxed{{{task.train[0].answer}}}")
    assert score.value == 1.0 and score.correct and score.parts == {"answer": 1.0, "exact": 0.0}
    assert task.reward(task.train[0], task.train[0].answer).value == 1.5
    for grader, named in [("answer,exact*x", "no weight"), ("answer,guess", "guess"), ("answer,exact&wall_s=3", "wall_s")]:
        with pytest.raises(KeelError, match=named):
            get_task(f"jsonl:{rows}?grader={grader}")
