"""`keel report` and `keel view`: a study's or a run's page, as a file or served while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keel.errors import KeelError
from keel.files import write_atomically, written
from keel.report.page import MOST, html, shown


def report(places: Sequence[str], *, out: str = "", most: int = MOST) -> Path:
    """Write the page.

    Args:
        places: one study folder, or one or more run folders.
        out: the file; "" is report.html in the first folder.
        most: completions that the page holds.

    Raises:
        KeelError: nothing is there to report on, a package is missing, or the file cannot be written.
    """
    if most < 1:
        raise KeelError(f"keel report was asked for {most} completions. Expected at least 1.")
    what = shown(places)
    path = Path(out) if out else Path(places[0]) / "report.html"
    page = html(what, most=most)
    with written(path.name, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.encode("utf-8", "replace"))
    return path


def run_report(places: Sequence[str], *, out: str, most: int) -> int:
    """The command `keel report`. Several studies get a page each."""
    studies = all((Path(place) / "study.json").is_file() for place in places)
    if studies and len(places) > 1 and out:
        raise KeelError(
            f"--out names one file, and {len(places)} studies get a page each. Leave it out: each page lies in its study."
        )
    for each in [[place] for place in places] if studies else [places]:
        path = report(each, out=out, most=most)
        print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def run_view(place: str, *, port: int, most: int) -> int:
    """The command `keel view`: until Ctrl-C."""
    from keel.report.view import serving

    with serving(Path(place), port=port, most=most) as server:
        print(f"{server.url}\nOnly this machine can open it, and only with this address. Ctrl-C ends it.", flush=True)
        try:
            server.wait()
        except KeyboardInterrupt:
            print()
    return 0
