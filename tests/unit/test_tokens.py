"""Single tokens of an update: their texts join to the completion, their numbers are those that the loss saw."""

from __future__ import annotations

import json
import math

import pytest
import torch

from keel.config import RecordSettings, RunConfig
from keel.files import read_jsonl
from keel.objectives.recipes import recipe
from keel.run_folder import RunFolder
from keel.training.batch import batch_from_groups
from keel.training.tokens import TokenTrace, groups_to_trace, token_texts, trace
from keel.types import Group, Prompt, Score


def groups(make_completion):
    told = []
    for n in range(3):
        name = f"p{n}"
        completions = (
            make_completion([4 + n, 5, 1], name),
            make_completion([6], name, 1),
            make_completion([], name, 2, finish="error"),
        )
        scores = Score(1.0, True), Score(0.0), Score(None, reason="the engine failed")
        told.append(Group(Prompt(name, "1+1?", "2", token_ids=(2, 3)), completions, scores))
    return told


def test_groups_are_spread_over_the_batch_on_the_beat():
    every_third = RecordSettings(tokens_every=3, tokens_groups=2)
    assert groups_to_trace(every_third, 0, 16) == {4, 12} and groups_to_trace(every_third, 3, 16) == {4, 12}
    assert groups_to_trace(every_third, 1, 16) == frozenset() == groups_to_trace(RecordSettings(tokens_every=0), 0, 16)
    assert groups_to_trace(RecordSettings(tokens_groups=9), 0, 3) == {0, 1, 2}


def test_a_trace_holds_what_the_loss_saw(make_completion, tokenizer):
    whole = batch_from_groups(groups(make_completion))
    whole = type(whole)(**{**vars(whole), "logp_old": torch.full_like(whole.logp_rollout, -1.5)})
    prepared = recipe("solid").objective.prepare(whole, 8)
    rows = torch.tensor([2, 3, 4, 5])  # the second update: groups 1 and 2
    logp, entropy = torch.full((4, 3), -1.25), torch.full((4, 3), 0.5)
    found = trace(tokenizer, groups(make_completion), frozenset({0, 2}), rows, whole.rows(rows), prepared.rows(rows), logp, entropy)
    assert [(each.prompt_id, each.sample) for each in found] == [("p2", 0), ("p2", 1)]
    first = found[0]
    assert "".join(first.texts) == tokenizer.decode([6, 5, 1])
    assert first.values["logp"] == (-1.25,) * 3 and first.values["logp_rollout"] == (-1.0,) * 3
    assert first.values["ratio"] == pytest.approx((math.exp(0.25),) * 3) and first.values["gap"] == (-0.5,) * 3
    assert first.values["advantage"] == tuple(prepared.advantage[4].tolist())
    assert len(found[1].texts) == 1 and found[1].values["advantage"][0] < 0 < first.values["advantage"][0]


def test_without_old_log_probabilities_the_update_is_on_policy(make_completion, tokenizer):
    whole = batch_from_groups(groups(make_completion))
    prepared = recipe("solid").objective.prepare(whole, 8)
    logp = torch.full((6, 3), -1.25)
    found = trace(tokenizer, groups(make_completion), frozenset({0}), torch.arange(6), whole, prepared, logp, -logp)
    assert found[0].values["ratio"] == (1.0,) * 3 and found[0].values["gap"] == (-0.25,) * 3


class Bytes:
    """A tokenizer whose tokens are bytes: characters outside ASCII need several."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["plain", "zwölf ⇒ 十二 🙂 end", "🙂"])
def test_tokens_within_a_character_join_to_it(text):
    ids = list(text.encode())
    parts = token_texts(Bytes(), ids)
    assert len(parts) == len(ids) and "".join(parts) == text


def test_a_torn_last_character_is_shown_as_torn():
    assert token_texts(Bytes(), list("aé".encode())[:2]) == ("a", "\ufffd")


def test_rows_are_short_and_the_file_does_not_grow_for_ever(tmp_path):
    one = TokenTrace("p", 1, ("a", "b"), {"logp": (-0.123456, -2.0), "ratio": (1.0, 1.0), "entropy": (math.nan, 0.5)})
    assert one.as_row() == {"prompt_id": "p", "sample": 1, "tokens": ["a", "b"], "logp": [-0.1235, -2.0], "ratio": 1.0} | {
        "entropy": pytest.approx([math.nan, 0.5], nan_ok=True)
    }
    folder = RunFolder.create(RunConfig(out=str(tmp_path / "run")), {})
    for step in range(1, 10):
        folder.add_tokens(step, [one.as_row()], most_bytes=300.0)
    told = list(read_jsonl(folder.tokens))
    assert [row["step"] for row in told] == [1, 2, 3] and told[0]["entropy"] == [None, 0.5]
    folder.cut_back(2)
    assert [json.loads(line)["step"] for line in folder.tokens.read_text().splitlines()] == [1, 2]
