"""The commands, each with its options. Every setting is a flag by its dotted name.

What a command needs is imported when it runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from keel.arguments import parser_of, read
from keel.errors import KeelError

# ── train ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def train(arguments: list[str]) -> None:
    """train a policy: keel train quickstart, keel train solid --task arithmetic:hard --train.lr 1e-4"""
    parser = parser_of("train", train, settings=True)
    parser.add_argument("config", nargs="?", help="a recipe, a shipped configuration or a TOML file (default: quickstart)")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder; only --steps can be given with it")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and what they amount to")
    parser.add_argument("--json", action="store_true", help="print the summary (or the dry run) as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options, overrides = read(parser, arguments)
    from keel.config import load_config

    if options.dry_run and not options.resume:
        _dry_run(options, overrides)
        return
    if options.resume:
        steps = _steps_alone(options, overrides)
        from keel.run import resume

        result = resume(options.resume, steps=steps, quiet=options.quiet)
    else:
        config = load_config(options.config or "quickstart", overrides)
        from keel.run import train as begin

        result = begin(config, quiet=options.quiet)
    print(json.dumps(result.summary | {"run": str(result.folder.path)})) if options.json else result.report()


def _dry_run(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    from keel.config import load_config

    config = load_config(options.config or "quickstart", overrides).resolved()
    from keel.run_folder import place_of, toml_of

    config = config.replaced({"out": str(place_of(config))})
    derived = config.derived()
    if options.json:
        print(json.dumps({"config": config.model_dump(mode="json"), "derived": derived}))
        return
    width = max(map(len, derived))
    print(toml_of(config), *(f"# {name:<{width}} {value:>13,}" for name, value in derived.items()), sep="\n")


def _steps_alone(options: argparse.Namespace, overrides: dict[str, Any]) -> int | None:
    steps = overrides.pop("steps", None)
    if overrides or options.config or options.dry_run:
        given = ", ".join([*overrides, *filter(None, [options.config]), *(["--dry-run"] if options.dry_run else [])])
        raise KeelError(
            f"--resume came with {given}. Expected nothing but --steps: a resumed run keeps the settings that it "
            "began with, which its config.toml holds. Start a new run to change them."
        )
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise KeelError(f"--steps is {steps!r}. Expected a whole number of optimizer steps, at least 1.")
    return steps


# ── eval ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate(arguments: list[str]) -> None:
    """evaluate a run or a model on held-out prompts: keel eval runs/mine --evaluation.samples 16"""
    parser = parser_of("eval", evaluate, settings=True)
    parser.add_argument("source", help="a run folder (its own task, template and sampling hold) or a model")
    parser.add_argument("--step", type=int, help="of a run: the checkpoint of this step, not the newest")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON on stdout")
    options, overrides = read(parser, arguments)
    from keel import run
    from keel.config import load_config
    from keel.run_folder import RunFolder

    if os.path.isfile(os.path.join(options.source, "config.toml")):
        folder = RunFolder.open(options.source)
        parts = run.assemble(folder.config.replaced(overrides), run.trained_policy(folder, options.step))
    else:
        parts = run.assemble(load_config("solid", {"model": options.source} | overrides))
    numbers = run.held_out(parts)
    if options.json:
        print(json.dumps({"source": options.source, "task": parts.config.task, **numbers}))
        return
    width = max(map(len, numbers))
    print(*(f"{name:<{width}}  {value:.4g}" for name, value in numbers.items()), sep="\n")


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
    from keel.objectives.papers import difference, papers_markdown
    from keel.objectives.recipes import RECIPES, recipe

    if len(options.recipes) > 2:
        raise KeelError(f"keel papers was given {len(options.recipes)} recipes. Expected none, one or two to compare.")
    if options.markdown:
        print(papers_markdown(), end="")
    elif len(options.recipes) == 2:
        found = difference(*options.recipes)
        _print_json(map(vars, found)) if options.json else _print_difference(found, *options.recipes)
    elif options.recipes:
        one = recipe(options.recipes[0])
        _print_json([_plain(one)]) if options.json else _print_one(one)
    else:
        _print_json(map(_plain, RECIPES.values())) if options.json else _print_list()


def _plain(one: Any) -> dict[str, Any]:
    from keel.objectives.papers import choices

    about = {name: getattr(one, name) for name in ("name", "title", "paper", "url", "notes")}
    return about | {"choices": choices(one), "sources": dict(one.sources)}


def _print_json(rows: Iterable[Any]) -> None:
    print(json.dumps(list(rows), ensure_ascii=False))


def _print_list() -> None:
    from keel.objectives.recipes import RECIPES

    width = max(map(len, RECIPES))
    print(*(f"{each.name:<{width}}  {each.title}  [{each.paper}]" for each in RECIPES.values()), sep="\n")


def _print_one(one: Any) -> None:
    from keel.objectives.papers import choices

    print(f"{one.title}\n{one.paper}  {one.url}\n")
    for name, here in choices(one).items():
        source = one.sources.get(name, "")
        print(f"{name:<19} {here}" + (f"\n{'':<19} └ {source}" if source else ""))
    print(f"\n{one.notes}" if one.notes else "")


def _print_difference(found: Sequence[Any], a: str, b: str) -> None:
    width = max(len(a), len(b))
    for each in found:
        print(each.field)
        for name, choice, source in ((a, each.a, each.source_a), (b, each.b, each.source_b)):
            print(f"  {name:<{width}}  {choice}" + (f"\n  {'':<{width}}  └ {source}" if source else ""))
    print("" if found else f"{a} and {b} choose the same.")


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
    parser.add_argument("--markdown", action="store_true", help="print docs/claims.md")
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


# ── grade ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

COLUMNS = ("answer", "gold", "label", "prompt", "class")


def grade(arguments: list[str]) -> int:
    """grade the graders: keel grade answers.jsonl"""
    parser = parser_of("grade", grade)
    parser.add_argument(
        "source", help="a JSONL of answers with gold answers, and labels (right or wrong, or a level) if there are any"
    )
    parser.add_argument(
        "--grader", action="append", default=[], metavar="NAME", help="a grader, or file.py:function; may be repeated"
    )
    for role in COLUMNS:
        parser.add_argument(f"--{role}", default="", metavar="COLUMN", help=f"the column of the {role} (default: guessed)")
    parser.add_argument(
        "--callers", type=int, default=0, help="threads that ask at once (default: one, or as many as the grader takes)"
    )
    parser.add_argument("--twice", action="store_true", help="ask everything twice, to see whether verdicts are stable")
    parser.add_argument("--feature", action="append", default=[], metavar="COLUMN", help="a column that errors may depend on")
    parser.add_argument("--group-size", type=int, default=8, help="of the training that is thought of (default: %(default)s)")
    parser.add_argument("--markdown", default="", metavar="FILE", help="write a page, with a picture next to it")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON on stdout")
    o = parser.parse_args(arguments)
    from keel.grade.command import as_columns, run

    shown = dict(callers=o.callers, twice=o.twice, features=o.feature, group_size=o.group_size)
    return run(o.source, o.grader, as_columns(o), **shown, markdown=o.markdown, as_json=o.json)


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def data(arguments: list[str]) -> int:
    """look for faults in a data set, or build one: keel data check rows.jsonl; keel data build arithmetic:medium"""
    commands = {"check": _check, "build": _build}
    if not arguments or arguments[0] not in commands:
        print("usage: keel data check SPEC …  or  keel data build SPEC …; `keel data check --help` says more.")
        return 0 if arguments[:1] in ([], ["--help"], ["-h"]) else 2
    return commands[arguments[0]](arguments[1:])


def _check(arguments: list[str]) -> int:
    """copies, leaks, gold that cannot be graded or is likely wrong, and what nobody or everybody solves"""
    parser = parser_of("data check", _check)
    parser.add_argument("spec", help="a task, or a JSONL or Parquet file")
    parser.add_argument("--against", nargs="+", default=[], metavar="SPEC", help="what is evaluated on: no row may stand in it")
    parser.add_argument(
        "--samples", default="", metavar="RUN", help="a run folder or a JSONL of completions: pass rates, suspect gold"
    )
    parser.add_argument("--grader", default="", help="in place of the task's own")
    parser.add_argument(
        "--drop", nargs="+", default=[], metavar="FAULT", help="kinds of faults to drop rows for, besides the usual"
    )
    parser.add_argument("--keep", nargs="+", default=[], metavar="FAULT", help="kinds of faults not to drop rows for")
    parser.add_argument("--out", default="", metavar="FILE", help="write the cleaned set, and what was dropped and why")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON on stdout")
    o = parser.parse_args(arguments)
    from keel.data.command import run_check

    given = dict(against=o.against, samples=o.samples, grader=o.grader, also=o.drop, keep=o.keep)
    return run_check(o.spec, **given, out=o.out, as_json=o.json)


def _build(arguments: list[str]) -> int:
    """candidates with verified gold, chosen by a model's pass rate and for diversity, with a card and an unselected control"""
    parser = parser_of("data build", _build)
    parser.add_argument("specs", nargs="+", help="tasks whose training prompts are candidates")
    parser.add_argument("--out", required=True, metavar="FILE", help="the new JSONL")
    parser.add_argument("--size", type=int, required=True, help="rows")
    parser.add_argument("--model", default="tiny-dense", help="whose pass rates are measured (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=2000, help="candidates (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="completions of each (default: %(default)s)")
    parser.add_argument("--low", type=float, default=0.1, help="smallest pass rate (default: %(default)s)")
    parser.add_argument("--high", type=float, default=0.9, help="largest pass rate (default: %(default)s)")
    parser.add_argument("--variations", action="store_true", help="also other wordings of the candidates")
    parser.add_argument("--against", nargs="+", default=[], metavar="SPEC", help="what is evaluated on: no row may stand in it")
    parser.add_argument("--minutes", type=float, default=20.0, help="at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on stdout")
    o = parser.parse_args(arguments)
    from keel.data.command import run_build

    chosen = dict(model=o.model, pool=o.pool, samples=o.samples, low=o.low, high=o.high, variations=o.variations)
    return run_build(o.specs, out=o.out, size=o.size, **chosen, against=o.against, minutes=o.minutes, seed=o.seed, as_json=o.json)


# ── study ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def study(arguments: list[str]) -> int:
    """run the arms of a study under equal budgets and seeds, and compare them: keel study staircase --quick"""
    parser = parser_of("study", study)
    parser.add_argument("source", nargs="?", help="a shipped study or a TOML file (default: list the shipped ones)")
    parser.add_argument("--out", default="", help="the study's folder (default: one below runs/); it can be gone on with")
    parser.add_argument("--seeds", type=int, help="runs of each arm (default: the study's)")
    parser.add_argument("--quick", action="store_true", help="the study's quick size")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one CPU thread each (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="print the arms and stop")
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    o = parser.parse_args(arguments)
    from keel.lab.command import run

    return run(o.source, out=o.out, seeds=o.seeds, quick=o.quick, workers=o.workers, plan_only=o.plan, as_json=o.json)


# ── export ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def export(arguments: list[str]) -> None:
    """write a run's policy as a plain transformers folder, adapters merged: keel export runs/mine"""
    parser = parser_of("export", export)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("out", nargs="?", help="the new folder (default: RUN/export)")
    parser.add_argument("--step", type=int, help="the checkpoint of this step, not the newest")
    options = parser.parse_args(arguments)
    from keel.run_folder import RunFolder

    folder = RunFolder.open(options.run)
    from keel.models.export import export as write
    from keel.run import trained_policy

    print(write(trained_policy(folder, options.step), options.out or folder.path / "export"))


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train,
    "eval": evaluate,
    "pretrain": pretrain,
    "papers": papers,
    "audit": audit,
    "gap": gap,
    "grade": grade,
    "data": data,
    "study": study,
    "export": export,
}
