"""What runs in a worker process: math-verify, one question at a time, from a line of JSON to a line of JSON.

This file is run by its path and imports nothing of keel, so that a worker starts in the time that math-verify takes to import.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from functools import lru_cache

MEMORY = 3 << 30  # bytes of address space: a formula that needs more ends its worker, not the machine


def limit(memory: int) -> None:
    """Bound this process's memory, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError, OSError):
        pass  # no such limit here: the wall-clock bound remains


def limit_time(seconds: float) -> None:
    """End this process after so many more seconds of computing, even when nobody is left to end it."""
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 2, hard))
    except (ImportError, ValueError, OSError):
        pass


@lru_cache(maxsize=4096)
def read(text: str):
    """A formula as sympy sees it. The whole text is one formula: math-verify's own search for pieces of it is not used.

    Raises whatever the parser raises where the text is none.
    """
    if re.fullmatch(r"-?\d+(?:/\d+)?", text):
        from sympy import Rational

        return Rational(text)
    from latex2sympy2_extended import NormalizationConfig, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import latex2sympy

    dress = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, nits=True, boxed="none", equations=False)
    return latex2sympy(normalize_latex(text, dress))


def family(found) -> str:
    """Sets, pairs and intervals, equations and the rest are never the same thing."""
    from sympy import FiniteSet, Interval, MatrixBase, Set, Tuple
    from sympy.core.relational import Relational

    for kind in (FiniteSet, Interval, Set, Tuple, MatrixBase, Relational):
        if isinstance(found, kind):
            return kind.__name__
    return "And" if type(found).__name__ == "And" else "value"


def decide(answer: str, gold: str) -> dict[str, object]:
    """{"read": whether both are formulas, "same": whether they are the same one}."""
    from math_verify import verify

    try:
        wanted = read(gold)
    except Exception as error:  # the parser raises plain Exceptions
        return {"read": False, "what": "gold", "why": f"{type(error).__name__}: {str(error)[:80]}"}
    try:
        given = read(answer)
    except Exception as error:
        return {"read": False, "what": "answer", "why": f"{type(error).__name__}: {str(error)[:80]}"}
    numbers = [found.doit() if hasattr(found, "doit") and not _free(found) else found for found in (given, wanted)]
    if all(getattr(number, "is_Rational", False) for number in numbers) or any(map(_endless, numbers)):
        return {"read": True, "same": bool(numbers[0] == numbers[1])}
    same = family(given) == family(wanted) and _free(given) == _free(wanted)
    same = same and bool(verify([wanted], [given], timeout_seconds=None, float_rounding=12))
    return {"read": True, "same": same and not _apart(*numbers)}


def _endless(found) -> bool:
    """Infinite, or no number at all: sympy's simplification says now this and now that of a difference of such."""
    return getattr(found, "is_finite", None) is False or str(found) in ("nan", "zoo", "oo", "-oo")


def _apart(given, wanted) -> bool:
    """Whether two values differ when they are computed: a check on math-verify's yes."""
    from sympy import Expr, Rational

    if not isinstance(given, Expr) or not isinstance(wanted, Expr):
        return False
    at = {symbol: Rational(17 + 5 * i, 23) for i, symbol in enumerate(sorted(given.free_symbols | wanted.free_symbols, key=str))}
    values = [found.subs(at).evalf(30) for found in (given, wanted)]
    if not all(value.is_number and value.is_finite for value in values):
        return False
    return bool(abs(values[0] - values[1]) > 1e-12 * (1 + abs(values[1])))


def _free(found) -> frozenset[str]:
    return frozenset(str(symbol) for symbol in getattr(found, "free_symbols", ()))


def main() -> None:
    """Say that it is ready, then answer lines until there are no more."""
    import logging
    import warnings

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    limit(MEMORY)
    sys.setrecursionlimit(3000)
    decide("\\sqrt{2}+1", "1+\\sqrt{2}")
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        limit_time(question["bound"])
        random.seed(0)  # sympy tries random numbers
        try:
            said = decide(question["answer"], question["gold"])
        except (Exception, RecursionError, MemoryError) as error:
            said = {"read": False, "what": "comparison", "why": type(error).__name__}
        print(json.dumps(said | {"id": question["id"]}), file=out, flush=True)


if __name__ == "__main__":
    main()
