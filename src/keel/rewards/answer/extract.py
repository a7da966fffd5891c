"""Where the answer stands in a completion: its last box, tag or "answer:" line, else its last line; no tail of a fixed length."""

from __future__ import annotations

import re
from collections import deque
from typing import NamedTuple

from keel.rewards.answer.clean import LONGEST, closing_brace, unwrap

MOST_PLACES = 200  # boxes, tags or "answer:" lines that are looked at
MOST_BOXES = 4  # different ones; who boxes more is guessing
WORDS_BETWEEN = 4  # so many words between two boxes, and the later one replaces the earlier
LONGEST_TEXT = 2_000_000
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{])")
_TAG = re.compile(r"<(answer|final_answer|final|result|solution)>", re.I)
_SAYS = re.compile(
    r"(?:^|(?<=[\s*_#>(]))(?:final |correct |my |the ){0,4}(?:answer|ans|result|solution)s?\b[*_]*(?: (?:choice|option))?"
    r"(?:\s*(?:is|are)\b(?: therefore| thus)?\s*:?|\s*[:：]|\s*=(?!=)|\s+[-–—](?= ))[*_]*"
    r"|^[#*_ \t]+(?:final )?(?:answer|result|solution)[*_: \t]*$",
    re.I | re.M,
)
_REASON = re.compile(r",?\s+(?:since|because|as (?:desired|required|claimed|wanted)|which|where)\b.*", re.S)
_HASHES = re.compile(r"^####[ \t]*\S", re.M)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_IS = re.compile(r"(?:\b(?:is|are|equals|get|gives|be|was|were)\b:?|(?<![<>!=])=(?!=))\s*(?=\S)")
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


class Extracted(NamedTuple):
    """answer: None where there is none; note: what is odd about it, or why there is none."""

    answer: str | None
    note: str = ""


class _Found(NamedTuple):
    start: int
    end: int
    content: str


def extract(text: str, *, truncated: bool = False) -> str | None:
    """The answer of a completion, or None.

    The last of boxes, tags and "answer:" lines; without any, the last line. Boxes that stand next to each other ("\\boxed{1} or
    \\boxed{2}") are one answer with several parts; with a sentence between them the last one counts. A box or tag that was begun
    and not ended, and a completion that was cut off, have no answer: whatever stands before was not the end of it.
    """
    return find(text, truncated=truncated).answer


def find(text: str, *, truncated: bool = False) -> Extracted:
    """`extract`, with what is odd about it."""
    if not isinstance(text, str) or not text.strip():
        return Extracted(None, "empty")
    if truncated:
        return Extracted(None, "truncated")
    if len(text) > LONGEST_TEXT:
        return Extracted(None, f"longer than {LONGEST_TEXT} characters")
    text = _after_thinking(text)
    if text is None:
        return Extracted(None, "still thinking at its end")
    for places in (_boxes(text), _tags(text)):
        if places is None:
            return Extracted(None, "its last box or tag never ends, or there are hundreds")
    marked = [found for found in (_boxes(text), _tags(text), _said(text)) if found]
    if not marked:
        return Extracted(_last_line(text))
    places = max(marked, key=lambda found: (found[-1].end, -found[-1].start))
    return _chosen(text, places)


def is_marked(text: str) -> bool:
    """Whether a text says where its answer is, so that it is a completion and not an answer alone."""
    return bool(
        _BOX.search(text)
        or _TAG.search(text)
        or _SAYS.search(text)
        or _HASHES.search(text)
        or "\\boxed" in text
        or "think>" in text
    )


def _after_thinking(text: str) -> str | None:
    ended = text.rfind("</think>")
    if text.find("<think>", max(ended, 0)) >= 0:
        return None
    return text[ended + len("</think>") :] if ended >= 0 else text


def _boxes(text: str) -> list[_Found] | None:
    """Outermost boxes; None where the last one never closes."""
    found, position = [], 0
    for match in _BOX.finditer(text):
        if match.start() < position:
            continue
        if len(found) > MOST_PLACES:
            return None
        end = closing_brace(text, match.end())
        if end < 0:
            return None
        found.append(_Found(match.start(), end + 1, text[match.end() + 1 : end]))
        position = end
    return found


def _tags(text: str) -> list[_Found] | None:
    found = []
    lowered = text.lower() if "<" in text else ""
    for match in _TAG.finditer(text) if lowered else ():
        if found and match.start() < found[-1].end:
            continue
        if len(found) > MOST_PLACES:
            return None
        closing = f"</{match[1].lower()}>"
        end = lowered.find(closing, match.end())
        if end < 0:
            return None
        found.append(_Found(match.start(), end + len(closing), text[match.end() : end]))
    return found


