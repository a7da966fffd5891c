"""A TRL or verl configuration in keel's words: which recipe, which knobs do nothing, where it leaves its paper."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest

from keel.audit.conformance import CASES
from keel.audit.peers import installed, source, version
from keel.audit.peers.defaults import TRL, TRL_OTHERS, TRL_VERSION, VERL, VERL_OTHERS, VERL_VERSION
from keel.audit.peers.overlay import as_text, overlay
from keel.audit.translate import nearest_recipe, translate
from keel.errors import KeelError
from keel.objectives.corrections import MaskSequence, MaskToken, RejectGeometric, TruncateToken
from keel.objectives.kl import k2, k3_clamped
from keel.objectives.parts import vary
from keel.objectives.recipes import RECIPES, recipe
from keel.objectives.shaping import OverlongFilter, SoftOverlong
from keel.objectives.surrogates import Cispo, Clip, DualClip, Gmpo, Reinforce

DAPO_OF_VERL = """
algorithm:
  adv_estimator: grpo
  use_kl_in_reward: false
  kl_ctrl: {kl_coef: 0.0}
  filter_groups: {enable: true, metric: acc}
data: {train_batch_size: 512, max_response_length: 20480, train_files: x.parquet}
actor_rollout_ref:
  actor:
    clip_ratio_low: 0.2
    clip_ratio_high: 0.28
    clip_ratio_c: 10.0
    loss_agg_mode: token-mean
    ppo_mini_batch_size: 32
    optim: {lr: 1e-6}
  rollout: {n: 16}
reward_model:
  reward_manager: dapo
  overlong_buffer: {enable: true, len: 4096, penalty_factor: 1.0}
