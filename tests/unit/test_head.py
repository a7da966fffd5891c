"""Log-probabilities in chunks equal log-probabilities from full logits, in value and gradient."""

import pytest
import torch

from keel.models.head import token_logp


def plain(hidden, weight, state, token, temperature, softcap, kept):
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    if kept is not None:
        logits = torch.where(kept, logits, torch.full_like(logits, -1e30))
    log_probs = logits.log_softmax(-1)
    return log_probs[state, token], -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("block_numbers", [1, 25, 10**6])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("truncated", [False, True])
def test_value_and_gradient(block_numbers, temperature, softcap, truncated):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    state = torch.tensor([0, 3, 3, 6, 2, 1, 5, 4, 4])  # several edges leave one state, in no order
    token = torch.tensor([1, 0, 9, 10, 4, 4, 2, 7, 8])
    kept = None
    if truncated:
        kept = torch.rand(7, 11, generator=generator) < 0.6
        kept[state, token] = True
    upstream = torch.randn(9, generator=generator, dtype=torch.float64), torch.randn(7, generator=generator, dtype=torch.float64)

    def gradients(function):
        logp, entropy = function()
        grads = torch.autograd.grad((logp * upstream[0]).sum() + (entropy * upstream[1]).sum(), (hidden, weight))
        return (logp, entropy, *grads)

    ours = gradients(
        lambda: token_logp(
            hidden, weight, state, token, temperature=temperature, softcap=softcap, kept=kept, block_numbers=block_numbers
        )
    )
    theirs = gradients(lambda: plain(hidden, weight, state, token, temperature, softcap, kept))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_temperature_divides_logits_and_not_log_probabilities():
    hidden, weight = torch.ones(1, 1), torch.tensor([[2.0], [1.0], [0.0]])
    logp, _ = token_logp(hidden, weight, torch.tensor([0]), torch.tensor([0]), temperature=0.6)
    assert logp.item() == pytest.approx(-0.2026, abs=1e-4)  # raw logits give −0.4076, log-probability / 0.6 gives −0.6793
