"""What a step takes on one, two and three processes of this machine: predicted from measured costs, and measured.

    python benchmarks/scale.py                         # measures, predicts, writes benchmarks/scale.json
    python benchmarks/scale.py --plan                  # 1,000 GPUs on paper

Costs and outcomes are measured in turn within one script, again and again: the machine may have other work, and its speed changes.
Costs are seconds of a core, so that other work does not count, from processes of their own with other batch sizes than the runs
that are predicted; what other work takes away shows in how far three busy processes get. Outcomes are means of seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from keel.config import RunConfig
from keel.scale.simulate import RAY_WORKER, Costs, Forecast, Plan, simulate
from keel.scale.traffic import broadcast_s, traffic

HERE = Path(__file__).parent
PROMPTS, GROUP = 16, 8
WARM, TIMED = 3, 20  # steps of a turn: those that use up what was sampled while others had theirs, and those that count
RUNS = {
    "in turn": {},
    "ahead, staleness 2": {"train.max_staleness": 2},
    "Ray, 1 worker, staleness 2": {"train.max_staleness": 2, "cluster.ray": "auto"},
    "Ray, 2 workers, staleness 2": {"train.max_staleness": 2, "cluster.ray": "auto", "cluster.rollout_workers": 2},
}
PROCESSES = 3  # at most at work at once
CROWD_S = 3.0  # seconds for which so many are


def config_of(prompts: int = PROMPTS, **changes) -> RunConfig:
    threads = {"train.threads": 1, "engine.threads": 1, "train.lr": 1e-6}  # so small that lengths stay as they are
    size = {"train.prompts_per_step": prompts, "train.group_size": GROUP, "train.probe_every": 0, "record.tokens_every": 0}
    return RunConfig(steps=10**6).replaced(threads | size | changes).resolved()


class Training:
    """A run that is taken forward some steps at a time."""

    def __init__(self, config: RunConfig):
        import torch

        from keel.models.load import load_policy
        from keel.rollout.local import LocalEngine
        from keel.tasks.task import get_task
        from keel.training.loop import Trainer, iterate

        torch.set_num_threads(config.train.threads)  # in every process that has one: a second thread only waits, and is counted
        policy = load_policy(config.model, seed=config.seed)
        self.trainer = Trainer(policy, LocalEngine(policy), get_task(config.task), config.chosen(), config)
        self.steps = iterate(self.trainer)

    def take(self, warm: int, timed: int) -> tuple[float, list]:
        """Seconds of a step, and the records."""
        for _ in range(warm):
            next(self.steps)
        begin = time.perf_counter()
        records = [next(self.steps) for _ in range(timed)]
        return (time.perf_counter() - begin) / max(1, timed), records

    def trained(self, load_s: float) -> tuple[float, float]:
        """Tokens of a step, and seconds of a core in it without its sampling and its `load_s`."""
        sampled, collect = [], self.trainer.rollouts.collect
        self.trainer.rollouts.collect = lambda step: _timed(sampled, collect, step)
        begin = time.process_time()
        record = next(self.steps)
        seconds = time.process_time() - begin - sampled[0] - load_s
        self.trainer.rollouts.collect = collect
        return record.metrics["tokens/batch"], seconds


def _timed(seconds: list[float], work, *given):
    begin = time.process_time()
    found = work(*given)
    seconds.append(time.process_time() - begin)
    return found


# ── costs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Sampling:
    """A worker's work without a cluster."""

    def __init__(self):
        from keel.training.rollouts import sampler_of

        self.sampler, self.step = sampler_of(config_of(), 1), 10**5

    def groups(self, prompts: int) -> tuple[float, list]:
        """Seconds of a core, and what was sampled."""
        self.step += 1
        chosen, begin = self.sampler.stream.take(prompts), time.process_time()
        groups = self.sampler.groups(chosen, self.step)
        return time.process_time() - begin, groups


class _Turns:
    """A run in turn, for so many seconds: what all kinds of work amount to, at once and one after another."""

    def __init__(self):
        self.run = Training(config_of())
        self.run.take(WARM, 1)

    def steps(self, seconds: float) -> np.ndarray:
        """Steps, seconds of a core, seconds."""
        count, begin, computed = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < seconds:
            next(self.run.steps)
            count += 1
        return np.array([count, time.process_time() - computed, time.perf_counter() - begin])