"""


@pytest.fixture
def told(tmp_path):
    """translate, given the text of a file."""

    def of(framework: str, text: str):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return translate(framework, path)

    return of


def idle(translation) -> set[str]:
    return {item.knob.rpartition(".")[2] for item in translation.idle}


# ── TRL ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_trl_file_that_is_a_recipe_is_that_recipe(told):
    translation = told("trl", "loss_type: dr_grpo\nscale_rewards: none\nlearning_rate: 1e-6\n")
    assert (translation.recipe, translation.exact, translation.overlay) == ("dr_grpo", True, {})
    assert not (translation.unknown or translation.beyond or translation.departures or translation.idle or translation.warnings)
    assert translation.text().endswith(f"with the defaults of trl {TRL_VERSION}, is keel's dr_grpo.")


def test_a_recipe_with_something_beyond_keels_choices_is_not_exact(told):
    translation = told("trl", "loss_type: dr_grpo\nscale_rewards: none\ntop_p: 0.9\n")
    assert (translation.recipe, translation.exact, translation.overlay) == ("dr_grpo", False, {})
    assert "is keel's dr_grpo, but for what keel has no choice for." in translation.text()


def test_an_empty_trl_file_is_trls_default_and_named_after_dapo(told):
    translation = told("trl", "")
    assert (translation.recipe, translation.named_after, translation.updates_per_batch) == ("lite_ppo", "dapo", 1)
    assert translation.overlay == {"advantage.scale": "group_std"}
    missing = {departure.field for departure in translation.departures}
    assert missing == {"surrogate", "shaping", "dynamic_sampling", "updates_per_batch"}
    assert all(departure.source_a for departure in translation.departures)


def test_trl_gspo_is_found_by_its_ratio(told):
    text = "loss_type: grpo\nimportance_sampling_level: sequence\nepsilon: 3e-4\nepsilon_high: 4e-4\n"
    translation = told("trl", text + "steps_per_generation: 8\ngradient_accumulation_steps: 2\n")
    assert (translation.recipe, translation.exact, translation.updates_per_batch, idle(translation)) == ("gspo", True, 4, set())
    with_one = told("trl", text)
    assert with_one.named_after == "gspo" and idle(with_one) == {"epsilon", "epsilon_high", "importance_sampling_level"}


@pytest.mark.parametrize(
    ("text", "knobs"),
    [
        ("epsilon: 0.3\ndelta: 4.0", {"epsilon", "delta"}),
        ("epsilon: 0.3\nnum_iterations: 2", set()),
        ("epsilon: 0.3\nsteps_per_generation: 4\ngradient_accumulation_steps: 2", set()),
        ("epsilon: 0.3\ngeneration_batch_size: 64\nper_device_train_batch_size: 8", set()),
        ("beta: 0\nsync_ref_model: true\nref_model_mixup_alpha: 0.5\nuse_bias_correction_kl: false",
         {"beta", "sync_ref_model", "ref_model_mixup_alpha", "use_bias_correction_kl"}),
        ("beta: 0.1\nref_model_sync_steps: 9", {"ref_model_sync_steps"}),
        ("sapo_temperature_pos: 2\nvespo_k_pos: 1", {"sapo_temperature_pos", "vespo_k_pos"}),
        ("loss_type: sapo\nnum_iterations: 2\nepsilon: 0.1\ndelta: 3\nsapo_temperature_pos: 2", {"epsilon", "delta"}),
        ("loss_type: cispo\nnum_iterations: 2\nepsilon: 0.1\nepsilon_high: 5", {"epsilon"}),
        ("vllm_importance_sampling_mode: token_mask", {"vllm_importance_sampling_mode"}),
        ("use_vllm: true\nvllm_importance_sampling_correction: false\nvllm_importance_sampling_clip_max: 2",
         {"vllm_importance_sampling_clip_max"}),
        ("use_vllm: true\nvllm_importance_sampling_cap: 2\nvllm_importance_sampling_clip_max: 5",
         {"vllm_importance_sampling_clip_max"}),
        ("entropy_target: 1.0\nentropy_coef_max: 2", {"entropy_target", "entropy_coef_max"}),
        ("off_policy_mask_threshold: 0.5", {"off_policy_mask_threshold"}),
        ("multi_objective_aggregation: normalize_then_sum\nscale_rewards: batch", {"scale_rewards"}),
    ],
)  # fmt: skip
def test_trl_knobs_that_do_nothing_are_told(told, text, knobs):
    translation = told("trl", text)
    assert idle(translation) == knobs
    assert all(f"{knob}: " in translation.text() for knob in knobs)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("delta: 4.0\nnum_iterations: 2", DualClip(0.2, 0.2, 4.0)),
        ("loss_type: cispo\nepsilon_high: 5.0", Cispo(5.0)),
        ("mask_truncated_completions: true", OverlongFilter(in_baseline=True)),
        ("use_vllm: true", MaskSequence(0.0, 3.0)),
        ("use_vllm: true\nvllm_importance_sampling_mode: token_truncate\nvllm_importance_sampling_cap: 2", TruncateToken(2.0)),
        ("use_vllm: true\nvllm_importance_sampling_mode: token_mask\nvllm_importance_sampling_clip_min: 0.5", MaskToken(0.5, 3.0)),
    ],
)
def test_trl_knobs_become_parts(told, text, part):
    objective = told("trl", text).objective
    assert part in (objective.surrogate, *objective.shaping, *objective.corrections)


@pytest.mark.parametrize(
    ("text", "knob"),
    [
        ("loss_type: bnpo", "loss_type"),
        ("loss_type: luspo\nimportance_sampling_level: sequence", "loss_type"),
        ("loss_type: vespo", "loss_type"),
        ("top_entropy_quantile: 0.2", "top_entropy_quantile"),
        ("use_adaptive_entropy: true", "use_adaptive_entropy"),
        ("entropy_coef: 0.01", "entropy_coef"),
        ("delta: 1.1\nnum_iterations: 2", "delta"),
        ("loss_type: grpo\nmask_truncated_completions: true", "mask_truncated_completions"),
        ("steps_per_generation: 4\ngradient_accumulation_steps: 2", "loss_type"),
        ("top_p: 0.9", "top_p"),
        ("beta: 0.1\nsync_ref_model: true", "sync_ref_model"),
        ("beta: 0.1\nuse_vllm: true", "use_bias_correction_kl"),
        ("use_vllm: true\nvllm_importance_sampling_mode: token_truncate\nvllm_importance_sampling_clip_min: 0.5",
         "vllm_importance_sampling_clip_min"),
    ],
)  # fmt: skip
def test_what_keel_has_no_choice_for_is_named(told, text, knob):
    translation = told("trl", text)
    assert knob in {item.knob for item in translation.beyond} and not translation.exact
    assert "Not among keel's choices:" in translation.text()


def test_cispo_with_an_epsilon_in_place_of_a_cap_is_told_as_a_mistake(told):
    translation = told("trl", "loss_type: cispo\nepsilon_high: 0.28\n")
    assert "cap itself" in " ".join(translation.warnings) and "epsilon_high" not in idle(translation)
    assert not told("trl", "loss_type: cispo\nepsilon_high: 5.0\n").warnings


def test_unknown_keys_get_the_nearest_name_and_others_are_left_alone(told):
    translation = told("trl", "epsilon_hi: 0.28\nmodel_name_or_path: x\nmax_steps: 10\nreward_funcs: [a]\nseed: 3\nzzz: 1\n")
    assert {item.key: item.nearest for item in translation.unknown} == {"epsilon_hi": "epsilon_high", "zzz": ""}
    assert "epsilon_hi; did you mean epsilon_high?" in translation.text()


# ── verl ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_verls_dapo_script_is_dapo_with_its_differences_named(told):
    translation = told("verl", DAPO_OF_VERL)
    assert (translation.recipe, translation.named_after, translation.exact) == ("dapo", "dapo", False)
    assert (translation.updates_per_batch, translation.dynamic_sampling) == (16, True)
    assert translation.overlay == {
        "advantage.scale.eps": 1e-6, "surrogate": "dual_clip", "surrogate.clip_high": 0.28, "surrogate.dual": 10.0,
        "shaping.soft_overlong.scale": 1.0,
    }  # fmt: skip
    assert {departure.field for departure in translation.departures} == {"advantage.scale", "surrogate", "shaping"}
    assert idle(translation) == {"kl_coef"} and not translation.beyond
    assert "overlong_buffer_cfg" in " ".join(translation.warnings)


@pytest.mark.parametrize(
    ("actor", "name", "part"),
    [
        ("policy_loss: {loss_mode: gspo}\n    loss_agg_mode: seq-mean-token-mean", "gspo", Clip(0.2, 0.2)),
        ("policy_loss: {loss_mode: cispo}\n    clip_ratio_low: 1.0\n    clip_ratio_high: 4.0", "cispo", Cispo(5.0)),
        ("policy_loss: {loss_mode: geo_mean}\n    clip_ratio_low: 0.4\n    clip_ratio_high: 0.4", "gmpo", Gmpo(0.4)),
        ("policy_loss: {loss_mode: gpg}", "grpo", Reinforce()),
    ],
)
def test_verls_loss_modes_name_their_papers(told, actor, name, part):
    translation = told("verl", f"algorithm:\n  adv_estimator: grpo\nactor_rollout_ref:\n  actor:\n    {actor}\n")
    assert translation.named_after == name and translation.objective.surrogate == part


def test_verls_clip_ratio_alone_is_told_as_a_mistake(told):
    text = "algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {actor: {clip_ratio: 0.1"
    translation = told("verl", text + "}}")
    assert "clip_ratio 0.1 does nothing" in translation.warnings[0] and "clip_ratio" in idle(translation)
    followed = told("verl", text + ", clip_ratio_low: null, clip_ratio_high: null}}")
    assert followed.objective.surrogate == DualClip(0.1, 0.1, 3.0) and not followed.warnings


@pytest.mark.parametrize(
    ("text", "knobs"),
    [
        ("algorithm: {adv_estimator: rloo, norm_adv_by_std_in_grpo: false, lam: 0.9, gamma: 0.9}",
         {"norm_adv_by_std_in_grpo", "lam", "gamma"}),
        ("algorithm: {adv_estimator: grpo, kl_penalty: k2, kl_ctrl: {type: adaptive}}", {"kl_penalty", "type"}),
        ("algorithm: {adv_estimator: grpo, use_kl_in_reward: true, kl_ctrl: {kl_coef: .1, horizon: 3}}", {"horizon"}),
        ("algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {actor: {kl_loss_type: k2, tau_pos: 2, loss_scale_factor: 3}}",
         {"kl_loss_type", "tau_pos", "loss_scale_factor"}),
        ("algorithm: {adv_estimator: grpo}\ndata: {train_batch_size: 256}\nactor_rollout_ref: {actor: {clip_ratio_high: .3}}",
         {"clip_ratio_high"}),
        ("algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {actor: {policy_loss: {loss_mode: sapo, dro_beta: 1.0}, "
         "clip_ratio_c: 4.0, loss_agg_mode: token-mean}}", {"dro_beta", "clip_ratio_c", "loss_agg_mode"}),
        ("algorithm: {adv_estimator: grpo}\nreward: {reward_kwargs: {overlong_buffer_cfg: {enable: true, len: 10}}}",
         {"enable", "len"}),
        ("algorithm: {adv_estimator: grpo, rollout_correction: {rollout_is_threshold: 3.0, loss_type: reinforce}}",
         {"rollout_is_threshold", "loss_type"}),
    ],
)  # fmt: skip
def test_verl_knobs_that_do_nothing_are_told(told, text, knobs):
    assert idle(told("verl", text)) == knobs


def test_verls_corrections_kl_and_length_become_parts(told):
    chosen = "{rollout_is: token, rollout_is_threshold: '%s', rollout_rs: %s, %s}"
    text = "algorithm: {adv_estimator: grpo, rollout_correction: " + chosen + "}"
    assert told("verl", text % ("2.0", "null", "")).objective.corrections == (TruncateToken(2.0),)
    both = told("verl", text % ("0.5_5.0", "seq_mean_k1", "rollout_rs_threshold: 0.999_1.001")).objective.corrections
    assert both == (MaskToken(0.5, 5.0), RejectGeometric(0.999, 1.001, leaves=True))
    kl = "algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {actor: {use_kl_loss: true, kl_loss_type: %s}}"
    assert told("verl", kl % "low_var_kl").objective.loss_kl.estimator is k3_clamped
    assert told("verl", kl % "k3+").objective.loss_kl.estimator is k2
    assert "restrains nothing" in told("verl", kl % "kl").warnings[0]
    assert told("verl", DAPO_OF_VERL).objective.shaping == (SoftOverlong(0.2, 1.0),)


@pytest.mark.parametrize(
    ("text", "knob"),
    [
        ("", "algorithm.adv_estimator"),
        ("algorithm: {adv_estimator: reinforce_plus_plus, gamma: 0.9}", "algorithm.gamma"),
        ("algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {actor: {loss_agg_mode: seq-mean-token-sum}}",
         "actor_rollout_ref.actor.loss_agg_mode"),
        ("algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {actor: {policy_loss: {loss_mode: kl_cov}}}",
         "actor_rollout_ref.actor.policy_loss.loss_mode"),
        ("algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {rollout: {top_p: 0.9}}", "actor_rollout_ref.rollout.top_p"),
        ("algorithm: {adv_estimator: grpo, rollout_correction: {bypass_mode: true}}", "algorithm.rollout_correction.bypass_mode"),
    ],
)  # fmt: skip
def test_what_keel_has_no_choice_for_is_named_for_verl_too(told, text, knob):
    assert knob in {item.knob for item in told("verl", text).beyond}


def test_unknown_keys_are_judged_only_where_the_loss_is_tuned(told):
    misspelt = DAPO_OF_VERL.replace("clip_ratio_c", "clip_ration_c")
    translation = told("verl", misspelt + "trainer: {anything: 1}\ndefaults: [_self_]\n")
    assert {item.key: item.nearest for item in translation.unknown} == {
        "actor_rollout_ref.actor.clip_ration_c": "actor_rollout_ref.actor.clip_ratio_c"
    }


def test_what_only_verl_can_resolve_is_taken_at_its_default(told):
    translation = told("verl", "algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {actor: {clip_ratio_high: '${oc.env:EPS}'}}")
    assert "which only verl resolves: its default, 0.2" in translation.warnings[0]


# ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("framework", "text", "message"),
    [
        ("trl", "loss_type: dpao", "did you mean 'dapo'"),
        ("trl", "beta: much", "Expected a number"),
        ("trl", "use_vllm: 3", "Expected true or false"),
        ("trl", "- a\n- b", "holds a list"),
        ("trl", "a: [", "is no YAML"),
        ("trl", "steps_per_generation: 2\ngeneration_batch_size: 8", "both set"),
        ("trl", "scale_rewards: [group]", "scale_rewards is"),
        ("verl", "algorithm: {adv_estimator: grop}", "did you mean 'grpo'"),
        ("verl", "algorithm: {rollout_correction: {rollout_is: token, rollout_is_threshold: high}}", "0.5_5.0"),
        ("openrlhf", "", "Expected one of: trl, verl"),
    ],
)
def test_bad_input_is_refused_with_what_was_expected(told, framework, text, message):
    with pytest.raises(KeelError, match=message):
        told(framework, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(KeelError, match="There is no file"):
        translate("trl", tmp_path / "none.yaml")


def test_json_is_stable_and_plain(told):
    record = json.loads(json.dumps(told("verl", DAPO_OF_VERL).as_json()))
    assert set(record) == {
        "framework", "version", "path", "recipe", "exact", "overlay", "dynamic_sampling", "updates_per_batch", "beyond", "idle",
        "unknown", "warnings", "named_after", "departures",
    }  # fmt: skip
    assert record["departures"][0].keys() == {"field", "paper", "here", "source"} and record["version"] == VERL_VERSION


def test_an_overlay_leads_from_any_recipe_to_any_other_in_plain_words():
    for one, other in itertools.product([found.objective for found in RECIPES.values()], repeat=2):
        changes = overlay(one, other)
        assert vary(one, changes) == other and vary(one, json.loads(json.dumps(changes))) == other
        assert (as_text(changes) == "none") == (one == other)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.peer}-{case.recipe}")
def test_the_nearest_recipe_of_every_case_can_be_varied_into_it(case):
    reading = case.reading
    own = replace(recipe("solid"), name="own", objective=reading.objective)
    closest = nearest_recipe(own, prefer=reading.named_after).objective
    assert vary(closest, overlay(closest, reading.objective)) == reading.objective


def test_translating_imports_no_framework(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("loss_type: grpo\n")
    code = (
        "import sys; from keel.audit.translate import translate; translate('trl', sys.argv[1]).text(); "
        "print([m for m in ('trl', 'verl', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.skipif(not installed("trl"), reason="not installed: trl")
def test_the_table_of_defaults_is_the_installed_trls():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import GRPOConfig
    if version("trl") != TRL_VERSION:
        pytest.skip(f"the table is of trl {TRL_VERSION}, installed is {version('trl')}")
    fields = {item.name: item.default for item in dataclasses.fields(GRPOConfig)}
    assert {name: fields[name] for name in TRL} == TRL
    assert set(fields) == {*TRL, *TRL_OTHERS}


@pytest.mark.skipif(not installed("verl"), reason="not installed: verl")
def test_the_table_of_defaults_is_the_installed_verls():
    import yaml

    from keel.audit.peers.configuration import _flat

    if version("verl") != VERL_VERSION:
        pytest.skip(f"the table is of verl {VERL_VERSION}, installed is {version('verl')}")
    path = source.folder("verl") / "trainer/config/_generated_ppo_trainer.yaml"
    tree = dict(_flat(yaml.safe_load(path.read_text())))
    ours = {name: value for name, value in VERL.items() if not name.startswith("reward.reward_kwargs")}
    assert {name: tree[name] for name in ours} == ours
    judged = [name for name in tree if name.startswith(("algorithm.", "actor_rollout_ref.actor."))]
    assert [n for n in judged if n not in VERL and not any(n == o or n.startswith(o + ".") for o in VERL_OTHERS)] == []
