"""One HTML file that holds everything: words, figures, completions, and the programs that show them. It asks no network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from keel.errors import KeelError
from keel.report import words
from keel.report.data import RunData, read_run, rollouts
from keel.report.figures import figures, series_of
from keel.report.skills import skills_table
from keel.report.study import StudyData, read_study

MOST = 10_000  # completions of a page
PARTS = ("theme.js", "charts.js", "reader.js", "page.js")
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data:; connect-src {connect}; "
    "base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Shown:
    """What one page is about: a study, or runs."""

    runs: tuple[RunData, ...]
    study: StudyData | None = None

    @property
    def title(self) -> str:
        return self.study.name if self.study else " · ".join(run.name for run in self.runs)

    @property
    def kind(self) -> str:
        return "study" if self.study else "run" if len(self.runs) == 1 else "runs"


def shown(places: Sequence[str | Path]) -> Shown:
    """One study, or one or several runs.

    Raises:
        KeelError: a folder is neither, or a study comes with something else.
    """
    paths = [Path(place) for place in places]
    studies = [path for path in paths if (path / "study.json").is_file()]
    if studies and len(paths) > 1:
        raise KeelError(f"{studies[0]} is a study, and {len(paths)} folders were named. Expected one study, or one or more runs.")
    if studies:
        study = read_study(studies[0])
        return Shown(study.runs, study)
    return Shown(tuple(read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)))


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from one another."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names) and not any(name.isdigit() for name in names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]


def payload(what: Shown, most: int = MOST) -> dict[str, Any]:
    """Everything that the page's programs show."""
    runs = [run for run in what.runs if run.rows]
    told = _read_from(runs)
    return {
        "head": head(what),
        "skills": skills_table(series_of(runs)),
        "series": [{"name": line.name, "colour": line.colour} for line in series_of(runs)],
        "figures": figures(runs, what.study.rows if what.study else ()),
        "runs": [{"name": run.name, "arm": run.arm, "seed": run.seed} for run in told],
        "rollouts": rollouts(told, most) if told else None,
    }


def _read_from(runs: Sequence[RunData]) -> list[RunData]:
    """Runs whose completions are shown: of a study one for each arm, its first seed."""
    firsts: dict[str, RunData] = {}
    for run in runs:
        firsts.setdefault(run.arm or str(run.path), run)
    return list(firsts.values())


def head(what: Shown) -> dict[str, Any]:
    """The words above the curves. Where its stage changes, more of a served page does than its programs can renew."""
    if what.study:
        judged = hashlib.sha256(repr(what.study.results).encode()).hexdigest()[:16]
        return {"headline": words.study_headline(what.study), "notes": _study_notes(what.study), "stage": judged}
    if len(what.runs) == 1:
        return {"headline": words.run_headline(what.runs[0]), "notes": words.run_notes(what.runs[0])}
    told = [f"{run.name}: {words.run_headline(run)}" for run in what.runs]
    alone = "One run each: a difference between two of them may be luck. A study with several seeds tells."
    return {"headline": words.runs_headline(what.runs), "notes": [*told, alone]}


def _study_notes(study: StudyData) -> list[str]:
    told = [f"{study.ended} of {study.planned} runs have ended."] if study.results and study.ended < study.planned else []
    if study.rows and not any(each.verdict != "not judged yet" for each in study.predictions):
        told.append("No prediction was judged. Intervals are of each arm alone, and not corrected for comparing several.")
    return told + [f"Failed: {where}: {why}" for where, why in study.failed.items()]


def html(what: Shown, *, most: int = MOST, live: str = "") -> str:
    """The page.

    Args:
        most: completions at most.
        live: where a server gives the data and the chart program anew; "" for a page that holds them.

    Raises:
        KeelError: plotly or jinja2 is not installed.
    """
    template = _template("page.html")
    blobs = {} if live else _blobs(payload(what, most))
    # of the content, so that the same runs give the same file, and no completion can hold it
    nonce = secrets.token_hex(16) if live else hashlib.sha256("".join(blobs.values()).encode()).hexdigest()[:32]
    return template.render(
        what=what,
        head=head(what),
        words=words,
        blobs=blobs,
        live=live,
        nonce=nonce,
        policy=POLICY.format(nonce=nonce, connect="'self'" if live else "'none'"),
        css=asset("page.css"),
        script="\n".join(map(asset, PARTS)),
        settings=_settings(what),
        made_with=_made_with(what.runs),
    )


def _blobs(told: Mapping[str, Any]) -> dict[str, str]:
    """Words and figures by themselves, so that they are seen before thousands of completions are unpacked."""
    apart = ("runs", "rollouts")
    first = {name: value for name, value in told.items() if name not in apart}
    said = {name: told[name] for name in apart}
    return {"data": packed(as_json(first)), "said": packed(as_json(said)), "plotly": packed_plotly()}


def index_html(entries: Sequence[Mapping[str, str]]) -> str:
    """The list of what a server shows: each with its href, name, kind and headline."""
    nonce = secrets.token_hex(16)
    policy = POLICY.format(nonce=nonce, connect="'none'")
    texts = {"css": asset("page.css"), "script": asset("theme.js")}
    return _template("index.html").render(entries=entries, nonce=nonce, policy=policy, **texts)


def as_json(value: Mapping[str, Any]) -> bytes:
    """JSON of any text: what UTF-8 cannot say goes as an escape, what JSON cannot say as null."""
    return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False).encode()


def packed(data: bytes) -> str:
    """Bytes that can stand in HTML, small."""
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


@lru_cache(maxsize=1)
def packed_plotly() -> str:
    return packed(plotly_program())


def plotly_program() -> bytes:
    """plotly.js, as plotly ships it.

    Raises:
        KeelError: plotly is not installed.
    """
    _need("plotly")
    return files("plotly").joinpath("package_data/plotly.min.js").read_bytes()


def asset(name: str) -> str:
    return files("keel.report").joinpath("templates", name).read_text(encoding="utf-8")


def _template(name: str) -> Any:
    _need("jinja2")
    from jinja2 import Environment, StrictUndefined

    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(asset(name))


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise KeelError(f"The page needs {package}, which is not installed. Install what it takes: pip install 'keel-rl[report]'.")


def _settings(what: Shown) -> list[tuple[str, list[str]]]:
    """Settings by name: one column if all runs agree, else one for each."""
    runs = what.runs if not what.study else what.runs[:1]
    names = dict.fromkeys(name for run in runs for name in run.config if name != "out")
    rows = [(name, [_shown(run.config.get(name)) for run in runs]) for name in names]
    return sorted(rows, key=lambda row: len(set(row[1])) == 1)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return (
        "–"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _made_with(runs: Sequence[RunData]) -> str:
    versions = (runs[0].manifest.get("versions") or {}) if runs else {}
    return ", ".join(f"{name} {versions[name]}" for name in ("keel-rl", "torch", "transformers") if name in versions)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
