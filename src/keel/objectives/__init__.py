"""Objectives: pure tensor mathematics. Start at `recipes.py`; "the loss" is `objective.py`."""
