"""One RL step of the same work in keel and in TRL's GRPOTrainer, alternately, and the ratio of their seconds and memory.

Without options (`make bench`): both models, and the memory of the head. How to read what it prints: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import head_memory
import keel_side
import trl_side
from player import Player, Step, use_threads
from tables import head_table, step_table, sweep_table, write_measured
from works import WORKS, Work, equal_tokens

HERE = Path(__file__).resolve().parent
SWEEP_KEEL = (None, 8192, 4096, 2048, 1024)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    use_threads(options.threads)
    options.load = load_average()
    chosen = [adjusted(WORKS[name], options) for name in options.models]
    if options.sweep:
        for work in chosen:
            print(sweep_table(work, sweep(work, options.pairs or 3)), flush=True)
        return
    results = earlier(options.out)
    for work in chosen:
        results["step_vs_trl"][work.name] = compare(work, options.warmup) | provenance(options)
        print(step_table(work, results["step_vs_trl"][work.name]), flush=True)
        save(options.out, results)
    if options.head:
        results["head_memory"] = head_memory.measure() | provenance(options)
        print(head_table(results["head_memory"]), flush=True)
        save(options.out, results)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny-dense, one pair, no head memory; written to build/")
    parser.add_argument("--models", nargs="+", choices=sorted(WORKS), default=None, help="default: all")
    parser.add_argument("--pairs", type=int, help="timed pairs of steps; default: each model's own")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps of each system before the first pair")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads of each system")
    parser.add_argument("--trl-rows", type=int, help="TRL's micro-batch, completions; default: its best")
    parser.add_argument("--keel-tokens", type=int, help="keel's micro-batch, prompt + completion tokens; default: its best")
    parser.add_argument(
        "--probe", action="store_const", const=1, help="leave keel's on-policy probe on, as a run has it by default"
    )
    parser.add_argument("--sweep", action="store_true", help="time the micro-batches of both systems instead, to find the best")
    parser.add_argument("--no-head", dest="head", action="store_false", help="leave out the memory of the head")
    parser.add_argument("--out", type=Path, help="default: benchmarks/latest.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.head = options.pairs or 1, False
    options.models = options.models or (["tiny-dense"] if options.quick else list(WORKS))
    options.out = options.out or (Path("build/bench-quick.json") if options.quick else HERE / "latest.json")
    return options


def adjusted(work: Work, options: argparse.Namespace) -> Work:
    """The work with the command line's changes."""
    asked = {"pairs": options.pairs, "trl_rows": options.trl_rows, "keel_tokens": options.keel_tokens, "probe_every": options.probe}
    return dataclasses.replace(work, **{name: value for name, value in asked.items() if value is not None})


def compare(work: Work, warmup: int) -> dict[str, Any]:
    """Warm both systems up, then time pairs of steps, the order turned round each time; one more keel at TRL's micro-batch."""
    steps = warmup + work.pairs
    with Player(trl_side.play, work, work.trl_rows, steps) as trl, Player(keel_side.play, work, work.keel_tokens, steps) as keel:
        for _ in range(warmup):
            trl.step(), keel.step()
        for pair in range(work.pairs):
            for player in (trl, keel) if pair % 2 == 0 else (keel, trl):
                player.step()
            print(f"{work.name} pair {pair + 1}/{work.pairs}: {_line(keel.steps[-1], trl.steps[-1])}", file=sys.stderr, flush=True)
        equal = equal_tokens(work, keel.facts["longest_prompt"])
        facts = {"trl_loading_mb": trl.facts["loading_peak_mb"], "keel_loading_mb": keel.facts["loading_peak_mb"]}
    with Player(keel_side.play, work, equal, steps) as keel_equal:
        for _ in range(steps):
            keel_equal.step()
    result = summary(work, keel.steps[warmup:], trl.steps[warmup:]) | facts
    return result | {"equal": at_equal(equal, keel_equal.steps[warmup:], result)}


def _line(keel: Step, trl: Step) -> str:
    return f"keel {keel.seconds:.2f} s, TRL {trl.seconds:.2f} s, ratio {trl.seconds / keel.seconds:.2f}"


