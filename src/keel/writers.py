"""Where metrics go while a run trains: one small seam, and an implementation for each place.

A Writer of your own needs two methods. `metrics.jsonl` is always written; the others are named by the setting
`writers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from keel.errors import KeelError, nearest
from keel.files import append_jsonl


@runtime_checkable
class Writer(Protocol):
    """Something that takes each step's metrics."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step; steps only rise."""

    def close(self) -> None:
        """The run has ended: let nothing be lost."""


class NullWriter:
    """Writes nothing."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object per line, on disk as soon as it is written.

    Args:
        path: appended to.
    """

    def __init__(self, path: Path):
        self.path = path

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        append_jsonl(self.path, [{"step": step, **metrics}])

    def close(self) -> None: ...


class TensorBoardWriter:
    """Event files in the run folder's `tensorboard/`; after a resume, later points replace those that were lost."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int):
        module = _imported("torch.utils.tensorboard", "tensorboard")
        self.board = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


class WandbWriter:
    """A run in the project "keel" of Weights & Biases, named like the run folder; a resumed run goes on in the same
    place.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int):
        module = _imported("wandb", "wandb")
        name = folder.resolve().name
        self.run = module.init(project="keel", id=name, name=name, config=dict(config), dir=str(folder), resume="allow")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class TrackioWriter:
    """A run in the local project "keel" of trackio, named like the run folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int):
        module = _imported("trackio", "trackio")
        self.run = module.init(project="keel", name=folder.resolve().name, config=dict(config), resume="allow")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


WRITERS = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter, "trackio": TrackioWriter}


def open_writers(names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int = 0) -> list[Writer]:
    """The writers that the settings name, besides `metrics.jsonl`.

    Args:
        folder: of the run.
        config: its settings, for writers that keep them.
        step: done so far; above 0 when the run is resumed.

    Raises:
        KeelError: a name is unknown, or its package is not installed.
    """
    check_writers(names)
    return [WRITERS[name](folder, config, step) for name in names]


def check_writers(names: Sequence[str]) -> None:
    """Refuse, before anything is made, a writer that is unknown or whose package is missing."""
    for name in names:
        if name not in WRITERS:
            hint = nearest(name, WRITERS)
            raise KeelError(
                f"There is no writer {name!r}. {hint[:1].upper() + hint[1:]}Expected any of: {', '.join(WRITERS)}. "
                "metrics.jsonl is always written."
            )
        if find_spec(name) is None:
            raise _missing(name, "it is not installed")


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as missing:
        raise _missing(package, missing) from None


def _missing(package: str, why: object) -> KeelError:
    return KeelError(
        f"The writer {package!r} needs the package {package}, which could not be imported ({why}). Install it with "
        f"`pip install 'keel-rl[{package}]'`, or leave it out of `writers`."
    )
