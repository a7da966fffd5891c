"""Diagnostics: (Batch, log-probabilities) → {name: number}. `measure` computes, `metrics` names."""

from keel.diagnostics.measure import measure as measure
from keel.diagnostics.measure import measure_routing as measure_routing
from keel.diagnostics.metrics import check_names as check_names
from keel.diagnostics.metrics import metrics_markdown as metrics_markdown
