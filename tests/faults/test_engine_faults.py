"""Each way in which an engine can break its contract, and the alarm that names it."""

from __future__ import annotations

import copy

import pytest
import torch

from keel.errors import KeelError
from keel.rollout.engine import Seed, check_arrival, check_completions, checksum
from keel.rollout.scripted import Fault, ScriptedEngine
from keel.types import Prompt, Sampling

PROMPTS = [Prompt("a", "1+1", "2", (4, 5)), Prompt("b", "2+2", "4", (6,))]
CAP4 = Sampling(max_completion_tokens=4)


def force(completion, **changes):
    """A copy with fields that its own constructor would refuse in a test."""
    twin = copy.copy(completion)
    for name, value in changes.items():
        object.__setattr__(twin, name, value)
    return twin


@pytest.fixture
def healthy(make_completion):
    return [make_completion([5, 6, 1], p.id, s) for p in PROMPTS for s in range(2)]


def check(rows, sampling=CAP4, **keywords):
    check_completions(PROMPTS, rows, 2, sampling, **(dict(end_ids={1, 2}, vocab_size=10, version=0) | keywords))


NAN, POSITIVE = torch.tensor([-1.0, torch.nan, -1.0]), torch.tensor([-1.0, -1.0, 0.01])
TOKEN_FAULTS = [
    ("id past the vocabulary", dict(token_ids=torch.tensor([5, 10, 1])), "has token id 10 at token 1; expected ids"),
    ("negative id", dict(token_ids=torch.tensor([-1, 5, 1])), "has token id -1 at token 0"),
    ("NaN log-probability", dict(logp_rollout=NAN), "has log-probability nan at token 1"),
    ("log-probability above zero", dict(logp_rollout=POSITIVE), "has log-probability 0.0099.* at token 2"),
    ("an infinite one", dict(logp_rollout=-1 / torch.zeros(3)), "has log-probability -inf at token 0"),
    ("too few log-probabilities", dict(logp_rollout=torch.zeros(2)), "has 3 tokens and 2 entries in logp_rollout"),
    ("too few versions", dict(versions=torch.zeros(1)), "has 3 tokens and 1 entries in versions"),
    ("stale weights", dict(versions=torch.tensor([0, 0, -1])), "was sampled by weights of version -1 at token 2"),
    ("goes on after its end", dict(token_ids=torch.tensor([5, 2, 1])), "samples on after end token 2 at token 1"),
    ("stop without an end token", dict(token_ids=torch.tensor([5, 6, 7])), "finished with 'stop' on token 7"),
    ("length on an end token", dict(finish="length"), "finished with 'length' on end token 1; expected 'stop'"),
    (
        "length below the cap",
        dict(finish="length", token_ids=torch.tensor([5, 6, 7])),
        "finished with 'length' after 3 tokens; expected max_completion_tokens = 4",
    ),
    ("nothing at all", {k: torch.zeros(0) for k in ("token_ids", "logp_rollout", "versions", "sampled")}, "is empty"),
    ("an error without a reason", dict(finish="error"), "finished with 'error' and does not say why"),
    ("another prompt's name", dict(prompt_id="b"), "stands at place 1; expected sample 1 of prompt 'a'"),
    ("a sample twice", dict(sample=0), "stands at place 1; expected sample 1 of prompt 'a'"),
]


def test_healthy_completions_raise_no_alarm(healthy):
    check(healthy)


@pytest.mark.parametrize(("changes", "says"), [f[1:] for f in TOKEN_FAULTS], ids=[f[0] for f in TOKEN_FAULTS])
def test_a_broken_completion_is_named(healthy, changes, says):
    rows = [healthy[0], force(healthy[1], **changes), *healthy[2:]]
    with pytest.raises(KeelError, match=f"Completion . of prompt '.' {says}"):
        check(rows)


def test_a_completion_past_the_cap_is_named(healthy):
    with pytest.raises(KeelError, match="has 3 tokens; expected at most max_completion_tokens = 2"):
        check(healthy, Sampling(max_completion_tokens=2))


def test_a_sampled_token_outside_its_kept_set_is_named(healthy):
    kept = torch.ones(3, 10, dtype=torch.bool)
    kept[1, 6] = False
    rows = [force(row, kept=kept) for row in healthy]
    with pytest.raises(KeelError, match="has a sampled token outside its own kept set"):
        check(rows, Sampling(top_p=0.9, max_completion_tokens=4))


@pytest.mark.parametrize("lost", [0, 3])
def test_a_missing_row_is_counted_and_its_prompt_named(healthy, lost):
    name = healthy[lost].prompt_id
    rows = healthy[:lost] + healthy[lost + 1 :]
    with pytest.raises(KeelError, match=f"returned 3 completions for 2 prompts × 2; prompt '{name}' has 1"):
        check(rows)


