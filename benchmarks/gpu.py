"""One graphics card: is keel right on it, how fast is it, and how does TRL do on the same card. One command, nothing else needed.

    python benchmarks/gpu.py                               # correctness, speed and TRL, with SmolLM2-135M
    python benchmarks/gpu.py --model my-model --no-trl     # a folder, a GGUF file or a hub id
    python benchmarks/gpu.py --device cpu --quick          # the same on a CPU with the tiny model: does it run at all

Exit code 1 where a result on the card is further from the CPU's in 64 bits than its bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from player import Player
from tables import table
from works import LEARNING_RATE, SEED, WORDY_SUMS, WORKS, Work

LOGP_BOUND = 1e-3  # nats a token, of fp32 against 64 bits: some ten times what a CPU in fp32 shows on SmolLM2-135M
GRADIENT_BOUND = 1e-3  # of its norm
RECIPES = ("solid", "grpo", "dapo")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    refuse_no_card(options.device)
    work = the_work(options)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    told: dict[str, Any] = {"when": when, "machine": machine(options.device)}
    told["correctness"] = correctness(work)
    told["decoding"] = decoding(work, options.pairs)
    told["speed"] = speed(work, options.steps)
    if options.trl:
        told["trl"] = against_trl(work, options.pairs)
    print(in_words(work, told))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(told, indent=2) + "\n")
    return 0 if right(told["correctness"]) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try it out")
    parser.add_argument("--model", help="default: SmolLM2-135M; with --quick the tiny model")
    parser.add_argument("--prompts", type=int, help="of a step; each is answered eight times")
    parser.add_argument("--cap", type=int, help="tokens of a completion, at most")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"), help="of matrix products in the timed steps")
    parser.add_argument("--trl-rows", type=int, help="TRL's micro-batch, completions; default: all of a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of keel alone, after one that is not")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of steps against TRL")
    parser.add_argument("--no-trl", dest="trl", action="store_false", help="keel alone")
    parser.add_argument("--quick", action="store_true", help="the tiny model, few steps")
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"))
    return parser.parse_args(arguments)


def refuse_no_card(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            f"gpu.py: torch {torch.__version__} sees no CUDA device. Expected one, and a build of torch for it; "
            "--device cpu --quick tries the command out without."
        )


def the_work(options: argparse.Namespace) -> Work:
    plain = WORKS["tiny-dense" if options.quick else "smollm2-135m"]
    wanted = {"model": options.model, "prompts": options.prompts, "cap": options.cap}
    if not options.quick:
        wanted = {"prompts": 32, "cap": 128} | {name: value for name, value in wanted.items() if value is not None}
    changed = {name: value for name, value in wanted.items() if value is not None}
    changed |= {"task": WORDY_SUMS} if options.model else {}
    work = dataclasses.replace(plain, device=options.device, dtype=options.dtype, keel_tokens=65536, **changed)
    return dataclasses.replace(work, trl_rows=options.trl_rows or work.completions)


def machine(device: str) -> dict[str, Any]:
    told = {name: version(name) for name in ("torch", "transformers")} | {"device": device}
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(torch.device(device))
        told |= {"card": card.name, "memory_gb": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return told


# ── correctness ───────────────────────────────────────────────────────────────────────────────────────────────────────


def correctness(work: Work) -> dict[str, Any]:
    """The card in fp32 against the CPU in 64 bits, on completions that the card's own engine sampled: log-probabilities, and the
    gradient of one step of each of some recipes.
    """
    from keel.models.load import load_policy
    from keel.rollout.engine import Seed
    from keel.rollout.local import LocalEngine
    from keel.tasks.task import get_task
    from keel.training.batch import batch_from_groups
    from keel.types import Group, Sampling, Score

    torch.backends.cuda.matmul.allow_tf32 = False
    there, here = load_policy(work.model, device=work.device), load_policy(work.model)
    here.model.double()
    task, sampling = get_task(work.task), Sampling(max_completion_tokens=min(work.cap, 64))
    prompts = [there.template.render(prompt, there.tokenizer) for prompt in task.train[:4]]
    engine = LocalEngine(there)
    made = engine.generate(prompts, sampling, Seed(SEED, 0), 4)
    rows = [tuple(made[4 * n : 4 * n + 4]) for n in range(len(prompts))]
    scores = tuple(Score(float(n % 2), n % 2 == 1) for n in range(4))  # right and wrong by turns: every recipe has a gradient
    batch = batch_from_groups([Group(prompt, each, scores) for prompt, each in zip(prompts, rows, strict=True)])
    mask = batch.mask
    exact = here.logp(batch).logp.detach()
    seen = there.logp(batch).logp.detach()
    return {
        "tokens": int(mask.sum()),
        "trainer_max_abs_nats": float((seen - exact)[mask].abs().max()),
        "engine_max_abs_nats": float((batch.logp_rollout - exact)[mask].abs().max()),
        "gap_max_abs_nats": float((seen - batch.logp_rollout)[mask].abs().max()),
        "gradients": {name: gradient_error(name, there, here, batch, sampling.max_completion_tokens) for name in RECIPES},
    }


def gradient_error(name: str, there, here, batch, cap: int) -> float:
    """Norm of the difference of the card's gradient and the CPU's, in norms of the latter."""
    from keel.doctor.subject import in_double

    found, wanted = gradient(name, there, batch, cap), gradient(name, here, in_double(batch), cap)
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


def gradient(name: str, policy, batch, cap: int) -> torch.Tensor:
    """Of one step of a recipe, as if the batch's own log-probabilities were the old ones and the reference's."""
    from keel.objectives.recipes import recipe
    from keel.training.batch import micro_batches
    from keel.training.step import accumulate_gradient

    objective = recipe(name).objective
    batch = dataclasses.replace(batch, logp_old=batch.logp_rollout, logp_ref=batch.logp_rollout - 0.1)
    prepared = objective.prepare(batch, cap)
    policy.model.zero_grad(set_to_none=True)
    accumulate_gradient(policy, objective, batch, prepared, objective.counts(batch, prepared, cap), micro_batches(batch, 4096), 1.0)
    return torch.cat([p.grad.flatten() for p in policy.parameters().values() if p.grad is not None])


def right(found: dict[str, Any]) -> bool:
    errors = (found["trainer_max_abs_nats"], found["engine_max_abs_nats"])
    return max(errors) <= LOGP_BOUND and max(found["gradients"].values()) <= GRADIENT_BOUND


# ── decoding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def decoding(work: Work, pairs: int) -> dict[str, Any]:
    """Tokens a second that the engine samples, with its steps captured as graphs and launched kernel by kernel, in turn; and how
    many of their tokens are the same. On a CPU nothing is captured.
    """
    from keel.models.load import load_policy
    from keel.rollout.engine import Seed
    from keel.rollout.local import LocalEngine
    from keel.rollout.numerics import Numerics
    from keel.tasks.task import get_task
    from keel.types import Sampling

    policy, numerics = load_policy(work.model, device=work.device), Numerics(work.dtype)
    sampling = Sampling(max_completion_tokens=work.cap)
    prompts = [policy.template.render(prompt, policy.tokenizer) for prompt in get_task(work.task).train[: work.prompts]]
    engines = {name: LocalEngine(policy, numerics=numerics, eager=name == "eager") for name in ("captured", "eager")}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    same, count = 0, 0
    for number in range(pairs + 1):
        made = {}
        for name in ("captured", "eager") if number % 2 else ("eager", "captured"):
            synchronise(work.device)
            begin = time.perf_counter()
            made[name] = engines[name].generate(prompts, sampling, Seed(SEED, number), work.group_size)
            synchronise(work.device)
            rates[name].append(sum(len(each.token_ids) for each in made[name]) / (time.perf_counter() - begin))
        for one, other in zip(made["captured"], made["eager"], strict=True):
            width = min(len(one.token_ids), len(other.token_ids))
            same += int((one.token_ids[:width] == other.token_ids[:width]).sum())
            count += max(len(one.token_ids), len(other.token_ids))
    told: dict[str, Any] = {f"{name}_tokens_per_s": statistics.median(found[1:]) for name, found in rates.items()}
    ratios = [a / b for a, b in zip(rates["captured"][1:], rates["eager"][1:], strict=True)]
    return told | {"captures": engines["captured"].captures, "ratio": statistics.median(ratios), "same_tokens": same / count}


# ── speed ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def speed(work: Work, steps: int) -> dict[str, Any]:
    """Seconds, tokens a second and peak memory of whole steps; and what share of the card's own matrix rate training reaches."""
    from keel_side import configuration
    from works import give

    from keel.objectives.recipes import recipe
    from keel.rollout.local import LocalEngine
    from keel.training.loop import Trainer, iterate

    given = give(work, steps + 1)
    settings = configuration(work, work.keel_tokens, steps + 1)
    trainer = Trainer(given.policy, LocalEngine(given.policy), given.task, recipe("solid"), settings)
    records = iterate(trainer)
    next(records)
    reset_peak(work.device)
    told = [next(records).metrics for _ in range(steps)]
    parameters = sum(p.numel() for p in given.policy.model.parameters())
    rate = product_rate(work.device, work.dtype)
    trained = [(row["tokens/step"], row["time/train_s"]) for row in told]
    return {
        "parameters": parameters,
        "step_s": statistics.median(row["time/step_s"] for row in told),
        "rollout_tokens_per_s": statistics.median(row["tokens/batch"] / row["time/rollout_s"] for row in told),
        "trained_tokens_per_s": statistics.median(tokens / seconds for tokens, seconds in trained),
        "product_tflops": rate / 1e12,
        "train_mfu": statistics.median(6 * parameters * tokens / seconds for tokens, seconds in trained) / rate,
        "peak_mb": peak_mb(work.device),
        "learning_rate": LEARNING_RATE,
    }


