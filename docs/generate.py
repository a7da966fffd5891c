"""Writes the generated pages: `python docs/generate.py`. A test compares each with what this would write."""

from __future__ import annotations

from pathlib import Path

from keel.audit.whole import audit_everything
from keel.diagnostics import metrics_markdown
from keel.doctor.pages import pages
from keel.lab.ledger import claims_page
from keel.objectives.papers import papers_markdown

HERE = Path(__file__).parent
PAGES = {
    "papers.md": papers_markdown,
    "metrics.md": metrics_markdown,
    "claims.md": lambda: claims_page(audit_everything(), HERE / "studies"),
}

if __name__ == "__main__":
    for name, markdown in PAGES.items():
        (HERE / name).write_text(markdown(), encoding="utf-8")
    faults = HERE / "faults"
    faults.mkdir(exist_ok=True)
    for name, text in pages().items():
        (faults / name).write_text(text, encoding="utf-8")
