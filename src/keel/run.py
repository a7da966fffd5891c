"""One run put together: settings → policy, task, engine → the loop, with evaluation, writers, checkpoints and Ctrl-C
around it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from keel.config import RunConfig, load_config
from keel.diagnostics.health import contradictions, impossible
from keel.errors import KeelError
from keel.held_out import held_out
from keel.manifest import check_same_origin, manifest
from keel.models.policy import Policy
from keel.parts import MakeEngine, Parts, assemble
from keel.progress import Display, display
from keel.run_folder import RunFolder, WatchedFolder, environment
from keel.settings import dotted
from keel.stopping import StopRequest, stop_requests
from keel.summary import closing_table, summarise
from keel.training import checkpoint
from keel.training.loop import StepRecord, Trainer, iterate
from keel.training.ranks import ALONE, Ranks, joined
from keel.writers import JsonlWriter, Writer, open_writers


class Interrupted(KeyboardInterrupt):
    """Someone asked the run to stop. It is saved; the text says how to go on."""


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Args:
        folder: everything that it left on disk.
        policy: the trained policy; None where trainers on a cluster have it, or where it is cut over processes that have parted
            (`keel.parts.trained_policy(run.folder)` reads it).
        summary: as in `summary.json`.
        ranks: that trained it; the first one speaks.
    """

    folder: RunFolder
    policy: Policy | None
    summary: dict[str, Any]
    ranks: Ranks = ALONE

    def report(self) -> None:
        """Print what the run came to, and where its picture is."""
        if not self.ranks.first:
            return
        console = Console()
        console.print(closing_table(self.summary))
        places = {"curves": self.folder.curves, "run": self.folder.path, "page": f"keel report {self.folder.path}"}
        console.print("\n".join(f"{name:<8} {place}" for name, place in places.items()), highlight=False, soft_wrap=True)


