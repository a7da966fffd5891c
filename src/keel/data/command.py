"""`keel data check` and `keel data build`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.data.check import Findings, check
from keel.data.items import open_items
from keel.data.samples import read_samples
from keel.errors import KeelError
from keel.files import append_jsonl, json_of, write_atomically, written

if TYPE_CHECKING:
    from keel.data.build import Built
    from keel.data.select import Candidate


def find(
    spec: str,
    *,
    against: Sequence[str] = (),
    samples: str = "",
    grader: str = "",
    also: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> Findings:
    """Check a data set. Arguments as of `run_check`."""
    items = open_items(spec, grader)
    sampled = read_samples(samples, items.items) if samples else None
    return check(items, [open_items(other) for other in against], sampled, also=also, keep=keep)


def run_check(
    spec: str,
    *,
    against: Sequence[str] = (),
    samples: str = "",
    grader: str = "",
    also: Sequence[str] = (),
    keep: Sequence[str] = (),
    out: str = "",
    as_json: bool = False,
) -> int:
    """`keel data check`.

    Args:
        spec: a task, or a JSONL or Parquet file.
        against: specs or files that are evaluated on: no row may stand in them.
        samples: a run folder or a JSONL of completions, which tell how hard the items are and which gold answers are suspect.
        grader: by name, in place of the task's.
        also, keep: kinds of faults to drop rows for, and not to.
        out: the cleaned set; what was dropped, and why, goes next to it (`.dropped.jsonl`). "" writes nothing.

    Returns:
        0: a fault is a finding and not a failure.
    """
    from keel.data.words import told

    places = written_to(out) if out else []
    found = find(spec, against=against, samples=samples, grader=grader, also=also, keep=keep)
    if places:
        write_clean(found, *places)
    print(json_of(found.as_json()) if as_json else told(found, " and ".join(map(str, places))))
    return 0


def written_to(out: str) -> list[Path]:
    """Files of a cleaned set.

    Raises:
        KeelError: one exists already, or its folder does not.
    """
    clean = Path(out).expanduser()
    return new_files(clean, clean.with_name(f"{clean.stem}.dropped.jsonl"))


def new_files(*files: Path) -> list[Path]:
    """The same files, if they can be made.

    Raises:
        KeelError: one exists already, or its folder does not.
    """
    for file in files:
        if file.exists() or not file.parent.is_dir():
            found = "exists already" if file.exists() else f"has no folder {str(file.parent)!r}"
            raise KeelError(f"{str(file)!r} {found}. Expected a new file in a folder that exists: nothing is overwritten.")
    return list(files)


def write_clean(found: Findings, clean: Path, dropped: Path) -> None:
    """The rows that are left, as they stood in their file; and those that are not, each with the reason."""
    append_jsonl(clean, (writable(item.row) for item in found.kept))
    rows = {item.id: item.row for item in found.items.items} | dict(found.items.rows)
    gone = found.dropped.values()
    append_jsonl(
        dropped, ({"dropped": f.kind, "why": f.why, "id": f.id, "like": f.other, "row": writable(rows.get(f.id))} for f in gone)
    )


def writable(row: object) -> dict[str, Any] | None:
    """A row as JSON can hold it: dates and the like as text, half a surrogate pair as a question mark."""
    return json.loads(json.dumps(row, default=str, ensure_ascii=False).encode("utf-8", "replace"))


def run_build(
    specs: Sequence[str],
    *,
    out: str,
    size: int,
    model: str = "tiny-dense",
    template: str = "auto",
    pool: int = 2000,
    samples: int = 8,
    low: float = 0.1,
    high: float = 0.9,
    variations: bool = False,
    against: Sequence[str] = (),
    minutes: float = 20.0,
    temperature: float = 1.0,
    max_completion_tokens: int = 48,
    threads: int | None = None,
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """`keel data build`.

    Args:
        specs: tasks whose training prompts are candidates; the other settings are those of `build.Plan`.
        out: the new JSONL; next to it come the held-out rows (`.test.jsonl`), as many unselected ones (`.unselected.jsonl`) and
            the card (`.md`).
        model, template: whose pass rates are measured, and how it is asked.

    Returns:
        0.
    """
    import sys

    from keel.data.build import Plan, build
    from keel.models.checksum import checksum
    from keel.models.load import load_policy
    from keel.rollout.local import LocalEngine
    from keel.types import Sampling

    files = files_of(out)
    sampling = Sampling(temperature=temperature, max_completion_tokens=max_completion_tokens)
    choices = dict(pool=pool, samples=samples, low=low, high=high, variations=variations, minutes=minutes, seed=seed)
    plan = Plan(tuple(specs), size, against=tuple(against), sampling=sampling, **choices)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    policy = load_policy(model, template=template)
    built = build(plan, policy, LocalEngine(policy), lambda line: print(line, file=sys.stderr, flush=True))
    spec = write_built(built, files, policy.name, checksum(policy.weights()))
    print(json_of(summary(built, files, spec)) if as_json else built_told(built, files, spec))
    return 0


def files_of(out: str) -> dict[str, Path]:
    """Files of built data by what they are.

    Raises:
        KeelError: one exists already, or its folder does not.
    """
    data = Path(out).expanduser()
    ends = {"held out": ".test.jsonl", "unselected": ".unselected.jsonl", "card": ".md"}
    files = {"data": data} | {name: data.with_name(data.stem + end) for name, end in ends.items()}
    new_files(*files.values())
    return files


def write_built(built: Built, files: Mapping[str, Path], model: str, checksum: str) -> str:
    """Write data, held-out rows, control and card.

    Returns:
        The spec under which the data can be trained on.

    Raises:
        KeelError: no exact way of reading answers grades these tasks' gold, so a JSONL cannot carry their reward.
    """
    from keel.data.card import card

    spec = f"jsonl:{files['data']}?test={files['held out']}&extract={extract_of(built)}"
    append_jsonl(files["data"], map(_row, built.chosen.candidates))
    append_jsonl(files["unselected"], map(_row, built.control))
    append_jsonl(files["held out"], ({"id": p.id, "prompt": p.text, "answer": p.answer} for p in built.pool.held_out))
    tables = {name: path for name, path in files.items() if name != "card"}
    with written(files["card"].name, files["card"].parent):
        write_atomically(files["card"], card(built, model, checksum, tables, spec))
    return spec


def extract_of(built: Built) -> str:
    """The option `extract` of a JSONL task under which every source's gold completions score 1."""
    from keel.tasks.table import EXTRACT

    tasks = {source.name: source.task for source in built.pool.sources}
    rows = [(c.prompt, tasks[c.source].gold(c.prompt)) for c in built.chosen.candidates]
    for name in ("marker", "tag", "auto"):
        if all(EXTRACT[name](prompt, gold).correct for prompt, gold in rows):
            return name
    raise KeelError(
        f"The gold completions of {', '.join(tasks)} are graded by no one way of reading answers (marker, tag, auto), so one JSONL "
        "cannot carry their rewards. Build from tasks that write their answers alike."
    )


