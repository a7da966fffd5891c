"""`keel doctor`: before a run the card, and after it triage; or single probes of either."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from keel.config import load_config
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check
from keel.doctor.pages import page
from keel.errors import KeelError
from keel.files import json_of
from keel.settings import nested

FAULT = re.compile(r"K\d{3}")


def run(source: str, overrides: dict[str, Any], *, probes: list[str], step: int | None, folder_only: bool, as_json: bool) -> int:
    """The command.

    Args:
        source: a configuration, as `keel train` takes it; a run folder; or the code of a fault.
        probes: to ask alone; all of the card's, or triage, where none is named.
        step: of a run: with the weights of this checkpoint.
        folder_only: of a run: read it, and ask the living system nothing.

    Returns:
        0 where nothing was found, 1 where something was. A mistake, or a system that cannot be put together, raises.
    """
    from keel.doctor.probes import PROBES

    if probes == ["list"]:
        print("\n".join(f"{name:<20} {(probe.__doc__ or '').strip().splitlines()[0]}" for name, probe in PROBES.items()))
        return 0
    if FAULT.fullmatch(source):
        print(page(fault(source)), end="")
        return 0
    folder = os.path.isdir(source)
    if folder and overrides:
        raise KeelError(
            f"keel doctor was given the run {source!r} with {', '.join(overrides)}. Its own settings hold; expected none."
        )
    if folder and not probes:
        return _triage(source, step, folder_only, as_json)
    return _examined(source, overrides, folder, probes, step, as_json)


def is_foreign(source: str) -> bool:
    """Whether it is a file or folder of metrics that no run or configuration of keel's own is."""
    if os.path.isdir(source):
        held = set(os.listdir(source))
        return bool(held) and not held & {"config.toml", "manifest.json", "metrics.jsonl"}
    return os.path.isfile(source) and not source.endswith(".toml")


def run_on_log(source: str, framework: str, overrides: dict[str, Any], *, as_json: bool) -> int:
    """The command on another framework's metrics.

    Args:
        framework: trl or verl; "" = by the names in the log.
        overrides: of the settings, `train.updates_per_batch` says what a log does not.

    Returns:
        0 where nothing was found, 1 where something was.
    """
    from keel.doctor.card import check_json
    from keel.doctor.foreign import checks, read
    from keel.doctor.words import told_of_log

    updates = nested(overrides).get("train", {}).get("updates_per_batch")
    log = read(source, framework)
    seen = checks(log, updates)
    if as_json:
        told = {"framework": log.framework, "rows": len(log.rows), "unmapped": log.unmapped, "missing": log.missing}
        print(json_of({"source": source, **told, "checks": [check_json(check) for check in seen]}))
    else:
        print(told_of_log(log, seen))
    return int(any(check.findings for check in seen))


def _examined(source: str, overrides: dict[str, Any], folder: bool, probes: list[str], step: int | None, as_json: bool) -> int:
    from keel.doctor.card import check_json, examine
    from keel.doctor.probes import ask
    from keel.doctor.subject import Subject
    from keel.doctor.words import check_words, told

    subject = Subject.of_run(source, step) if folder else Subject.of(load_config(source, overrides))
    try:
        if not probes:
            card = examine(subject, source, _show)
            print(json_of(card.as_json()) if as_json else told(card))
            return int(not card.diagnosis.healthy)
        checks = ask(subject, probes)
    finally:
        subject.close()
    print(
        json_of({"source": source, "checks": [check_json(c) for c in checks]}) if as_json else "\n".join(map(check_words, checks))
    )
    return int(any(check.findings for check in checks))


def _triage(source: str, step: int | None, folder_only: bool, as_json: bool) -> int:
    from keel.doctor.triage import triage
    from keel.doctor.words import told_of_run

    found = triage(source, step=step, folder_only=folder_only, see=_show)
    print(json_of(found.as_json()) if as_json else told_of_run(found))
    return int(not found.diagnosis.healthy)


def _show(check: Check) -> None:
    """Progress, for someone who waits at a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{check.name} {check.seconds:.1f} s", end="\r", file=sys.stderr, flush=True)
