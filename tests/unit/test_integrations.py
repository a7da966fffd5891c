"""Recipes as other engines' configurations and functions: what is written reads back, and what cannot be said is named."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from keel.audit.conformance import MAX_TOKENS, random_batch
from keel.audit.peers import installed, loss_and_gradient
from keel.audit.peers.defaults import TRL, TRL_OTHERS
from keel.audit.translate import translate
from keel.cli import main
from keel.config import load_config
from keel.errors import KeelError
from keel.integrations import prime_rl, slime, verl
from keel.integrations.export import ENGINES, write
from keel.objectives.objective import Objective
from keel.objectives.parts import vary
from keel.objectives.recipes import RECIPES, recipe
from keel.tasks.task import get_task

# what TRL's and verl's own knobs do not express of a recipe: the fields, and knobs that mean something else; the rest they do
LOST = {
    "trl": {
        "solid": {"advantage.baseline", "surrogate"},
        "dapo": {"shaping", "dynamic_sampling", "loss_type"},
        "rloo": {"advantage.baseline", "surrogate", "reward_kl"},
        "reinforce_pp": {"advantage.baseline", "advantage.scale", "reward_kl"},
        "reinforce_pp_baseline": {"advantage.scale", "loss_kl"},
        "reinforce_pp_centred": {"advantage.scale", "loss_kl"},
        "minirl": {"surrogate"},
        "gmpo": {"surrogate"},
        "cispo": {"loss_type"},
        "deepseek_v32": {"use_bias_correction_kl"},
        "decoupled": {"loss_type"},
    },
    "verl": {
        "grpo": {"advantage.scale", "surrogate", "loss_kl"},
        "dapo": {"advantage.scale", "surrogate", "shaping"},
        "dr_grpo": {"surrogate"},
        "reinforce_pp": {"surrogate", "adv_estimator"},
        "reinforce_pp_baseline": {"surrogate", "adv_estimator"},
        "reinforce_pp_centred": {"advantage.scale", "surrogate"},
        "lite_ppo": {"advantage.scale", "surrogate"},
        "minirl": {"surrogate"},
        "gspo": {"advantage.scale"},
        "gmpo": {"advantage.scale", "loss_mode"},
        "cispo": {"advantage.scale"},
        "sapo": {"advantage.scale"},
        "tis": {"advantage.scale", "surrogate"},
        "icepop": {"advantage.scale", "surrogate"},
        "deepseek_v32": {"surrogate", "corrections", "loss_kl"},
        "decoupled": {"advantage.scale", "surrogate", "corrections"},
    },
}


def ran(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    told = capsys.readouterr()
    return code, told.out, told.err


# ── configurations ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("engine", LOST)
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_reads_back_as_the_recipe_or_its_difference_is_named(engine, name, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    code, out, err = ran(capsys, "export", name, str(file), "--to", engine)
    assert (code, out) == (0, f"{file}\n")
    found = translate(engine, file)
    lost = {phrase.split(" is ")[0].split(":")[0].rpartition("policy_loss.")[2].removeprefix("algorithm.") for phrase in told(err)}
    assert lost == LOST[engine].get(name, set())
    if lost:
        assert (found.recipe, found.exact) != (name, True) and f"{engine} does not express all of {name}:" in err
    else:
        assert (found.recipe, found.exact, err) == (name, True, "")
    assert not found.unknown
    assert (found.dynamic_sampling, found.updates_per_batch) == (
        recipe(name).dynamic_sampling and engine == "verl", recipe(name).updates_per_batch
    )  # fmt: skip


def told(err: str) -> list[str]:
    return [line.strip() for line in err.splitlines()[1:]]


@pytest.mark.parametrize("name", [name for name, one in RECIPES.items() if not verl.beyond(one.objective)])
def test_verls_file_with_keels_loss_reads_back_as_the_recipe(name, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    assert ran(capsys, "export", name, str(file), "--to", "verl", "--adapter")[0] == 0
    found = translate("verl", file)
    clamped = [item.knob.rpartition(".")[2] for item in found.beyond]
    assert (found.recipe, found.differences, clamped) == (name, (), ["kl_loss_type"] if name == "grpo" else [])
    file.write_text(file.read_text().replace(f"adv_estimator: keel_{name}", "adv_estimator: grpo"))
    assert "advantages are not those" in translate("verl", file).beyond[0].says


@pytest.mark.parametrize("engine", LOST)
def test_changed_parts_and_settings_are_written_too(engine, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    changes = ["--objective.surrogate.clip_high", "0.3", "--train.group_size", "4", "--sampling.max_completion_tokens", "100"]
    assert ran(capsys, "export", "tis", str(file), "--to", engine, *changes, "--train.lr", "3e-5")[0] == 0
    assert translate(engine, file).objective.surrogate.clip_high == 0.3
    text = file.read_text()
    assert "100" in text and "3.0e-05" in text
    assert ("num_generations: 4" if engine == "trl" else "n: 4") in text


def test_a_written_trl_file_holds_nothing_that_a_grpo_config_does_not_know():
    written = yaml.safe_load(write("trl", load_config("tis", {})).text)
    assert set(written) <= {*TRL, *TRL_OTHERS}


@pytest.mark.parametrize(("name", "kept"), [("tis", True), ("solid", False)])
def test_prime_rls_file_names_keels_functions_and_says_what_they_cannot_be_told(name, kept):
    written = write("prime-rl", load_config(name, {}))
    loss = tomllib.loads(written.text)["trainer"]["loss"]
    assert loss == {"type": "custom", "import_path": "keel.integrations.prime_rl.loss", "kwargs": {"recipe": name}}
    assert bool(written.missing) is not kept


def test_slimes_arguments_name_keels_functions_and_the_divisor(capsys):
    _, out, err = ran(capsys, "export", "dapo", "--to", "slime")
    assert "--custom-loss-function-path keel.integrations.slime.loss" in out and "--calculate-per-token-loss" in out and not err
    assert "--calculate-per-token-loss" not in write("slime", load_config("grpo", {})).text
    changed = write("slime", load_config("dapo", {"objective.surrogate.clip_high": 0.5}))
    assert "objective.surrogate.clip_high = 0.5" in changed.missing[0]


def test_the_adapters_configurations_leave_the_loss_to_keel():
    trl = yaml.safe_load(write("trl", load_config("dapo", {}), adapter=True).text)
    assert "loss_type" not in trl and trl["steps_per_generation"] == 16 * trl["gradient_accumulation_steps"]
    own = yaml.safe_load(write("verl", load_config("tis", {}), adapter=True).text)
    assert own["actor_rollout_ref"]["actor"]["policy_loss"]["loss_mode"] == own["algorithm"]["adv_estimator"] == "keel_tis"
    with pytest.raises(KeelError, match="verl cannot hold deepseek_v32: the KL in its loss has a ratio"):
        write("verl", load_config("deepseek_v32", {}), adapter=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "dapo", "--to", "tlr"), "did you mean 'trl'?"),
        (("export", "runs/none", "--train.lr", "1"), "Expected settings only with --to"),
        (("export", "dapoo", "--to", "trl"), "did you mean 'dapo'"),
    ],
)
def test_a_mistake_in_an_export_is_told(capsys, arguments, said):
    code, out, err = ran(capsys, *arguments)
    assert (code, out) == (2, "") and said in err


def test_nothing_is_overwritten(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    assert "nothing is overwritten" in ran(capsys, "export", "dapo", str(file), "--to", "trl")[2]
    assert file.read_text() == "mine"


def test_every_engine_writes_every_recipe():
    for engine in ENGINES:
        for name in RECIPES:
            assert write(engine, load_config(name, {})).text


# ── functions ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Sequence:
    """What prime-rl hands to a loss."""

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    ref_logprobs: torch.Tensor | None = None


@pytest.mark.parametrize("name", [name for name, one in RECIPES.items() if not prime_rl.beyond(one.objective)])
def test_prime_rls_losses_sum_to_keels_step(name):
    batch, logp = random_batch(4)
    objective = recipe(name).objective
    corrects = bool(objective.corrections) or objective.surrogate.weighs_gap
    batch = replace(batch, logp_old=None if corrects else batch.logp_rollout)
    prepared = objective.prepare(batch, MAX_TOKENS)
    own = loss_and_gradient(objective, logp, batch, MAX_TOKENS)
    logp = logp.requires_grad_()
    lengths = batch.completion_len.tolist()
    parts = [
        prime_rl.loss(
            Sequence(*(x[i, :n] for x in (logp, batch.logp_rollout, prepared.advantage, batch.mask, batch.logp_ref))), name
        )
        for i, n in enumerate(lengths)
    ]
    total = sum(part.loss for part in parts) / batch.mask.sum()
    torch.testing.assert_close(total.detach(), own[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, logp)[0], own[1], rtol=1e-9, atol=1e-12)
    assert all(0 <= float(part.metrics["clip_frac"]) <= 1 for part in parts)


def test_prime_rls_advantages_are_keels():
    rewards, lengths = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5]]), torch.tensor([[3, 2, 4], [1, 1, 5]])
    made = prime_rl.advantage(SimpleNamespace(rewards=rewards, completion_lengths=lengths), "tis").advantages
    std = rewards[0].std() + 1e-4
    torch.testing.assert_close(made, torch.stack([(rewards[0] - 1 / 3) / std, torch.zeros(3)]))


@pytest.mark.parametrize("name", ["grpo", "solid"])
def test_prime_rl_is_told_what_it_cannot_hold(name):
    batch, logp = random_batch(0)
    with pytest.raises(KeelError, match=f"prime-rl cannot hold {name}: its aggregate"):
        prime_rl.loss(Sequence(logp[0], logp[0], logp[0], batch.mask[0]), name)


def test_a_kl_without_a_reference_is_told():
    batch, logp = random_batch(0)
    with pytest.raises(KeelError, match="hands over no reference"):
        prime_rl.loss(Sequence(logp[0], logp[0], logp[0], batch.mask[0]), "reinforce_pp_baseline")


def slimes(batch, logits, tokens, prepared, **more):
    """What slime hands to a loss: lists with an entry for each completion, and packed logits."""
    lengths, prompt = batch.completion_len.tolist(), 2
    columns = {"log_probs": batch.logp_old, "ref_log_probs": batch.logp_ref, "rollout_log_probs": batch.logp_rollout,
               "advantages": prepared.advantage, "loss_masks": batch.mask.long()}  # fmt: skip
    held = {name: [row[:n] for row, n in zip(value, lengths, strict=True)] for name, value in columns.items()}
    totals = [prompt + n for n in lengths]
    return {**held, "response_lengths": lengths, "total_lengths": totals, "unconcat_tokens": tokens, **more}


@pytest.mark.parametrize("name", [name for name, one in RECIPES.items() if not slime.beyond(one.objective)])
def test_slimes_loss_divided_as_slime_divides_is_keels_step(name):
    batch, _ = random_batch(5)
    objective = recipe(name).objective
    draw = torch.Generator().manual_seed(0)
    totals = (batch.completion_len + 2).tolist()
    logits = torch.randn(1, sum(totals), 7, generator=draw, dtype=torch.float64)
    tokens = [torch.randint(0, 7, (n,), generator=draw) for n in totals]
    logp = log_probabilities(logits / 0.5, tokens, batch)
    spread = 0.3 * torch.randn(logp.shape, generator=draw, dtype=torch.float64)
    batch = replace(batch, logp_old=logp + spread, logp_rollout=logp - spread, logp_ref=logp + 2 * spread)
    prepared = objective.prepare(batch, MAX_TOKENS)
    by_tokens = objective.aggregate.__name__ == "token_mean"
    args = SimpleNamespace(keel_recipe=name, rollout_temperature=0.5, rollout_max_response_len=MAX_TOKENS,
                           calculate_per_token_loss=by_tokens)  # fmt: skip
    value, metrics = slime.loss(args, slimes(batch, logits, tokens, prepared), logits, None)
    own, _ = loss_and_gradient(objective, logp, batch, MAX_TOKENS)
    divisor = batch.mask.sum() if by_tokens else len(batch)
    torch.testing.assert_close(value / divisor, own, rtol=1e-9, atol=1e-12)
    assert metrics["loss"] == value


def log_probabilities(logits, tokens, batch):
    made, at = torch.zeros(batch.mask.shape, dtype=torch.float64), 0
    for row, ids in enumerate(tokens):
        every = logits[0, at : at + len(ids)].log_softmax(-1)
        made[row, : len(ids) - 2] = every[1:-1].gather(1, ids[2:, None])[:, 0]
        at += len(ids)
    return made


def test_slimes_rewards_become_keels_advantages_group_by_group():
    class Sample(SimpleNamespace):
        def get_reward_value(self, args):
            return self.reward

    rewards = {0: [1.0, 0.0], 1: [0.0, 0.0]}
    samples = [Sample(group_index=g, response_length=4, reward=r) for r0 in (0, 1) for g, rs in rewards.items() for r in [rs[r0]]]
    args = SimpleNamespace(keel_recipe="dapo", rollout_max_response_len=100)
    raw, made = slime.advantages(args, samples)
    assert raw == [1.0, 0.0, 0.0, 0.0]
    assert made == pytest.approx([0.5 / (0.5**0.5 + 1e-4), 0.0, -0.5 / (0.5**0.5 + 1e-4), 0.0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keel_recipe": None}, "keel_recipe: dapo"),
        ({"tensor_model_parallel_size": 2}, "cuts the logits"),
        ({"calculate_per_token_loss": False}, "with --calculate-per-token-loss"),
        ({"keel_recipe": "rloo"}, "its KL is in the reward"),
    ],
)
def test_slime_is_told_what_it_cannot_hold(changes, says):
    args = SimpleNamespace(**{"keel_recipe": "dapo", "calculate_per_token_loss": True, **changes})
    with pytest.raises(KeelError, match=says):
        slime.loss(args, {}, torch.zeros(1, 1, 1), None)


# ── extras ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(installed("trl"), reason="trl is installed")
def test_without_trl_its_adapter_says_how_to_get_it():
    run = subprocess.run([sys.executable, "-c", "import keel.integrations.trl"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "pip install 'keel-rl[peers]'" in run.stderr


@pytest.mark.skipif(installed("verl"), reason="verl is installed")
def test_without_verl_its_registry_says_how_to_get_it():
    with pytest.raises(KeelError, match="pip install --no-deps verl=="):
        verl.register(recipe("dapo"))


@pytest.mark.skipif(installed("verifiers"), reason="verifiers is installed")
def test_without_verifiers_its_task_says_how_to_get_it():
    with pytest.raises(KeelError, match=r"pip install 'keel-rl\[verifiers\]'"):
        get_task("verifiers:wordle")


def test_verl_is_told_what_it_cannot_hold_before_it_is_looked_for():
    leaving = Objective(**vars(vary(recipe("icepop").objective, {"corrections.mask_token.leaves": True})))
    assert verl.beyond(leaving) == ["a correction takes tokens out of the denominators"]
    balanced = vary(recipe("dapo").objective, {"aggregate": "balanced_mean"})
    assert verl.beyond(balanced) == ["its aggregate needs counts of each group or sign"]