# ---- weights that did not arrive -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt2"])
def test_every_single_tensor_that_is_changed_is_named(make_policy, kind):
    policy = make_policy(kind, tie_word_embeddings=False)
    sent = policy.weights()
    for name in sent:
        arrived = dict(sent)
        arrived[name] = sent[name].clone()
        arrived[name].view(-1)[-1] += 1
        with pytest.raises(KeelError, match=f"version 3: tensor '{name}' arrived with other values"):
            check_arrival(sent, arrived, 3)


def test_missing_unexpected_and_reshaped_tensors_are_named(tiny_policy):
    sent = tiny_policy.weights()
    name = "model.norm.weight"
    without = {key: value for key, value in sent.items() if key != name}
    for found, says in [
        (without, "was sent but did not arrive"),
        (sent | {"extra": torch.ones(1)}, "'extra' is in the engine but was never sent"),
        (sent | {name: sent[name].bfloat16()}, "was sent as torch.float32 .* and arrived as torch.bfloat16"),
        (sent | {name: sent[name][:-1]}, r"was sent as .* \(32,\) and arrived as torch.float32 \(31,\)"),
    ]:
        with pytest.raises(KeelError, match=says):
            check_arrival(sent, found, 1)


# ---- faults of the scripted engine -----------------------------------------------------------------------------------


def scripted(policy, *faults, **keywords):
    return ScriptedEngine(policy, lambda prompt, sample: f"A:{prompt.id}{sample}", faults=faults, **keywords)


def run(engine, policy, step=0, temperature=1.0, version=0):
    sampling = Sampling(max_completion_tokens=8, temperature=temperature)
    rows = engine.generate(PROMPTS, sampling, Seed(0, step), 2)
    rows_of_head = policy.base.get_output_embeddings().weight.shape[0]
    check_completions(PROMPTS, rows, 2, sampling, end_ids=policy.end_ids, vocab_size=rows_of_head, version=version)
    return rows


def test_raise_raises_at_its_step_only(tiny_policy):
    engine = scripted(tiny_policy, Fault("raise", step=2))
    run(engine, tiny_policy, step=1)
    with pytest.raises(RuntimeError, match="fails at step 2"):
        run(engine, tiny_policy, step=2)


def test_drop_and_stale_ring_the_contract(tiny_policy):
    with pytest.raises(KeelError, match="returned 3 completions"):
        run(scripted(tiny_policy, Fault("drop", place=2)), tiny_policy)
    with pytest.raises(KeelError, match="Completion 1 of prompt 'b' was sampled by weights of version -1"):
        run(scripted(tiny_policy, Fault("stale", place=3)), tiny_policy)


def test_error_is_data_and_no_alarm(tiny_policy):
    rows = run(scripted(tiny_policy, Fault("error", place=1)), tiny_policy)
    assert [row.finish for row in rows] == ["stop", "error", "stop", "stop"]


def test_swapped_answers_keep_the_contract_and_fail_the_echo(tiny_policy):
    echo = [row.text == f"A:{row.prompt_id}{row.sample}" for row in run(scripted(tiny_policy), tiny_policy)]
    assert echo == [True] * 4
    rows = run(scripted(tiny_policy, Fault("swap", place=1)), tiny_policy)
    assert [row.text == f"A:{row.prompt_id}{row.sample}" for row in rows] == [True, False, False, True]


def test_raw_log_probabilities_differ_only_where_temperature_is_not_one(tiny_policy):
    faulty = scripted(tiny_policy, Fault("raw_logp", place=0))
    for temperature, differs in [(1.0, False), (0.5, True)]:
        right = run(scripted(tiny_policy), tiny_policy, temperature=temperature)
        wrong = run(faulty, tiny_policy, temperature=temperature)
        gaps = [float((a.logp_rollout - b.logp_rollout).abs().max()) for a, b in zip(right, wrong, strict=True)]
        assert (gaps[0] > 1e-4) == differs and gaps[1:] == [0.0] * 3


def test_a_lost_tensor_shows_in_the_checksum(tiny_policy):
    engine = scripted(tiny_policy, Fault("lose_tensor", step=2, tensor="model.norm.weight"))
    assert engine.load(tiny_policy.weights(), 1) == checksum(tiny_policy.weights())
    assert engine.load(tiny_policy.weights(), 2) != checksum(tiny_policy.weights())


def test_an_unknown_fault_names_the_nearest():
    with pytest.raises(KeelError, match="did you mean 'raise'"):
        Fault("rise")
