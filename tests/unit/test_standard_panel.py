"""The standard panel: who is asked what, how much of it, and when."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

import keel.held_out
import keel.parts
from keel.cli import main
from keel.errors import KeelError
from keel.evaluate import standard
from keel.evaluate.standard import OF_CHARACTERS, OF_WORDS, standard_of, standard_panel
from keel.held_out import before_training
from keel.models.characters import VOCABULARY, character_tokenizer
from keel.models.load import load_policy
from keel.rollout.engine import Seed
from keel.rollout.local import LocalEngine
from keel.run import train
from keel.run_folder import RunFolder
from keel.types import Sampling

SAMPLING, SEED = Sampling(max_completion_tokens=8), Seed(0, 0)


@dataclass
class Listening:
    """The local engine, and what it was asked."""

    engine: LocalEngine
    asked: list = field(default_factory=list)

    def generate(self, prompts, sampling, seed, group_size):
        self.asked.append((len(prompts), group_size, sampling.max_completion_tokens))
        return self.engine.generate(prompts, sampling, seed, group_size)

    def __getattr__(self, name):
        return getattr(self.engine, name)


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny-dense")


def test_every_skill_is_asked_but_those_that_are_evaluated_anyhow(policy):
    engine = Listening(LocalEngine(policy))
    told = standard_panel(engine, policy, ["arithmetic:medium?train_size=9", "skills:sort"], SAMPLING, 64, SEED)
    assert list(told) == [name for name in OF_CHARACTERS.tasks if name not in ("arithmetic:medium", "skills:sort")]
    assert all(prompts * samples >= 64 > prompts * (samples - 1) and cap == 8 for prompts, samples, cap in engine.asked)
    assert engine.asked[0][:2] == (32, 2)  # of easy sums no more are held out: each is asked more often
    assert told == standard_panel(engine, policy, ["arithmetic:medium", "skills:sort"], SAMPLING, 64, SEED)


def test_it_asks_for_no_more_than_it_may_cost(policy):
    engine = Listening(LocalEngine(policy))
    standard_panel(engine, policy, OF_CHARACTERS.tasks[:-1], Sampling(max_completion_tokens=200), 10**6, SEED)
    assert engine.asked == [(256, 2, OF_CHARACTERS.max_completion_tokens)]


def test_a_model_of_words_is_asked_in_words():
    assert standard_of(SimpleNamespace(get_vocab=lambda: {"a": 0})) is OF_WORDS
    assert standard_of(character_tokenizer()) is OF_CHARACTERS and len(VOCABULARY) == 64


def test_what_the_model_cannot_read_is_not_asked(policy, monkeypatch):
    own = policy.template

    class Deaf:
        def render(self, prompt, tokenizer):
            if not prompt.text.startswith("M:"):
                raise KeelError("a character has no token")
            return own.render(prompt, tokenizer)

    engine = LocalEngine(policy)
    monkeypatch.setattr(policy, "template", Deaf())
    assert list(standard_panel(engine, policy, [], SAMPLING, 4, SEED)) == ["skills:max"]
    monkeypatch.setattr(type(policy), "context", 9)
    assert standard_panel(engine, policy, [], SAMPLING, 4, SEED) == {}


def small(tmp_path, **changes):
    evaluation = {"prompts": 4, "samples": 1, "every": 1} | changes
    return train(
        "solid", model="tiny-dense", task="arithmetic:easy", steps=2, out=str(tmp_path / "run"), quiet=True, evaluation=evaluation,
        train={"prompts_per_step": 2, "group_size": 2}, sampling={"max_completion_tokens": 8},
    )  # fmt: skip


def test_a_run_asks_it_before_and_after(tmp_path, capsys):
    run = small(tmp_path)
    run.report()
    told = capsys.readouterr().out
    assert "other skills, pass@1" in told and f"page     keel report {run.folder.path}" in told
    assert ["eval/skills:sort/pass@1" in row for row in run.folder.rows()] == [True, False, True]
    panel = run.summary["eval"]["panel"]
    assert list(panel) == list(OF_CHARACTERS.tasks[1:]) and all({"change", "low", "high"} <= set(ends) for ends in panel.values())
    first = run.folder.rows()[0]
    assert before_training(run.folder, run.folder.config, first) == first  # as it was recorded
    fewer = before_training(run.folder, run.folder.config.replaced({"evaluation.prompts": 2}), first)
    assert fewer["eval/skills:sort/pass@1"] in (0.0, 0.5, 1.0) and "step" not in fewer  # measured anew


def test_it_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(standard, "standard_panel", lambda *_: pytest.fail("asked all the same"))
    run = small(tmp_path, standard_panel=False)
    assert run.summary["eval"]["panel"] == {}


def test_keel_eval_compares_with_the_model_before_training(tmp_path, monkeypatch, capsys):
    made, assemble = [], keel.held_out.assemble
    place = str(small(tmp_path, every=0).folder.path)
    for module in (keel.held_out, keel.parts):
        monkeypatch.setattr(module, "assemble", lambda *given: made.append(given) or assemble(*given))
    assert main(["eval", place, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    first, *_, last = RunFolder.open(place).rows()
    assert told["panel"]["arithmetic:easy"]["before"] == first["eval/pass@1"]
    assert told["panel"]["skills:max"]["after"] == told["eval/skills:max/pass@1"] == last["eval/skills:max/pass@1"]
    assert len(made) == 1  # the start stands in the run's folder: it is not evaluated again
    assert main(["eval", place, "--evaluation.prompts", "2"]) == 0 and len(made) == 3
    assert "change (95 %)" in capsys.readouterr().out
    assert main(["eval", place, "--evaluation.prompts", "2", "--alone"]) == 0 and len(made) == 4
    assert "change" not in capsys.readouterr().out
