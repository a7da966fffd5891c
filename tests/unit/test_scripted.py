"""ScriptedEngine says what it is told, and otherwise is an engine like any other."""

from __future__ import annotations

import pytest
import torch

from keel.errors import KeelError
from keel.rollout.engine import Engine, Seed, check_completions, checksum
from keel.rollout.scripted import ScriptedEngine
from keel.types import Prompt, Sampling

PROMPTS = [Prompt("a", "1+1=", "2", (20, 21, 22)), Prompt("b", "2+2=", "4", (23, 24))]


def generate(engine, policy, group_size=2, **sampling):
    sampling = Sampling(**(dict(max_completion_tokens=6) | sampling))
    rows = engine.generate(PROMPTS, sampling, Seed(0, 0), group_size)
    head = policy.base.get_output_embeddings().weight.shape[0]
    rules = dict(end_ids=policy.end_ids, vocab_size=head, version=engine.version)
    check_completions(PROMPTS, rows, group_size, sampling, **rules)
    return rows


def test_it_is_an_engine(tiny_policy):
    assert isinstance(ScriptedEngine(tiny_policy, {}), Engine)


def test_samples_take_the_scripts_answers_in_turn(tiny_policy):
    engine = ScriptedEngine(tiny_policy, {"a": ["A:2", "A:3"], "b": "A:4"})
    assert [row.text for row in generate(engine, tiny_policy, 3)] == ["A:2", "A:3", "A:2", "A:4", "A:4", "A:4"]


def test_a_function_sees_prompt_and_sample(tiny_policy):
    engine = ScriptedEngine(tiny_policy, lambda prompt, sample: prompt.answer if sample else "?")
    assert [row.text for row in generate(engine, tiny_policy)] == ["?", "2", "?", "4"]


def test_the_end_token_is_sampled_and_a_cap_cuts(tiny_policy):
    engine = ScriptedEngine(tiny_policy, {"a": "A:2", "b": "1+2+3+4"})
    short, long = generate(engine, tiny_policy, 1)
    assert (short.finish, short.token_ids[-1].item(), len(short.token_ids)) == ("stop", 1, 4)
    assert (long.finish, long.text, len(long.token_ids)) == ("length", "1+2+3+", 6)


def test_token_ids_are_taken_as_they_are(tiny_policy):
    engine = ScriptedEngine(tiny_policy, {"a": [7, 0, 1], "b": [[8, 1], [9, 1]]})  # 0 is the pad token, sampled
    assert [row.token_ids.tolist() for row in generate(engine, tiny_policy)] == [[7, 0, 1], [7, 0, 1], [8, 1], [9, 1]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_policys_at_the_sampling_temperature(tiny_policy, temperature):
    engine = ScriptedEngine(tiny_policy, {"a": ["A:2", "12+3"], "b": "9"})
    prompts = {prompt.id: prompt.token_ids for prompt in PROMPTS}
    for row in generate(engine, tiny_policy, temperature=temperature):
        ids = torch.tensor([[*prompts[row.prompt_id], *row.token_ids.tolist()]])
        with torch.no_grad():
            logits = tiny_policy.model(input_ids=ids).logits[0]
        start = len(prompts[row.prompt_id])
        expected = (logits / temperature).log_softmax(-1)[start - 1 : -1].gather(1, row.token_ids[:, None])[:, 0]
        torch.testing.assert_close(row.logp_rollout, expected, rtol=0, atol=1e-5)


def test_a_constant_needs_no_forward_pass(tiny_policy):
    engine = ScriptedEngine(tiny_policy, lambda prompt, sample: "7", logp=-0.5)
    assert [row.logp_rollout.tolist() for row in generate(engine, tiny_policy, 1)] == [[-0.5, -0.5]] * 2


def test_greedy_has_all_its_mass_on_what_was_said(tiny_policy):
    engine = ScriptedEngine(tiny_policy, lambda prompt, sample: "7")
    assert [row.logp_rollout.tolist() for row in generate(engine, tiny_policy, 1, temperature=0.0)] == [[0.0, 0.0]] * 2


def test_loading_moves_the_version_and_proves_itself(tiny_policy, make_policy):
    engine = ScriptedEngine(tiny_policy, lambda prompt, sample: "7")
    assert engine.load(tiny_policy.weights(), 5) == checksum(tiny_policy.weights())
    assert generate(engine, tiny_policy)[0].versions.tolist() == [5, 5]
    with pytest.raises(KeelError, match="arrived with other values"):
        engine.load(make_policy(seed=1).weights(), 6)
    assert engine.version == 5


def test_a_missing_entry_names_the_nearest(tiny_policy):
    with pytest.raises(KeelError, match="nothing for prompt 'a': did you mean 'a1'"):
        generate(ScriptedEngine(tiny_policy, {"a1": "x"}), tiny_policy)


def test_truncated_sampling_is_refused(tiny_policy):
    with pytest.raises(KeelError, match="cannot stand for truncated sampling"):
        generate(ScriptedEngine(tiny_policy, lambda prompt, sample: "7"), tiny_policy, top_p=0.9)


def test_it_describes_itself(tiny_policy):
    assert ScriptedEngine(tiny_policy, {}, logp=-1.0).describe() == {
        "engine": "scripted",
        "logp": -1.0,
        "faults": [],
        "generation_config": "ignored",
    }
