"""Worlds small enough to enumerate: what an estimator expects, and the gradients it might be meant to follow.

`world.py` makes the world, `truths.py` the gradients, `expectation.py` the expectation of a loss's own gradient.
"""
