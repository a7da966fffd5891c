"""Settings: defaults that agree, mistakes that are explained, combinations that do not construct."""

from __future__ import annotations

import re
import tomllib

import pytest

from keel.config import RunConfig, load_config
from keel.errors import KeelError
from keel.run_folder import toml_of
from keel.settings import as_list, dotted, merged, nested, parse_value, shipped


def refusal(**data) -> str:
    with pytest.raises(KeelError) as said:
        RunConfig(**data)
    return str(said.value)


def test_the_quickstart_is_what_three_lines_of_python_train():
    """But for what it measures besides: its panel of other skills, and how often it asks whether it is on-policy."""
    config = RunConfig(recipe="solid", model="tiny-dense", task="arithmetic:medium")
    measured = {"evaluation.panel": [], "train.probe_every": config.train.probe_every}
    assert load_config("quickstart", measured) == config
    assert load_config("solid", {"model": "tiny-dense", "task": "arithmetic:medium"}) == config


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_configuration_loads(name):
    assert load_config(name).derived()["completions_total"] > 0


def test_what_is_written_as_toml_is_read_back_the_same(tmp_path):
    changes = {
        "lora.rank": 4,
        "train.threads": None,
        "train.lr": 1e-4,
        "evaluation.ks": (1, 4),
        "objective": {"surrogate": "clip", "surrogate.clip_high": 0.3},
    }
    config = load_config("solid", changes).resolved()
    (tmp_path / "config.toml").write_text(toml_of(config))
    assert load_config(str(tmp_path / "config.toml")) == config


def test_resolving_leaves_nothing_to_the_recipe():
    assert load_config("dapo").train.updates_per_batch is None
    resolved = load_config("dapo").resolved().train
    assert (resolved.updates_per_batch, resolved.dynamic_sampling) == (16, True)
    mine = load_config("dapo", {"train.updates_per_batch": 2, "train.dynamic_sampling": False}).resolved().train
    assert (mine.updates_per_batch, mine.dynamic_sampling) == (2, False)


def test_derived_numbers():
    config = load_config(
        "dapo",
        {"steps": 20, "train.prompts_per_step": 3, "train.group_size": 4, "sampling.max_completion_tokens": 10},
    )
    assert config.derived() == {
        "updates_per_batch": 16,
        "prompts_per_update": 3,
        "completions_per_update": 3 * 4,
        "prompts_per_batch": 3 * 16,
        "completions_per_batch": 3 * 4 * 16,
        "completion_tokens_per_update_at_most": 3 * 4 * 10,
        "batches": 2,  # 20 updates of 16 a batch: the second batch stops after 4
        "prompts_total": 2 * 3 * 16,
        "completions_total": 2 * 3 * 4 * 16,
        "completion_tokens_total_at_most": 2 * 3 * 4 * 16 * 10,
        "completions_per_evaluation": 256 * 4,
    }


def test_the_objective_follows_its_overrides():
    recipe = load_config("grpo", {"objective.surrogate.clip_high": 0.28, "objective.loss_kl": "none"}).chosen()
    assert recipe.objective.surrogate.clip_high == 0.28
    assert recipe.objective.surrogate.clip_low == 0.2
    assert recipe.objective.loss_kl is None


def test_nested_and_dotted_objective_tables_mean_the_same():
    tables = load_config("grpo", {"objective": {"surrogate": {"clip_high": 0.28}}})
    assert tables == load_config("grpo", {"objective.surrogate.clip_high": 0.28})


@pytest.mark.parametrize(
    "key, suggested",
    [
        ("train.lrr", "train.lr"),
        ("lr", "train.lr"),
        ("learning_rate", "train.lr"),
        ("num_generations", "train.group_size"),
        ("max_new_tokens", "sampling.max_completion_tokens"),
        ("evaluation.sample", "evaluation.samples"),
        ("lora.rnk", "lora.rank"),
        ("recip", "recipe"),
    ],
)
def test_an_unknown_setting_names_the_nearest(key, suggested):
    said = refusal(**nested({key: 1}))
    assert f"no setting {key!r}" in said and f"Did you mean {suggested!r}?" in said


def test_an_unknown_recipe_names_the_nearest():
    assert "did you mean 'dr_grpo'" in refusal(recipe="drgrpo")


def test_an_unknown_setting_of_the_objective_is_named():
    assert "clip_hihg" in refusal(recipe="grpo", objective={"surrogate.clip_hihg": 0.3})


@pytest.mark.parametrize(
    "changes, found, expected",
    [
        ({"train.lr": -1.0}, "train.lr is -1.0", "greater than 0"),
        ({"train.lr": float("nan")}, "train.lr is nan", "finite"),
        ({"train.lr": "fast"}, "train.lr is 'fast'", "number"),
        ({"train.group_size": 0}, "train.group_size is 0", "greater than or equal to 1"),
        ({"seed": 1.5}, "seed is 1.5", "whole number"),
        ({"train.betas": [0.9]}, "train.betas is", "list of 2"),
        ({"train.lr_schedule": "step"}, "train.lr_schedule is 'step'", "constant or linear or cosine"),
        ({"train": 3}, "train is 3", "a table"),
        ({"evaluation.ks": [8]}, "evaluation.ks is [8]", "between 1 and the number of samples"),
        ({"sampling.temperature": 0}, "sampling.temperature is 0", "greater than 0"),
        ({"plugins": "no_such_module_here"}, "no module 'no_such_module_here'", "Run from its folder"),
    ],
)
def test_a_bad_value_says_what_was_found_and_what_was_expected(changes, found, expected):
    said = refusal(**nested(changes))
    assert found in said and expected in said


