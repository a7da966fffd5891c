"""What the person at the terminal sees while a run trains: one live line, or a plain line now and then where nobody
watches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from io import TextIOBase
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = (("reward/mean", "reward"), ("eval/pass@1", "pass@1"), ("length/mean", "length"))


@runtime_checkable
class Display(Protocol):
    """Something that shows how a run is getting on."""

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step is done."""

    def say(self, text: str) -> None:
        """A sentence that stays."""

    def close(self) -> None:
        """The run has ended."""


class Silent:
    """Shows nothing."""

    def show(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class LiveLine:
    """A bar with reward, pass@1, tokens per second and the time that is left.

    Args:
        steps: of the whole run.
        done: of them, before this process.
    """

    def __init__(self, console: Console, steps: int, done: int = 0):
        self.seen = _Seen()
        self.bar = Progress(
            TextColumn("[bold]keel"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TextColumn("[dim]left"),
            TimeRemainingColumn(compact=True),
            console=console,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task("train", total=steps, completed=done, said="")
        self.bar.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        self.bar.update(self.task, completed=step, said=self.seen.told(metrics))

    def say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self.bar.stop()


class PlainLines:
    """A line at every evaluation and at about every twentieth of the run.

    Args:
        steps: of the whole run.
        done: of them, before this process.
    """

    def __init__(self, stream: TextIOBase, steps: int, done: int = 0):
        self.stream, self.steps, self.begun, self.done = stream, steps, time.perf_counter(), done
        self.every, self.seen = max(1, steps // 20), _Seen()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        told = self.seen.told(metrics)
        if step % self.every == 0 or step == self.steps or "eval/pass@1" in metrics:
            self.say(f"step {step}/{self.steps}  {told}  left {self._left(step)}")

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def close(self) -> None: ...

    def _left(self, step: int) -> str:
        if step <= self.done:
            return "?"
        seconds = (time.perf_counter() - self.begun) / (step - self.done) * (self.steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class _Seen:
    """The newest value of each number that is shown; pass@1 stays between evaluations."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def told(self, metrics: Mapping[str, float]) -> str:
        self.values |= {name: metrics[name] for name, _ in SHOWN if name in metrics}
        self.values |= {"rate": metrics["tokens/per_s"]} if "tokens/per_s" in metrics else {}
        said = [f"{word} {self.values[name]:.3g}" for name, word in SHOWN if name in self.values]
        return "  ".join(said + ([f"{self.values['rate']:,.0f} tokens/s"] if "rate" in self.values else []))


def display(stream: TextIOBase, steps: int, done: int = 0, *, quiet: bool = False) -> Display:
    """The display that fits a stream: live on a terminal, plain lines elsewhere."""
    if quiet:
        return Silent()
    console = Console(file=stream)
    return LiveLine(console, steps, done) if console.is_terminal else PlainLines(stream, steps, done)