def product_rate(device: str, dtype: str, size: int = 4096) -> float:
    """Floating-point operations a second of a large square product: what the card gives, rather than what its sheet says."""
    size = size if device.startswith("cuda") else 1024
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    seconds = []
    for _ in range(8):
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronise(device)
        seconds.append((time.perf_counter() - begin) / 4)
    return 2 * size**3 / min(seconds)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_mb(device: str) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.startswith("cuda") else None


# ── against TRL ───────────────────────────────────────────────────────────────────────────────────────────────────────


def against_trl(work: Work, pairs: int) -> dict[str, Any]:
    """Whole steps in turn, each system in a process of its own on the same card; the order turns round with each pair."""
    import keel_side
    import trl_side

    steps = pairs + 1
    with Player(trl_side.play, work, work.trl_rows, steps) as trl, Player(keel_side.play, work, work.keel_tokens, steps) as keel:
        trl.step(), keel.step()
        for pair in range(pairs):
            for player in (trl, keel) if pair % 2 == 0 else (keel, trl):
                player.step()
            seconds = keel.steps[-1].seconds, trl.steps[-1].seconds
            print("pair {}/{}: keel {:.2f} s, TRL {:.2f} s".format(pair + 1, pairs, *seconds), file=sys.stderr)
        ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(keel.steps[1:], trl.steps[1:], strict=True)]
    told = {"ratio": statistics.median(ratios), "ratios": ratios, "trl_version": version("trl")}
    for name, player in (("keel", keel), ("trl", trl)):
        timed = player.steps[1:]
        told[f"{name}_s"] = statistics.median(step.seconds for step in timed)
        told[f"{name}_tokens"] = statistics.median(step.tokens for step in timed)
        peaks = [step.device_mb for step in timed if step.device_mb is not None]
        told[f"{name}_peak_mb"] = max(peaks) if peaks else None
    return told


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_words(work: Work, told: dict[str, Any]) -> str:
    found, fast, where = told["correctness"], told["speed"], told["machine"]
    errors = f"trainer {found['trainer_max_abs_nats']:.1e}, engine {found['engine_max_abs_nats']:.1e} nats at most"
    gradients = ", ".join(f"{name} {error:.1e}" for name, error in found["gradients"].items())
    size = f"{work.prompts} × {work.group_size} completions of at most {work.cap} tokens"
    rates = f"{fast['rollout_tokens_per_s']:,.0f} sampled a second, {fast['trained_tokens_per_s']:,.0f} trained a second"
    share = f"{fast['train_mfu']:.1%} of the {fast['product_tflops']:.3g} TFLOP/s that a large product reaches here"
    lines = [
        ("fp32 against 64 bits on a CPU", f"{'right' if right(found) else 'NOT RIGHT'}, {found['tokens']} tokens"),
        ("log-probabilities", f"{errors} (bound {LOGP_BOUND:g})"),
        ("engine gap", f"{found['gap_max_abs_nats']:.1e} nats at most"),
        ("gradients", f"{gradients} of their norm (bound {GRADIENT_BOUND:g})"),
        ("decoding", _of_decoding(told["decoding"])),
        ("step", f"{fast['step_s']:.3f} s, {size}, products in {work.dtype}"),
        ("tokens", rates),
        ("training", share),
        ("peak memory", "not known on a CPU" if fast["peak_mb"] is None else f"{fast['peak_mb']:,.0f} MB"),
        *(_of_trl(told["trl"]) if "trl" in told else ()),
    ]
    title = f"{work.model} on {where.get('card', where['device'])}, torch {where['torch']}"
    return f"\n**{title}**\n\n" + table([("", "measured"), *lines])


def _of_decoding(drawn: dict[str, Any]) -> str:
    plain = f"{drawn['eager_tokens_per_s']:,.0f}"
    if not drawn["captures"]:
        return f"{plain} tokens a second; nothing is captured on a CPU"
    speeds = f"{drawn['captured_tokens_per_s']:,.0f} tokens a second captured, {plain} kernel by kernel"
    return f"{speeds}: {drawn['ratio']:.2f} ×; {drawn['same_tokens']:.1%} of the tokens are the same"


def _of_trl(trl: dict[str, Any]) -> list[tuple[str, str]]:
    ends = f"{min(trl['ratios']):.2f}–{max(trl['ratios']):.2f}, {len(trl['ratios'])} pairs"
    seconds = f"{trl['trl_s']:.3f} s against {trl['keel_s']:.3f} s: {trl['ratio']:.2f} × ({ends})"
    memory = "not known on a CPU"
    if trl["trl_peak_mb"] is not None:
        memory = f"{trl['trl_peak_mb']:,.0f} MB against {trl['keel_peak_mb']:,.0f} MB"
    return [(f"TRL {trl['trl_version']}", seconds), ("TRL's peak memory", memory)]


if __name__ == "__main__":
    raise SystemExit(main())
