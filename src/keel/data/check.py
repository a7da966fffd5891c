"""Look at a data set: copies, leaks, gold answers that cannot be graded or are likely wrong, items that teach nothing."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from keel.data.items import Item, Items
from keel.data.near import near_pairs, normalised, template
from keel.data.samples import Samples
from keel.data.votes import LEAST, Suspect, Suspicion, Vote, suspects, vote
from keel.errors import KeelError, nearest
from keel.evaluate.tiers import Tier, tier

KINDS = {  # what is looked for: what it is, and whether such rows are dropped unless something else is said
    "unreadable": ("no item could be made of the row", True),
    "ungradable": ("its own gold answer does not score 1", True),
    "placeholder": ("its gold answer is no answer", True),
    "conflict": ("the same question stands there with another gold answer", True),
    "overlap": ("the question is held out for evaluation", True),
    "duplicate": ("the question stood there before", True),
    "near_overlap": ("nearly the question is held out for evaluation", True),
    "near_duplicate": ("nearly the question stood there before", True),
    "near_conflict": ("nearly the same question has another gold answer", False),
    "suspect": ("its gold answer is more likely wrong than right: most samples agree on another", False),
    "nobody": ("no sample solved it", False),
    "everybody": ("every sample solved it", False),
}
LIKELY = 0.5  # chance of being wrong from which a contradicted gold answer is a fault
PLACEHOLDERS = frozenset({"none", "null", "nan", "n/a", "na", "unknown", "undefined", "todo", "tbd", "?", "-", "...", "…"})


@dataclass(frozen=True)
class Fault:
    """One thing about one row. `other` is the row that it is compared with, if there is one."""

    id: str
    kind: str
    why: str
    other: str = ""


@dataclass(frozen=True)
class Solved:
    """What samples say about all items together.

    Args:
        items: with at least four scored samples.
        samples: of those, on average.
        pass_rate: mean over items.
        tiers: how many items are easy, medium and hard.
        nobody, everybody: items that no sample and that every sample solved.
        live: group size → share of groups with right and wrong answers, without bias; None where there are too few samples.
        unscorable: samples without a verdict.
        truncated: samples that reached the length cap.
    """

    items: int
    samples: float
    pass_rate: float
    tiers: Mapping[Tier, int]
    nobody: int
    everybody: int
    live: Mapping[int, float | None]
    unscorable: int
    truncated: int


@dataclass(frozen=True)
class Findings:
    """What was found.

    Args:
        faults: all of them; a row may have several.
        drop: kinds of faults for which a row is dropped.
        templates: distinct texts without their numbers, and rows of the most frequent one.
        votes: of the items with samples.
    """

    items: Items
    faults: tuple[Fault, ...]
    drop: frozenset[str]
    templates: tuple[int, int]
    against: Mapping[str, int]
    votes: tuple[Vote, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    suspicion: Suspicion | None = None
    solved: Solved | None = None
    samples: Samples | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Rows by kind of fault."""
        found = Counter(kind for kind, _ in {(fault.kind, fault.id) for fault in self.faults})
        return {kind: found[kind] for kind in KINDS if found[kind]}

    @property
    def dropped(self) -> dict[str, Fault]:
        """Row → the first of its faults for which it is dropped, in the order of `KINDS`."""
        order = {kind: place for place, kind in enumerate(KINDS)}
        out: dict[str, Fault] = {}
        for fault in sorted(self.faults, key=lambda fault: order[fault.kind]):
            if fault.kind in self.drop:
                out.setdefault(fault.id, fault)
        return out

    @property
    def kept(self) -> list[Item]:
        gone = self.dropped
        return [item for item in self.items.items if item.id not in gone]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        splits = Counter(item.split for item in self.items.items)
        return {
            "data": self.items.name,
            "rows": len(self.items.items) + len(self.items.unreadable),
            "splits": dict(splits),
            "kept": len(self.kept),
            "found": self.counts,
            "dropped": dict(Counter(fault.kind for fault in self.dropped.values())),
            "templates": {"distinct": self.templates[0], "largest": self.templates[1]},
            "against": dict(self.against),
            "faults": [asdict(fault) for fault in self.faults],
            "suspects": [asdict(suspect) for suspect in self.suspects],
            "suspicion": asdict(self.suspicion) if self.suspicion else None,
            "solved": asdict(self.solved) if self.solved else None,
            "samples": {"used": self.samples.count, "unmatched": self.samples.unmatched} if self.samples else None,
        }


