"""What a study expects, as data that is written before its runs.

    [[predictions]]
    says = "clip-higher keeps more entropy than clip"
    arm = "clip-higher"
    against = "clip"                 # default: the first arm; "start" = its own first value
    metric = "policy/entropy_nats"   # default "eval/pass@1"; any name in metrics.jsonl
    at = "end"
    expect = "higher"                # or lower, or equal
    margin = 0.02                    # smallest difference that matters

How each is judged stands in `verdicts.py`. With scale = "ranks" two families of arms are compared, one to one, by how they rank:

    arm = "* · 1M"                   # every arm of this ending …
    against = "* · .1M"              # … with its counterpart here: does the ranking of these predict the ranking of those?
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from keel.config import EvaluationSettings, RunConfig, Section
from keel.diagnostics.metrics import metric
from keel.errors import KeelError, nearest
from keel.settings import explain
from keel.summary import panel_name

START = "start"
STAR = "*"
FEWEST_RANKED = 3
VALIDATION = "eval/pass@1"  # the best checkpoint is chosen on it
At = Literal["end", "mean", "best", "area", "change", "fall", "equal-tokens", "best-on-validation", "sigmoid-miss", "standing-miss"]
AT = (
    "end = the last evaluation, or the mean over the last tenth of what is logged at every step; mean = over all that is logged; "
    "best = highest; area = mean over generated tokens; change = end − start; fall = best − end; equal-tokens = where the one of "
    "the two that generated less ended; best-on-validation = at the evaluation of highest eval/pass@1; sigmoid-miss = how far a "
    "sigmoid fitted on the first half of the tokens misses the second, on average; standing-miss = the same of the value between"
)


class Prediction(Section):
    """One expected difference between an arm and another, seed by seed.

    Raises:
        KeelError: a key is unknown, or the prediction could not be judged.
    """

    says: str = Field(description="in one sentence")
    arm: str = Field(description="the arm that it is about; of a grid its full name, such as 'none · R2'")
    against: str = Field("", description="the arm that it is compared with, or 'start' for its own start; empty = the first arm")
    against_value: float | None = Field(None, description="a number that it is compared with, in place of an arm")
    metric: str = Field(VALIDATION, description="a name in metrics.jsonl")
    at: At = Field("end", description=AT)
    against_at: At | None = Field(None, description="the same of what it is compared with; none = as `at`")
    expect: Literal["higher", "lower", "equal"] = Field(description="than, or as, what it is compared with")
    margin: float = Field(0.0, ge=0, description="the smallest difference that matters")
    scale: Literal["difference", "log2", "ranks"] = Field(
        "difference",
        description="log2 = differences of logarithms to base 2: -1 is a half, and a margin of 1 a factor of two; ranks = "
        "Spearman's correlation between two families of arms under one seed, which noise of single runs brings nearer to 0",
    )

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as found:
            told = explain(found, Prediction, "the study's file")
            raise KeelError(f"Prediction {data.get('says', '')!r}: {told}") from None

    @model_validator(mode="after")
    def _can_be_judged(self) -> Prediction:
        alone = self.against == START or self.against_value is not None
        if self.expect == "equal" and self.margin == 0:
            self._refuse("expects equality and has no margin", "the largest difference that still counts as equal, as margin")
        if self.against and self.against_value is not None:
            self._refuse("has both against and against_value", "one of them")
        if "equal-tokens" in (self.at, self.against_at) and (alone or self.against_at not in (None, self.at)):
            self._refuse("compares at equal tokens with something that is no run", "another arm, at the same place")
        if self.against == START and (self.at == "fall" or self.against_at):
            self._refuse(f"compares {self.at!r} with the start", "end, change, best, mean or area, and no against_at")
        if (self.scale == "ranks") != (self.arm.count(STAR) == self.against.count(STAR) == 1):
            self._refuse(f"has arm {self.arm!r}, against {self.against!r} and scale {self.scale!r}", "one * in both arms for ranks")
        if "best-on-validation" in (self.at, self.against_at) and self.metric == VALIDATION:
            self._refuse(
                f"looks at {VALIDATION} where {VALIDATION} is best, which is luck in part",
                "a metric of other held-out prompts: 'eval/TASK?skip_test=N/pass@1', with TASK?skip_test=N in evaluation.panel",
            )
        return self

    def _refuse(self, found: str, expected: str) -> None:
        raise KeelError(f"Prediction {self.says!r} {found}. Expected {expected}.")

    @property
    def logged(self) -> str:
        """The metric's name as a run writes it: a panel task's options are written with dashes."""
        family, _, rest = self.metric.partition("/")
        panel, _, leaf = rest.rpartition("/")
        return f"{family}/{panel_name(panel)}/{leaf}" if family == "eval" and panel else self.metric

    def reference(self, arms: list[str]) -> str:
        """The arm that it is compared with; "" where it is its own start or a number."""
        if self.against_value is not None or (self.against == START and START not in arms):
            return ""
        return self.against or arms[0]

    def families(self, arms: Iterable[str]) -> list[tuple[str, str]]:
        """The arms that are ranked, each with its counterpart."""
        (begin, end), names = self.arm.split(STAR), list(arms)
        found = [name for name in names if name.startswith(begin) and name.endswith(end) and len(name) > len(begin) + len(end)]
        other = [self.against.replace(STAR, name[len(begin) : len(name) - len(end)]) for name in found]
        return [(mine, theirs) for mine, theirs in zip(found, other, strict=True) if theirs in names]

    def check(self, arms: Mapping[str, RunConfig]) -> None:
        """See that it speaks of arms that there are, and of what they will log.

        Raises:
            KeelError: of another arm, of an arm against itself, or of a metric that it will not log.
        """
        names = list(arms)
        if self.scale == "ranks":
            self._check_families(arms)
            return
        both = self.arm, self.reference(names)
        for name in filter(None, both):
            if name not in names:
                near = nearest(name, names).strip()
                self._refuse(f"names an arm {name!r}{f' ({near})' if near else ''}", f"one of: {', '.join(map(repr, names))}")
            self._check_logged(arms[name].evaluation)
        if both[0] == both[1] and self.against_at in (None, self.at):
            self._refuse(f"compares {self.arm!r} with itself", "another arm, against = 'start' or an against_value")

    def _check_families(self, arms: Mapping[str, RunConfig]) -> None:
        found = self.families(arms)
        if len(found) < FEWEST_RANKED or self.arm == self.against:
            told = ", ".join(f"{mine!r} and {theirs!r}" for mine, theirs in found) or "none"
            self._refuse(f"ranks these pairs of arms: {told}", f"at least {FEWEST_RANKED}, of two families")
        for name in {each for pair in found for each in pair}:
            self._check_logged(arms[name].evaluation)

    def _check_logged(self, evaluation: EvaluationSettings) -> None:
        metric(self.logged)
        family, _, rest = self.logged.partition("/")
        panel, _, leaf = rest.rpartition("/")
        kind, _, k = leaf.partition("@")
        panels = [panel_name(task) for task in evaluation.panel]
        if family == "eval" and panel and panel not in ("sampler", *panels):
            self._refuse(f"looks at {self.metric!r}", f"a task in evaluation.panel, which has: {', '.join(panels) or 'none'}")
        if family == "eval" and kind == "pass" and k.isdigit() and int(k) not in (1, *evaluation.ks):
            self._refuse(f"looks at {self.metric!r}", f"a k in evaluation.ks, which is {list(evaluation.ks)}")