def _helper(pipe) -> None:
    """Another process: does such a run for as long as it is told to."""
    work = _Turns()
    while (seconds := pipe.recv()) is not None:
        pipe.send(work.steps(seconds))


class Echo:
    """An actor that does nothing but say how long it has computed: what the way there and back costs."""

    def call(self, data: bytes) -> tuple[float, bytes]:
        return time.process_time(), data

    def fetch(self, kept: list) -> tuple[float]:
        import ray

        ray.get(kept[0])
        return (time.process_time(),)


class Meter:
    """Measures costs, a round at a time."""

    def __init__(self):
        import ray

        self.ray, self.echo = ray, ray.remote(Echo).options(num_cpus=0).remote()
        context = multiprocessing.get_context("spawn")
        self.work, self.turns, self.others = _Sampling(), _Turns(), []
        for _ in range(PROCESSES - 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_helper, args=(theirs,), daemon=True)
            process.start()
            self.others.append((process, ours))
        self.probes = {size: Training(config_of(size)) for size in (PROMPTS // 2, PROMPTS * 3 // 2)}
        self.samples, self.trained, self.loads, self.hands, self.calls, self.fetches = [], [], [], [], [], []
        self.lengths: list[list[int]] = []
        self.crowds = np.zeros((PROCESSES, 3))  # of one, two, … at once: steps, seconds of a core, seconds

    def measure(self) -> None:
        from keel.training.transfer import as_arrays, dumps, loads

        self.work.groups(PROMPTS)  # a run has its caches warm
        for size in (4, 12, 24):
            seconds, groups = self.work.groups(size)
            tokens = [[len(c.token_ids) for c in group.completions] for group in groups]
            self.lengths += tokens
            self.samples.append((1.0, max(map(max, tokens)), sum(map(sum, tokens)), seconds))
        data, weights = dumps(groups), self.work.sampler.policy.weights()
        self.hands.append(_computed(lambda: loads(dumps(groups))) / sum(map(len, tokens)))
        self.loads.append(_computed(lambda: self.work.sampler.engine.load(weights, 0)))
        self.calls.append(self._ways(lambda: self.echo.call.remote(data)))
        self.fetches.append(self._ways(lambda: self.echo.fetch.remote([self.ray.put(as_arrays(weights))])))
        for probe in self.probes.values():
            probe.take(2, 0)
            self.trained += [(1.0, *probe.trained(self.loads[-1])) for _ in range(4)]
        for crowd in range(1, PROCESSES + 1):
            self.crowds[crowd - 1] += self._together(crowd)

    def _ways(self, send, times: int = 10) -> tuple[float, float]:
        """Seconds of a core of one way there and back: here, and there."""
        first, begin = self.ray.get(send())[0], time.process_time()
        last = [self.ray.get(send())[0] for _ in range(times)][-1]
        return (time.process_time() - begin) / times, (last - first) / times

    def _together(self, crowd: int) -> np.ndarray:
        """What so many processes did that were at work at once."""
        others = [pipe for _, pipe in self.others[: crowd - 1]]
        for pipe in others:
            pipe.send(CROWD_S)
        return sum([self.turns.steps(CROWD_S), *(pipe.recv() for pipe in others)])

    def costs(self) -> tuple[Costs, dict[str, Any]]:
        """Costs over all rounds, and how the machine is shared; `cluster` are the costs with calls of Ray's."""
        part_s, round_s, token_s = _fit(self.samples)
        step_s, train_s = _fit(self.trained)
        found = Costs(part_s, round_s, token_s, mean(self.loads), mean(self.hands), step_s, train_s)
        (here, there), (putting, fetching) = np.mean(self.calls, 0).tolist(), np.mean(self.fetches, 0).tolist()
        self.cluster = replace(found, part_s=part_s + there, load_s=found.load_s + fetching, step_s=step_s + here + putting)
        steps, computed, seconds = self.crowds.T
        crowding = max(1.0, mean(computed[1:] / steps[1:]) / (computed[0] / steps[0]))
        cores = tuple(float(share) for share in computed / seconds * np.arange(1, PROCESSES + 1))
        return found, {"cores": cores, "crowding": crowding}

    def close(self) -> None:
        for process, pipe in self.others:
            pipe.send(None)
            process.join(10)
        for run in (self.turns.run, *self.probes.values()):
            run.trainer.close()


def _computed(work) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _fit(rows: list) -> list[float]:
    """Non-negative costs by least squares: their sums are right on average."""
    from scipy.optimize import nnls

    table = np.array(rows)
    return nnls(table[:, :-1], table[:, -1])[0].tolist()


# ── outcomes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def plan_of(changes: dict, machine: dict[str, Any]) -> Plan:
    workers = changes.get("cluster.rollout_workers", 1)
    weight = RAY_WORKER if "cluster.ray" in changes else 1.0
    return Plan(PROMPTS, GROUP, bound=changes.get("train.max_staleness", 0), workers=workers, worker_weight=weight, **machine)


def compare(rounds: int) -> dict:
    """Costs, and for each run its predicted and its measured seconds a step."""
    os.environ |= {  # read when Ray is imported: loopback alone, a key of this process, and no report of its use
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    import ray

    with contextlib.redirect_stdout(sys.stderr):
        quiet = dict(include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=200 * 2**20)
        ray.init("local", num_cpus=3, **quiet)
    meter = Meter()
    runs = {name: Training(config_of(**changes)) for name, changes in RUNS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    try:
        with ThreadPoolExecutor() as together:
            list(together.map(lambda run: run.trainer.rollouts, runs.values()))
        for number in range(rounds):
            meter.measure()
            for name, run in random.Random(number).sample(list(runs.items()), len(runs)):
                seconds[name].append(run.take(WARM, TIMED)[0])
            found = told_of(meter, seconds)
            told = ", ".join(f"{row['predicted_s']:.3f} {row['measured_s']:.3f}" for row in found["runs"].values())
            print(f"round {number + 1}/{rounds}, predicted and measured so far: {told}", file=sys.stderr)
    finally:
        for run in runs.values():
            run.trainer.close()
        meter.close()
        ray.shutdown()
    return found


def told_of(meter: Meter, seconds: dict[str, list[float]]) -> dict:
    """Predictions from all costs so far beside the means of all outcomes so far."""
    costs, machine = meter.costs()
    table = {}
    for name, changes in RUNS.items():
        apart = meter.cluster if "cluster.ray" in changes else costs
        told = simulate(plan_of(changes, machine), apart if changes else replace(costs, hand_s=0.0), meter.lengths)
        found = mean(seconds[name])
        table[name] = {"predicted_s": told.step_s, "measured_s": found, "error": told.step_s / found - 1, "all_s": seconds[name]}
        table[name] |= {"forecast": asdict(told) | {"bottleneck": told.bottleneck}}
    lengths = [length for group in meter.lengths for length in group]
    return {
        "rounds": len(meter.loads), "load": os.getloadavg(), "costs": asdict(costs),
        "costs_on_ray": asdict(meter.cluster), "machine": machine,
        "length": {"mean": float(np.mean(lengths)), "p99": float(np.percentile(lengths, 99))}, "runs": table,
    }  # fmt: skip


# ── on paper ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PARAMETERS, GPUS, PER_WORKER, PER_MACHINE = 32e9, 1000, 4, 8
FLOPS, HBM = 989e12, 3.35e12  # of an H100, a second: its bf16 peak, bytes of its memory
LINK, COPY = 50e9, 5e9  # bytes a second: 400 Gb/s into and out of a machine; from a process to the object store
USED_DECODING, USED_TRAINING, USED_HBM = 0.5, 0.4, 0.6  # shares of these that are reached: assumptions
BATCH, SAMPLES, CAP = 512, 16, 16384
BEST = 160  # workers
CHANGES = {
    "nothing else": {},
    "weights in fp32, as keel sends them from an fp32 trainer": {"weight_bytes": 4},
    "every trainer puts its own cut of the weights": {"putters": 360},
    "gradients in bf16": {"gradient_bytes": 2},
    "both of these": {"putters": 360, "gradient_bytes": 2},
    "completions of at most 8,192 tokens": {"shorter": True},
    "all three": {"putters": 360, "gradient_bytes": 2, "shorter": True},
}


def on_paper(
    workers: int, bound: int, lengths: list[list[int]], *, putters: int = 1, gradient_bytes: int = 4, weight_bytes: int = 2
) -> tuple[Forecast, dict[str, float]]:
    """1,000 GPUs with so many rollout workers of PER_WORKER each; the others train. Costs follow from the numbers above.

    Args:
        putters: trainers that write weights to the object store, a cut each.
    """
    trainers, machines = GPUS - workers * PER_WORKER, -(-workers * PER_WORKER // PER_MACHINE)
    tokens = BATCH * sum(map(sum, lengths)) / len(lengths)
    moved = traffic(PARAMETERS, tokens, machines, trainers, weight_bytes=weight_bytes, gradient_bytes=gradient_bytes)
    put, reduce = moved.weights / (COPY * putters), moved.gradients / (LINK / PER_MACHINE)
    costs = Costs(
        part_s=1.0,
        round_s=2 * PARAMETERS / (HBM * USED_HBM * PER_WORKER),
        token_s=2 * PARAMETERS / (FLOPS * USED_DECODING * PER_WORKER),
        load_s=broadcast_s(moved.weights, machines, LINK),
        hand_s=0.0,
        step_s=put + reduce,
        train_s=8 * PARAMETERS / (FLOPS * USED_TRAINING),  # forward for logp_old, forward and backward
    )
    told = simulate(Plan(BATCH, SAMPLES, bound=bound, workers=workers, trainers=trainers), costs, lengths, batches=60)
    computing = {"put_s": put, "reduce_s": reduce, "train_s": costs.train_s * tokens / trainers, "load_s": costs.load_s}
    longest, own = CAP * costs.round_s, tokens / workers * costs.token_s
    return told, asdict(moved) | computing | {"tokens": tokens, "longest_s": longest, "tokens_of_a_worker_s": own}


def print_plan() -> None:
    """The tables of docs/scale.md."""
    rng = np.random.default_rng(0)
    spread = rng.lognormal(np.log(2500), 0.8, (4000, 1)) * rng.lognormal(0, 0.5, (4000, SAMPLES))  # prompts differ, and samples
    lengths, shorter = (np.minimum(spread, cap).astype(int).tolist() for cap in (CAP, CAP // 2))
    print("| workers × GPUs | GPUs that train | staleness | step, s | workers busy | trainers busy | bottleneck |")
    print("|---|---|---|---|---|---|---|")
    for workers, bound in [(64, 0), (64, 4), (128, 4), (160, 4), (192, 4), (208, 4), (224, 4), (240, 4)]:
        told, moved = on_paper(workers, bound, lengths)
        busy = f"{told.sampling:.2f} | {told.training:.2f} | {told.bottleneck}"
        print(f"| {workers} × {PER_WORKER} | {GPUS - workers * PER_WORKER} | {bound} | {told.step_s:.0f} | {busy} |")
    print({name: f"{value:.3g}" for name, value in on_paper(BEST, 4, lengths)[1].items()})
    print(f"\n| {BEST} × {PER_WORKER}, staleness 4, and | step, s | best split | step there, s |\n|---|---|---|---|")
    for name, changes in CHANGES.items():
        drawn = shorter if "shorter" in changes else lengths
        kept = {key: value for key, value in changes.items() if key != "shorter"}
        steps = {workers: on_paper(workers, 4, drawn, **kept)[0].step_s for workers in (BEST, *range(112, 225, 16))}
        best = min(steps, key=steps.get)
        print(f"| {name} | {steps[BEST]:.0f} | {best} × {PER_WORKER} | {steps[best]:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE / "scale.json")
    parser.add_argument("--plan", action="store_true", help="1,000 GPUs on paper; nothing is measured")
    options = parser.parse_args()
    if options.plan:
        print_plan()
        return
    found = compare(options.rounds)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print("| run | predicted, s | measured, s | error |\n|---|---|---|---|")
    for name, row in found["runs"].items():
        print(f"| {name} | {row['predicted_s']:.3f} | {row['measured_s']:.3f} | {100 * row['error']:+.0f} % |")


if __name__ == "__main__":
    main()
