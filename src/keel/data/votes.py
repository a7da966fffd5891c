"""What samples say about an item: how often it is solved, and whether its gold answer is likely wrong.

A gold answer is suspect where most samples agree on another one. How suspect depends on how often a majority errs, and on how
rarely gold is sampled at all, which the other items tell: `fit` weighs the two explanations, wrong gold and a majority's error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from keel.data.items import Items, Read
from keel.data.samples import Sampled
from keel.types import Prompt

LEAST = 4  # scored samples from which an item votes
STABLE = 0.5  # share of the samples that must agree on another answer to make gold a suspect
LONGEST = 100  # characters of an answer that are shown
COMPARED = 4  # wrong answers, the most frequent, that are compared with one another by the grader


@dataclass(frozen=True)
class Vote:
    """One item's samples.

    Args:
        tries: scored samples; a truncated one is a wrong answer, an unscorable one is left out.
        right: of those, graded right.
        rival: the most frequent wrong answer, "" without one, and how often it came.
        unscorable: samples without a verdict.
    """

    id: str
    tries: int
    right: int
    rival: str
    rival_count: int
    unscorable: int

    @property
    def pass_rate(self) -> float:
        return self.right / self.tries if self.tries else float("nan")

    @property
    def agrees(self) -> bool:
        """Whether gold is what most samples say; of equals, gold."""
        return self.right >= self.rival_count


def vote(items: Items, prompt: Prompt, samples: Sequence[Sampled], read: Read) -> Vote:
    """Grade an item's samples, and count what the wrong ones answer."""
    scores = [items.reward(prompt, sample.text, sample.finish) for sample in samples]
    wrong = [
        read(sample.text, prompt.answer)
        for sample, score in zip(samples, scores, strict=True)
        if score.scorable and not score.correct and sample.finish == "stop"
    ]
    counts = merged(items, prompt, Counter(answer for answer in wrong if answer))
    rival, times = counts.most_common(1)[0] if counts else ("", 0)
    scorable = sum(score.scorable for score in scores)
    right = sum(score.scorable and score.correct for score in scores)
    return Vote(prompt.id, scorable, right, rival, times, len(scores) - scorable)


def merged(items: Items, prompt: Prompt, counts: Counter[str]) -> Counter[str]:
    """Answers that the grader takes for one another counted together, under the most frequent of them."""
    kept: Counter[str] = Counter()
    for place, (answer, count) in enumerate(counts.most_common()):
        twin = next((other for other in kept if place < COMPARED and _same(items, prompt, other, answer)), answer)
        kept[twin] += count
    return kept


def _same(items: Items, prompt: Prompt, a: str, b: str) -> bool:
    """Whether b would be right if a were gold."""
    asked = Prompt(id=prompt.id, text=prompt.text, answer=a, data=prompt.data)
    said = Prompt(id=prompt.id, text=prompt.text, answer=b, data=prompt.data)
    return items.reward(asked, items.task.gold(said)).correct


@dataclass(frozen=True)
class Suspicion:
    """Two explanations of what samples say, and how often the first is true.

    With chance 1 − `wrong` gold is right: it is sampled as often as a right answer is, Beta(solve) of the tries, and of the others
    Beta(rival) fall on one answer. Else it is the rival that is sampled as a right answer is (or nothing right is), and gold hardly
    at all: with chance `seen`, then a few times.

    Args:
        wrong: share of wrong gold answers, as estimated.
        solve, rival: the two parameters of each Beta distribution over items.
    """

    wrong: float
    solve: tuple[float, float]
    rival: tuple[float, float]
    seen: float

    def of(self, tries: int, right: int, rival: int) -> float:
        """Chance that gold is wrong, given how many of the tries it and its rival got."""
        good, bad = (float(each[right, rival]) for each in self.likelihoods(tries))
        return self.wrong * bad / max(self.wrong * bad + (1 - self.wrong) * good, 1e-300)

    def likelihoods(self, tries: int) -> tuple[Float[np.ndarray, "K K"], Float[np.ndarray, "K K"]]:
        """Chances of [right, rival] counts where gold is right, and where it is wrong."""
        solved = beta_binomial(tries, *self.solve)
        top = np.zeros((tries + 1, tries + 1))  # [wrong answers, how often the most frequent of them came]
        top[0, 0] = 1.0
        for wrong in range(1, tries + 1):
            top[wrong, 1 : wrong + 1] = beta_binomial(wrong - 1, *self.rival)
        good = solved[:, None] * top[::-1]
        count = np.arange(tries + 1)
        fewer = count[:, None] < count  # the right answer is not the rival: it came less often
        bad = np.where(count > 0, solved, 0.0) + (good * fewer).sum(0)
        of_gold = np.where(count == 0, 1 - self.seen, self.seen * 0.5**count)
        return good, of_gold[:, None] * bad


