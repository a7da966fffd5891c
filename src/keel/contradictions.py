"""Settings that contradict one another, each refused in a paragraph: impossible combinations do not construct."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keel.errors import KeelError

if TYPE_CHECKING:
    from keel.config import RunConfig
    from keel.objectives.recipes import Recipe


def refuse_contradictions(config: RunConfig) -> None:
    """Look at a whole configuration.

    Raises:
        KeelError: two of its settings cannot stand together.
    """
    for refuse in REFUSALS:
        refuse(config)


def _refuse_lone_completions(config: RunConfig) -> None:
    recipe = config.chosen()
    if config.train.group_size == 1 and _silent_alone(recipe):
        raise KeelError(
            f"train.group_size is 1, and recipe {config.recipe!r} compares the completions of one prompt with each "
            "other: a group of one has no baseline, so every advantage would be 0 or undefined. Expected a group of "
            "at least 2. Set train.group_size = 8, or take a recipe whose baseline is the batch (`keel papers` lists "
            "them)."
        )


def _silent_alone(recipe: Recipe) -> bool:
    """Whether a right and a wrong completion, each alone in its group, both get advantage 0: asked of the advantage
    itself.
    """
    import torch

    from keel.objectives.signals import Scored

    reward, alone, true = torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), torch.tensor([True, True])
    scored = Scored(reward, alone, true, true[:, None])
    return not bool(recipe.objective.advantage(reward[:, None], scored).any())


def _refuse_idle_corrections(config: RunConfig) -> None:
    idle = [type(c).__name__ for c in config.chosen().objective.corrections if type(c).__name__ != "OffPolicyMask"]
    if config.train.bypass_old and idle:
        raise KeelError(
            f"train.bypass_old is true, and the objective corrects the engine gap by {', '.join(idle)}. Without a logp_old of the "
            "trainer's own there is no gap to see: every weight would be 1. Expected one or the other: bypass_old with a clip on "
            "π/μ, or corrections of π_old/μ (decoupled)."
        )


def _refuse_stale_twice(config: RunConfig) -> None:
    if config.engine.sync_every > 1 and config.samples_apart:
        raise KeelError(
            f"engine.sync_every is {config.engine.sync_every}, and {_apart(config)}. Expected one of them: sync_every skips syncs "
            "of the trainer's own engine, and train.max_staleness is how old the weights of other processes may be."
        )


def _refuse_unheard_routing(config: RunConfig) -> None:
    engine = config.engine
    if config.train.routing_replay == "R3" and engine.name == "vllm" and not engine.routed_experts:
        raise KeelError(
            "train.routing_replay is R3, which replays the engine's experts, and engine.routed_experts is false: vLLM would not "
            "say which they were. Set engine.routed_experts = true, or replay the trainer's own (R2)."
        )


def _refuse_partial_alone(config: RunConfig) -> None:
    if config.train.partial_rollouts and config.cluster.ray:
        raise KeelError(
            "train.partial_rollouts is true with cluster.ray: workers on a cluster take new weights between completions, not "
            "within them. Expected one of them: --ray, or one worker that samples ahead (train.max_staleness without --ray)."
        )
    if config.train.partial_rollouts and (config.train.max_staleness == 0 or config.engine.name != "local"):
        raise KeelError(
            f"train.partial_rollouts is true with train.max_staleness = {config.train.max_staleness} and engine.name = "
            f"{config.engine.name}. Expected a local engine that samples ahead: in turn no weights become newer meanwhile, and "
            "other engines take them between batches. Set train.max_staleness above 0 and engine.name = local."
        )


def _refuse_blind_curriculum(config: RunConfig) -> None:
    if config.train.curriculum != "none" and config.samples_apart:
        raise KeelError(
            f"train.curriculum is {config.train.curriculum}, and {_apart(config)}. Whoever samples ahead keeps its own place in "
            "the data, and what it learned of pass rates would be lost on resuming. Expected one of them."
        )


def _refuse_no_room_ahead(config: RunConfig) -> None:
    stale, updates = config.train.max_staleness, config.resolved_updates()
    if 0 < stale < 2 * updates - 1:
        raise KeelError(
            f"train.max_staleness is {stale} with {updates} updates a batch. A batch that is sampled while another one is learned "
            f"is {2 * updates - 1} versions old at its last update. Expected at least {2 * updates - 1}, or 0 for sampling in turn."
        )


def _refuse_workers_nowhere(config: RunConfig) -> None:
    cluster = config.cluster
    if not cluster.ray and (cluster.rollout_workers > 1 or cluster.train_workers > 0):
        name = "rollout_workers" if cluster.rollout_workers > 1 else "train_workers"
        raise KeelError(
            f"cluster.{name} is {getattr(cluster, name)} without cluster.ray. Expected a Ray cluster for them: --ray auto on a "
            "machine of it, or --ray HOST:PORT. Without one, train.max_staleness starts one rollout worker on this machine, and "
            "torchrun starts several trainers."
        )


def _refuse_trainers_of_a_client(config: RunConfig) -> None:
    if config.cluster.train_workers > 0 and config.cluster.ray.startswith("ray://"):
        raise KeelError(
            f"--train-workers came with --ray {config.cluster.ray}: through a client's connection trainers cannot reach the "
            "process that starts them. Expected a machine of the cluster: start keel on one, with --ray auto."
        )


def _apart(config: RunConfig) -> str:
    """Which setting lets other processes sample."""
    if config.cluster.ray:
        return f"cluster.ray is {config.cluster.ray!r}"
    return f"train.max_staleness is {config.train.max_staleness}"


def _refuse_one_card(config: RunConfig) -> None:
    device = config.train.device
    if config.train.parallel != "none" and device.startswith("cuda:"):
        raise KeelError(
            f"train.parallel is {config.train.parallel} and train.device is {device}: all processes would share one card. Expected "
            "train.device = cuda, with which each takes the card of its own number, or cpu."
        )


def _refuse_parallel_ahead(config: RunConfig) -> None:
    if config.train.parallel != "none" and config.train.max_staleness > 0 and not config.cluster.ray:
        raise KeelError(
            f"train.parallel is {config.train.parallel} and train.max_staleness is {config.train.max_staleness}. Several ranks "
            "sample in turn with training, each its share of the prompts; a worker that samples ahead serves one trainer. Expected "
            "one of them: set train.max_staleness = 0, or train.parallel = none; or workers on a cluster, which serve all: --ray."
        )


REFUSALS = (
    _refuse_workers_nowhere,
    _refuse_trainers_of_a_client,
    _refuse_lone_completions,
    _refuse_no_room_ahead,
    _refuse_idle_corrections,
    _refuse_stale_twice,
    _refuse_unheard_routing,
    _refuse_partial_alone,
    _refuse_blind_curriculum,
    _refuse_one_card,
    _refuse_parallel_ahead,
)
