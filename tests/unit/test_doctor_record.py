"""What a run left, whole and damaged; signs on records made by hand; the triage command; the pages of the catalogue."""

import json
import math
from pathlib import Path

import pytest

from keel.cli import main
from keel.doctor.catalogue import FAULTS
from keel.doctor.pages import found_by, pages
from keel.doctor.record import Asked, Record, Rollout, numbers, read
from keel.doctor.signs import SIGNS, answers, batches, course, look
from keel.doctor.triage import PARTS_OF, examined
from keel.errors import KeelError
from keel.tasks.task import unchecked_task

TASK = "arithmetic:medium?train_size=64&test_size=64"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from keel import train

    few = {"evaluation.prompts": 8, "evaluation.samples": 1, "evaluation.standard_panel": False, "train.prompts_per_step": 4}
    out = tmp_path_factory.mktemp("runs") / "run"
    train("solid", task=TASK, **few, **{"train.threads": 1}, steps=3, out=str(out), quiet=True)
    return out


@pytest.fixture
def copy(run, tmp_path):
    import shutil

    return Path(shutil.copytree(run, tmp_path / "copy"))


def rollout(step=1, prompt="p", sample=0, **given):
    told = {"completion": "A:1", "answer": "1", "reward": 0.0, "correct": False, "tokens": 4}
    return Rollout(step, prompt, sample, f"{prompt}?", **told | given)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_run_is_read(run):
    record = read(run)
    assert (record.steps, len(record.rollouts), record.unread) == (3, 3 * 4 * 8, ())
    assert record.asked.group_size == 8 and record.asked.centred and record.task is not None and record.weights.step == 3
    assert all(record.prompt_of(r).token_ids == () and record.prompt_of(r).text == r.prompt for r in record.rollouts)


def test_a_torn_line_is_left_out_and_said(copy):
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train/lo')
    record = read(copy)
    assert record.steps == 3 and any("metrics.jsonl: line 5, the last" in said for said in record.unread)


FILES = ["config.toml", "manifest.json", "rollouts.jsonl", "tokens.jsonl", "metrics.jsonl", "health.jsonl"]
ODD = [
    "",
    "[1, 2]\n",
    "null\n\n{}\n",
    '{"step": "one"}\n',
    "\x00\n",
    '{"step": 1, "train/loss": NaN}\n',
    '{"step": 1, "found": 3}\n',
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_leaves_a_partial_answer(copy, name):
    (copy / name).unlink()
    told = examined(read(copy))
    assert told.diagnosis.healthy, [f.says for f in told.diagnosis.findings]
    assert name == "health.jsonl" or any(name in said for said in told.diagnosis.unknown)


def test_settings_of_another_version_are_told(copy, capsys):
    (copy / "config.toml").write_text('recipe = "solid"\nfuture_knob = 3\n')
    assert main(["doctor", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "future_knob" in out and "living system: its settings cannot be read" in out


@pytest.mark.parametrize("text", ODD)
def test_odd_files_never_raise(copy, text):
    for name in FILES[1:]:
        (copy / name).write_text(text, encoding="utf-8")
    told = examined(read(copy))
    assert told.diagnosis.unknown and json.dumps(told.as_json())


def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(KeelError, match="holds nothing of a run"):
        read(tmp_path)
    assert main(["doctor", str(tmp_path)]) == 2
    assert "config.toml" in capsys.readouterr().err


def test_exit_codes_and_json(copy, capsys):
    assert main(["doctor", str(copy), "--folder-only", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {
        "source",
        "run",
        "healthy",
        "asked",
        "verdicts",
        "components",
        "named",
        "checks",
        "unknown",
        "next",
        "seconds",
    }
    assert told["healthy"] and not told["asked"] and "living system: it was not asked" in told["unknown"]
    assert told["next"] == f"keel doctor {copy}" and told["run"]["steps"] == 3
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    rows[2]["policy/entropy_nats"] = -0.5
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["doctor", str(copy), "--folder-only"]) == 1
    out = capsys.readouterr().out
    assert "Verdict: framework (metrics)" in out and "keel doctor K174" in out
    assert main(["doctor", str(copy), "--train.lr", "1"]) == 2
    assert "Its own settings hold" in capsys.readouterr().err


# ── signs, by hand ────────────────────────────────────────────────────────────────────────────────────────────────────


def rows_of(groups, **changes):
    """Metrics that agree with these groups of right (1) and wrong (0) completions."""
    flat = [v for g in groups for v in g]
    live = sum(0 < sum(g) < len(g) for g in groups) / len(groups)
    return {"step": 1, "group/count": float(len(groups)), "group/live_frac": live, "reward/mean": sum(flat) / len(flat)} | changes


def record_of(groups, row, **asked):
    made = [rollout(1, f"p{i}", j, reward=float(v), correct=bool(v)) for i, g in enumerate(groups) for j, v in enumerate(g)]
    return Record("hand", Asked(group_size=len(groups[0]), updates_per_batch=1, staleness=0, **asked), (numbers(row),), tuple(made))


GROUPS = [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"group/count": 16.0}, "K106"),
        ({"group/count": 3.0}, "K107"),
        ({"group/live_frac": 0.75}, "K108"),
        ({"reward/mean": 0.5}, "K151"),
    ],
)
def test_measured_batches_are_the_stored_ones(changes, code):
    check = batches.whole(record_of(GROUPS, rows_of(GROUPS, **changes)))
    assert [f.fault.code for f in check.findings] == ([code] if code else [])


GAP = {"gap/chi2": 1e-2, "gap/k3_nats": 5e-3, "tokens/step": 10_000.0}


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([GAP | {"gap/weight_mean": 1.001}] * 3, None),  # symmetric noise: one standard error is .001
        ([GAP | {"gap/weight_mean": 0.98}] * 3, "K216"),
        ([{"gap/chi2": 4e-12, "gap/k3_nats": 2e-12, "tokens/step": 1e4, "gap/weight_mean": 1 - 3e-7}] * 3, None),  # rounding
        ([{"gap/chi2": n * 1e-7, "gap/k3_nats": n * 1e-7, "tokens/step": 1e4, "gap/weight_mean": 1.0} for n in (0, 1, 40)], "K217"),
    ],
)
def test_the_gap_of_a_run(rows, code):
    record = Record("hand", Asked(staleness=0), tuple(numbers(row | {"step": n}) for n, row in enumerate(rows, 1)))
    assert [f.fault.code for f in batches.gap(record).findings] == ([code] if code else [])
    stale = batches.gap(Record("hand", Asked(staleness=2), record.rows))
    assert [f.fault.code for f in stale.findings] == (["K216"] if code == "K216" else [])  # what is stale may grow


