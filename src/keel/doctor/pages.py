"""The catalogue of faults as pages: what each shows, why, how it is found, and what to do. Makes docs/faults."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import cache
from types import ModuleType

from keel.doctor.catalogue import FAULTS
from keel.doctor.finding import PARTS, Fault

CODE = re.compile(r"K\d{3}")


def page(fault: Fault) -> str:
    """One fault, in Markdown."""
    looks = found_by().get(fault.code, [])
    lines = [
        f"# {fault.code} {fault.name}",
        "",
        f"Part: **{fault.part}** · component: **{fault.component}**",
        "",
        f"**Shows itself:** {fault.shows}.",
        "",
        f"**Why:** {fault.why}.",
        "",
        f"**Found by:** {', '.join(looks)}.",
        "",
        f"**What the alarm rests on:** {fault.rests_on}.",
        "",
        f"**What to do:** {fault.remedy}.",
    ]
    met = ["", "**Others met it:** " + ", ".join(f"<{source}>" for source in fault.sources)] if fault.sources else []
    return "\n".join([*lines, *met, "", "[All faults](README.md)", ""])


def index() -> str:
    """All faults, by part."""
    head = (
        "# What can go wrong\n\n"
        "Generated from `src/keel/doctor/catalogue.toml`; do not edit. `keel doctor CONFIG` asks before a run, `keel doctor RUN` "
        "after it; `keel doctor K620` prints a page.\n"
    )
    return "\n".join([head, *(_section(part) for part in PARTS)])


def pages() -> dict[str, str]:
    """File name → Markdown, of every page."""
    return {"README.md": index()} | {f"{fault.code}.md": page(fault) for fault in FAULTS}


def _section(part: str) -> str:
    rows = [f"| [{f.code}]({f.code}.md) | {f.name} | {f.component} | {f.shows} |" for f in FAULTS if f.part == part]
    return "\n".join([f"## {part}", "", "| code | fault | component | shows itself |", "| --- | --- | --- | --- |", *rows, ""])


@cache
def found_by() -> dict[str, list[str]]:
    """Code → the probes and signs that can find it, read off their source: every code that a check's functions mention."""
    from keel.doctor.probes import PROBES
    from keel.doctor.signs import SIGNS

    checks = [(f"probe `{name}`", probe) for name, probe in PROBES.items()]
    checks += [(f"sign `{name}`", look) for name, (_, look) in SIGNS.items()]
    found: dict[str, list[str]] = {}
    for name, check in checks:
        for code in sorted(_codes(check.__module__, check.__name__, set())):
            found.setdefault(code, []).append(name)
    return found


def _codes(module: str, name: str, seen: set[tuple[str, str]]) -> set[str]:
    """Codes in a function or a table of the doctor's, and in those that it names."""
    if (module, name) in seen or not module.startswith("keel.doctor"):
        return set()
    seen.add((module, name))
    home = sys.modules[module]
    node = _tops(home).get(name)
    if node is None:  # made elsewhere: a function that was imported
        other = getattr(home, name, None)
        return _codes(other.__module__, name, seen) if inspect.isfunction(other) and other.__module__ != module else set()
    codes = {
        c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str) and CODE.fullmatch(c.value)
    }
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return codes.union(*(_codes(module, other, seen) for other in names))


@cache
def _tops(module: ModuleType) -> dict[str, ast.AST]:
    """What stands at the top of a module, by name."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found