def test_several_mistakes_are_counted():
    assert re.search(r"\(1 more to mend", refusal(seed=-1, steps=0))


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_truncated_sampling_without_replay_is_refused(cut):
    assert "replay_sampling_mask" in refusal(sampling=cut | {"replay_sampling_mask": False})
    assert RunConfig(sampling=cut).sampling.distribution().truncated


@pytest.mark.parametrize("recipe", ["solid", "grpo", "dapo", "rloo", "lite_ppo", "minirl"])
def test_a_group_of_one_is_refused_where_groups_are_compared(recipe):
    assert "group of one" in refusal(recipe=recipe, train={"group_size": 1})


def test_a_group_of_one_is_fine_where_they_are_not():
    plain = RunConfig(train={"group_size": 1}, objective={"advantage": "none"})
    assert plain.derived()["completions_per_update"] == 32


def test_a_cap_that_the_context_cannot_hold_is_refused():
    config = RunConfig(sampling={"max_completion_tokens": 100})
    config.check_fits(context=128, longest_prompt=28)
    with pytest.raises(KeelError, match="129 tokens.*holds 128.*Lower the cap to 99"):
        config.check_fits(context=128, longest_prompt=29)


def test_a_config_is_frozen_and_replacing_checks_anew():
    config = RunConfig()
    with pytest.raises(ValueError):
        config.seed = 1
    assert config.replaced({"train.lr": 1e-3}).train.lr == 1e-3
    with pytest.raises(KeelError):
        config.replaced({"train.lr": 0})


def test_sources(tmp_path):
    with pytest.raises(KeelError, match="no file.*quickstart"):
        load_config("missing.toml")
    with pytest.raises(KeelError, match="not a TOML file"):
        load_config("some/folder")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\nlr = 1")
    with pytest.raises(KeelError, match=r"broken.toml is not TOML: .*line 1"):
        load_config(str(broken))


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("true", True),
        ("none", None),
        ("[1, 4]", [1, 4]),
        ("arithmetic:medium", "arithmetic:medium"),
        ("2024-01-01", "2024-01-01"),
        ('"3"', "3"),
    ],
)
def test_values_of_the_command_line(text, value):
    assert parse_value(text) == value


def test_lists_from_text():
    assert as_list("1,4", tuple[int, ...]) == [1, 4]
    assert as_list(4, tuple[int, ...]) == [4]
    assert as_list("a", tuple[str, ...]) == ["a"]
    assert as_list("a,b", str) == "a,b"
    assert as_list("all", tuple[str, ...] | str) == "all"
    config = load_config("solid", {"evaluation.ks": "1,4", "lora.targets": "q_proj,k_proj", "writers": "wandb,trackio"})
    assert (config.evaluation.ks, config.writers) == ((1, 4), ("wandb", "trackio"))
    assert config.lora.targets == ("q_proj", "k_proj")
    assert load_config("solid", {"lora.rank": 2}).lora.targets == "all-linear"


def test_trees():
    tree = nested({"a.b.c": 1, "a.b.d": 2, "objective.x.y": 3})
    assert tree == {"a": {"b": {"c": 1, "d": 2}}, "objective": {"x.y": 3}}
    assert dotted({"a": {"b": 1}, "c.d": 2}) == {"a.b": 1, "c.d": 2}
    assert merged({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": 4}) == {"a": {"b": 1, "d": 3}, "c": 4}


def test_the_toml_of_a_config_says_nothing_of_settings_that_are_none():
    tables = tomllib.loads(toml_of(RunConfig()))
    assert "lora" not in tables and "threads" not in tables["train"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cluster.rollout_workers": 2}, "Expected a Ray cluster for them: --ray auto"),
        ({"cluster.train_workers": 2}, "Expected a Ray cluster for them: --ray auto"),
        ({"cluster.ray": "auto", "train.partial_rollouts": True}, "take new weights between completions"),
        ({"cluster.ray": "auto", "train.curriculum": "pass_rate"}, "keeps its own place in the data"),
        ({"cluster.ray": "auto", "engine.sync_every": 2}, "cluster.ray is 'auto'. Expected one of them"),
    ],
)
def test_workers_on_a_cluster_do_not_go_with_everything(settings, said):
    assert said in refusal(**nested(settings))


def test_workers_on_a_cluster_have_short_flags():
    from keel.arguments import parser_of, read

    parser = parser_of("train", test_workers_on_a_cluster_have_short_flags, settings=True)
    _, overrides = read(parser, ["--ray", "127.0.0.1:6379", "--rollout-workers", "4", "--train-workers", "2"])
    config = RunConfig(**nested(overrides))
    cluster = config.cluster
    assert config.samples_apart and (cluster.ray, cluster.rollout_workers, cluster.train_workers) == ("127.0.0.1:6379", 4, 2)
    assert config.train.parallel == "none" and config.resolved().train.parallel == "fsdp"
    assert config.replaced({"cluster.train_workers": 1}).resolved().train.parallel == "none"
    assert not RunConfig().samples_apart and RunConfig(train={"max_staleness": 1}).samples_apart
