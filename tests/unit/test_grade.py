"""Calibration of graders: by hand, against published examples, by enumeration, and on errors that were planted."""

from __future__ import annotations

import json
import random
import time
from argparse import ArgumentParser

import numpy as np
import pytest

from keel.errors import KeelError
from keel.grade.agreement import against_levels, compare, confusion, kappa
from keel.grade.arguments import ROLES, add_arguments, run_options
from keel.grade.command import find, run
from keel.grade.consequence import consequence, enumerated
from keel.grade.pairs import COLUMNS, clusters, level_of, pairs_of, read_pairs
from keel.grade.rates import auc, difference, effective_tries, rate
from keel.grade.surface import clustered_p, surface
from keel.grade.verdicts import verdicts
from keel.grade.words import told
from keel.rewards.graders import get_grader, register
from keel.types import Prompt, Score


def rows(right=200, wrong=200):
    return [
        *({"answer": f"{i}", "gold": f"{i}", "label": True, "class": "equal"} for i in range(right)),
        *({"answer": f"{i + 1}", "gold": f"{i}", "label": False, "class": "near"} for i in range(wrong)),
    ]


RUBRIC = """
[[criteria]]
name = "right"
says = "The answer is right."
kind = "essential"
"""


def noisy(tpr, fpr, seed=0):
    """A grader with these chances, whose verdict hangs on the answer and its row alone."""

    def grade(prompt: Prompt, text: str) -> Score:
        lucky = random.Random(f"{seed} {prompt.id} {text}").random()
        passed = lucky < (tpr if text == prompt.answer else fpr)
        return Score(float(passed), passed)

    return grade


# ── shares ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_difference_as_published():
    # Newcombe 1998, table II, contrast (a), method 10: 56/70 − 48/80 = .2, .0524 … .3339
    names = [str(i) for i in range(80)]
    a, b = (rate(np.arange(n) < hits, names[:n]) for hits, n in ((56, 70), (48, 80)))
    found = difference(a, b)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_answers_to_one_question_count_for_less():
    hit = np.repeat(np.arange(40) % 2 == 0, 5)
    apart, together = [str(i) for i in range(200)], [str(i // 5) for i in range(200)]
    assert effective_tries(hit, apart) == pytest.approx(200, rel=0.01)
    assert effective_tries(hit, together) == pytest.approx(40, rel=0.03)
    assert rate(hit, together).high > rate(hit, apart).high
    nothing = rate(np.zeros(0, dtype=bool), [])
    assert np.isnan(nothing.mean) and (nothing.low, nothing.high) == (0.0, 1.0)


def test_auc_by_hand():
    # hits .1 .4, others .2 .3: pairs won 0, 0, 1, 1
    assert auc(np.array([0.1, 0.4, 0.2, 0.3]), np.array([True, True, False, False])).mean == 0.5
    assert auc(np.array([1.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False])).mean == 0.75  # a tie is half a win
    assert auc(np.array([3.0, 4.0, 1.0, 2.0]), np.array([True, True, False, False])).mean == 1.0


def test_kappa_by_hand():
    a = np.repeat([0, 0, 1, 1], [20, 5, 10, 15])
    b = np.repeat([0, 1, 0, 1], [20, 5, 10, 15])
    assert confusion(a, b, 2).tolist() == [[20, 5], [10, 15]]
    assert kappa(a, b, 2) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    # three levels: seen squares (1·1)/4, by chance Σ (i−j)² pᵢ qⱼ
    a, b = np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])
    chance = 1 * (0.25 * 0.5) + 4 * (0.25 * 0.25) + 1 * (0.25 * 0.25 + 0.25 * 0.25) + 4 * (0.5 * 0.25) + 1 * (0.5 * 0.5)
    assert kappa(a, b, 3, squared=True) == pytest.approx(1 - 0.25 / chance)
    assert np.isnan(kappa(a * 0, b * 0, 3))


def test_levels_of_a_rubric():
    label = np.array([0.0, 0.5, 1.0, 1.0])
    found = against_levels(np.array([0.1, 0.6, 0.9, 0.4]), label, list("abcd"))
    assert found.levels == (0.0, 0.5, 1.0)
    assert found.table == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert found.mean == pytest.approx((0.1, 0.6, 0.65))