def _row(candidate: Candidate) -> dict[str, object]:
    prompt = candidate.prompt
    about = {"source": candidate.source, "verified": candidate.verified, "right": candidate.right, "tries": candidate.tries}
    return {"id": prompt.id, "prompt": prompt.text, "answer": prompt.answer, **about}


def summary(built: Built, files: Mapping[str, Path], spec: str) -> dict[str, object]:
    """For machines."""
    rates = {
        name: {"pass_rate": sum(c.pass_rate for c in first) / len(first), "again": sum(c.pass_rate for c in again) / len(again)}
        for name, first, again in (
            ("selected", built.chosen.candidates, built.again),
            ("unselected", built.control, built.control_again),
        )
    }
    counts = {"candidates": len(built.pool.candidates), "measured": len(built.measured), "rows": len(built.chosen.candidates)}
    rest = {"left": built.chosen.left, "rejected": built.pool.rejected, "seconds": built.seconds, "stopped": built.stopped}
    return counts | rates | rest | {"spec": spec, "files": {name: str(path) for name, path in files.items()}}


def built_told(built: Built, files: Mapping[str, Path], spec: str) -> str:
    """In a few lines."""
    told = summary(built, files, spec)
    lines = [f"{told['rows']:,} rows of {told['measured']:,} measured candidates, {built.seconds:.0f} s."]
    for name in ("selected", "unselected"):
        rate = told[name]
        lines.append(f"{name:<10} pass rate {rate['pass_rate']:.3f} when measured, {rate['again']:.3f} on fresh samples")
    lines.append("others: " + (", ".join(f"{count:,} {why}" for why, count in built.chosen.left.items()) or "none"))
    return "\n".join([*lines, f"card     {files['card']}", f"task     {spec}"])
