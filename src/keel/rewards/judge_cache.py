"""A judge's answers, kept in SQLite: the same question is asked once, in this run and the next."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

from keel.errors import KeelError

_TABLE = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT, answer TEXT, made TEXT DEFAULT CURRENT_TIMESTAMP)"
WAIT_S = 10.0  # for another process that is writing


class AnswerCache:
    """Key → answer, from any thread and any process. Only answers that were understood come here; a failure is asked again.

    Args:
        path: of the file; "" keeps answers in memory, for this object alone.

    Raises:
        KeelError: the file cannot be opened, or is no SQLite file.
    """

    def __init__(self, path: str = ""):
        self.path, self._lock = path, threading.Lock()
        try:
            if path:
                Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
            place = str(Path(path).expanduser()) if path else ":memory:"
            self._base = sqlite3.connect(place, timeout=WAIT_S, check_same_thread=False, isolation_level=None)
        except (sqlite3.Error, OSError) as fault:
            raise KeelError(
                f"The judge's cache {path!r} cannot be opened: {fault}. Expected a path that can be written."
            ) from fault
        try:
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.execute(_TABLE)
        except sqlite3.Error as fault:
            self._base.close()
            raise KeelError(
                f"The judge's cache {path!r} cannot be used: {fault}. Expected a file that keel wrote; move it away to begin anew."
            ) from fault

    def get(self, key: str) -> str | None:
        """The answer, if it is known."""
        with self._lock:
            row = self._base.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: str, model: str, answer: str) -> None:
        """Keep an answer; the first one stays."""
        with self._lock:
            self._base.execute("INSERT OR IGNORE INTO answers (key, model, answer) VALUES (?, ?, ?)", (key, model, answer))

    def __len__(self) -> int:
        with self._lock:
            return self._base.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        with self._lock:
            self._base.close()
