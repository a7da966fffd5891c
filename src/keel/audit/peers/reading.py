"""What a configuration of another framework says, in keel's words: an objective, and what no choice of keel's expresses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from keel.errors import KeelError, nearest
from keel.objectives.objective import Objective

ON_POLICY = "one update a batch: the ratio is 1, so nothing is clipped or gated"


@dataclass(frozen=True)
class Beyond:
    """A choice that keel does not have.

    Args:
        knob: of the configuration.
        says: what it does, in a phrase.
    """

    knob: str
    says: str


@dataclass(frozen=True)
class Idle:
    """A knob that does nothing.

    Args:
        knob: its name.
        value: what it is set to.
        because: why.
    """

    knob: str
    value: Any
    because: str


@dataclass(frozen=True)
class Reading:
    """A configuration read.

    Args:
        objective: its loss, as far as keel has the choices.
        named_after: the recipe whose name it carries.
        dynamic_sampling, updates_per_batch: the two habits of the loop.
        beyond: what keel has no choice for.
        idle: knobs that were set and do nothing.
        warnings: what is likely a mistake.
    """

    objective: Objective
    named_after: str
    dynamic_sampling: bool = False
    updates_per_batch: int = 1
    beyond: tuple[Beyond, ...] = ()
    idle: tuple[Idle, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass
class Notes:
    """Gathers what is found while reading.

    Args:
        settings: every knob with its value; given: only those that were set.
    """

    settings: Mapping[str, Any]
    given: Mapping[str, Any]
    beyond: list[Beyond] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, knob: str) -> Any:
        return self.settings[knob]

    def unlike(self, knob: str, says: str) -> None:
        """keel has no choice for this one."""
        self.beyond.append(Beyond(knob, says))

    def unused(self, knobs: Iterable[str], because: str) -> None:
        """Those of these knobs that were set do nothing; the first reason stays."""
        known = {idle.knob for idle in self.idle}
        self.idle += [Idle(knob, self.given[knob], because) for knob in knobs if knob in self.given and knob not in known]

    def choose(self, knob: str, choices: Mapping[Any, Any], unknown: Iterable[str] = ()) -> Any:
        """What the knob's value stands for; None, with a note, for values that keel has no choice for."""
        value, others = self.settings[knob], tuple(unknown)
        if isinstance(value, str | bool) and value in choices:
            return choices[value]
        if value not in others:
            known = [str(name) for name in (*choices, *others)]
            raise KeelError(f"{knob} is {value!r}; {nearest(str(value), known)}Expected one of: {', '.join(known)}.")
        self.unlike(knob, f"{value} has no counterpart in keel")
        return None
