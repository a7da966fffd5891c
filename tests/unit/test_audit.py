"""Losses of one's own, and `keel audit` as it is typed."""

import json
import time

import pytest
import torch

from keel import cli
from keel.audit.bare import BareLoss, faults_of
from keel.audit.identify import identify
from keel.audit.side_by_side import compare
from keel.objectives.estimators import ESTIMATORS

PLUGIN = """
import torch

def mine(logp, logp_old, logp_rollout, logp_ref, advantages, mask):
    ratio = (logp - logp_old).exp()
    d = logp_ref - logp
    return -advantages * ratio.clamp(0.8, 1.2) + 0.1 * (d.exp() - 1 - d)

def scalar(logp, *rest):
    return logp.mean()
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my_losses.py"


def test_a_loss_of_ones_own_is_identified():
    def loss(logp, logp_old, logp_rollout, logp_ref, advantages, mask):
        return -advantages * (logp - logp_old).exp() + 0.3 * (logp - logp_ref).square() / 2

    assert faults_of(loss) == []
    found = identify(BareLoss(loss))
    assert found.exact
    assert {name: c for c, name in found.terms} == pytest.approx({"J": 1.0, "reverse_kl_positions": -0.3})


def test_a_loss_that_branches_is_taken_batch_by_batch():
    def loss(logp, logp_old, logp_rollout, logp_ref, advantages, mask):
        return -advantages * logp if float(logp.detach().sum()) < 1e9 else logp

    found = identify(BareLoss(loss), {"group_size": 2})
    assert found.exact and found.terms[0][1] == "J"


def masked_mean_of_all(logp, *rest):
    return logp - logp.mean()


BAD = {
    "returns a float": (lambda *a: 1.0, "returned a float"),
    "returns a scalar": (lambda logp, *a: logp.sum(), "scalar"),
    "has another shape": (lambda logp, *a: logp[:, :1], "shape"),
    "is not differentiable": (lambda logp, *a: -logp.detach(), "no gradient"),
    "gives NaN": (lambda logp, *a: logp.log(), "NaN"),
    "ignores its input": (lambda logp, *a: logp * 0, "ignores logp"),
    "looks under the mask": (masked_mean_of_all, "under the mask"),
    "depends on the order": (lambda logp, *a: logp * torch.arange(len(logp))[:, None], "order of the rows"),
    "raises": (lambda logp: logp, "TypeError"),
}


@pytest.mark.parametrize("function, match", BAD.values(), ids=BAD)
def test_each_fault_has_its_verdict(function, match):
    (fault,) = faults_of(function)
    assert match in fault


def test_two_estimators_side_by_side():
    rows = dict(compare(ESTIMATORS["group_mean"].objective, ESTIMATORS["leave_one_out"].objective))
    found = rows["on-policy"]
    assert (found.cosine, found.scale, found.relative) == pytest.approx((1.0, 0.5, 0.5))
    assert found.variance_ratio == pytest.approx(0.25)


def said(capsys, *arguments):
    code = cli.main(["audit", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_one_recipe_within_five_seconds(capsys):
    start = time.perf_counter()
    code, out, _ = said(capsys, "dapo")
    assert code == 0 and "does not follow the expected reward" in out
    assert time.perf_counter() - start < 5


def test_a_file_of_ones_own(capsys, plugin):
    code, out, _ = said(capsys, "my_losses.py:mine")
    assert code == 0 and "follows: +1 J -0.1 forward_kl_positions" in out
    assert said(capsys, "my_losses:mine")[1].splitlines()[2:] == out.splitlines()[2:]
    code, _, err = said(capsys, "my_losses:scalar")
    assert code == 2 and "scalar" in err


def test_json_is_stable(capsys):
    code, out, _ = said(capsys, "grpo", "--json")
    (first, *_) = json.loads(out)["certificates"]
    assert set(first) == {"objective", "claim", "truth", "conditions", "relative_bias", "cosine", "variance", "holds"}
    assert code == 0 and first["holds"] is True and first["truth"] == "J_group_std - 0.04 forward_kl"


def test_a_claim_that_does_not_hold_exits_with_one(capsys):
    code, out, _ = said(capsys, "dr_grpo", "--world", "gap=0.4")
    assert code == 1 and "✗ dr_grpo" in out and "NO, off by" in out


def test_comparing(capsys):
    code, out, _ = said(capsys, "--compare", "k1-in-reward", "k3-in-loss")
    assert code == 0 and "k1-in-reward follows: -1 reverse_kl" in out and "k3-in-loss follows: -1 forward_kl_positions" in out


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["k3-in-los"], "did you mean 'k3_in_loss'"),
        (["--world", "drift"], "knob=value"),
        (["--world", "drft=1"], "did you mean 'drift'"),
        (["nowhere:loss"], "nowhere"),
        (["keel.errors:nothing"], "has no function"),
    ],
)
def test_mistakes_are_told(capsys, arguments, match):
    code, _, err = said(capsys, *arguments)
    assert code == 2 and match in err
