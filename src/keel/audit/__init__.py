"""What does this estimator really estimate? Claims judged, losses identified, other people's losses compared.

`certificate.py` judges a claim in enumerated worlds, `facts.py` checks exact numbers, `orders.py` measures orders of error,
`identify.py` names the truth that a loss follows, `side_by_side.py` compares two, `bare.py` admits a function of one's own,
`whole.py` is all that keel ships. `montecarlo.py` (with `projection`, `jackknife`, `comparison`) asks the same of a real policy;
`peers/`, `conformance.py` and `translate.py` read other frameworks. `command.py` is `keel audit`; `words.py` makes sentences of it.
"""
