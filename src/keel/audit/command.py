"""`keel audit`: which audit was asked for, done, printed, and judged by its exit code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from keel.audit import words
from keel.audit.bare import BareLoss, branches, faults_of, find_function
from keel.audit.certificate import certify, judge
from keel.audit.identify import identify
from keel.audit.side_by_side import compare
from keel.audit.whole import audit_everything
from keel.errors import KeelError, nearest
from keel.exact.expectation import Loss
from keel.exact.world import Setting
from keel.objectives.estimators import ESTIMATORS, KL, SILENT
from keel.objectives.recipes import RECIPES
from keel.objectives.registry import Recipe, recipe

NO_PEERS = (
    "None of trl, verl and openrlhf is installed, so there is nothing to compare with. Install what you use (for TRL: the extra "
    "`peers`), and ask again."
)


def run(options: argparse.Namespace) -> int:
    """Do what was asked for.

    Returns:
        0, or 1 when a claim does not hold or a loss cannot be audited.
    """
    knobs = knobs_of(options.world)
    if not options.model:
        torch.set_num_threads(1)  # the tensors are small: a second thread only waits
    if options.translate:
        return _translate(*options.translate, as_json=options.json)
    if options.peers:
        return _peers(as_json=options.json)
    if options.model:
        return _on_a_model(options)
    if options.compare:
        return _compare(*options.compare, knobs, as_json=options.json)
    if options.objective:
        return _one(options.objective, knobs, options.seed, as_json=options.json)
    return _everything(knobs, options)


def knobs_of(pairs: Sequence[str]) -> dict[str, Any]:
    """["drift=0.3", "group_size=4"] → {"drift": 0.3, "group_size": 4}, checked."""
    from keel.settings import parse_value

    broken = [pair for pair in pairs if "=" not in pair]
    if broken:
        raise KeelError(f"--world {broken[0]}: expected knob=value, for instance --world drift=0.3 group_size=4.")
    knobs = {name.replace("-", "_"): parse_value(value) for name, _, value in (pair.partition("=") for pair in pairs)}
    Setting.of(knobs)
    return knobs


def find(name: str) -> Recipe | BareLoss:
    """What is audited under that name: a recipe, an estimator, or a function "package.module:name".

    Raises:
        KeelError: nothing has that name; a function that cannot be audited, with every reason.
    """
    plain = name.replace("-", "_")
    if plain in ESTIMATORS and plain not in RECIPES:
        return ESTIMATORS[plain]
    if ":" not in name and plain not in RECIPES:
        known = [*RECIPES, *ESTIMATORS]
        raise KeelError(
            f"Nothing to audit is named {name!r}; {nearest(plain, known)}Expected a recipe ({', '.join(RECIPES)}), an estimator "
            f"({', '.join(ESTIMATORS)}), or package.module:function for a loss of your own."
        )
    if ":" not in name:
        return recipe(plain)
    held = find_function(name)
    if isinstance(held, Recipe):
        return held
    faults = faults_of(held)
    if faults:
        raise KeelError(f"{name} cannot be audited. " + " ".join(faults))
    return BareLoss(held)


def _everything(knobs: Mapping[str, Any], options: argparse.Namespace) -> int:
    audit = audit_everything(knobs, options.seed)
    if options.json:
        print(json.dumps({"certificates": audit.as_json()}, ensure_ascii=False))
    else:
        print(words.claims_markdown(audit) if options.markdown else words.audit_text(audit), end="" if options.markdown else "\n")
    return 0 if audit.holds else 1


def _one(name: str, knobs: Mapping[str, Any], seed: int, as_json: bool) -> int:
    subject = find(name)
    loss, live_only, conditions = _subject(subject, knobs)
    certificates = _certificates(name, subject, knobs, seed)
    if as_json:
        print(json.dumps({"certificates": [c.as_json() for c in certificates]}, ensure_ascii=False))
    else:
        title = (
            subject.title
            if isinstance(subject, Recipe)
            else f"{name}: rewards less their leave-one-out mean, summed over a constant"
        )
        print(words.one_text(title, certificates, identify(loss, conditions, seed, live_only)))
    return 0 if all(c.holds for c in certificates) else 1


def _subject(subject: Recipe | BareLoss, knobs: Mapping[str, Any]) -> tuple[Loss, bool, dict[str, Any]]:
    """The loss, whether dead groups are drawn again, and the conditions under which it is identified."""
    if isinstance(subject, BareLoss):
        return subject, False, {**({"group_size": 2} if branches(subject.function) else {}), **knobs}
    return subject.objective, subject.dynamic_sampling, {**(SILENT if subject in KL else {}), **knobs}


def _certificates(name: str, subject: Recipe | BareLoss, knobs: Mapping[str, Any], seed: int) -> list:
    if isinstance(subject, Recipe):
        return certify(subject, knobs, seed)
    return [judge(name, subject, claim, knobs, seed) for claim in getattr(subject.function, "claims", ())]


def _compare(a: str, b: str, knobs: Mapping[str, Any], as_json: bool) -> int:
    subjects = [find(name) for name in (a, b)]
    silent = SILENT if all(subject in KL for subject in subjects) else {}
    losses = [subject if isinstance(subject, BareLoss) else subject.objective for subject in subjects]
    rows = compare(*losses, {**silent, **knobs})
    if as_json:
        print(json.dumps({"comparison": [{"world": place, **vars(found)} for place, found in rows]}).replace("NaN", "null"))
        return 0
    for name, subject in zip((a, b), subjects, strict=True):
        loss, live_only, conditions = _subject(subject, knobs)
        print(f"{name} follows: {identify(loss, conditions, live_only=live_only).text()}")
    print("", words.compared_text(a, b, rows), sep="\n")
    return 0


def _translate(framework: str, path: str, as_json: bool) -> int:
    from keel.audit.translate import translate

    found = translate(framework, path)
    print(json.dumps(found.as_json(), ensure_ascii=False) if as_json else found.text())
    return 0


def _peers(as_json: bool) -> int:
    from keel.audit.conformance import conformance_table

    rows = conformance_table()
    if as_json:
        print(json.dumps({"conformance": [row.as_json() for row in rows]}, ensure_ascii=False))
    else:
        print(*(row.text() for row in rows), sep="\n") if rows else print(NO_PEERS)
    return 0


def _on_a_model(options: argparse.Namespace) -> int:
    from keel.audit.montecarlo import audit_model
    from keel.progress import display

    subjects = {name: find(name) for name in options.compare or [options.objective or "solid"]}
    objectives = {name: held if isinstance(held, BareLoss) else held.objective for name, held in subjects.items()}
    found = audit_model(
        list(objectives), options.model, options.task, options.samples, options.group_size, options.seed,
        objectives=objectives, drift=options.drift, stale_steps=options.stale_steps, display=display(sys.stderr, options.samples),
    )  # fmt: skip
    print(json.dumps(found.as_json(), ensure_ascii=False) if options.json else found.text())
    return 0
