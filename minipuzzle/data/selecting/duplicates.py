"""Duplicates: the same text (exact), or nearly the same words (MinHash); the first of its kind stays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from minipuzzle.data.rows import Rejected, Row
from minipuzzle.errors import MinipuzzleError

SHINGLE_WORDS = 5
_WORDS = re.compile(r"\w+")


def shingles(text: str) -> set[str]:
    """All runs of ``SHINGLE_WORDS`` words of a text; the whole of a shorter one."""
    words = _WORDS.findall(text.lower())
    last = max(len(words) - SHINGLE_WORDS, 0)
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last + 1)}


def without_duplicates(rows: Iterable[Row | Rejected], *, similarity: float) -> Iterator[Row | Rejected]:
    """The rows, and rejections of those whose content was there already.

    ``similarity``: the Jaccard similarity of shingles from which rows are near duplicates; 1 asks for equal words.

    Raises: MinipuzzleError where datasketch is missing, or for a similarity outside (0, 1].
    """
    if not 0 < similarity <= 1:
        raise MinipuzzleError(f"‹similarity› is {similarity}", "give a share up to 1, such as 0.8")
    seen: dict[str, str] = {}
    near = None if similarity == 1 else _index(similarity)
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        words = " ".join(_WORDS.findall(row.content.lower())) or row.content
        first = seen.get(words)
        if first is None and near is not None:
            sketch = _sketch(row.content)
            first = next(iter(sorted(near.query(sketch))), None)
            if first is None:
                near.insert(row.id, sketch)
        if first is not None:
            yield Rejected(id=row.id, reason="duplicate", detail=f"of {first}")
            continue
        seen[words] = row.id
        yield row


def _index(similarity: float) -> Any:
    try:
        from datasketch import MinHashLSH
    except ImportError:
        raise MinipuzzleError("near duplicates need datasketch", "pip install 'minipuzzle[data]'") from None
    return MinHashLSH(threshold=similarity, num_perm=128)


def _sketch(text: str) -> Any:
    from datasketch import MinHash

    sketch = MinHash(num_perm=128, seed=1)
    sketch.update_batch([shingle.encode() for shingle in shingles(text)])
    return sketch
