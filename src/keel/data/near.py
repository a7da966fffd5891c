"""Equal and nearly equal texts."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt64

ALIKE = 0.7  # share of common shingles from which two texts are called nearly equal
WORDS = 8  # a text of fewer words has too few shingles to compare
SIZE, BANDS, ROWS = 3, 32, 4  # words of a shingle; minima kept of each text are BANDS · ROWS
CROWD = 200  # texts in one bucket beyond which only neighbours are compared: a template's thousand variations
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_IGNORED = re.compile(r"[$\s\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]+")
_WORD = re.compile(r"\w+|[^\w\s]")
PRIME = np.uint64((1 << 61) - 1)


def normalised(text: str) -> str:
    """The text without what two copies of it may differ in: case, forms of characters, spaces, dollar signs, a last full stop."""
    return _IGNORED.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip().rstrip(".?!").rstrip()


def numbers(text: str) -> tuple[str, ...]:
    """Its numbers in order. Two questions with other numbers are two questions, however alike they look."""
    return tuple(_NUMBER.findall(text))


def template(text: str) -> str:
    """The text with a hole for each number."""
    return _NUMBER.sub("#", normalised(text))


def shingles(text: str) -> frozenset[str]:
    """Runs of three words of the normalised text; empty for a text too short to say."""
    words = _WORD.findall(normalised(text))
    return frozenset(" ".join(words[i : i + SIZE]) for i in range(len(words) - SIZE + 1)) if len(words) >= WORDS else frozenset()


def similar_share(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard's similarity: common shingles over all; 0 where there are none."""
    return len(a & b) / len(a | b) if a or b else 0.0


def near_pairs(texts: Sequence[str], least: float = ALIKE) -> Iterator[tuple[int, int, float]]:
    """Pairs (i < j) of texts that are nearly equal and ask with the same numbers, with their similarity.

    MinHash proposes, the exact similarity decides. Pairs of similarity .7 are missed one time in 5,000.

    Source: A. Broder, Compression and Complexity of Sequences (1997). Differs from it: bands as in Leskovec et al., Mining of
    Massive Datasets, ch. 3.
    """
    sets = [shingles(text) for text in texts]
    of_numbers = [numbers(text) for text in texts]
    for i, j in sorted(set(_candidates(sets, of_numbers))):
        similarity = similar_share(sets[i], sets[j])
        if similarity >= least:
            yield i, j, similarity


def _candidates(sets: Sequence[frozenset[str]], of_numbers: Sequence[tuple[str, ...]]) -> Iterable[tuple[int, int]]:
    rng = np.random.default_rng(20)
    factor, shift = (rng.integers(1, int(PRIME), size=BANDS * ROWS, dtype=np.uint64) for _ in range(2))
    buckets: dict[tuple, list[int]] = defaultdict(list)
    for place, members in enumerate(sets):
        if members:
            minima = _minima(members, factor, shift)
            for band in range(BANDS):
                part = minima[band * ROWS : (band + 1) * ROWS]
                buckets[band, part.tobytes(), of_numbers[place]].append(place)
    for members in buckets.values():
        reach = len(members) if len(members) <= CROWD else CROWD
        yield from ((a, b) for i, a in enumerate(members) for b in members[i + 1 : i + 1 + reach])


def _minima(members: frozenset[str], factor: UInt64[np.ndarray, " H"], shift: UInt64[np.ndarray, " H"]) -> UInt64[np.ndarray, " H"]:
    values = np.array([zlib.crc32(member.encode("utf-8", "surrogatepass")) for member in members], dtype=np.uint64)
    return ((values[:, None] * factor + shift) % PRIME).min(0)
