"""Grade the graders: how right each is on labelled answers, what its errors depend on, and what that does to training."""
