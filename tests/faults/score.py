"""How well the doctor does on the held-out table: python tests/faults/score.py [FAULT ...] > score.jsonl

One line a fault or healthy setting: verdicts, components, whether the part and the component were named, and seconds. A system that
refuses to be put together is told as "refused".
"""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import nullcontext

import torch
from held_out import HEALTHY, HELD_OUT
from seeded import planted

from keel.config import load_config
from keel.doctor.probes import PROBES, ask
from keel.doctor.subject import Subject
from keel.doctor.verdict import weigh
from keel.errors import KeelError

SMALL = {"task": "arithmetic:medium?train_size=600&test_size=200"}


def diagnosis_of(settings):
    settings = SMALL | settings
    subject = Subject.of(load_config(settings.pop("recipe", "solid"), settings))
    try:
        return weigh(ask(subject, tuple(PROBES)))
    finally:
        subject.close()


def score(name):
    """What the doctor says of a fault (or a healthy setting), and whether that is right."""
    fault, begin = HELD_OUT.get(name), time.process_time()
    plant = nullcontext(HEALTHY.get(name, {})) if fault is None else planted(name, table=HELD_OUT)
    try:
        with plant as settings:
            found = diagnosis_of(dict(settings))
    except KeelError as refusal:
        return {"fault": name, "refused": str(refusal)}
    named = [finding.fault.component.lower() for finding in found.findings]
    wanted = ((), "") if fault is None else ((fault.part,), fault.component.lower())
    return {
        "fault": name,
        "expected": wanted,
        "verdicts": found.verdicts,
        "components": named,
        "verdict_right": found.verdicts == wanted[0],
        "component_named": fault is None or any(re.search(wanted[1], each) for each in named),
        "says": [finding.says for finding in found.findings],
        "cpu_s": round(time.process_time() - begin, 1),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [*HELD_OUT, *HEALTHY]:
        try:
            told = score(name)
        except Exception as fault:  # a doctor that falls over is a miss, and the next one is asked all the same
            told = {"fault": name, "crashed": f"{type(fault).__name__}: {fault}"}
        print(json.dumps(told), flush=True)