# ── consequence ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tpr, fpr", [(0.8, 0.2), (0.97, 0.01), (0.3, 0.6), (0.5, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_factors_are_those_of_every_group_enumerated(tpr, fpr, p):
    at = consequence(tpr, fpr, 4, [p])[0]
    assert enumerated(p, tpr, fpr, 4) == pytest.approx((at.centred, at.by_std), abs=1e-12)


def test_factors_as_known():
    at = consequence(0.8, 0.2, 8, [0.05, 0.5, 0.9])
    assert [round(each.by_std, 2) for each in at] == [0.5, 0.6, 0.52]
    assert at[1].graded == pytest.approx(0.5) and at[1].samples == pytest.approx(1 / 0.36)
    assert at[0].earned == pytest.approx(0.05 * 0.8 / 0.23)


def test_samples_for_the_same_signal_about_as_enumerated():
    from dataclasses import replace

    from keel.exact.expectation import expect
    from keel.exact.world import Setting, World
    from keel.objectives.advantages import leave_one_out
    from keel.objectives.aggregate import constant_length_mean
    from keel.objectives.objective import Objective

    objective = Objective(advantage=leave_one_out, aggregate=constant_length_mean)
    setting = Setting(prompts=1, vocabulary=3, max_tokens=3)
    for seed in range(3):
        world = World.random(setting, seed)
        p = float((world.tree.of_completions(world.now).exp() * world.reward).sum())
        graded = replace(world, setting=replace(setting, tpr=0.95, fpr=0.05))
        seen = (expect(world, objective).signal_to_noise / expect(graded, objective).signal_to_noise) ** 2
        assert consequence(0.95, 0.05, 8, [p])[0].samples == pytest.approx(seen, rel=0.2)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_are_found_by_their_usual_names():
    run_row = {"prompt": "q", "completion": "4", "answer": "4", "correct": True, "reward": 1.0}
    pairs = pairs_of([run_row])
    assert dict(pairs.columns) == {"answer": "completion", "gold": "answer", "prompt": "prompt"}  # a verdict is no label
    assert pairs_of([run_row], label="correct").labelled == 1
    assert pairs_of([{"answer": "4", "gold": "4"}]).columns == {"answer": "answer", "gold": "gold"}
    with pytest.raises(KeelError, match="looks like the gold"):
        pairs_of([{"question": "q", "answer": "4"}])
    with pytest.raises(KeelError, match="did you mean 'gold'"):
        pairs_of([{"answer": "4", "gold": "4"}], gold="glod")


def test_rows_that_cannot_be_read_are_counted_not_fatal():
    good = {"answer": "4", "gold": "4", "label": "right"}
    pairs = pairs_of(
        [good, {"answer": None, "gold": "4"}, {"answer": "1", "gold": " "}, {**good, "label": 7}, {**good, "answer": 4.0}]
    )
    assert [pair.row for pair in pairs.rows] == [1, 5] and pairs.rows[1].text == "4"
    assert set(pairs.left_out) == {2, 3, 4} and "label is 7" in pairs.left_out[4]
    with pytest.raises(KeelError, match="Not one row"):
        pairs_of([{"answer": None, "gold": "4"}])


def test_labels():
    assert [level_of(v) for v in (True, 0, "Right", "0.5", 0.5, None, "")] == [1.0, 0.0, 1.0, 0.5, 0.5, None, None]
    with pytest.raises(ValueError, match="maybe"):
        level_of("maybe")


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(KeelError, match="(?i)did you mean 'pairs.jsonl'"):
        read_pairs(tmp_path / "pair.jsonl")


# ── graders ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_graders_by_name(tmp_path):
    (tmp_path / "mine.py").write_text("def always(prompt, text):\n    from keel.types import Score\n    return Score(1.0, True)\n")
    assert get_grader(f"{tmp_path}/mine.py:always")(Prompt("a", "", "1"), "2").correct
    assert get_grader("number")(Prompt("a", "", "1"), "it is 1").correct
    for name, says in (("nubmer", "did you mean 'number'"), ("keel.types:nothing", "no function"), ("no.such:f", "No module")):
        with pytest.raises(KeelError, match=says):
            get_grader(name)
    with pytest.raises(KeelError, match="taken"):
        register("exact", get_grader("text"))


