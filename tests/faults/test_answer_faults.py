"""Nothing hangs, nothing raises, and the pool stays whole."""

import os
import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.errors import KeelError
from keel.rewards.answer import AnswerGrader, equal, extract
from keel.rewards.answer.workers import Failed, Workers

TOWER = "\\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}"
SLOW = "\\prod_{k=1}^{10^9} k"  # nothing here decides it, and math-verify never ends
BOMBS = [
    None, 5, 5.0, ["5"], {}, b"5", "", "{" * 1_000_000, "(" * 1_000_000, "[" * 3000, "\\sqrt{" * 600, "\\frac" * 700,
    "\\boxed{" * 3000, "<answer>" * 3000, "\x00", "5\x00", "\u202e5", "\ud800", "\U0010ffff", "^" * 2000, "-" * 3000,
    "!" * 3000, "5" + "!" * 2000, "5" + "%" * 2000, "|" * 2000, "9" * 4000, "1,234" * 700, "9^" * 300 + "9",
    "9^{" * 10 + "9" + "}" * 10, TOWER, "10^{10^{10}}", "2^{-10^{9}}", "0^{-1}", "0^0", "10000!", "3!!!!!!",
    "\\binom{10^9}{5}", "1e999", "1e-999", "e^{e^{e^e}}", "\\sin(10^{9999})", "\\ln 0", "\\tan(\\pi/2)", "x^{x^{x^{x^x}}}",
    "1/(x-x)", "\\def\\a{\\a\\a}\\a", "\\input{x}", "\\begin{pmatrix}" * 200, "&" * 500, "\\\\" * 500, ",".join("12" * 500),
    " or ".join("x" * 300), "\\pm" * 300, "\\pm 1 \\pm 2 \\pm 3 \\pm 4 \\pm 5 \\pm 6 \\pm 7 \\pm 8",
    "(1,2)\\cup" * 50 + "(1,2)", "x<" * 100 + "x", "=" * 300, "x=" * 200 + "1", "\\{" * 500, "1 " * 1000,
    "\\frac{1}{2}" * 300, "__import__('os').abort()", "\\overline{" * 100, ".\\overline{" + "1" * 3000 + "}", "a_" * 500,
    "$" * 999, "**" * 999, "`" * 999, "answer: " * 400, "is " * 1000, "\n" * 3999, "\u0301" * 500,
]  # fmt: skip


@pytest.fixture
def workers():
    """A pool with a bound of two seconds that ends with its test."""
    pool = Workers(count=2, bound=2.0)
    pool.warm()
    yield pool
    pool.close()
    assert not pool.pids


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_no_bomb_hangs_raises_or_is_right(bomb, workers_once):
    for gold in ("5", "\\frac{1}{2}", "Paris", "\\{1,2\\}", "x^2+1"):
        begun = time.monotonic()
        assert not equal(bomb, gold, workers_once).correct
        assert time.monotonic() - begun < workers_once.bound + 1
    begun = time.monotonic()
    equal("5", bomb, workers_once)
    extract(bomb) if isinstance(bomb, str) else None
    assert time.monotonic() - begun < workers_once.bound + 1


@pytest.fixture(scope="module")
def workers_once():
    pool = Workers(count=1, bound=2.0)
    pool.warm()
    yield pool
    pool.close()


MEGABYTES = [
    "answer: ",
    "the answer is ",
    "#### 5\n",
    "<answer>5</answer>",
    "\\boxed{5} ",
    "\\boxed{",
    "final correct my the ",
    " ",
    "is ",
    "$x$ ",
    "a. ",
]


