"""What a policy can do on prompts that it never trained on."""

from keel.evaluate.estimates import interval as interval
from keel.evaluate.estimates import pass_at_k as pass_at_k
from keel.evaluate.suite import evaluate as evaluate
from keel.evaluate.suite import panel as panel
from keel.evaluate.tiers import tier as tier
from keel.evaluate.tiers import tiers as tiers
