"""The commands, each with its options. Every setting is a flag by its dotted name.

What a command needs is imported when it runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from keel.arguments import parser_of, read
from keel.errors import KeelError

# ── train ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def train(arguments: list[str]) -> None:
    """train a policy: keel train quickstart, keel train solid --task arithmetic:hard --train.lr 1e-4"""
    parser = parser_of("train", train, settings=True)
    parser.add_argument("config", nargs="?", help="a recipe, a shipped configuration or a TOML file (default: quickstart)")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder; only --steps and --train.parallel go with it")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and what they amount to")
    parser.add_argument("--json", action="store_true", help="print the summary (or the dry run) as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options, overrides = read(parser, arguments)
    from keel.config import load_config

    if options.dry_run and not options.resume:
        _dry_run(options, overrides)
        return
    if options.resume:
        changed = _changes_of_resumed(options, overrides)
        from keel.run import resume

        result = resume(options.resume, **changed, quiet=options.quiet)
    else:
        config = load_config(options.config or "quickstart", overrides)
        from keel.run import train as begin

        result = begin(config, quiet=options.quiet)
    if not options.json:
        result.report()
    elif result.ranks.first:
        print(json.dumps(result.summary | {"run": str(result.folder.path)}))


def _dry_run(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    from keel.config import load_config

    config = load_config(options.config or "quickstart", overrides).resolved()
    from keel.objectives.papers import choices
    from keel.run_folder import place_of, toml_of
    from keel.tasks.task import get_task

    get_task(config.task)  # a task that cannot be is told here too
    config = config.replaced({"out": str(place_of(config))})
    derived, chosen = config.derived(), choices(config.chosen())
    if options.json:
        print(json.dumps({"config": config.model_dump(mode="json"), "derived": derived, "objective": chosen}))
        return
    width = max(map(len, (*derived, *chosen)))
    amounts = [f"# {name:<{width}} {value:>13,}" for name, value in derived.items()]
    parts = [f"# {name:<{width}} {value}" for name, value in chosen.items()]
    print(toml_of(config), "# The objective", *parts, "", "# What it amounts to", *amounts, sep="\n")


def _changes_of_resumed(options: argparse.Namespace, overrides: dict[str, Any]) -> dict[str, Any]:
    """What may change when a run goes on: how long, and on how many ranks in which way."""
    steps, parallel = overrides.pop("steps", None), overrides.pop("train.parallel", None)
    if overrides or options.config or options.dry_run:
        given = ", ".join([*overrides, *filter(None, [options.config]), *(["--dry-run"] if options.dry_run else [])])
        raise KeelError(
            f"--resume came with {given}. Expected nothing but --steps and --train.parallel: a resumed run keeps the settings that "
            "it began with, which its config.toml holds. Start a new run to change them."
        )
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise KeelError(f"--steps is {steps!r}. Expected a whole number of optimizer steps, at least 1.")
    return {"steps": steps, "parallel": parallel}


# ── eval ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate(arguments: list[str]) -> None:
    """evaluate a run or a model on held-out prompts: keel eval runs/mine --evaluation.samples 16"""
    parser = parser_of("eval", evaluate, settings=True)
    parser.add_argument("source", help="a run folder (its own task, template and sampling hold) or a model")
    parser.add_argument("--step", type=int, help="of a run: the checkpoint of this step, not the newest")
    parser.add_argument("--alone", action="store_true", help="of a run: do not compare with the model before training")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON on stdout")
    options, overrides = read(parser, arguments)
    from keel.config import load_config
    from keel.held_out import before_training, held_out
    from keel.parts import assemble, trained_policy
    from keel.run_folder import RunFolder

    folder = RunFolder.open(options.source) if os.path.isfile(os.path.join(options.source, "config.toml")) else None
    if not folder and options.source.startswith("runs/") and not os.path.exists(options.source):
        raise KeelError(f"There is no run {options.source!r}. Expected a run folder, or a model: a name, a folder, a hub id.")
    if folder:
        parts = assemble(folder.config.replaced(overrides), trained_policy(folder, options.step))
    else:
        parts = assemble(load_config("solid", {"model": options.source} | overrides))
    numbers = held_out(parts, standard=True)
    before = before_training(folder, parts.config, numbers) if folder and not options.alone else {}
    _print_evaluation(options, parts.config.task, numbers, before)


def _print_evaluation(options: argparse.Namespace, task: str, numbers: dict[str, float], before: dict[str, Any]) -> None:
    from rich.console import Console

    from keel.summary import against, skills_table

    panel = against(before, numbers, task)
    if options.json:
        print(json.dumps({"source": options.source, "task": task, **numbers} | ({"panel": panel} if panel else {})))
        return
    width = max(map(len, numbers))
    print(*(f"{name:<{width}}  {value:.4g}" for name, value in numbers.items()), sep="\n")
    if panel:
        print()
        Console().print(skills_table(panel))


# ── pretrain ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def pretrain(arguments: list[str]) -> None:
    """make a small base model from nothing: keel pretrain --size .3M --kind base --out models/mine"""
    parser = parser_of("pretrain", pretrain)
    parser.add_argument("--size", default=".3M", help=".1M, .3M, 1M, or moe (default: .3M)")
    parser.add_argument("--kind", default="base", help="base (noisy mixture) or aligned (then tuned on clean answers)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="the new folder")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    options = parser.parse_args(arguments)
    from keel.evaluate.card import write_card
    from keel.models.pretrain import pretrain as make

    def show(step: int, steps: int, loss: float) -> None:
        if step % max(1, steps // 20) == 0:
            print(f"step {step}/{steps}  loss {loss:.3f} nats/token", file=sys.stderr, flush=True)

    report = make(options.size, options.kind, options.seed, options.out, progress=show)
    report.pop("model")
    report["pass@1"] = {task: round(numbers["pass@1"], 3) for task, numbers in write_card(options.out).items()}
    told = "\n".join(f"{name:<11} {value}" for name, value in report.items())
    print(json.dumps(report | {"out": options.out}) if options.json else f"{told}\nmodel       {options.out}")


# ── papers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def papers(arguments: list[str]) -> None:
    """list the recipes; show one; show what two choose differently, and where their papers say so: keel papers dapo
    grpo
    """
    parser = parser_of("papers", papers)
    parser.add_argument("recipes", nargs="*", help="none, one or two names")
    parser.add_argument("--json", action="store_true", help="print as JSON on stdout")
    parser.add_argument("--markdown", action="store_true", help="print docs/papers.md")
    options = parser.parse_args(arguments)
    from keel.papers import told

    print(told(options.recipes, as_json=options.json, as_markdown=options.markdown), end="")


# ── audit ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def audit(arguments: list[str]) -> int:
    """say what an objective's gradient really follows, by enumeration: keel audit; keel audit dapo; keel audit my.py:loss"""
    parser = parser_of("audit", audit)
    parser.add_argument("objective", nargs="?", help="a recipe, an estimator, or module:function (default: all that keel ships)")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two of them, side by side in the same worlds")
    parser.add_argument("--world", nargs="+", default=[], metavar="KNOB=VALUE", help="drift=0.3 gap=0.1 group_size=4 prompts=1 …")
    parser.add_argument("--seed", type=int, default=0, help="of the first random world, or of the samples")
    parser.add_argument("--model", help="ask a real policy by Monte Carlo instead: a model as `keel train` knows it")
    parser.add_argument("--task", default="arithmetic:medium", help="with --model: what its prompts are (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=200, help="with --model: groups (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=8, help="with --model: completions a group (default: %(default)s)")
    parser.add_argument(
        "--drift", type=float, default=0.0, help="with --model: a random weight step before sampling, for KL questions"
    )
    parser.add_argument("--stale-steps", type=int, default=0, help="with --model: optimizer steps between sampling and gradient")
    parser.add_argument("--translate", nargs=2, metavar=("FRAMEWORK", "FILE"), help="read a TRL or verl configuration")
    parser.add_argument("--peers", action="store_true", help="compare with the losses of the frameworks that are installed")
    parser.add_argument("--json", action="store_true", help="print as JSON on stdout")
    parser.add_argument("--markdown", action="store_true", help="print the certificates of docs/claims.md")
    options = parser.parse_args(arguments)
    from keel.audit.command import run

    return run(options)


# ── gap ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def gap(arguments: list[str]) -> int:
    """measure how far an engine is from the trainer, and say what it means: keel gap tiny-dense --engine.format bf16"""
    parser = parser_of("gap", gap, settings=True)
    parser.add_argument("source", help="a run folder (its own settings hold) or a model")
    parser.add_argument("--samples", type=int, default=512, help="completions (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of each prompt (default: %(default)s)")
    parser.add_argument("--step", type=int, help="of a run: the checkpoint of this step, not the newest")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON on stdout")
    options, overrides = read(parser, arguments)
    from keel.gap.command import run

    return run(
        options.source, overrides, samples=options.samples, group_size=options.group_size, step=options.step, as_json=options.json
    )


# ── doctor ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def doctor(arguments: list[str]) -> int:
    """examine a configuration, a run or a log: keel doctor quickstart, runs/mine, trainer_state.json; exit code 1 for findings"""
    parser = parser_of("doctor", doctor, settings=True)
    what = (
        "a configuration as `keel train` takes it, a run folder, another framework's metrics (a file or folder), or a fault: K620"
    )
    parser.add_argument("source", nargs="?", default="quickstart", help=what)
    parser.add_argument(
        "--from", default="", dest="framework", metavar="NAME", help="whose metrics: trl or verl (found by their names)"
    )
    parser.add_argument(
        "--probe", action="append", default=[], metavar="NAME", help="ask this one alone (several: repeat; list: all)"
    )
    parser.add_argument("--step", type=int, help="of a run: the weights of this checkpoint (with --probe, else the newest)")
    parser.add_argument("--folder-only", action="store_true", help="of a run: read what it left, and ask the living system nothing")
    parser.add_argument("--json", action="store_true", help="print as JSON on stdout")
    options, overrides = read(parser, arguments)
    from keel.doctor.command import is_foreign, run, run_on_log

    if options.framework or is_foreign(options.source):
        return run_on_log(options.source, options.framework, overrides, as_json=options.json)
    told = dict(probes=options.probe, step=options.step, folder_only=options.folder_only, as_json=options.json)
    return run(options.source, overrides, **told)


# ── grade ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def grade(arguments: list[str]) -> int:
    """grade the graders: keel grade answers.jsonl; or train a tiny judge on its own errors: keel grade improve"""
    if arguments[:1] == ["improve"]:
        return _improve(arguments[1:])
    from keel.grade.arguments import add_arguments, run_options

    parser = parser_of("grade", grade)
    add_arguments(parser)
    return run_options(parser.parse_args(arguments))


def _improve(arguments: list[str]) -> int:
    """measure a tiny judge, mine its errors, train on them, measure again, and train a policy against both"""
    parser = parser_of("grade improve", _improve)
    parser.add_argument("--seeds", type=int, default=5, help="policies trained against each judge (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the judges")
    parser.add_argument("--out", default="", metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON on stdout")
    o = parser.parse_args(arguments)
    from keel.grade.improve.command import run

    return run(seeds=o.seeds, seed=o.seed, out=o.out, as_json=o.json)


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def data(arguments: list[str]) -> int:
    """look for faults in a data set, or build one: keel data check rows.jsonl; keel data build arithmetic:medium"""
    from keel.data.arguments import add_build_arguments, add_check_arguments, build_options, check_options

    commands = {"check": (add_check_arguments, check_options), "build": (add_build_arguments, build_options)}
    name = arguments[0] if arguments else ""
    if name not in commands:
        print("usage: keel data check DATA …, or keel data build TASK …; `keel data check --help` says more")
        return 0 if name in ("-h", "--help") else 2
    add, run = commands[name]
    parser = parser_of(f"data {name}", data)
    add(parser)
    return run(parser.parse_args(arguments[1:]))


# ── study ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def study(arguments: list[str]) -> int:
    """run the arms of a study under equal budgets and seeds, and compare them: keel study staircase --quick"""
    parser = parser_of("study", study)
    parser.add_argument("source", nargs="?", help="a shipped study or a TOML file (default: list the shipped ones)")
    parser.add_argument("--out", default="", help="the study's folder (default: one below runs/); it can be gone on with")
    parser.add_argument("--seeds", type=int, help="runs of each arm (default: the study's)")
    parser.add_argument("--quick", action="store_true", help="the study's quick size")
    parser.add_argument(
        "--workers", type=int, help="runs at a time, one CPU thread each (default: 2; with --ray as many as the cluster holds)"
    )
    parser.add_argument(
        "--ray", default="", metavar="ADDRESS", help="make the runs on this Ray cluster: auto, HOST:6379, ray://HOST:10001"
    )
    parser.add_argument("--plan", action="store_true", help="print the arms and stop")
    parser.add_argument("--judge", action="store_true", help="start no run, and judge by those that have ended")
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    parser.add_argument("--keep", default="", metavar="FOLDER", help="keep results there too; without a study: what is kept there")
    o = parser.parse_args(arguments)
    from keel.lab.command import run

    how = {"plan_only": o.plan, "judge_only": o.judge, "as_json": o.json, "keep": o.keep}
    return run(o.source, out=o.out, seeds=o.seeds, quick=o.quick, workers=o.workers, ray=o.ray, **how)


# ── report, view ──────────────────────────────────────────────────────────────────────────────────────────────────────


def report(arguments: list[str]) -> int:
    """write a page of a study or of runs, in one file: keel report runs/mine, keel report runs/one runs/other"""
    parser = parser_of("report", report)
    parser.add_argument(
        "places", nargs="+", metavar="RUN|STUDY", help="one or more run folders for one page, or studies for a page each"
    )
    parser.add_argument("--out", default="", metavar="FILE", help="the file (default: report.html in the first folder)")
    parser.add_argument("--rollouts", type=int, default=10_000, help="completions that the page holds (default: %(default)s)")
    o = parser.parse_args(arguments)
    from keel.report.command import run_report

    return run_report(o.places, out=o.out, most=o.rollouts)


def view(arguments: list[str]) -> int:
    """serve the same pages to this machine while runs train: keel view runs/"""
    parser = parser_of("view", view)
    parser.add_argument("place", nargs="?", default="runs", help="a folder of runs and studies, or one (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="of this machine (default: any free one)")
    parser.add_argument("--rollouts", type=int, default=10_000, help="completions that a page holds (default: %(default)s)")
    o = parser.parse_args(arguments)
    from keel.report.command import run_view

    return run_view(o.place, port=o.port, most=o.rollouts)


# ── export ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def export(arguments: list[str]) -> int:
    """write a run as a plain folder, or a recipe as an engine's configuration: keel export runs/mine, keel export dapo --to trl"""
    parser = parser_of("export", export, settings=True)
    parser.add_argument("source", help="the run folder; with --to a configuration as `keel train` takes it")
    parser.add_argument("out", nargs="?", help="the new folder (default: RUN/export); with --to the new file (default: printed)")
    parser.add_argument("--step", type=int, help="of a run: the checkpoint of this step, not the newest")
    parser.add_argument("--to", metavar="ENGINE", help="trl, verl, prime-rl or slime; what it cannot express is named on stderr")
    parser.add_argument("--adapter", action="store_true", help="with --to trl or verl: name keel's own loss, and not their knobs")
    options, overrides = read(parser, arguments)
    from keel.integrations.command import run

    return run(options, overrides)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train,
    "eval": evaluate,
    "pretrain": pretrain,
    "papers": papers,
    "audit": audit,
    "gap": gap,
    "doctor": doctor,
    "grade": grade,
    "data": data,
    "study": study,
    "report": report,
    "view": view,
    "export": export,
}
