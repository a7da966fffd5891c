"""Captured decoding steps, where there is no card: a tape stands in for a CUDA graph, and has the rules of one.

It notes the operations of one call and does them again on the same memory. What the step read from Python when it was recorded
stays as it was; so a step that needs a number that changes, or decides by a value, goes wrong here as it would there.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from keel.models.decoder import mixture
from keel.rollout import local, serving
from keel.rollout.capture import Captured, padded_columns, padded_rows
from keel.rollout.engine import Seed
from keel.rollout.local import LocalEngine
from keel.rollout.numerics import Numerics
from keel.rollout.serving import every_expert
from keel.types import Prompt, Sampling

DECIDES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DECIDES & set(function.tags):
            raise RuntimeError(f"{function} decides by a value, which no graph can")
        out = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, out))
        return out

    def play(self):
        """Everything again; tensors that were made on the way are made anew."""
        made = {}

        def now(given):
            return tree_map_only(torch.Tensor, lambda t: made.get(id(t), t), given)

        for function, args, kwargs, out in self.done:
            again = function(*now(args), **now(kwargs))
            made |= {id(old): new for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True)}
        return now


class Recorder:
    """Records as `cuda_graphs` does, and counts."""

    def __init__(self):
        self.recorded = self.launched = 0

    def __call__(self, step):
        self.recorded += 1
        with Tape() as tape:
            answer = step()
        for leaf in tree_leaves(answer):
            if leaf is not None:
                leaf.zero_()  # recording is not running

        def launch():
            self.launched += 1
            now = tape.play()
            for leaf in tree_leaves(answer):
                if leaf is not None:
                    leaf.copy_(now(leaf))

        return launch, answer


def captured(policy, monkeypatch, **given):
    recorder = Recorder()
    monkeypatch.setattr(local, "cuda_graphs", lambda: recorder)
    engine = LocalEngine(policy, **given)
    engine.captures = True
    engine.take(policy.weights(), 0)
    return engine, recorder


PROMPTS = [Prompt(f"p{n}", "", "", tuple(range(4, 6 + n))) for n in range(5)]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("group_size", [1, 12])
@pytest.mark.parametrize("sampling", [Sampling(max_completion_tokens=40), Sampling(max_completion_tokens=12, top_p=0.9)])
def test_captured_steps_sample_what_plain_ones_do(make_policy, monkeypatch, kind, group_size, sampling):
    """Rows end one by one and siblings part: rows move, shapes shrink, and graphs are used again and again."""
    policy = make_policy(kind)
    policy.end_ids = frozenset(range(1, 8))  # many ends: half of all rows end within some eight tokens
    engine, recorder = captured(policy, monkeypatch)
    plain, found = (e.generate(PROMPTS, sampling, Seed(3, 1), group_size) for e in (LocalEngine(policy), engine))
    assert recorder.recorded >= 1 and recorder.launched > 2 * recorder.recorded
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and one.finish == other.finish
        torch.testing.assert_close(other.logp_rollout, one.logp_rollout, rtol=0, atol=1e-5)
        if kind == "qwen3_moe":
            assert torch.equal(one.experts, other.experts) and torch.equal(one.prompt_experts, other.prompt_experts)


def test_other_number_formats_are_captured_too(make_policy, monkeypatch):
    policy, sampling = make_policy(), Sampling(max_completion_tokens=20)
    numerics = Numerics("bf16", head_format="fp32")
    engine, recorder = captured(policy, monkeypatch, numerics=numerics)
    plain, found = (e.generate(PROMPTS, sampling, Seed(0, 0), 4) for e in (LocalEngine(policy, numerics=numerics), engine))
    assert recorder.launched > 0
    same = [torch.equal(one.token_ids, other.token_ids) for one, other in zip(plain, found, strict=True)]
    assert sum(same) >= 0.9 * len(same)  # a bf16 sum over more columns may round to another last bit


def test_new_weights_make_new_graphs(make_policy, monkeypatch):
    policy, sampling = make_policy(), Sampling(max_completion_tokens=20)
    engine, recorder = captured(policy, monkeypatch)
    engine.generate(PROMPTS, sampling, Seed(0, 0), 4)
    before = recorder.recorded
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.mul_(1.5)
    engine.load(policy.weights(), 1)
    plain, found = (e.generate(PROMPTS, sampling, Seed(0, 1), 4) for e in (LocalEngine(policy), engine))
    assert recorder.recorded > before
    assert all(torch.equal(one.token_ids, other.token_ids) for one, other in zip(plain, found, strict=True))


def test_weights_that_come_between_tokens(make_policy, monkeypatch):
    """What was written is read anew into other memory; old graphs would read the old."""
    policy, sampling = make_policy(), Sampling(max_completion_tokens=20)

    def told(engine):
        asked = iter(range(100))
        engine.renew = lambda: next(asked) == 7 and engine.take({n: 1.5 * w for n, w in policy.weights().items()}, 1) != ""
        return engine.generate(PROMPTS, sampling, Seed(0, 0), 4)

    engine, _ = captured(policy, monkeypatch)
    old = weakref.ref(engine.forward)
    plain, found = told(LocalEngine(policy)), told(engine)
    assert old() is None  # weights, caches and graphs left when the new ones came
    assert any(1 in one.versions for one in plain)
    assert all(torch.equal(one.token_ids, other.token_ids) for one, other in zip(plain, found, strict=True))
    assert all(torch.equal(one.versions, other.versions) for one, other in zip(plain, found, strict=True))


def test_a_step_that_decides_by_a_value_cannot_be_recorded(make_policy, monkeypatch):
    """The tape is no friend: the plain mixture, which sorts tokens by expert, is refused."""
    engine, _ = captured(make_policy("qwen3_moe"), monkeypatch)
    monkeypatch.setattr(serving, "every_expert", mixture)
    with pytest.raises(RuntimeError, match="decides by a value"):
        engine.generate(PROMPTS, Sampling(max_completion_tokens=20), Seed(0, 0), 4)


def test_a_number_that_was_baked_in_shows(make_policy, monkeypatch):
    """Nor is this one: the column as a plain number gives other tokens."""
    policy, sampling = make_policy(), Sampling(max_completion_tokens=20)
    engine, _ = captured(policy, monkeypatch)
    step = engine.forward._step
    engine.forward._step = lambda rows, columns: step(rows, columns, int(engine.forward.column))
    plain, found = (e.generate(PROMPTS, sampling, Seed(0, 0), 4) for e in (LocalEngine(policy), engine))
    assert not all(torch.equal(one.token_ids, other.token_ids) for one, other in zip(plain, found, strict=True))


def test_a_shape_is_run_then_recorded_then_launched():
    ran, recorded = [], []

    def record(step):
        recorded.append(step)
        return lambda: ran.append("launched"), "answer"

    step, captured = lambda *shape: ran.append(shape) or shape, Captured(record)
    assert [captured(step, *shape) for shape in ((2, 3), (2, 3), (4, 3), (2, 3))] == [(2, 3), "answer", (4, 3), "answer"]
    assert ran == [(2, 3), "launched", (4, 3), "launched"] and len(recorded) == 1


def test_shapes_are_few():
    assert [padded_rows(n, 48) for n in (1, 2, 3, 17, 32, 33, 48)] == [1, 2, 4, 32, 32, 48, 48]
    assert [padded_columns(n, 600) for n in (1, 256, 257, 513, 600)] == [256, 256, 512, 600, 600]
    assert padded_columns(10, 40) == 40


def test_every_expert_is_the_mixture():
    """Where each token's experts are all that counts."""
    random = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(6, 10, 8, generator=random), torch.randn(6, 8, 5, generator=random)
    x, index = torch.randn(7, 8, generator=random), torch.rand(7, 6, generator=random).topk(2).indices
    weight = torch.rand(7, 2, generator=random)
    torch.testing.assert_close(every_expert(gate_up, down, x, weight, index), mixture(gate_up, down, x, weight, index))
