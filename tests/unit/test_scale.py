"""The simulator against sums that can be done by hand, and what more workers can and cannot do."""

import importlib.util
from pathlib import Path

import pytest
import torch

from keel.scale.simulate import RAY_WORKER, Costs, Plan, simulate
from keel.scale.traffic import TOKEN_BYTES, broadcast_s, traffic

COSTS = Costs(part_s=0.01, round_s=0.002, token_s=1e-5, load_s=0.02, hand_s=1e-4, step_s=0.03, train_s=2e-5)
ALIKE = [[40] * 8]  # every completion has 40 tokens


def test_in_turn_a_step_is_the_sum_of_its_parts():
    told = simulate(Plan(prompts=32, group_size=8), COSTS, ALIKE)
    sampling = 0.01 + 40 * 0.002 + 256 * 40 * 1e-5 + 256 * 1e-4 / 2
    training = 0.03 + 256 * 40 * 2e-5 + 256 * 1e-4 / 2
    assert told.step_s == pytest.approx(0.02 + sampling + training)
    assert told.sampling == pytest.approx(sampling / told.step_s) and told.waiting == pytest.approx(1 - training / told.step_s)
    assert told.staleness == 0


def test_ahead_a_step_is_the_slower_of_the_two():
    sampling, training = 0.02 + 0.01 + 40 * 0.002 + 256 * 40 * 1e-5 + 256 * 5e-5, 0.03 + 256 * 40 * 2e-5 + 256 * 5e-5
    told = simulate(Plan(32, 8, bound=2), COSTS, ALIKE)
    assert told.step_s == pytest.approx(max(sampling, training), rel=0.01) and told.bottleneck == "training"
    slow = Costs(**{**vars(COSTS), "token_s": 1e-4})
    assert simulate(Plan(32, 8, bound=2), slow, ALIKE).bottleneck == "rollout"


def test_several_updates_of_a_batch_share_its_sampling():
    one, two = (simulate(Plan(32 // u, 8, updates=u, bound=u - 1), COSTS, ALIKE) for u in (1, 2))
    assert two.step_s * 2 - one.step_s == pytest.approx(COSTS.step_s)


def test_workers_and_trainers_divide_tokens_but_not_the_longest_completion():
    long = [[40] * 7 + [400]]
    steps = [simulate(Plan(32, 8, workers=w, trainers=w), COSTS, long).step_s for w in (1, 2, 32)]
    assert steps[0] > steps[1] > steps[2] > 400 * COSTS.round_s


def test_a_crowd_slows_whoever_is_at_work():
    alone, crowd = (simulate(Plan(32, 8, bound=2, cores=(float(cores),)), COSTS, ALIKE).step_s for cores in (2, 1))
    turn = simulate(Plan(32, 8, cores=(1.0,)), COSTS, ALIKE).step_s
    assert alone < crowd and crowd == pytest.approx(turn, rel=0.02)  # two that share one core gain nothing from each other
    assert simulate(Plan(32, 8, cores=(0.5,)), COSTS, ALIKE).step_s == pytest.approx(2 * turn)  # others take half of it


def test_idle_cores_are_free():
    """Even to a nice worker: it gives way where somebody else wants the core, and nowhere else."""
    apart, nice = (
        simulate(Plan(32, 8, bound=2, cores=cores, worker_weight=weight), COSTS, ALIKE).step_s
        for cores, weight in [((float("inf"),), 1.0), ((1.0, 2.0), RAY_WORKER)]
    )
    assert nice == pytest.approx(apart)
    busy = simulate(Plan(32, 8, bound=2, cores=(1.0,), worker_weight=RAY_WORKER), COSTS, ALIKE).step_s
    assert busy == pytest.approx(simulate(Plan(32, 8, cores=(1.0,)), COSTS, ALIKE).step_s, rel=0.02)  # work is work


def test_what_is_measured_computes_with_one_thread_in_every_process():
    """A second one only waits for the first, and what it waits would count as work that a crowd makes longer."""
    spec = importlib.util.spec_from_file_location("scale", Path(__file__).parents[2] / "benchmarks" / "scale.py")
    spec.loader.exec_module(scale := importlib.util.module_from_spec(spec))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        scale.Training(scale.config_of(1)).trainer.close()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_shares_of_cores():
    two = Plan(1, 1, cores=(1.0, 1.5, 2.0), crowding=1.25)
    assert [sum(two.shares([1.0] * busy)) for busy in (1, 2, 3, 4)] == pytest.approx([1, 1.2, 1.6, 1.6])
    assert Plan(1, 1, cores=(2.0,)).shares([1.0, RAY_WORKER, RAY_WORKER]) == pytest.approx([1.0, 0.5, 0.5])  # workers give way
    assert Plan(1, 1).shares([1.0] * 1000) == [1.0] * 1000


def test_bytes_of_a_step():
    moved = traffic(1e9, 1e6, machines=10, trainers=4, updates=2)
    assert moved.weights == 1e9 and moved.weights_in == 1e10 and moved.rollouts == TOKEN_BYTES * 1e6 and moved.gradients == 6e9
    assert traffic(1e9, 1e6, 1, trainers=1).gradients == 0
    assert [broadcast_s(50.0, n, 50.0) for n in (0, 1, 2, 3, 4, 7, 8)] == [0, 1, 2, 2, 3, 3, 4]
