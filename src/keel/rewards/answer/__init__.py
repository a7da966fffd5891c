"""Answer equality: find the answer in a completion, and tell whether it says the same as the gold answer."""

from keel.rewards.answer.equal import Verdict, equal, equal_all, gold_problem
from keel.rewards.answer.extract import extract
from keel.rewards.answer.grader import AnswerGrader, answer_grader_version, check_golds

__all__ = ["AnswerGrader", "Verdict", "answer_grader_version", "check_golds", "equal", "equal_all", "extract", "gold_problem"]
