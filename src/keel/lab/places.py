"""Where a study keeps its runs: names of folders and files. Light, so that pages open without what training needs."""

from __future__ import annotations

FAILED = "failed.txt"
BUILT = ("{data}", "{models}")  # in a study's file: what it builds, by the name that this has in its folder


def folder_name(arm: str) -> str:
    """An arm's name as a folder."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in arm.replace(" · ", "-"))
