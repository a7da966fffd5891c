"""The command line: finds the command, runs it, and tells a mistake in one paragraph."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from keel.commands import COMMANDS
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


def _overview() -> str:
    lines = [f"  {name:<10} {(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    head = "keel: a bench for reinforcement-learning post-training of language models\n\nusage: keel COMMAND [options]\n"
    return "\n".join([head, *lines, "", "keel COMMAND --help says more. keel --version prints the version."])


if __name__ == "__main__":
    sys.exit(main())
