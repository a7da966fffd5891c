"""Writes the generated pages: `python docs/generate.py`. A test compares each with what this would write."""

from __future__ import annotations

from pathlib import Path

from keel.diagnostics import metrics_markdown
from keel.objectives.papers import papers_markdown

PAGES = {"papers.md": papers_markdown, "metrics.md": metrics_markdown}

if __name__ == "__main__":
    for name, markdown in PAGES.items():
        (Path(__file__).parent / name).write_text(markdown(), encoding="utf-8")
