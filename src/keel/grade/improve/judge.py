"""The tiny judge: a character model that reads a problem and a solution, and writes a level and the line that is wrong.

It is asked "17+13=31⏎31+8=39⏎A:39⏎Q:17+13+8=⏎" and works before it judges. It solves the problem itself, and behind each of its
own lines it writes what the solution has there, and whether that is the same: "17+13=30/31x⏎30+8=38/39x⏎A:38/39x⏎". Then come
two characters: c (all right), b (one slip) or a (wrong), and the number of the first wrong line, 0 for none: "b1" here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from keel.grade.improve.solutions import LEVELS, Parts, Truth, truth, worked
from keel.models.characters import CHARACTERS
from keel.models.policy import Policy
from keel.rollout.engine import Seed
from keel.rollout.local import LocalEngine
from keel.types import Prompt, Sampling, Score

LETTERS = "abc"  # of the levels 0, ½ and 1
LONGEST = 96  # characters of a solution that are read; a longer one is wrong by its length
LONGEST_VERDICT = 64  # tokens, its working included
GREEDY = Sampling(temperature=0.0, max_completion_tokens=LONGEST_VERDICT)
JUDGING = Seed(0, 2**31 + 3)


def question(parts: Parts, solution: str) -> str:
    """What the judge is asked: the solution, then the problem as it is asked to be solved. Unknown characters are told as "?"."""
    readable = "".join(c if c in CHARACTERS else "?" for c in solution)
    return f"{readable}\nQ:{'+'.join(map(str, parts))}=\n"


def verdict(true: Truth) -> str:
    """The last line of what a perfect judge writes."""
    return f"{LETTERS[LEVELS.index(true.level)]}{true.step}"


def judgement(parts: Parts, solution: str) -> str:
    """All that a perfect judge writes: its own solution against the one it judges, and the verdict."""
    own, given = worked(parts).split("\n"), solution.split("\n")
    found = [_last_number(line) for line in [*given, *[""] * len(own)]]
    compared = [f"{line}/{said}{'=' if said == _last_number(line) else 'x'}" for line, said in zip(own, found, strict=False)]
    return "\n".join([*compared, verdict(truth(parts, solution))])


def _last_number(line: str) -> str:
    found = re.search(r"[0-9]{1,4}$", line)
    return found[0] if found else ""


def read(text: str) -> Truth | None:
    """A written verdict, the last line; None where it is none."""
    text = text.rpartition("\n")[2]
    if len(text) != 2 or text[0] not in LETTERS or text[1] not in "0123456789":
        return None
    return Truth(LEVELS[LETTERS.index(text[0])], int(text[1]))


@dataclass(frozen=True)
class Judge:
    """A policy that judges, greedily.

    Args:
        policy: a character model.
        engine: holds its weights.
    """

    policy: Policy
    engine: LocalEngine

    @classmethod
    def of(cls, policy: Policy) -> Judge:
        return cls(policy, LocalEngine(policy))

    def judge(self, asked: Sequence[tuple[Parts, str]]) -> list[Truth | None]:
        """Its verdict on each solution; None where it wrote none. Equal questions are asked once."""
        texts = [None if len(solution) > LONGEST else question(parts, solution) for parts, solution in asked]
        distinct = list(dict.fromkeys(text for text in texts if text is not None))
        prompts = [Prompt(id=text, text=text, answer="") for text in distinct]
        rendered = [self.policy.template.render(prompt, self.policy.tokenizer) for prompt in prompts]
        made = self.engine.generate(rendered, GREEDY, JUDGING, 1) if rendered else []
        known = {text: read(completion.text) for text, completion in zip(distinct, made, strict=True)}
        return [Truth(0.0, 0) if text is None else known[text] for text in texts]


@dataclass(frozen=True)
class JudgeGrader:
    """A judge as the grader of sums: value is its level; `correct` is what it would pass."""

    judge: Judge

    def __call__(self, prompt: Prompt, text: str) -> Score:
        return self.many([(prompt, text)])[0]

    def many(self, asked: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """The scores of a list, all asked at once."""
        told = self.judge.judge([(parts_of(prompt), text) for prompt, text in asked])
        return [
            Score(None, reason="the judge wrote no verdict") if each is None else Score(each.level, each.level == 1.0)
            for each in told
        ]


def parts_of(prompt: Prompt) -> Parts:
    """The terms of a sum, from "Q:17+13+8=⏎"."""
    return tuple(map(int, prompt.text.strip().removeprefix("Q:").removesuffix("=").split("+")))