def beta_binomial(n: int, a: float, b: float) -> Float[np.ndarray, " K"]:
    """Chances of 0 … n successes of n tries whose common chance is drawn from Beta(a, b)."""
    from scipy.special import betaln, gammaln

    k = np.arange(n + 1)
    choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return np.exp(choose + betaln(k + a, n - k + b) - betaln(a, b))


def fit(votes: Sequence[Vote]) -> Suspicion:
    """The likeliest model of these votes.

    The mode of the posterior: wrong ~ Beta(1.5, 20), seen ~ Beta(1.5, 10), the Beta parameters log-normal around 1.
    """
    from scipy.optimize import minimize

    counts = Counter((v.tries, v.right, v.rival_count) for v in votes)
    by_tries = {n: np.array([(r, t, times) for (m, r, t), times in counts.items() if m == n]).T for n in {key[0] for key in counts}}

    def loss(x: Float[np.ndarray, "6"]) -> float:
        model, likely = _model(x), 0.0
        for tries, (right, rival, times) in by_tries.items():
            good, bad = (each[right, rival] for each in model.likelihoods(tries))
            likely += times @ np.log(np.clip((1 - model.wrong) * good + model.wrong * bad, 1e-300, None))
        prior = 1.5 * np.log(model.wrong) + 20 * np.log1p(-model.wrong) + 1.5 * np.log(model.seen) + 10 * np.log1p(-model.seen)
        return -float(likely + prior - (x[2:] ** 2).sum() / 4)

    return _model(minimize(loss, np.array([-2.2, -2.0, 0.5, 0.5, 0.0, 0.7]), method="L-BFGS-B").x)


def _model(x: Float[np.ndarray, "6"]) -> Suspicion:
    share = 1 / (1 + np.exp(-np.clip(x[:2], -12, 12)))
    size = np.exp(np.clip(x[2:], -4, 6)).tolist()
    return Suspicion(float(share[0]), (size[0], size[1]), (size[2], size[3]), float(share[1]))


@dataclass(frozen=True)
class Suspect:
    """A gold answer that samples contradict."""

    id: str
    gold: str
    majority: str
    votes: int
    for_gold: int
    tries: int
    probability: float


def _shown(text: str) -> str:
    """The text's beginning, as something that any file can hold."""
    return text[:LONGEST].encode("utf-8", "replace").decode()


def suspects(votes: Sequence[Vote], gold: dict[str, str]) -> tuple[list[Suspect], Suspicion]:
    """Items whose gold is contradicted by a stable majority, the most suspect first; and the model behind the chances.

    Args:
        gold: id → answer.
    """
    able = [v for v in votes if v.tries >= LEAST]
    model = fit(able)
    found = [
        Suspect(
            v.id, _shown(gold[v.id]), _shown(v.rival), v.rival_count, v.right, v.tries, model.of(v.tries, v.right, v.rival_count)
        )
        for v in able
        if not v.agrees and v.rival_count >= STABLE * v.tries
    ]
    return sorted(found, key=lambda s: (-s.probability, -s.votes / s.tries, s.for_gold)), model
