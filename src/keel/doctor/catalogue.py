"""The catalogue of faults: `catalogue.toml` as `Fault`s."""

from __future__ import annotations

import tomllib
from importlib.resources import files

from keel.doctor.finding import Fault
from keel.errors import KeelError, nearest


def _read() -> tuple[Fault, ...]:
    rows = tomllib.loads((files("keel.doctor") / "catalogue.toml").read_text(encoding="utf-8"))
    return tuple(Fault(code, **row | {"sources": tuple(row.get("sources", ()))}) for code, row in rows.items())


FAULTS: tuple[Fault, ...] = _read()
_BY_CODE = {each.code: each for each in FAULTS}


def fault(code: str) -> Fault:
    """A fault by its code.

    Raises:
        KeelError: there is none; the nearest code is named.
    """
    if code not in _BY_CODE:
        raise KeelError(
            f"There is no fault {code!r}: {nearest(code, _BY_CODE)}Codes go from {FAULTS[0].code} to {FAULTS[-1].code}."
        )
    return _BY_CODE[code]
