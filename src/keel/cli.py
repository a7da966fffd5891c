"""The command line: `keel train`, `keel audit` and the others of COMMANDS. Every setting is a flag by its dotted name.

What is imported at the top is light, so that help and mistakes answer at once; each command imports what it needs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from keel.errors import KeelError, nearest

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 1 when something that was checked does not hold; 2 for a mistake, told in one paragraph on stderr; 130
        after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except KeelError as mistake:
        print(f"keel: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\n{stopped or 'Stopped at once. What was saved before is whole.'}", file=sys.stderr)
        return INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from keel import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        hint = hint[:1].upper() + hint[1:]
        raise KeelError(f"There is no command {name!r}. {hint}Expected one of: {', '.join(COMMANDS)}. See `keel --help`.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that plugins and recipes of one's own are found
    return COMMANDS[name](rest) or 0


# ── train ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def train(arguments: list[str]) -> None:
    """train a policy: keel train quickstart, keel train solid --task arithmetic:hard --train.lr 1e-4"""
    parser = _parser("train", train, settings=True)
    parser.add_argument("config", nargs="?", help="a recipe, a shipped configuration or a TOML file (default: quickstart)")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder; only --steps can be given with it")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and what they amount to")
    parser.add_argument("--json", action="store_true", help="print the summary (or the dry run) as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options, overrides = _read(parser, arguments)
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
    parser = _parser("eval", evaluate, settings=True)
    parser.add_argument("source", help="a run folder (its own task, template and sampling hold) or a model")
    parser.add_argument("--step", type=int, help="of a run: the checkpoint of this step, not the newest")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON on stdout")
    options, overrides = _read(parser, arguments)
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
    parser = _parser("pretrain", pretrain)
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
    parser = _parser("papers", papers)
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
    parser = _parser("audit", audit)
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
    parser = _parser("gap", gap, settings=True)
    parser.add_argument("source", help="a run folder (its own settings hold) or a model")
    parser.add_argument("--samples", type=int, default=512, help="completions (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of each prompt (default: %(default)s)")
    parser.add_argument("--step", type=int, help="of a run: the checkpoint of this step, not the newest")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON on stdout")
    options, overrides = _read(parser, arguments)
    from keel.gap.command import run

    return run(
        options.source, overrides, samples=options.samples, group_size=options.group_size, step=options.step, as_json=options.json
    )


# ── study ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def study(arguments: list[str]) -> int:
    """run the arms of a study under equal budgets and seeds, and compare them: keel study staircase --quick"""
    parser = _parser("study", study)
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
    parser = _parser("export", export)
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
    "study": study,
    "export": export,
}


# ── reading arguments ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a KeelError, and --help of a command with settings lists them all."""

    settings = False

    def error(self, message: str) -> NoReturn:
        raise KeelError(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` shows what is expected.")

    def format_help(self) -> str:
        return super().format_help() + (_settings_help() if self.settings else "")


def _parser(name: str, command: Callable[..., None], settings: bool = False) -> _Parser:
    parser = _Parser(prog=f"keel {name}", description=command.__doc__, allow_abbrev=False)
    parser.settings = settings
    return parser


def _read(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command's own options, and every other --flag as a setting with its value."""
    own = {flag for action in parser._actions for flag in action.option_strings}
    from keel.settings import parse_value

    rest: list[str] = []
    overrides: dict[str, Any] = {}
    queue = list(arguments)
    while queue:
        token = queue.pop(0)
        flag, equals, value = token.partition("=")
        if not flag.startswith("--") or flag in own:
            rest.append(token)
            continue
        if not equals:
            value = queue.pop(0) if queue and not queue[0].startswith("--") else "true"
        name = "engine.name" if flag == "--engine" else flag[2:].replace("-", "_")
        overrides[name] = parse_value(value)
    return parser.parse_args(rest), overrides


def _settings_help() -> str:
    from keel.config import RunConfig
    from keel.settings import kind, settings_of, shipped

    lines = ["", "settings (in a TOML file: [train] lr = 1e-4; on the command line: --train.lr 1e-4):"]
    for name, annotation, default, phrase in settings_of(RunConfig):
        shown = "" if default is None or repr(default) == "PydanticUndefined" else f" [{default}]"
        lines.append(f"  --{name:<36} {phrase}{shown}  ({kind(annotation)})")
    return "\n".join([*lines, "", f"shipped configurations: {', '.join(shipped())}", ""])


def _overview() -> str:
    lines = [f"  {name:<10} {(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    head = "keel: a bench for reinforcement-learning post-training of language models\n\nusage: keel COMMAND [options]\n"
    return "\n".join([head, *lines, "", "keel COMMAND --help says more. keel --version prints the version."])
