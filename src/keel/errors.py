"""One kind of error for everything a user can mend, and help with misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KeelError(ValueError):
    """Says in one paragraph what was found, what was expected and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as "did you mean 'grpo'? " when a known name is near, else the empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""