def check(
    items: Items,
    against: Sequence[Items] = (),
    samples: Samples | None = None,
    *,
    also: Sequence[str] = (),
    keep: Sequence[str] = (),
    group_sizes: Sequence[int] = (4, 8, 16),
) -> Findings:
    """Look at a data set.

    Args:
        against: sets that are evaluated on, all of whose rows are held out.
        also, keep: kinds of faults for which rows are dropped, or not dropped, unlike by default.
        group_sizes: for which the share of groups with signal is told.

    Raises:
        KeelError: an unknown kind.
    """
    for kind in (*also, *keep):
        if kind not in KINDS:
            raise KeelError(f"There is no fault {kind!r}: {nearest(kind, KINDS)}Known are {', '.join(KINDS)}.")
    drop = frozenset({kind for kind, (_, dropped) in KINDS.items() if dropped} | set(also)) - set(keep)
    faults = [Fault(id, "unreadable", why) for id, why in items.unreadable.items()]
    faults += [fault for item in items.items for fault in _of_gold(items, item)]
    faults += _copies(items.items)
    faults += _leaks(items.items, against)
    faults += _near(items.items)
    shapes = Counter(template(item.prompt.text) for item in items.items)
    sizes = (len(shapes), max(shapes.values(), default=0))
    names = {other.name: len(other.items) for other in against}
    if samples is None:
        return Findings(items, tuple(faults), drop, sizes, names)
    read = items.reader
    votes = [vote(items, item.prompt, samples.of[item.id], read) for item in items.items if item.id in samples.of]
    doubted, model = suspects(votes, {item.id: item.prompt.answer for item in items.items})
    faults += _of_votes(votes, doubted)
    truncated = sum(sample.finish == "length" for each in samples.of.values() for sample in each)
    told = solved(votes, group_sizes, truncated)
    return Findings(items, tuple(faults), drop, sizes, names, tuple(votes), tuple(doubted), model, told, samples)


def solved(votes: Sequence[Vote], group_sizes: Sequence[int], truncated: int = 0) -> Solved | None:
    """How hard the items are for what sampled; None when no item has enough samples."""
    able = [v for v in votes if v.tries >= LEAST]
    if not able:
        return None
    counts = Counter(tier(v.right, v.tries) for v in able)
    return Solved(
        items=len(able),
        samples=sum(v.tries for v in able) / len(able),
        pass_rate=sum(v.pass_rate for v in able) / len(able),
        tiers={name: counts[name] for name in ("easy", "medium", "hard")},
        nobody=sum(v.right == 0 for v in able),
        everybody=sum(v.right == v.tries for v in able),
        live={size: _live(able, size) for size in group_sizes},
        unscorable=sum(v.unscorable for v in votes),
        truncated=truncated,
    )


def _live(votes: Sequence[Vote], size: int) -> float | None:
    """Mean over items of 1 − C(right, G)/C(tries, G) − C(wrong, G)/C(tries, G): the chance that G of the samples differ."""
    able = [v for v in votes if v.tries >= size]
    if not able:
        return None
    dead = [(math.comb(v.right, size) + math.comb(v.tries - v.right, size)) / math.comb(v.tries, size) for v in able]
    return 1 - sum(dead) / len(dead)


