"""What does this estimator really estimate? Claims judged, losses identified, other people's losses compared.

`certificate.py` judges a claim in enumerated worlds, `facts.py` checks exact numbers, `orders.py` measures orders of error,
`identify.py` names the truth that a loss follows, `bare.py` admits a function of one's own, `montecarlo.py` asks the same of a real
policy, `peers/` and `translate.py` read other frameworks. `command.py` is `keel audit`; `words.py` puts all of it into sentences.
"""
