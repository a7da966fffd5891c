"""Writers and displays: one seam, and a hint where a package is missing."""

from __future__ import annotations

import importlib.util
import io

import pytest
from rich.console import Console

from keel.errors import KeelError
from keel.files import read_jsonl
from keel.progress import LiveLine, PlainLines, Silent, display
from keel.writers import WRITERS, JsonlWriter, NullWriter, check_writers, open_writers


def test_a_jsonl_writer_adds_a_line_a_step_at_once(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"reward/mean": 0.5})
    assert list(read_jsonl(tmp_path / "metrics.jsonl")) == [{"step": 1, "reward/mean": 0.5}]
    writer.write(2, {"reward/mean": 0.25})
    writer.close()
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_the_null_writer_takes_everything():
    writer = NullWriter()
    writer.write(1, {"a": 1.0})
    writer.close()


def test_an_unknown_writer_names_the_nearest(tmp_path):
    with pytest.raises(KeelError, match="no writer 'tensorbord'. Did you mean 'tensorboard'"):
        open_writers(["tensorbord"], tmp_path, {})
    assert open_writers([], tmp_path, {}) == []


@pytest.mark.parametrize("name", [name for name in WRITERS if importlib.util.find_spec(name) is None])
def test_a_missing_package_says_how_to_install_it(tmp_path, name):
    for refuse in (lambda: check_writers([name]), lambda: WRITERS[name](tmp_path, {}, 0)):
        with pytest.raises(KeelError, match=rf"pip install 'keel-rl\[{name}\]'"):
            refuse()


def metrics(step: int) -> dict[str, float]:
    shown = {"reward/mean": step / 100, "length/mean": 20.0, "tokens/per_s": 1234.0}
    return shown | ({"eval/pass@1": 0.875} if step == 7 else {})


def test_plain_lines_come_at_evaluations_and_at_every_twentieth():
    stream = io.StringIO()
    shown = PlainLines(stream, steps=100)
    for step in range(1, 101):
        shown.show(step, metrics(step))
    shown.close()
    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == sorted([*range(5, 101, 5), 7])
    assert lines[-1].startswith("step 100/100  reward 1  pass@1 0.875  length 20  1,234 tokens/s  left 0:00")


def test_a_resumed_run_shows_where_it_is():
    stream = io.StringIO()
    shown = PlainLines(stream, steps=10, done=8)
    shown.show(8, {})
    shown.show(9, {})
    assert "step 8/10    left ?" in stream.getvalue() and "step 9/10" in stream.getvalue()


def test_the_live_line_shows_the_newest_numbers():
    stream = io.StringIO()
    shown = LiveLine(Console(file=stream, force_terminal=True, width=140), steps=10)
    shown.show(7, metrics(7))
    shown.show(8, metrics(8))
    shown.say("a sentence that stays")
    shown.close()
    told = stream.getvalue()
    assert "8/10" in told and "pass@1 0.875" in told and "1,234 tokens/s" in told and "a sentence that stays" in told


def test_the_display_fits_its_stream():
    assert isinstance(display(io.StringIO(), 10), PlainLines)
    assert isinstance(display(io.StringIO(), 10, quiet=True), Silent)