def _said(text: str) -> list[_Found]:
    """What follows "answer:" and "the answer is", to the end of the sentence; on the next line where nothing follows."""
    found = []
    for match in deque(_SAYS.finditer(text), maxlen=MOST_PLACES):
        start = match.end()
        while start < len(text) and text[start] in " \t\r\n*_" and start < match.end() + LONGEST:
            start += 1
        end = _sentence_end(text, start)
        if text[start:end].strip(" *_"):
            said = _REASON.sub("", text[start:end].rstrip(" *_")).replace("**", "")
            if found and end <= found[-1].end:
                found.pop()  # "Answer: the answer is 5" says it once
            found.append(_Found(match.start(), end, said))
    whole = text.rstrip()
    last = whole.rfind("\n") + 1
    if whole.startswith("####", last) and whole[last + 4 :].strip():
        found.append(_Found(last, len(whole), whole[last + 4 :].strip()))
    return found


def _sentence_end(text: str, start: int) -> int:
    """The end of the line, or of the sentence; a formula in dollars or brackets is not cut."""
    depth = 0
    stop = text.find("\n", start)
    line_end = min(len(text) if stop < 0 else stop, start + LONGEST + 1)
    if text.startswith(("\\[", "$$"), start):
        closing = text.find("\\]" if text[start] == "\\" else "$$", start + 2)
        return line_end if closing < 0 else closing + 2
    for i in range(start, line_end):
        if text[i] == "$":
            depth ^= 1
        elif text[i] in ".!?" and not depth and (i + 1 == line_end or text[i + 1] in " \t\r*") and not _abbreviated(text, i):
            return i
    return line_end


def _abbreviated(text: str, i: int) -> bool:
    """ "sq. ft." and "B. Paris" go on after their full stop."""
    return text[i] == "." and (
        text[max(0, i - 2) : i] in ("sq", "ft", "Dr", "Mr", "St", "vs")
        or i >= 1
        and text[i - 1].isupper()
        and text[i - 2 : i - 1] in ("", " ", "(")
    )


def _chosen(text: str, places: list[_Found]) -> Extracted:
    group = [places[-1]]
    for place in reversed(places[:-1]):
        if len(_WORDS.findall(text[place.end : group[0].start])) >= WORDS_BETWEEN + (
            "nswer" in text[group[0].start : group[0].end]
        ):
            break
        group.insert(0, place)
    contents = list(dict.fromkeys(inner(place.content) for place in group))
    everything = list(dict.fromkeys(unwrap(place.content) for place in places))
    if len(everything) > MOST_BOXES and len(contents) == 1:
        return Extracted(None, f"{len(everything)} different answers")
    if not all(contents):
        return Extracted(None, "an empty box or tag")
    note = "" if len(everything) == len(contents) else f"earlier answers differ: {', '.join(everything[:-1])[:80]}"
    if len(contents) == 1:
        return Extracted(contents[0], note)
    return Extracted(" or ".join(contents), note or "several answers")


def inner(content: str) -> str:
    """A tag's or a line's content without the box in it."""
    boxes = _boxes(content)
    if not boxes:
        said = _said(content)
        return unwrap(said[-1].content if said else content)
    parts = list(dict.fromkeys(unwrap(box.content) for box in boxes))
    return parts[0] if len(parts) == 1 else " or ".join(parts)


def _last_line(text: str) -> str | None:
    """The last line that is not empty: all of it, or, of a sentence, what follows its last "is" or "="."""
    line = text.rstrip().rsplit("\n", 1)[-1].strip()
    spans = [m for m in re.finditer(r"\$([^$]+)\$|\\\((.+?)\\\)", line)] if len(line) < 5000 else []
    if spans and not re.search(r"[A-Za-z0-9]", line[spans[-1].end() :]) and len(_WORDS.findall(line[: spans[-1].start()])) > 0:
        return unwrap(spans[-1][1] or spans[-1][2])
    if len(_WORDS.findall(line)) < 3:
        return unwrap(line) or None
    found = list(_IS.finditer(line)) if len(line) < 5000 else []
    tail = unwrap(line[found[-1].end() :]) if found else ""
    return tail if tail and len(_WORDS.findall(tail)) < 3 else unwrap(line)
