"""A study: one question, one base of settings, and arms that are overlays on it. Data; running it is `runner`'s work.

    name = "staircase"
    question = "What does each step away from on-policy cost?"
    prediction = "…"            # written before the first run
    seeds = 5
    [base]                      # settings, as in any configuration
    recipe = "solid"
    [quick]                     # on top of the base with --quick
    steps = 20
    [arms.on-policy]            # the first arm is what the others are compared with
    [arms.mini-batches]
    train.updates_per_batch = 4

In place of arms, `[axes.NAME.VALUE]` tables give a grid: an arm for each combination of values, "none · R2".
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from keel.config import RunConfig, Section
from keel.errors import KeelError, nearest
from keel.lab.differences import OF_RUNNER, check_difference, difference
from keel.lab.predictions import Prediction
from keel.settings import dotted, explain, merged, nested, read_toml

BUDGET = ("completions_total", "prompts_total", "completion_tokens_total_at_most", "completions_per_evaluation")


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Args:
        name: as the study calls it.
        changes: dotted settings of its overlay.
        config: resolved settings, for seed 0.
        difference: every resolved setting that is not the base's; a recipe is taken apart into its choices.
    """

    name: str
    changes: dict[str, Any]
    config: RunConfig
    difference: dict[str, Any] = field(default_factory=dict, repr=False)

    def seeded(self, seed: int, out: Path, threads: int) -> RunConfig:
        """The run of one seed: the same prompts in the same order for every arm. What is evaluated is what the study names."""
        run = {"seed": seed, "out": str(out), "train.threads": threads, "evaluation.standard_panel": False}
        return self.config.replaced(run)


class Collapse(Section):
    """When a run counts as collapsed: at the first evaluation from which on so many in a row, or all that are left, lie below a
    share of the best before them; or at the first that is no number. A run that fails has collapsed too.
    """

    share: float = Field(0.5, gt=0, lt=1, description="of the run's own best so far")
    evaluations: int = Field(2, ge=1, description="in a row below it; at the end of a run fewer are enough")


class Pretrained(Section):
    """A model that a study makes, as `keel pretrain` does."""

    size: str = Field(description="of `keel pretrain`: .1M, .3M, 1M or moe")
    kind: Literal["base", "aligned"] = Field("base", description="aligned = then tuned on clean answers")
    seed: int = Field(0, ge=0, description="of its weights and examples")
    steps: int | None = Field(None, ge=1, description="optimizer steps of its first phase; none = as many as `keel pretrain` takes")


