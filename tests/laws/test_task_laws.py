"""What holds for every task: gold 1, empty 0, another row's gold 0, junk finite and fast, no training prompt tested."""

from __future__ import annotations

import json
import math
import time

import pytest

from keel.errors import KeelError
from keel.tasks.arithmetic import DIGITS, TIERS
from keel.tasks.problems import SKILLS
from keel.tasks.task import Task, get_task, known_tasks

BUILT_IN = [f"arithmetic:{tier}" for tier in TIERS] + [f"skills:{name}" for name in SKILLS]
BUILT_IN += [f"sums:{name}" for name in DIGITS]
GYM = ["basic_arithmetic", "chain_sum", "spell_backward", "prime_factorization", "complex_arithmetic", "countdown"]
GYM_OPTIONS, SMALL = {"train_size": 8, "test_size": 2}, {"train_size": 300, "test_size": 60}
TABLES = ["jsonl", "parquet", "datasets"]
SPECS = BUILT_IN + [f"reasoning_gym:{name}" for name in GYM] + TABLES
# the museum's cheats: all digits, every kind of not-a-number, an answer to everything, code that quits
CHEATS = ["nan", "inf", "exit(0)", "0 1 2 3 4 5 6 7 8 9", "A:", "<answer></answer>", "A:\n", "the answer is", "None"]
JUNK = [
    "", " ", "x" * 1_000_000, "9" * 1_000_000, "A:" * 500_000, "<answer>" * 125_000, "\n" * 1_000_000,
    '{"answer": [1, null]}', "[]", "\x00\x1b", "\ud83d", "∑𝟛٣", "<answer>[[1,2],[3</answer>", "(" * 3000,
    "A:" + "9" * 5000,
]  # fmt: skip


@pytest.fixture(scope="module")
def make_task(tmp_path_factory):
    """A task by its spec, made once; "jsonl", "parquet" and "datasets" read a table of capitals."""
    made: dict[str, Task] = {}

    def make(spec: str) -> Task:
        if spec not in made:
            if spec in TABLES:
                made[spec] = get_task(f"{spec}:{_table(spec, tmp_path_factory)}", prompt="question", answer="gold")
            else:
                made[spec] = get_task(spec, **(GYM_OPTIONS if spec.startswith("reasoning_gym") else SMALL))
        return made[spec]

    return make


def _table(kind: str, tmp_path_factory) -> str:
    rows = [{"question": f"How much is {i} times three?", "gold": 3 * i} for i in range(40)]
    folder = tmp_path_factory.mktemp(kind)
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(folder / "rows.jsonl")
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        return str(folder / "rows.parquet")
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(folder / "rows", num_proc=None)
    return str(folder / "rows")


def test_every_built_in_task_is_in_the_table():
    built_in = {"arithmetic", "skills", "sums", "reasoning_gym", *TABLES}
    assert built_in <= set(known_tasks())
    assert {spec.partition(":")[0] for spec in SPECS} == built_in


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_a_task_and_passes_its_own_check(spec, make_task):
    task = make_task(spec)
    assert isinstance(task, Task) and task.name.startswith(spec)
    task.check()


@pytest.mark.parametrize("spec", SPECS)
def test_ids_are_unique_and_no_training_prompt_is_tested(spec, make_task):
    task = make_task(spec)
    prompts = [*task.train, *task.test]
    assert len({p.id for p in prompts}) == len(prompts)
    assert not {p.text for p in task.train} & {p.text for p in task.test}
    assert not {p.id for p in task.train} & {p.id for p in task.test}


@pytest.mark.parametrize("spec", SPECS)
def test_gold_scores_one_empty_and_truncated_nothing(spec, make_task):
    task = make_task(spec)
    for prompt in [*task.train[:50], *task.test[:50]]:
        gold = task.reward(prompt, task.gold(prompt), "stop")
        assert (gold.value, gold.correct) == (pytest.approx(1.0), True)
        for text, finish in [("", "stop"), (task.gold(prompt), "length"), ("", "length")]:
            score = task.reward(prompt, text, finish)
            assert (score.value, score.correct) == (0.0, False) and score.reason, (text, finish)
        assert task.reward(prompt, task.gold(prompt), "error").value is None


@pytest.mark.parametrize("spec", BUILT_IN + TABLES)
def test_another_rows_gold_scores_nothing(spec, make_task):
    task = make_task(spec)
    prompts = [*task.train[:20], *task.test[:20]]
    for prompt in prompts:
        for other in prompts:
            right = task.reward(prompt, task.gold(other), "stop").correct
            assert right == (prompt.answer == other.answer), (prompt, other)


@pytest.mark.parametrize("spec", SPECS)
def test_junk_is_finite_and_fast_and_cheats_earn_nothing(spec, make_task):
    task = make_task(spec)
    for prompt in [task.train[0], task.test[-1]]:
        for text in JUNK + CHEATS:
            start = time.perf_counter()
            score = task.reward(prompt, text, "stop")
            assert time.perf_counter() - start < 1.0, text[:40]
            assert score.value is None or 0.0 <= score.value <= 1.0
            assert score.value is None or math.isfinite(score.value)
            assert score.reason or score.scorable
    wrong = sum(task.reward(p, text, "stop").correct for p in task.train[:8] for text in CHEATS)
    assert wrong <= 2, "cheats are right by luck at most (an answer that is 9, or 0)"


@pytest.mark.parametrize("spec", BUILT_IN)
def test_the_order_is_the_same_in_every_process(spec, make_task):
    again = get_task(spec, **SMALL)
    assert [p.id for p in again.train] == [p.id for p in make_task(spec).train]
    assert [p.id for p in again.test] == [p.id for p in make_task(spec).test]


@pytest.mark.parametrize("spec", [f"arithmetic:{t}" for t in TIERS] + ["skills:sort", "skills:max"])
def test_no_test_prompt_is_a_reordering_of_a_training_prompt(spec, make_task):
    task = make_task(spec)

    def key(prompt) -> tuple:
        text = prompt.text.strip("QSM:=\n")
        return tuple(sorted(text.replace("+", ",").split(","))) if "," in text or "+" in text else tuple(sorted(text))

    assert not {key(p) for p in task.train} & {key(p) for p in task.test}


@pytest.mark.parametrize("name", known_tasks())
def test_an_unknown_variant_is_refused_with_a_hint(name):
    if name == "verifiers":
        pytest.importorskip("verifiers")
    with pytest.raises(KeelError) as told:
        get_task(f"{name}:no-such-thing-anywhere")
    assert "no-such-thing-anywhere" in str(told.value) and "xpected" in str(told.value)