def train(
    config: RunConfig | str = "solid",
    *,
    engine: MakeEngine | dict[str, Any] | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> Run:
    """Train, from settings to a run folder.

    Args:
        config: settings, or what `load_config` takes: a recipe, a shipped configuration, a TOML file.
        engine: settings of the engine ({"format": "bf16"}), or a function policy → the engine that samples.
        quiet: show no progress.
        overrides: settings on top: model="tiny-dense", train={"lr": 1e-4}, **{"sampling.temperature": 0.8}.

    Raises:
        KeelError: the settings, the model, the task or the folder cannot be used; or training cannot go on.
        Interrupted: Ctrl-C; the run is saved and can be resumed.
    """
    if isinstance(engine, dict):
        engine, overrides = None, overrides | {"engine": engine}
    config = load_config(config, overrides) if isinstance(config, str) else config.replaced(overrides)
    if _on_cluster(config):
        from keel import ray_trainers

        return ray_trainers.train(config, quiet=quiet)
    with _together(config) as ranks:
        parts = assemble(config.resolved(), make_engine=engine, ranks=ranks)
        told = manifest(parts.config, parts.policy, parts.task, parts.engine, parts.recipe) | {"ranks": ranks.size}
        ranks.check_same({"the model": told["model"]["hash"], "the task": told["task"]["hash"]})
        path = ranks.by_first(lambda: RunFolder.create(parts.config, told).path)
        return _Session(parts, _seen_by(ranks, RunFolder(path)), _trainer(parts), quiet).run()


def resume(
    path: str | Path,
    *,
    steps: int | None = None,
    parallel: str | None = None,
    engine: MakeEngine | None = None,
    quiet: bool = False,
) -> Run:
    """Go on with a run from its newest checkpoint, bit for bit as if it had never stopped, if on as many ranks.

    Args:
        path: the run folder.
        steps: train for more steps than was first asked.
        parallel: how the ranks train that there are now, in place of `train.parallel`.
        engine, quiet: as `train` takes them.

    Raises:
        KeelError: not a run folder, a damaged checkpoint, or another model or task than the run began with.
    """
    asked = {name: value for name, value in (("steps", steps), ("train.parallel", parallel)) if value is not None}
    config = _changed(RunFolder.open(path), asked)
    if _on_cluster(config):
        from keel import ray_trainers

        return ray_trainers.resume(path, config, quiet=quiet)
    with _together(config, resuming=True) as ranks:
        folder = _seen_by(ranks, RunFolder.open(path))
        if asked:
            ranks.by_first(lambda: folder.rewrite_config(config))
        parts = assemble(config, make_engine=engine, ranks=ranks)
        check_same_origin(folder.manifest, parts.policy, parts.task)
        trainer = _trainer(parts)
        begun = checkpoint.checkpoints(folder.checkpoints)
        step = _restore(trainer, folder) if begun else -1  # stopped before the first: begin again
        ranks.by_first(lambda: folder.cut_back(step))
        return _Session(parts, folder, trainer, quiet).run()


def _on_cluster(config: RunConfig) -> bool:
    """Whether other processes are to train, and this is none of them."""
    return config.cluster.train_workers > 0 and "RANK" not in os.environ


@contextmanager
def _together(config: RunConfig, *, resuming: bool = False) -> Iterator[Ranks]:
    """The ranks of this run, once they have found that they are alike."""
    train = config.train
    with joined(train.parallel, train.device, train.rank_timeout_s, resuming=resuming) as ranks:
        if ranks.size > 1:
            here = environment()
            ranks.check_same(here["versions"] | {"git": here["git"]} | dotted(config.model_dump(mode="json")))
        yield ranks


def _seen_by(ranks: Ranks, folder: RunFolder) -> RunFolder:
    return folder if ranks.first else WatchedFolder(folder.path)


def _trainer(parts: Parts) -> Trainer:
    return Trainer(parts.policy, parts.engine, parts.task, parts.recipe, parts.config, parts.ranks)


def _restore(trainer: Trainer, folder: RunFolder) -> int:
    """Bring a trainer and the global random state to where the newest checkpoint has them; its step."""
    ranks = trainer.ranks
    step, tensors, state = checkpoint.load(folder.checkpoints, like=trainer.cut_tensors(), ranks=ranks)
    trainer.restore(tensors, state["clocks"])
    checkpoint.restore_random_state(tensors, state["random"], ranks.rank)
    return step


class _Session:
    """The loop with everything around it. What it writes can be read at any moment, and cut back to any checkpoint."""

    def __init__(self, parts: Parts, folder: RunFolder, trainer: Trainer, quiet: bool):
        config, done, self.ranks = parts.config, trainer.step, parts.ranks
        self.parts, self.folder, self.trainer = parts, folder, trainer
        self.rows = folder.rows()
        self.clock = _Clock(self.rows)
        self.saved = done
        shown = config.model_dump(mode="json")
        self.writers: list[Writer] = []
        if self.ranks.first:
            self.writers = [JsonlWriter(folder.metrics), *open_writers(config.writers, folder.path, shown, done)]
        self.display: Display = display(sys.stderr, config.steps, done, quiet=quiet or not self.ranks.first)

    def run(self) -> Run:
        try:
            with stop_requests(self.display.say) as stop:
                if not self.rows:
                    self._write(0, held_out(self.parts, standard=True))
                self._stop_if_asked(stop)
                for record in iterate(self.trainer):
                    self._after(record)
                    self._stop_if_asked(stop, record.batch_ends)
        finally:
            self.trainer.close()
            getattr(self.parts.engine, "close", lambda: None)()
            self.display.close()
            for writer in self.writers:
                writer.close()
        return self._finished()

    def _after(self, record: StepRecord) -> None:
        """A step is done: evaluate and write, and save where it is time. Both wait for the end of a rollout batch."""
        config, step = self.parts.config, record.step
        last = step >= config.steps
        metrics = dict(record.metrics)
        if record.batch_ends and (last or _crossed(config.evaluation.every, self._last("eval/pass@1"), step)):
            self.trainer.wake()
            metrics |= held_out(self.parts, standard=last)
        if record.skipped:
            self.display.say(f"step {step} was skipped: the gradient of {record.skipped} was not finite; no weight changed")
        self.folder.add_rollouts(step, record.groups)
        if record.traces:
            self.folder.add_tokens(step, (trace.as_row() for trace in record.traces), config.record.tokens_mb * 1e6)
        self._write(step, metrics)
        self.folder.add_health(step, [*impossible(metrics), *contradictions(record.groups, config.train.group_size)])
        if record.batch_ends and (last or _crossed(config.checkpoint.every, self.saved, step)):
            self._save()

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        metrics["time/total_s"] = self.clock.seconds()
        for writer in self.writers:
            writer.write(step, metrics)
        self.rows.append({"step": step, **metrics})
        self.display.show(step, metrics)

    def _save(self) -> None:
        tensors, clocks = self.trainer.state()
        random_tensors, random_state = checkpoint.random_states(self.ranks)
        state = {"clocks": clocks, "random": random_state}
        keep = self.parts.config.checkpoint.keep
        checkpoint.save(self.folder.checkpoints, self.trainer.step, tensors | random_tensors, state, keep, self.ranks)
        self.saved = self.trainer.step

    def _stop_if_asked(self, stop: StopRequest, batch_ends: bool = True) -> None:
        if not batch_ends or self.trainer.step >= self.parts.config.steps or not self.ranks.any(bool(stop.signal)):
            return
        if self.trainer.step > self.saved:
            self._save()
        self._draw()
        raise Interrupted(
            f"Stopped after step {self.trainer.step} of {self.parts.config.steps}; everything is saved. "
            f"Go on with: keel train --resume {self.folder.path}"
        )

    def _last(self, name: str) -> int:
        return max((row["step"] for row in self.rows if name in row), default=0)

    def _finished(self) -> Run:
        self.rows = self.ranks.by_first(self.folder.rows)
        summary = summarise(self.rows)
        self.folder.finish(summary)
        self._draw()
        parted = self.ranks.sharded and not self.ranks.lasting
        return Run(self.folder, None if parted else self.parts.policy, summary, self.ranks)

    def _draw(self) -> None:
        if not self.ranks.first:
            return
        from keel.curves import draw  # matplotlib takes its time to import

        config = self.parts.config
        title = f"{config.recipe} · {config.model} · {config.task} · seed {config.seed}"
        draw(self.rows, self.folder.curves, title)


class _Clock:
    """Seconds that the run has taken, over all processes that worked on it, up to what was kept."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.before = rows[-1].get("time/total_s", 0.0) if rows else 0.0
        self.start = time.perf_counter()

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start


def _crossed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]; never for 0."""
    return every > 0 and now // every > before // every


def _changed(folder: RunFolder, asked: dict[str, Any]) -> RunConfig:
    config = folder.config
    steps = asked.get("steps", config.steps)
    if config.train.lr_schedule != "constant" and steps != config.steps:
        raise KeelError(
            f"This run's learning rate follows a {config.train.lr_schedule} schedule over {config.steps} steps, and "
            f"--steps {steps} would bend it. Expected the same number of steps; start a new run, or use lr_schedule = "
            "constant from the beginning."
        )
    return config.replaced(asked) if asked else config
