"""The journal of answers: a SQLite file in which every answer stands as soon as it is there.

A run that is killed at any moment asks nothing twice: what it asks again is found here, by content.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

from minipuzzle.data.endpoint.questions import Answer, Model, Question
from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import Advance, no_progress

JOURNAL_FILE = "journal.sqlite"
_WAIT_SECONDS = 60.0  # for another process that writes


class Journal:
    """Answers by the key of their question; several threads and processes may use one file."""

    def __init__(self, path: Path) -> None:
        self._lock = Lock()
        try:
            self._rows = sqlite3.connect(path, timeout=_WAIT_SECONDS, check_same_thread=False, isolation_level=None)
            self._rows.execute("PRAGMA journal_mode=WAL")
            self._rows.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise MinipuzzleError(f"{path} is no journal that can be used: {error}", "remove it") from None

    def find(self, key: str) -> Answer | None:
        """The answer that was given, or None."""
        with self._lock:
            found = self._rows.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if found is None else Answer(**json.loads(found[0]))

    def keep(self, key: str, answer: Answer) -> None:
        """Write an answer down; the first one counts.

        Raises: MinipuzzleError if the disk is full.
        """
        try:
            with self._lock:
                row = (key, json.dumps(asdict(answer)))
                self._rows.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", row)
        except sqlite3.Error as error:
            hint = "make room; the same command continues"
            raise MinipuzzleError(f"an answer cannot be written down: {error}", hint) from None

    def close(self) -> None:
        """Give the file back."""
        self._rows.close()


@dataclass(frozen=True, kw_only=True)
class Journaled:
    """A model whose answers are remembered: only what is new is asked."""

    model: Model
    journal: Journal

    def ask(self, questions: Sequence[Question], advance: Advance = no_progress) -> list[Answer]:
        """An answer for each question, in their order; each is kept as soon as it is there."""
        keys = [question.key(self.model.name) for question in questions]
        found = {key: answer for key in dict.fromkeys(keys) if (answer := self.journal.find(key)) is not None}
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in found}
        names = list(new)
        advance(len(found))
        for idx, answer in self.model.answers(list(new.values())):
            key = names[idx]
            self.journal.keep(key, answer)
            found[key] = answer
            advance(1)
        return [found[key] for key in keys]
