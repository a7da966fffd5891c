"""Reading a command line: argparse whose mistakes are told in a paragraph, and every setting as a flag by its dotted name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from keel.errors import KeelError

SHORT = {  # flags that stand for a setting with a longer name
    "--engine": "engine.name",
    "--ray": "cluster.ray",
    "--rollout-workers": "cluster.rollout_workers",
    "--train-workers": "cluster.train_workers",
}


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a KeelError, and --help of a command with settings lists them all."""

    settings = False

    def error(self, message: str) -> NoReturn:
        raise KeelError(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` shows what is expected.")

    def format_help(self) -> str:
        return super().format_help() + (_settings_help() if self.settings else "")


def parser_of(name: str, command: Callable[..., None], settings: bool = False) -> Parser:
    parser = Parser(prog=f"keel {name}", description=command.__doc__, allow_abbrev=False)
    parser.settings = settings
    return parser


def read(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
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
        overrides[SHORT.get(flag, flag[2:].replace("-", "_"))] = parse_value(value)
    return parser.parse_args(rest), overrides


def _settings_help() -> str:
    from keel.config import RunConfig
    from keel.settings import kind, settings_of, shipped

    lines = ["", "settings (in a TOML file: [train] lr = 1e-4; on the command line: --train.lr 1e-4):"]
    for name, annotation, default, phrase in settings_of(RunConfig):
        shown = "" if default is None or repr(default) == "PydanticUndefined" else f" [{default}]"
        lines.append(f"  --{name:<36} {phrase}{shown}  ({kind(annotation)})")
    return "\n".join([*lines, "", f"shipped configurations: {', '.join(shipped())}", ""])