class Study(Section):
    """A study as its file has it.

    Raises:
        KeelError: a key is unknown, an arm does not construct, or arms differ in budget without `varies_budget`.
    """

    name: str = Field(description="of the study and of its folder")
    question: str = Field(description="in one sentence")
    source: str = Field("", description="where the question comes from")
    prediction: str = Field("", description="what is expected, written before the first run")
    predictions: tuple[Prediction, ...] = Field((), description="what is expected, each to be judged")
    seeds: int = Field(5, ge=1, description="runs of each arm")
    hours: float | None = Field(None, gt=0, description="of one process that the full size took before: what to expect")
    first_seed: int = Field(0, ge=0, lt=1_000_000, description="seeds below it led to the predictions, and are left out")
    confirm: bool = Field(False, description="whether verdicts are meant to be final: refused with fewer than `confirm_seeds`")
    confirm_seeds: int = Field(10, ge=10, description="seeds from which on a verdict is more than a hint")
    collapse: Collapse = Field(default_factory=Collapse, description="when a run counts as collapsed")
    varies_budget: bool = Field(False, description="whether arms may differ in what they sample")
    sweep: dict[str, tuple[float, ...]] = Field(
        default_factory=dict, description="one setting and its values: each arm chooses the best one first, on seeds of its own"
    )
    sweep_seeds: int = Field(2, ge=1, description="runs of each arm at each value of the sweep")
    build: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of `keel data build`, run once before the arms; tasks of theirs find it as jsonl:{data}.jsonl, its "
        "control as {data}.unselected.jsonl and its held-out rows as {data}.test.jsonl",
    )
    models: dict[str, Pretrained] = Field(
        default_factory=dict, description="models by name, each made once before the arms, which find it as {models}/NAME"
    )
    base: dict[str, Any] = Field(default_factory=dict, description="settings of all arms")
    quick: dict[str, Any] = Field(default_factory=dict, description="settings of a quick look, on top of the base")
    quick_seeds: int = Field(2, ge=1, description="runs of each arm in a quick look")
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict, description="overlays by name")
    axes: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict, description="overlays by axis and value")

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as found:
            raise KeelError(explain(found, Study, "the study's file")) from None

    @field_validator("predictions", mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        return [Prediction(**each) if isinstance(each, dict) else each for each in given] if isinstance(given, list) else given

    @field_validator("sweep", mode="before")
    @classmethod
    def _swept(cls, given: Any) -> Any:
        """Let it be written as tables, as any setting."""
        return dotted(given) if isinstance(given, dict) else given

    @field_validator("sweep", mode="after")
    @classmethod
    def _one_setting(cls, given: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        if len(given) > 1 or any(len(set(values)) < 2 for values in given.values()):
            raise KeelError(f"sweep is {given}. Expected one setting with two values or more, such as train.lr = [1e-4, 2e-4].")
        return given

    def seeds_for(self, wanted: int | None = None, quick: bool = False) -> int:
        """Runs of each arm.

        Raises:
            KeelError: the study means to confirm, and these are fewer than that takes.
        """
        count = wanted or (self.quick_seeds if quick else self.seeds)
        if self.confirm and not quick and count < self.confirm_seeds:
            raise KeelError(
                f"Study {self.name!r} means to confirm its predictions with {count} seeds. Expected {self.confirm_seeds} or more: "
                f"with few seeds chance decides too often. Set seeds = {self.confirm_seeds}, or confirm = false, and read the "
                "verdicts as hints."
            )
        return count

    def overlays(self) -> dict[str, dict[str, Any]]:
        """The settings of each arm that differ from the base, by the arm's name."""
        if bool(self.arms) == bool(self.axes):
            raise KeelError(
                f"Study {self.name!r} has {'both arms and axes' if self.arms else 'neither arms nor axes'}. Expected one."
            )
        if self.arms:
            return {name: dotted(changes) for name, changes in self.arms.items()}
        grid = itertools.product(*(values.items() for values in self.axes.values()))
        return {
            " · ".join(value for value, _ in point): {k: v for _, changes in point for k, v in dotted(changes).items()}
            for point in grid
        }

    def resolved_arms(self, quick: bool = False) -> list[Arm]:
        """Every arm with its whole configuration, checked."""
        self.seeds_for(quick=quick)
        base = merged(self.base, self.quick if quick else {})
        if held := [name for name in OF_RUNNER if name in dotted(base)]:
            raise KeelError(f"The base of study {self.name!r} sets {', '.join(held)}. Expected it not to: the runner does.")
        plain = _config(self.name, "the base", base, {})
        arms = [_arm(self.name, name, base, plain, changes) for name, changes in self.overlays().items()]
        for arm in arms:
            if held := arm.changes.keys() & self.sweep.keys():
                raise KeelError(
                    f"Arm {arm.name!r} of study {self.name!r} sets {held.pop()}, which the sweep chooses. Expected one of the two."
                )
            for setting, values in self.sweep.items():
                _config(self.name, f"{arm.name} at {setting} = {values[0]}", base, arm.changes | {setting: values[0]})
        for prediction in self.predictions:
            prediction.check({arm.name: arm.config for arm in arms})
        if not self.varies_budget:
            _check_budgets(self.name, arms)
        return arms


def _arm(study: str, name: str, base: dict[str, Any], plain: RunConfig, changes: dict[str, Any]) -> Arm:
    config = _config(study, name, base, changes)
    found = difference(config, plain)
    check_difference(name, changes, found)
    return Arm(name, changes, config, found)


def _config(study: str, arm: str, base: dict[str, Any], changes: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig(**merged(base, nested(changes))).resolved()
    except KeelError as fault:
        raise KeelError(f"Arm {arm!r} of study {study!r}: {fault}") from None


def _check_budgets(study: str, arms: list[Arm]) -> None:
    first, *others = arms
    for arm in others:
        ours, theirs = _budget(arm.config), _budget(first.config)
        unequal = [f"{name} {ours[name]} against {theirs[name]}" for name in ours if ours[name] != theirs[name]]
        if unequal:
            raise KeelError(
                f"Arm {arm.name!r} of study {study!r} has another budget than {first.name!r}: {', '.join(unequal)}. Expected equal "
                "ones, or varies_budget = true where the budget is the question."
            )


def _budget(config: RunConfig) -> dict[str, Any]:
    """What a run may spend. With dynamic sampling it samples more than it trains on."""
    derived = config.derived()
    return {name: derived[name] for name in BUDGET} | {"steps": config.steps, "dynamic sampling": config.train.dynamic_sampling}


def shipped_studies() -> dict[str, Path]:
    """Studies that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "studies").glob("*.toml"))}


def load_study(source: str) -> Study:
    """A study from a TOML file, or a shipped one by name."""
    known = shipped_studies()
    if source in known:
        return Study(**read_toml(known[source]))
    if not Path(source).is_file():
        raise KeelError(
            f"There is no study {source!r}. {nearest(source, known)}Expected a TOML file, or one of: {', '.join(known) or 'none'}."
        )
    return Study(**read_toml(Path(source)))