@pytest.mark.parametrize("piece", MEGABYTES)
def test_a_megabyte_is_searched_in_a_second_or_so(piece):
    text = piece * (1_000_000 // len(piece))
    begun = time.monotonic()
    AnswerGrader().grade("answer: " + text, "7")
    equal(text, "7")
    assert time.monotonic() - begun < 5


def test_much_arithmetic_is_given_up_by_count_and_not_by_clock():
    many = [f"\\sin({i}x)+\\sqrt{{{i}}}" for i in range(2, 42)]
    verdict = equal("\\{" + ",".join(many) + "\\}", "\\{" + ",".join(f"\\cos({i}x)" for i in range(41, 1, -1)) + "\\}")
    assert verdict.kind == "wrong"
    begun = time.monotonic()
    equal("+".join(f"(x+{i})^{{9999}}" for i in range(60)), "+".join(f"({i}+x)^{{9999}}" for i in range(60)))
    assert time.monotonic() - begun < 6


def test_a_tower_is_decided_without_a_worker():
    verdict = equal(TOWER, "5")
    assert verdict.kind == "wrong" and "too many digits" in verdict.reason


def test_a_worker_that_takes_too_long_is_replaced(workers):
    before = workers.pids
    begun = time.monotonic()
    verdict = equal(SLOW, "7", workers)
    assert verdict.kind == "unscorable" and "too long" in verdict.reason
    assert time.monotonic() - begun < workers.bound + 1
    after = workers.pids
    assert len(after) == 3 and len(set(after) - set(before)) == 1 and workers.killed == 1
    workers.warm()
    assert equal("\\int_0^1 2x\\,dx", "1", workers).correct


def test_many_slow_ones_at_once_leave_the_pool_whole(workers):
    verdicts = []
    threads = [threading.Thread(target=lambda: verdicts.append(equal(SLOW, "7", workers).kind)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert verdicts == ["unscorable"] * 4 and len(workers.pids) == 3
    workers.warm()
    assert workers.ask("\\sqrt{4}", "2")["same"]


def test_workers_that_died_while_idle_cost_no_answer(workers):
    dead = workers.pids
    for pid in dead:
        os.kill(pid, 9)
    for process in workers._all:
        process.process.wait(timeout=10)
    assert all(workers.ask("1", "1")["same"] for _ in range(3))
    assert len(workers.pids) == 3 and workers.killed == 3 and not set(workers.pids) & set(dead)


def test_a_worker_that_dies_over_a_question_is_replaced(workers):
    threading.Timer(0.5, lambda: [os.kill(pid, 9) for pid in workers.pids]).start()
    with pytest.raises(Failed, match="ended the process"):
        workers.ask(SLOW, "7")
    assert workers.ask("1", "1")["same"]


def test_a_slow_start_is_not_held_against_the_question():
    pool = Workers(count=1, bound=0.5)  # seconds: less than a process takes to start
    try:
        assert pool.ask("1", "1")["same"]
    finally:
        pool.close()


def test_a_pool_works_from_any_thread(workers):
    """math-verify's own timeout needs the main thread, and gives every answer 0 in another one."""
    said = []
    thread = threading.Thread(target=lambda: said.append(equal("\\int_0^1 2x\\,dx", "1", workers).correct))
    thread.start()
    thread.join(timeout=30)
    assert said == [True]


def test_a_closed_pool_starts_again():
    pool = Workers(count=1)
    pool.warm()
    pool.close()
    assert not pool.pids
    assert pool.ask("1", "1")["same"]
    pool.close()


def test_a_pool_needs_a_process():
    with pytest.raises(KeelError, match="at least one"):
        Workers(count=0)


ALPHABET = st.one_of(
    st.characters(),
    st.sampled_from(list("0123456789+-*/^_(){}[]|,.;:!%=<>$\\ \nxyzABei")),
    st.sampled_from(["\\frac", "\\sqrt", "\\boxed{", "\\{", "\\}", "\\pm", "\\cup", "\\pi", " or ", "answer: "]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ALPHABET, max_size=40).map("".join),
    st.sampled_from(["5", "\\frac{1}{2}", "(1, 2]", "x > 3", "Paris", "B", "y = 2x", "\\{1, 2\\}"]),
)
def test_any_text_gets_a_verdict(text, gold):
    grader = AnswerGrader()
    for verdict in (grader.grade(text, gold), equal(text, gold), equal(gold, text)):
        assert verdict.kind in ("correct", "wrong", "unscorable")


def test_a_correct_answer_survives_no_change_of_value():
    """A digit put into, taken from or changed in a right number makes it a wrong one."""
    rng = random.Random(1)
    for _ in range(300):
        number = str(rng.randint(10, 10**6))
        i = rng.randrange(len(number))
        digit = str((int(number[i]) + rng.randint(1, 9)) % 10)
        changed = number[:i] + digit + number[i + 1 :]
        assert not equal(changed, number).correct and not equal(f"\\sqrt{{{changed}}}", f"\\sqrt{{{number}}}").correct
