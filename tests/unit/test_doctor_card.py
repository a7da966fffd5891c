"""The card and its command: what is printed, exit codes, JSON, single probes."""

import json

import pytest
import torch
from seeded import planted

from keel.cli import main
from keel.config import load_config
from keel.doctor.card import CONDITIONS, examine
from keel.doctor.subject import Subject
from keel.doctor.words import told

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"task": "arithmetic:medium?train_size=400&test_size=200", "train.threads": 1}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def subject():
    subject = Subject.of(load_config("grpo", SMALL))
    subject.before = {name: p.detach().clone() for name, p in subject.policy.model.named_parameters()}
    yield subject
    subject.close()


@pytest.fixture(scope="module")
def healthy(subject):
    return examine(subject, "grpo")


def test_a_healthy_card_names_every_condition(healthy):
    text = told(healthy)
    assert healthy.diagnosis.healthy and not healthy.broken and "Nothing is broken." in text
    assert all(title in text for title in CONDITIONS.values())
    assert {line.condition for line in healthy.lines} == {*CONDITIONS, "size"}
    assert all(line.why for line in healthy.lines)


def test_what_is_not_the_baseline_is_told_and_is_no_fault(healthy):
    (plain,) = (line for line in healthy.lines if line.condition == "plain")
    assert plain.state == "chosen" and "KL in the loss" in plain.value and "surrogate Clip" in plain.value


def test_a_card_is_json(healthy):
    card = json.loads(json.dumps(healthy.as_json()))
    assert card["healthy"] and card["verdicts"] == [] and len(card["checks"]) > 25 and not card["unknown"]


def test_weights_are_as_they_were(subject, healthy):
    for name, p in subject.policy.model.named_parameters():
        assert p.dtype == subject.before[name].dtype and torch.equal(subject.before[name], p)
    assert subject.trainer.step == 0 and not subject.trainer.optimizer.state


def test_a_broken_condition_is_named():
    with planted("grader finds the answer anywhere", "engine takes top_p from the model"):
        subject = Subject.of(load_config("solid", SMALL))
        card = examine(subject, "solid")
        subject.close()
    assert card.broken == ["reward", "engine"]
    text = told(card)
    assert "K463" in text and "K211" in text and "do:" in text and "Broken: 4 an accurate reward" in text


def test_exit_codes(capsys):
    assert main(["doctor", "solid", *FLAGS, "--probe", "gold", "--probe", "copies"]) == 0
    assert "gold" in capsys.readouterr().out
    with planted("grader is always 0"):
        assert main(["doctor", "solid", *FLAGS, "--probe", "gold", "--json"]) == 1
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert check["findings"] == ["K461"]
    assert main(["doctor", "solid", "--probe", "gould"]) == 2
    assert "gold" in capsys.readouterr().err
    assert main(["doctor", "no-such-thing"]) == 2


def test_the_list_of_probes(capsys):
    assert main(["doctor", "--probe", "list"]) == 0
    assert "sync" in capsys.readouterr().out


def test_probes_of_a_run_use_its_checkpoint(tmp_path, capsys):
    from keel import train

    few = {"evaluation.prompts": 8, "evaluation.standard_panel": False, "evaluation.samples": 1, "train.prompts_per_step": 4}
    run = train("solid", **SMALL | few, steps=2, out=str(tmp_path / "run"), quiet=True)
    records = [json.loads(line) for line in run.folder.health.read_text().splitlines()]
    assert records == [{"step": 1, "found": []}, {"step": 2, "found": []}]
    subject = Subject.of_run(run.folder.path)
    weights = run.policy.parameters()
    assert all(torch.equal(weights[name], p) for name, p in subject.policy.parameters().items())
    subject.close()
    assert main(["doctor", str(run.folder.path), "--probe", "gap", "--probe", "sync"]) == 0
    assert "engine and trainer" in capsys.readouterr().out