def test_what_fails_is_unscorable_and_counted():
    def fails(prompt, text):
        if text == "1":
            raise RuntimeError("no")
        return Score({"2": None, "3": float("nan")}.get(text, 1.0), True, reason="busy" if text == "2" else "")

    said = verdicts("fails", fails, pairs_of([{"answer": str(i), "gold": "0"} for i in range(5)]).rows)
    assert said.scorable.tolist() == [True, False, False, False, True]
    assert said.raised == 1 and said.passed.sum() == 2
    assert said.reasons["busy"] == 1 and said.reasons["it raised RuntimeError"] == 1


def test_many_callers_get_the_same_verdicts():
    pairs = pairs_of(rows()).rows
    one, many = (verdicts("n", noisy(0.8, 0.2), pairs, callers) for callers in (1, 16))
    assert one.value.tolist() == many.value.tolist()


def test_cost_is_what_this_cost():
    class Judge:
        cost = 5.0

        def __call__(self, prompt, text):
            self.cost += 0.25
            return Score(1.0, True)

    found = find(pairs_of(rows(4, 4)), {"judge": Judge()})
    assert found.graders[0].cost_per_1000 == pytest.approx(250)


def test_a_grader_of_many_is_asked_at_once():
    class Judge:
        asked = 0

        def __call__(self, prompt, text):
            return self.many([(prompt, text)])[0]

        def many(self, asked):
            self.asked += 1
            if any(text == "3" for _, text in asked):
                raise RuntimeError("no")
            return [Score(float("inf") if text == "2" else 1.0, True) for _, text in asked]

    judge, pairs = Judge(), pairs_of([{"answer": str(i), "gold": "0"} for i in range(3)]).rows
    said = verdicts("judge", judge, pairs)
    assert judge.asked == 1 and said.scorable.tolist() == [True, True, False] and np.isnan(said.call_s).all()
    said = verdicts("judge", judge, pairs_of([{"answer": str(i), "gold": "0"} for i in range(5)]).rows)
    assert said.raised == 1 and said.scorable.tolist() == [True, True, False, False, True]  # asked again, one by one
    assert verdicts("judge", judge, pairs, callers=1).call_s.max() < 1


def test_a_judge_by_its_rubric(tmp_path):
    pytest.importorskip("openai")
    rubric = tmp_path / "points.toml"
    rubric.write_text(RUBRIC)
    judge = get_grader(f"judge:{rubric}?model=m&base_url=http://127.0.0.1:9/v1&retries=0&timeout_s=5&cache=")
    with judge:
        found = find(pairs_of([{"answer": "4", "label": 1}] * 2, gold="none"), {"judge": judge}).graders[0]
    assert found.unscorable.hits == 2 and found.raised == 0 and found.cost_per_1000 == 0.0
    with pytest.raises(KeelError):
        get_grader(f"judge:{rubric}?modle=m")


# ── the whole ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_grader_with_known_errors():
    found = find(pairs_of(rows(1000, 1000)), {"noisy": noisy(0.9, 0.1)}).graders[0].accuracy
    assert found.tpr.low < 0.9 < found.tpr.high and found.fpr.low < 0.1 < found.fpr.high
    assert found.j.low < 0.8 < found.j.high and found.j.high - found.j.low < 0.06
    assert found.slope.mean == pytest.approx(found.j.mean)  # two levels, values of 0 and 1
    assert found.slope.low == pytest.approx(found.j.low, abs=0.01)
    assert found.precision.mean == pytest.approx(found.tpr.hits / (found.tpr.hits + found.fpr.hits))
    assert found.enumerated < 1e-12
    assert not found.surface.found  # they hang on nothing


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, names, held = np.random.default_rng(0), [str(i) for i in range(150)], 0
    for _ in range(400):
        found = difference(rate(rng.random(150) < 0.9, names), rate(rng.random(150) < 0.05, names))
        held += found.low <= 0.85 <= found.high
    assert 0.93 <= held / 400 <= 0.98