def traced(values, rewards):
    made = tuple(rollout(1, "p", i, reward=float(r), correct=r > 0) for i, r in enumerate(rewards))
    traces = tuple({"step": 1, "prompt_id": "p", "sample": i, "advantage": v} for i, v in enumerate(values))
    return Record("hand", Asked(centred=True), rollouts=made, traces=traces)


@pytest.mark.parametrize(
    ("values", "rewards", "code"),
    [
        ([0.5, -0.5, [0.5, 0.5], -0.5], [1, 0, 1, 0], None),
        ([-0.5, 0.5, -0.5, 0.5], [1, 0, 1, 0], "K125"),
        ([0.9, 0.1, 0.9, 0.1], [1, 0, 1, 0], "K125"),
        ([0.0, 0.0, 0.0], [0, 0, 0], None),
        ([0.3, 0.3, 0.3], [1, 1, 1], "K128"),
    ],
)
def test_stored_advantages_follow_stored_rewards(values, rewards, code):
    check = batches.advantages(traced(values, rewards))
    assert [f.fault.code for f in check.findings] == ([code] if code else [])


def many(right, groups=360, size=8, **given):
    return tuple(
        rollout(1 + i // 60, f"p{i}", j, reward=float(right(i, j)), correct=right(i, j), **given)
        for i in range(groups)
        for j in range(size)
    )


@pytest.mark.parametrize(
    ("rollouts", "code"),
    [
        (many(lambda i, j: False), "K568"),
        (many(lambda i, j: True), "K569"),
        (many(lambda i, j: i > 120 and j == 0), None),  # it began to learn
        (many(lambda i, j: i > 240 or j < 4), None),  # it has learned: no group is live in the end
        (many(lambda i, j: False)[:16], None),  # too few to say
    ],
)
def test_difficulty_is_a_matter_of_live_groups(rollouts, code):
    check = course.groups(Record("hand", Asked(group_size=8), rollouts=rollouts))
    assert [f.fault.code for f in check.findings] == ([code] if code else [])


def test_groups_that_are_cut_off_have_no_signal():
    cut = Record("hand", Asked(cap=4), rollouts=many(lambda i, j: False, finish="length"))
    assert [f.fault.code for f in course.length(cut).findings] == ["K620"]
    told = examined(cut)
    assert told.diagnosis.verdicts == ("settings",), "what was cut off says nothing of difficulty"
    some = Record("hand", Asked(cap=4), rollouts=many(lambda i, j: j == 1)[:160] + many(lambda i, j: False, finish="length")[160:])
    assert course.length(some).holds


def evaluated(*scores, room=0.05):
    return tuple(
        {"step": n * 10, "eval/pass@1": s, "eval/pass@1_low": s - room, "eval/pass@1_high": s + room} for n, s in enumerate(scores)
    )


def test_a_fall_is_told_with_what_moved_and_only_beyond_chance():
    assert course.fall(Record("hand", rows=tuple(map(numbers, evaluated(0.4, 0.5, 0.45))))).holds
    moved = [
        {"step": n, "policy/entropy_nats": 0.5 if n < 22 else 0.01, "train/grad_norm": 1.0 + 0.1 * (n % 2)} for n in range(1, 31)
    ]
    rows = sorted((*evaluated(0.4, 0.7, 0.7, 0.1), *moved), key=lambda row: row["step"])
    check = course.fall(Record("hand", rows=tuple(map(numbers, rows))))
    assert [f.fault.code for f in check.findings] == ["K670"] and check.findings[0].evidence["moved"][0].startswith(
        "policy/entropy_nats"
    )


def test_a_loss_that_is_lost_and_one_that_was_not():
    def coded(losses):
        found = SIGNS["health"][1](
            Record("hand", rows=tuple(numbers({"step": n, "train/loss": x}) for n, x in enumerate(losses, 1)))
        ).findings
        return [f.fault.code for f in found]

    assert coded([0.0, 0.1, 3.0, -2.0]) == []  # a loss may rise, and be 0
    assert coded([0.1, math.nan, math.nan]) == ["K131"]
    assert coded([0.1, math.nan, 0.1]) == ["K174"]


def test_stored_scores_are_graded_again():
    task = unchecked_task(TASK)
    asked = task.train[:8]

    def stored(score):
        made = [
            rollout(1, p.id, j, answer=p.answer, completion=f"A:{p.answer if j else 0}", **score(j))
            for p in asked
            for j in range(2)
        ]
        return Record("hand", rollouts=tuple(made), task=task)

    true = answers.verdicts(stored(lambda j: {"reward": float(j), "correct": bool(j)}))
    assert true.holds, true.says
    changed = answers.verdicts(stored(lambda j: {"reward": 0.0, "correct": False}))
    assert [f.fault.code for f in changed.findings] == ["K468"]
    turned = answers.verdicts(stored(lambda j: {"reward": float(1 - j), "correct": not j}))
    assert [f.fault.code for f in turned.findings] == ["K151"]


def test_pairs_with_other_prompts_are_held_against_the_next_batch():
    task = unchecked_task(TASK)
    few = list({p.answer: p for p in task.train}.values())[:16]

    def record(shift):
        made = []
        for step in (1, 2):
            asked = few[8 * (step - 1) : 8 * step]
            for i, p in enumerate(asked):
                said = asked[(i + shift) % 8].answer
                made += [
                    rollout(step, p.id, j, answer=p.answer, completion=f"A:{said}", reward=float(not shift), correct=not shift)
                    for j in range(4)
                ]
        return Record("hand", rollouts=tuple(made), task=task)

    assert not answers.pairs(record(0)).findings
    assert [f.fault.code for f in answers.pairs(record(1)).findings] == ["K151"]


def test_an_empty_record_is_silent():
    assert all(check.skipped and not check.findings for check in look(Record("nothing")))


def test_every_sign_speaks_of_a_part():
    assert set(SIGNS) <= set(PARTS_OF)


# ── pages ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_pages_are_up_to_date():
    folder = Path(__file__).parents[2] / "docs" / "faults"
    made = pages()
    assert {path.name for path in folder.glob("*.md")} == set(made), "run: python docs/generate.py"
    for name, text in made.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"{name}: run python docs/generate.py"


def test_every_fault_can_be_found_by_something():
    assert [fault.code for fault in FAULTS if fault.code not in found_by()] == []


def test_a_fault_is_printed_by_its_code(capsys):
    assert main(["doctor", "K620"]) == 0
    assert "max_completion_tokens" in capsys.readouterr().out
    assert main(["doctor", "K999"]) == 2
