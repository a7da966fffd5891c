"""Writes the generated pages: `python docs/generate.py`. A test compares each with what this would write."""

from __future__ import annotations

from pathlib import Path

from keel.audit.whole import audit_everything
from keel.audit.words import claims_markdown
from keel.diagnostics import metrics_markdown
from keel.objectives.papers import papers_markdown

PAGES = {
    "papers.md": papers_markdown,
    "metrics.md": metrics_markdown,
    "claims.md": lambda: claims_markdown(audit_everything()),
}

if __name__ == "__main__":
    for name, markdown in PAGES.items():
        (Path(__file__).parent / name).write_text(markdown(), encoding="utf-8")
