"""Data checks: faults that were planted are found and dropped, and nothing else is."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from keel.data.check import KINDS, check, solved
from keel.data.command import find, run_check
from keel.data.items import open_items
from keel.data.near import near_pairs, normalised, numbers, shingles, similar_share, template
from keel.data.samples import match, read_samples
from keel.data.votes import Vote, fit, suspects
from keel.errors import KeelError

STORY = "{who} has {i} apples and buys {j} more from the shop on the corner. How many apples has {who} now?"


def story(i, who="Tom"):
    return STORY.format(who=who, i=i, j=i + 1)


@pytest.fixture
def write(tmp_path):
    def make(rows, name="rows.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return make


def plain(count=40):
    return [{"question": story(i), "answer": str(2 * i + 1)} for i in range(count)]


# ── near texts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_normalised():
    assert normalised("  What IS\u200b $2+2$?\n") == normalised("what is 2+2") == "what is 2+2"
    assert normalised("5!+1") != normalised("5+1") and normalised("ﬁne") == "fine"
    assert numbers("from 1,000 to 2.5") == ("1,000", "2.5") and template("Add 12 to 3.") == "add # to #"


def test_near_pairs_are_those_of_comparing_all():
    rng, words = random.Random(0), [a + b for a in "bdfgklmn" for b in "aeiou"]
    texts = []
    for _ in range(60):
        base = rng.choices(words, k=30)
        texts.append(" ".join(base))
        for _ in range(rng.randint(0, 2)):
            base[rng.randrange(30)] = "other"
            texts.append(" ".join(base))
    sets = [shingles(text) for text in texts]
    all_pairs = {(i, j) for i in range(len(texts)) for j in range(i + 1, len(texts)) if similar_share(sets[i], sets[j]) >= 0.7}
    assert {(i, j) for i, j, _ in near_pairs(texts)} == all_pairs and len(all_pairs) > 20


def test_other_numbers_are_another_question():
    long = "A train leaves the old station in the morning and stops at every village on its way until it has passed {} of them."
    assert not list(near_pairs([long.format(i) for i in range(50)]))
    assert list(near_pairs([long.format(1), long.format(1).replace("old", "new")]))
    assert [pair[:2] for pair in near_pairs([story(1), story(2), story(1, "Ann").replace("Ann", "Tom", 1)])] == [(0, 2)]


# ── faults ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_clean_data_have_no_fault(write):
    found = find(write(plain()))
    assert found.counts == {} and len(found.kept) == 40


def test_tasks_that_ship_have_no_fault():
    for spec in ("arithmetic:easy", "skills:sort?train_size=300&test_size=50", "sums:2digit?train_size=300"):
        assert find(spec).counts == {}, spec


@pytest.mark.parametrize(
    "row, kind, others",
    [
        ({"question": None, "answer": "1"}, "unreadable", 0),
        ({"question": "Why?", "answer": " "}, "unreadable", 0),
        ({"question": "Why so?", "answer": "N/A"}, "placeholder", 0),
        ({"question": story(3).upper(), "answer": "7"}, "duplicate", 0),
        ({"question": story(3), "answer": "8"}, "conflict", 1),
        ({"question": story(3).replace("has Tom now", "does Tom have"), "answer": "7"}, "near_duplicate", 0),
    ],
)
def test_a_planted_fault_is_found_and_dropped(write, row, kind, others):
    found = find(write([*plain(), row]) + "?test=" + write([{"question": "Held out?", "answer": "yes"}], "test.jsonl"))
    assert found.counts == {kind: 1 + others}
    assert len(found.dropped) == 1 + others and "row/40" in found.dropped


def test_nearly_equal_questions_with_other_answers_are_told_and_kept(write):
    found = find(write([*plain(), {"question": story(3).replace("has Tom now", "does Tom have"), "answer": "70"}]))
    assert found.counts == {"near_conflict": 2} and not found.dropped
    assert len(check(found.items, also=["near_conflict"]).dropped) == 2


def test_leaks_into_evaluation(write):
    held = write([{"question": story(5) + "  ", "answer": "11"}], "held.jsonl")
    near = write([{"question": story(6).replace("has Tom now", "does Tom have"), "answer": "13"}], "near.jsonl")
    found = find(write(plain()), against=[held, near])
    assert {fault.id: fault.kind for fault in found.dropped.values()} == {"row/5": "overlap", "row/6": "near_overlap"}
    inside = find(write(plain()) + "?test=" + held)
    assert inside.dropped["row/5"].kind == "overlap" and len(inside.dropped) == 1


def test_gold_that_the_grader_refuses(write, tmp_path):
    (tmp_path / "strict.py").write_text(
        "from keel.types import Score\n"
        "def grade(prompt, text):\n"
        "    if prompt.answer == '5': raise RuntimeError('no')\n"
        "    return Score(None, reason='unparsable') if prompt.answer == '3' else Score(1.0, True)\n"
    )
    found = find(write(plain()), grader=f"{tmp_path}/strict.py:grade")
    assert set(found.dropped) == {"row/1", "row/2"} and "unparsable" in found.dropped["row/1"].why
    assert "RuntimeError" in found.dropped["row/2"].why


def test_a_spec_says_how_answers_are_read(write):
    rows = [{"question": story(i), "answer": f"Add them. #### {2 * i + 1}"} for i in range(12)]
    spec = f"jsonl:{write(rows)}?extract=tag&answer_after=####"
    samples = write(
        [{"prompt": story(3), "completion": text} for text in ("<answer>7</answer>", "7", "<answer>8</answer>")], "s.jsonl"
    )
    found = find(spec, samples=samples)
    assert found.counts == {} and (found.votes[0].right, found.votes[0].rival) == (1, "8")
    assert found.kept[0].row == rows[0]


def test_kinds_can_be_kept_and_dropped(write):
    rows = [*plain(), plain()[0]]
    assert not find(write(rows), keep=["duplicate"]).dropped
    with pytest.raises(KeelError, match="did you mean 'duplicate'"):
        find(write(rows), keep=["duplicates"])


# ── samples ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_samples_find_their_items(write):
    items = open_items(write(plain())).items
    rows = [
        {"prompt_id": "row/3@2", "prompt": story(3), "completion": "7"},
        {"prompt_id": "row/3", "prompt": story(4), "completion": "9"},  # the id is another data set's
        {"question": story(5) + " ", "completions": ["11", "12"]},
        {"prompt_id": "row/6@1", "completion": "13", "finish": "length"},
        {"prompt": "of nobody", "completion": "1"},
    ]
    found = match(rows, items)
    assert {id: len(each) for id, each in found.of.items()} == {"row/3": 1, "row/4": 1, "row/5": 2, "row/6": 1}
    assert found.unmatched == 1 and found.of["row/6"][0].finish == "length"
    with pytest.raises(KeelError, match="None of 1 completions"):
        match(rows[-1:], items)
    with pytest.raises(KeelError, match="Expected a completion"):
        match([{"prompt": "x"}], items)


def test_a_run_folder_gives_its_rollouts(write, tmp_path):
    items = open_items(write(plain())).items
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rollouts.jsonl").write_text(json.dumps({"prompt": story(3), "completion": "7", "reward": 1.0}) + "\n")
    assert read_samples(tmp_path / "run", items).count == 1
    with pytest.raises(KeelError, match="run folder"):
        read_samples(tmp_path / "none", items)


def test_pass_rates_and_tiers(write):
    right = {0: 0, 1: 8, 2: 4, 3: 7}
    rows = [{"prompt": story(i), "completion": str(2 * i + 1 if k < n else 500 + k)} for i, n in right.items() for k in range(8)]
    rows.append({"prompt": story(2), "completion": "5", "finish": "length"})  # right, but cut off: wrong
    file = write(rows, "samples.jsonl")
    found = find(write(plain()), samples=file)
    assert {v.id: (v.right, v.tries) for v in found.votes} == {f"row/{i}": (n, 8 + (i == 2)) for i, n in right.items()}
    assert (found.solved.nobody, found.solved.everybody, found.solved.tiers) == (1, 1, {"easy": 2, "medium": 1, "hard": 1})
    assert found.solved.truncated == 1 and not found.suspects
    assert len(check(found.items, samples=found.samples, also=["nobody", "everybody"]).dropped) == 2


def test_share_of_live_groups_by_hand():
    # of 4 samples with 1 right, 3 of 6 pairs differ; with 2 right 4 of 6
    votes = [Vote("a", 4, 1, "", 0, 0), Vote("b", 4, 2, "", 0, 0)]
    assert solved(votes, (2, 8)).live == {2: pytest.approx((3 + 4) / 12), 8: None}


def test_wrong_answers_that_mean_the_same_vote_together(write, tmp_path):
    (tmp_path / "loose.py").write_text(
        "from keel.types import Score\n"
        "def grade(prompt, text):\n"
        "    right = text.strip().rstrip('.0') == prompt.answer.rstrip('.0')\n"
        "    return Score(float(right), right)\n"
    )
    rows = [{"prompt": story(3), "completion": text} for text in ("9", "9.0", "9.00", "7", "8")]
    found = find(write(plain()), samples=write(rows, "s.jsonl"), grader=f"{tmp_path}/loose.py:grade")
    assert (found.votes[0].rival_count, found.votes[0].right) == (3, 1)


def simulated(count, wrong, seed, tries=8):
    """Votes of a model that is sometimes wrong in its own way, on gold answers of which some are wrong."""
    rng = np.random.default_rng(seed)
    skill, bad, votes = rng.beta(2, 1, count), rng.random(count) < wrong, []
    for i in range(count):
        own_mistake = rng.random() < 0.5  # its wrong answers agree with one another
        said = ["right" if rng.random() < skill[i] else "slip" if own_mistake else f"any{rng.integers(50)}" for _ in range(tries)]
        gold = "typo" if bad[i] else "right"
        rivals = {word: said.count(word) for word in set(said) - {gold}}
        rival = max(rivals, key=rivals.get, default="")
        votes.append(Vote(str(i), tries, said.count(gold), rival, rivals.get(rival, 0), 0))
    return votes, bad


def test_wrong_gold_answers_are_ranked_first():
    votes, bad = simulated(1500, 0.1, seed=1)
    found, model = suspects(votes, {v.id: "gold" for v in votes})
    score = np.zeros(len(votes))
    for suspect in found:
        score[int(suspect.id)] = suspect.probability
    ones, zeros = score[bad], score[~bad]
    assert np.mean([(zeros < one).mean() + (zeros == one).mean() / 2 for one in ones]) > 0.85  # AUC
    assert 0.05 < model.wrong < 0.13
    first = [bad[int(suspect.id)] for suspect in found[:50]]
    assert np.mean(first) > 0.9


def test_chances_mean_what_they_say():
    seen, said = [], []
    for seed in range(4):
        votes, bad = simulated(800, 0.1, seed=10 + seed)
        found, _ = suspects(votes, {v.id: "gold" for v in votes})
        seen += [bad[int(s.id)] for s in found]
        said += [s.probability for s in found]
    assert np.mean(said) == pytest.approx(np.mean(seen), abs=0.12)


def test_without_wrong_gold_few_are_accused():
    votes, _ = simulated(800, 0.0, seed=3)
    found, model = suspects(votes, {v.id: "gold" for v in votes})
    assert model.wrong < 0.03 and sum(s.probability >= 0.5 for s in found) <= 16
    assert fit([]).wrong < 0.1  # nothing seen: the prior


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_writes_what_is_left_and_why(write, tmp_path, capsys):
    rows = [*plain(), plain()[0] | {"source": "copy"}, {"question": "Who?", "answer": None}]
    out = tmp_path / "clean.jsonl"
    samples = write([{"prompt": story(4), "completion": "10"} for _ in range(8)], "s.jsonl")
    assert run_check(write(rows), samples=samples, out=str(out)) == 0
    said = capsys.readouterr().out
    assert "Kept 40 of 42 rows; dropped 2: 1 unreadable, 1 duplicate." in said and "but 8 of 8 say '10'" in said
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(kept) == 40 and kept[0] == rows[0]
    gone = [json.loads(line) for line in (tmp_path / "clean.dropped.jsonl").read_text().splitlines()]
    assert {each["dropped"]: each["row"] for each in gone} == {"unreadable": rows[41], "duplicate": rows[40]}
    with pytest.raises(KeelError, match="exists already"):
        run_check(write(rows), out=str(out))
    run_check(write(rows), as_json=True)
    assert json.loads(capsys.readouterr().out)["found"] == {"unreadable": 1, "duplicate": 1}


def test_columns_that_are_not_there(write):
    with pytest.raises(KeelError, match="column 'ansver'.*did you mean 'answer'"):
        find("jsonl:" + write(plain()) + "?answer=ansver")
    with pytest.raises(KeelError, match="looks like the prompt"):
        find(write([{"a": 1, "answer": 2}]))
    with pytest.raises(KeelError, match="Not one row"):
        find(write([{"question": "", "answer": 2}]))


def test_every_kind_says_what_it_is():
    assert all(text and isinstance(dropped, bool) for text, dropped in KINDS.values())


def test_any_text_is_looked_at(write, tmp_path, capsys):
    texts = ["\0", "a\0", "\ud800", "\u202e42", "{" * 100_000, "1 " * 50_000, "💥", "word " * 20_000]
    rows = [{"question": q, "answer": a, "note": "\udfff"} for q in texts for a in ("\ud800", "7")]
    samples = write([{"prompt": q, "completion": "\ud800 " + c} for q in texts for c in texts], "samples.jsonl")
    assert run_check(write(rows), samples=samples, out=str(tmp_path / "clean.jsonl"), keep=["conflict"]) == 0
    capsys.readouterr().out.encode()
    run_check(write(rows), samples=samples, as_json=True)
    json.loads(capsys.readouterr().out)
    assert (tmp_path / "clean.jsonl").read_text()


def test_values_that_json_does_not_know_are_written_as_text(tmp_path):
    import datetime

    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"question": [story(1), story(1)], "answer": [3, 3], "when": [datetime.date(2020, 1, 2)] * 2})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert run_check(str(tmp_path / "rows.parquet"), out=str(tmp_path / "clean.jsonl")) == 0
    assert json.loads((tmp_path / "clean.jsonl").read_text()) == {"question": story(1), "answer": 3, "when": "2020-01-02"}
