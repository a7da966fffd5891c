"""The plan of the house: imports run one way, and files stay readable."""

import ast
from pathlib import Path

import pytest

import keel

SOURCE = Path(keel.__file__).parent
FLOORS = [  # a room may import from its own floor and from those above it in this list
    {"errors", "types", "files"},
    {"objectives"},
    {"diagnostics", "exact", "scale"},
    {"settings", "config", "contradictions", "ray_cluster"},
    {"tasks", "rewards", "models"},
    {"rollout"},
    {"training", "evaluate", "writers", "progress", "stopping", "curves", "summary", "data"},
    {"manifest", "run_folder"},
    {"parts"},
    {"held_out"},
    {"run", "ray_trainers"},
    {"audit", "gap", "grade", "lab", "doctor", "integrations"},
    {"report"},
    {"arguments", "papers", "commands", "cli", "__init__", "__main__"},
]
KNOWS_ONLY = {
    "diagnostics": {"types", "objectives", "errors"},
    "exact": {"types", "objectives", "errors"},
    "objectives": {"types", "errors"},
    "scale": {"errors"},
}


def floor_of(room):
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"room {room!r} stands on no floor: add it to FLOORS, in its place"
    return found[0]


def room_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "keel":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names if (SOURCE / alias.name).exists()]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("keel."))


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    for other in set(imported_rooms(path)) - {room}:
        assert floor_of(other) <= floor_of(room), f"{room} imports from {other}, which stands above it"
        assert other in KNOWS_ONLY.get(room, {other}), f"{room} knows {other}, and should not"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short(path):
    assert path.read_text().count("\n") <= 420