def _of_gold(items: Items, item: Item) -> Iterator[Fault]:
    if getattr(items.task, "checked", 1) == 0:  # no completion is known to be right, or to grade one costs money
        return
    score = items.reward(item.prompt, items.task.gold(item.prompt))
    if score.value is None:
        yield Fault(item.id, "ungradable", f"gold {_short(item.prompt.answer)} is unscorable: {score.reason}")
    elif not score.correct or abs(score.value - 1) > 1e-9:
        yield Fault(item.id, "ungradable", f"gold {_short(item.prompt.answer)} scores {score.value:g} ({score.reason or 'wrong'})")
    if item.prompt.answer.strip().casefold() in PLACEHOLDERS:
        yield Fault(item.id, "placeholder", f"gold is {_short(item.prompt.answer)}")


def _copies(items: Sequence[Item]) -> Iterator[Fault]:
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[normalised(item.prompt.text)].append(item)
    for members in groups.values():
        golds = {normalised(item.prompt.answer): item for item in members}
        if len(golds) > 1:
            for item in members:
                other = next(o for o in golds.values() if normalised(o.prompt.answer) != normalised(item.prompt.answer))
                yield Fault(
                    item.id, "conflict", f"gold {_short(item.prompt.answer)} here, {_short(other.prompt.answer)} there", other.id
                )
            continue
        held = next((item for item in members if item.split == "test"), None)
        first = held or members[0]
        for item in members:
            if held is not None and item.split == "train":
                yield Fault(item.id, "overlap", f"{_same(item, held)} in the test split", held.id)
            elif item is not first:
                yield Fault(item.id, "duplicate", _same(item, first), first.id)


def _same(item: Item, other: Item) -> str:
    equal = item.prompt.text == other.prompt.text
    return "the same text" if equal else "the same text but for case, spaces, dollar signs and its last full stop"


def _leaks(items: Sequence[Item], against: Sequence[Items]) -> Iterator[Fault]:
    for other in against:
        held = {normalised(item.prompt.text): item for item in other.items}
        for item in items:
            twin = held.get(normalised(item.prompt.text))
            if twin is not None:
                yield Fault(item.id, "overlap", f"{_same(item, twin)} in {other.name}", f"{other.name}#{twin.id}")
        both = [item.prompt.text for item in items] + [item.prompt.text for item in other.items]
        for i, j, similarity in near_pairs(both):
            if i < len(items) <= j and normalised(both[i]) != normalised(both[j]):
                twin = other.items[j - len(items)]
                yield Fault(items[i].id, "near_overlap", f"{similarity:.2f} alike, in {other.name}", f"{other.name}#{twin.id}")


def _near(items: Sequence[Item]) -> Iterator[Fault]:
    for i, j, similarity in near_pairs([item.prompt.text for item in items]):
        a, b = items[i], items[j]
        if normalised(a.prompt.text) == normalised(b.prompt.text):
            continue
        if normalised(a.prompt.answer) != normalised(b.prompt.answer):
            why = f"{similarity:.2f} alike; gold {_short(a.prompt.answer)} and {_short(b.prompt.answer)}"
            yield Fault(a.id, "near_conflict", why, b.id)
            yield Fault(b.id, "near_conflict", why, a.id)
        elif a.split != b.split:
            train, test = (a, b) if a.split == "train" else (b, a)
            yield Fault(train.id, "near_overlap", f"{similarity:.2f} alike, in the test split", test.id)
        else:
            yield Fault(b.id, "near_duplicate", f"{similarity:.2f} alike", a.id)


def _of_votes(votes: Sequence[Vote], doubted: Sequence[Suspect]) -> Iterator[Fault]:
    for s in (s for s in doubted if s.probability >= LIKELY):
        why = f"{s.votes} of {s.tries} samples say {_short(s.majority)}, {s.for_gold} gold {_short(s.gold)}; wrong with chance"
        yield Fault(s.id, "suspect", f"{why} {s.probability:.2f}")
    for v in votes:
        if v.tries >= LEAST and v.right in (0, v.tries):
            kind = "everybody" if v.right else "nobody"
            yield Fault(v.id, kind, f"{v.right} of {v.tries} samples")


def _short(text: str, most: int = 40) -> str:
    return repr(text if len(text) <= most else text[: most - 1] + "…")