def summary(work: Work, keel: list[Step], trl: list[Step]) -> dict[str, Any]:
    """Medians of both systems, and the median of the paired ratios."""
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(keel, trl, strict=True)]
    rates = [t.seconds / t.tokens * k.tokens / k.seconds for k, t in zip(keel, trl, strict=True)]
    result: dict[str, Any] = {
        "keel_s": median(keel, "seconds"),
        "trl_s": median(trl, "seconds"),
        "ratio": statistics.median(ratios),
        "keel_rss_mb": peak(keel),
        "trl_rss_mb": peak(trl),
        "rss_ratio": ratio(peak(keel), peak(trl)),
        "ratios": ratios,
        "ratio_per_token": statistics.median(rates),
        "pairs": len(ratios),
        "keel_probe_every": work.probe_every,
        "keel_micro_batch_tokens": work.keel_tokens,
        "trl_micro_batch_rows": work.trl_rows,
        "completions": work.completions,
        "max_completion_tokens": work.cap,
    }
    for name, steps in (("keel", keel), ("trl", trl)):
        result |= {f"{name}_{key}": value for key, value in fractions(steps).items()}
        result[f"{name}_tokens"] = median(steps, "tokens")
        result[f"{name}_tokens_per_completion"] = median(steps, "tokens") / work.completions
    return result


def fractions(steps: list[Step]) -> dict[str, float]:
    """Shares of the steps' time, summing to 1."""
    total = sum(step.seconds for step in steps)
    rollout, train = (sum(getattr(step, key) for step in steps) / total for key in ("rollout_s", "train_s"))
    return {"rollout_frac": rollout, "train_frac": train, "rest_frac": 1 - rollout - train}


def at_equal(tokens: int, keel: list[Step], best: dict[str, Any]) -> dict[str, Any]:
    """keel at TRL's micro-batch against the same TRL steps."""
    return {
        "keel_micro_batch_tokens": tokens,
        "trl_micro_batch_rows": best["trl_micro_batch_rows"],
        "keel_s": median(keel, "seconds"),
        "keel_rss_mb": peak(keel),
        "trl_rss_mb": best["trl_rss_mb"],
        "rss_ratio": ratio(peak(keel), best["trl_rss_mb"]),
    }


def median(steps: list[Step], key: str) -> float:
    return statistics.median(getattr(step, key) for step in steps)


def peak(steps: list[Step]) -> float | None:
    peaks = [step.peak_mb for step in steps if step.peak_mb is not None]
    return max(peaks) if peaks else None


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def sweep(work: Work, steps: int) -> list[dict[str, Any]]:
    """Seconds and memory of each micro-batch, one process each, after one untimed step."""
    rows = []
    trials = [("TRL", trl_side.play, size, f"{size} completions") for size in work.divisors()]
    trials += [("keel", keel_side.play, size, "whole batch" if size is None else f"{size} tokens") for size in SWEEP_KEEL]
    for system, play, size, label in trials:
        with Player(play, work, size, steps + 1) as player:
            timed = [player.step() for _ in range(steps + 1)][1:]
        seconds = min(step.seconds for step in timed)  # the fastest: a sweep is not paired, so disturbances count in full
        rows.append({"system": system, "label": label, "seconds": seconds, "peak_mb": peak(timed)})
        print(f"{work.name} {system} {label}: {rows[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return rows


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """When, how, on what and with which versions this was measured."""
    packages = {name: version(name) for name in ("torch", "transformers", "trl")}
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    command = "python benchmarks/step_vs_trl.py " + shlex.join(sys.argv[1:])
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": options.threads, "load_before": options.load}
    machine["python"] = platform.python_version()
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"when": when, "command": command.strip(), "revision": revision, "machine": machine, "versions": packages}


def load_average() -> float | None:
    """Running programs in the last minute; says so when there are others, because they slow the two systems down unequally."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > 0.5:
        print(f"Other programs are running (load {load:.1f}): times and ratios will not mean much.", file=sys.stderr)
    return load


def processor() -> str:
    """The processor's own name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def earlier(path: Path) -> dict[str, Any]:
    """What an earlier run wrote, so that one model can be measured again without the others."""
    return json.loads(path.read_text()) if path.exists() else {"step_vs_trl": {}}


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the results; the shipped ones also go into README.md as tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    if path.resolve() == HERE / "latest.json":
        write_measured(HERE / "README.md", results)


if __name__ == "__main__":
    main()