def test_errors_that_hang_on_length_and_on_a_phrase_are_seen():
    rng = random.Random(0)
    data = []
    for i in range(400):
        right, long, phrase = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.3
        text = f"{i if right else i + 1}" + (" as can be seen by working it out" if long else "") + (" certainly" if phrase else "")
        data.append({"answer": text, "gold": f"{i}", "label": right})

    def swayed(prompt, text):
        right = text.split()[0] == prompt.answer
        passed = right or "certainly" in text or (len(text) > 20 and rng.random() < 0.3)
        return Score(float(passed), passed)

    report = find(pairs_of(data), {"swayed": swayed})
    found = report.graders[0].accuracy.surface
    assert "the word 'certainly'" in [effect.feature for effect in found.found]
    assert "length in characters" in [effect.feature for effect in found.found]
    assert found.length["wrong"].mean > 0.6
    assert "a policy can raise its reward without being right" in told(report)


def test_a_column_of_ones_own_can_be_asked(capsys):
    data = [{**row, "place": i % 2, "author": "ab"[i % 2]} for i, row in enumerate(rows())]
    first = lambda prompt, text: Score(1.0, True) if prompt.data["place"] == 0 else Score(0.0, False)  # noqa: E731
    found = find(pairs_of(data), {"first": first}, features=["place", "author"]).graders[0].accuracy.surface.found
    assert {"place", "author 'a'"} <= {effect.feature for effect in found}
    with pytest.raises(KeelError, match="did you mean 'place'"):
        find(pairs_of(data), {"first": first}, features=["palce"])


def test_one_question_with_many_answers_is_no_evidence_of_many():
    cluster = [str(i // 50) for i in range(200)]
    error, feature = np.array([i // 50 < 1 for i in range(200)]), np.array([float(i // 50 < 1) for i in range(200)])
    feature[::7] = 1 - feature[::7]
    assert clustered_p(feature, error, cluster) > 0.04  # a test by answers says 1e-30


def babble(rng, count):
    """Texts that have and lack most of the features."""
    parts = [
        "$",
        "x = ",
        "\\boxed",
        "(",
        "-",
        "3.5 ",
        "7/8 ",
        "9% ",
        "so ",
        "thus ",
        "hence ",
        "given ",
        "clearly ",
        "note ",
        "\n",
        "é",
        "<b>",
    ]
    return ["".join(part for part in parts if rng.random() < 0.4) + str(i) for i in range(count)]


def test_errors_at_random_are_rarely_taken_for_a_pattern():
    rng, wrongly, tried = np.random.default_rng(1), 0, 0
    for _ in range(40):
        data = [{"answer": text, "gold": f"{i}", "label": i % 2 == 0} for i, text in enumerate(babble(rng, 200))]
        pairs, right = pairs_of(data).rows, np.arange(200) % 2 == 0
        found = surface(pairs, right == (rng.random(200) < 0.8), right, clusters(pairs))
        wrongly, tried = wrongly + bool(found.found), tried + found.tried
    assert tried > 40 * 35
    assert wrongly <= 5  # 2 are to be expected; without the correction it would be 30


def test_many_answers_to_one_question_are_one_piece_of_evidence():
    data = [{"answer": f"{'so ' if i < 40 else ''}{i}", "gold": "0" if i < 40 else f"{i}", "label": False} for i in range(200)]
    pairs = pairs_of(data).rows
    passed = np.arange(200) < 40  # all its errors are on one question, whose answers all say "so"
    assert not surface(pairs, passed, np.zeros(200, dtype=bool), clusters(pairs)).found
    apart = [str(i) for i in range(200)]
    assert surface(pairs, passed, np.zeros(200, dtype=bool), apart).found


def test_unscorable_stays_out_of_the_rates():
    def shy(prompt, text):
        return Score(None, reason="busy") if int(prompt.answer) % 4 == 0 else noisy(1.0, 0.0)(prompt, text)

    each = find(pairs_of(rows()), {"shy": shy}).graders[0]
    assert (each.unscorable.hits, each.accuracy.tpr.of, each.accuracy.tpr.mean) == (100, 150, 1.0)
    assert each.accuracy.recall.mean == 0.75
    assert "100 × busy" in told(find(pairs_of(rows()), {"shy": shy}))


def test_two_graders_side_by_side():
    pairs = pairs_of(rows())
    a, b = (verdicts(name, noisy(*chances), pairs.rows) for name, chances in (("a", (1.0, 0.0)), ("b", (0.8, 0.0))))
    right = np.array([pair.label == 1.0 for pair in pairs.rows])
    found = compare(a, b, [str(i) for i in range(400)], list(range(1, 401)), right)
    assert found.only_b == 0 and found.only_a == found.a_right == 200 - b.passed.sum() and found.b_right == 0
    assert found.p == pytest.approx(2 * 0.5**found.only_a)
    assert found.agree.mean == pytest.approx(1 - found.only_a / 400)


def test_asked_twice():
    state = iter(range(10**6))
    drifts = lambda prompt, text: Score(1.0, True) if next(state) < 400 else Score(0.0, False)  # noqa: E731
    found = find(pairs_of(rows()), {"steady": noisy(1.0, 0.0), "drifts": drifts}, twice=True).graders
    assert (found[0].again, found[0].swap) == (0.0, 0.0)
    assert found[1].again == 1.0


@pytest.mark.parametrize(
    "grade, says",
    [
        (noisy(1.0, 0.0), "Trust it as a reward"),
        (noisy(0.95, 0.05), "It can be trained on"),
        (noisy(0.7, 0.3), "Trust it little"),
        (noisy(0.5, 0.5), "Do not train on it: its verdicts may say nothing"),
        (noisy(0.2, 0.8), "unlearn"),
    ],
)
def test_how_far_to_trust(grade, says):
    assert says in told(find(pairs_of(rows(400, 400)), {"grader": grade}))


def test_a_class_that_is_paid_stops_it():
    data = [*rows(400, 400), *({"answer": "", "gold": f"{i}", "label": False, "class": "hostile"} for i in range(20))]
    lax = lambda prompt, text: Score(float(text in ("", prompt.answer)), text in ("", prompt.answer))  # noqa: E731
    text = told(find(pairs_of(data), {"lax": lax}))
    assert "Do not train on it yet: a policy would find class 'hostile'" in text


def test_few_answers_are_said_to_be_few():
    assert "Only 20 wrong answers say so" in told(find(pairs_of(rows(300, 20)), {"perfect": noisy(1.0, 0.0)}))
    assert "There is no wrong answer" in told(find(pairs_of(rows(5, 0)), {"perfect": noisy(1.0, 0.0)}))


def test_the_command_writes_a_page(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row | {"answer": row["answer"] + "|`x"}) + "\n" for row in rows(20, 20)))
    assert run(str(file), ["exact", "text"], {}, twice=True, markdown=str(tmp_path / "page.md"), as_json=True) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["labelled"] == 40 and [each["name"] for each in got["graders"]] == ["exact", "text"]
    page = (tmp_path / "page.md").read_text()
    assert "# How far to trust: exact, text" in page and "](page.png)" in page and (tmp_path / "page.png").stat().st_size > 1000
    with pytest.raises(KeelError, match="folder that exists"):
        run(str(file), ["exact"], {}, markdown=str(tmp_path / "no" / "page.md"))


def test_arguments_reach_the_command(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row | {"place": i % 3}) + "\n" for i, row in enumerate(rows(20, 20))))
    parser = ArgumentParser()
    add_arguments(parser)
    given = [str(file), "--grader", "exact", "--grader", "text", "--label", "label", "--feature", "place", "--twice", "--json"]
    assert run_options(parser.parse_args(given)) == 0
    got = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in got["graders"]] == ["exact", "text"] and got["graders"][0]["again"] == 0
    assert tuple(COLUMNS) == ROLES


def test_the_command_without_labels(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"completion": row["answer"], "gold": row["gold"]}) + "\n" for row in rows(20, 20)))
    assert run(str(file), [], {}) == 0
    said = capsys.readouterr().out
    assert "no labels" in said and "Nobody has said which answers are right" in said and "50 in 100" in said


HOSTILE = [
    "",
    " ",
    "\0",
    "a\0",
    "\ud800",
    "\u202e42\u202c",
    "{" * 100_000,
    "9^" * 50_000,
    "\\frac" * 20_000,
    "1,1." * 50_000,
    "💥",
    "|`|\n|",
]


def test_any_text_is_graded_and_reported(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    data = [{"answer": text, "gold": "42", "label": i % 2, "class": text[:9]} for i, text in enumerate(HOSTILE * 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    begun = time.perf_counter()
    for as_json in (True, False):
        assert run(str(file), ["exact", "number"], {}, twice=True, markdown=str(tmp_path / "page.md"), as_json=as_json) == 0
    assert time.perf_counter() - begun < 20
    capsys.readouterr().out.encode()
    assert (tmp_path / "page.md").stat().st_size < 30_000
