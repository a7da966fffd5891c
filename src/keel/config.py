"""The run, as types: every setting with its default, its range and one phrase. Impossible combinations do not
construct.

A configuration comes from a TOML file, a shipped one (`configs/`), or a recipe's name, and dotted overrides on top:
`load_config("solid", {"train.lr": 1e-4})`. Reading and explaining mistakes live in `settings.py`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from keel.contradictions import refuse_contradictions
from keel.errors import KeelError
from keel.settings import as_list, dotted, explain, merged, nested, read_source

if TYPE_CHECKING:
    from keel.objectives.recipes import Recipe
    from keel.types import Sampling


class Section(BaseModel):
    """A table of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, given: Any) -> Any:
        """Let a list be written as text with commas, or as its only member."""
        if not isinstance(given, dict):
            return given
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: as_list(value, kinds.get(name)) for name, value in given.items()}


class TrainSettings(Section):
    """How a batch is collected and learned from."""

    prompts_per_step: int = Field(32, ge=1, description="prompts behind one optimizer step")
    group_size: int = Field(8, ge=1, description="completions of each prompt")
    updates_per_batch: int | None = Field(
        None,
        ge=1,
        description="optimizer steps per rollout phase, each on prompts_per_step prompts; none = the recipe's",
    )
    micro_batch_tokens: int | None = Field(
        16384, ge=1, description="prompt and completion tokens of one forward pass; changes memory, never the gradient"
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate of AdamW")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up, over `steps`")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    eps: float = Field(1e-8, gt=0, description="of AdamW")
    max_grad_norm: float | None = Field(1.0, gt=0, description="the gradient is scaled down to this norm; none = never")
    probe_every: int = Field(
        10,
        ge=0,
        description="batches between separate forward passes that measure whether training is on-policy; 0 = never",
    )
    dynamic_sampling: bool | None = Field(
        None, description="keep only groups with right and wrong answers, and sample on; none = the recipe's"
    )
    dynamic_sampling_max_rounds: int = Field(10, ge=1, description="rounds of sampling before a batch is given up")
    curriculum: Literal["none", "pass_rate"] = Field(
        "none",
        description="pass_rate = prompts that are solved now and then come more often, never-solved and solved ones more rarely",
    )
    bypass_old: bool = Field(
        False, description="take the engine's log-probabilities for logp_old: the ratio is π/μ, and no gap is left to correct"
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="versions by which a sampled batch may lag at its last update; above 0 a worker samples ahead, 0 = in turn",
    )
    partial_rollouts: bool = Field(
        False, description="a worker that samples ahead takes new weights in the middle of completions, not only between batches"
    )
    routing_replay: Literal["none", "R2", "R3"] = Field(
        "none", description="of a mixture: R2 = the trainer's experts at the sampling weights, R3 = the engine's own"
    )
    parallel: Literal["none", "ddp", "fsdp"] = Field(
        "none", description="how several processes train one policy: ddp = each has all of it, fsdp = it is cut over them"
    )
    rank_timeout_s: float = Field(1800.0, gt=0, description="seconds that one of these processes waits for another")
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="of matrix products in the trainer; weights, gradients, optimizer and log-probabilities stay fp32"
    )
    checkpoint_activations: bool = Field(
        False, description="keep only what goes into each layer, and compute the rest again in backward: less memory, more time"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; none = torch's choice")
    device: str = Field("cpu", description="where the policy lives: cpu, cuda, cuda:1 ...")


class SamplingSettings(Section):
    """The distribution that training completions are drawn from, and evaluation's too."""

    temperature: float = Field(1.0, gt=0, description="logits are divided by it, in the engine and in the trainer alike")
    top_p: float = Field(1.0, gt=0, le=1, description="smallest set of likeliest tokens with this mass; 1 = all")
    top_k: int = Field(0, ge=0, description="number of likeliest tokens; 0 = all")
    min_p: float = Field(0.0, ge=0, lt=1, description="tokens of at least this share of the likeliest one's probability")
    max_completion_tokens: int = Field(48, ge=1, description="completions are cut off here")
    replay_sampling_mask: bool = Field(True, description="the trainer normalises over the tokens that truncation kept")

    @property
    def truncated(self) -> bool:
        """Whether some tokens of the vocabulary cannot be sampled."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    def distribution(self) -> Sampling:
        """As the engines take it."""
        from keel.types import Sampling

        return Sampling(**self.model_dump(exclude={"replay_sampling_mask"}))

    @model_validator(mode="after")
    def _replay_what_was_cut(self) -> SamplingSettings:
        if self.truncated and not self.replay_sampling_mask:
            raise KeelError(
                f"Sampling is truncated (top_p {self.top_p}, top_k {self.top_k}, min_p {self.min_p}) and "
                "sampling.replay_sampling_mask is false. Expected the trainer to know which tokens could be drawn: "
                "over the full vocabulary the mean importance ratio is the kept mass and not 1, so every gradient is "
                "biased. Set sampling.replay_sampling_mask = true, or top_p = 1, top_k = 0 and min_p = 0."
            )
        return self


class EvaluationSettings(Section):
    """Held-out prompts, graded as in training, before, during and after."""

    every: int = Field(20, ge=0, description="optimizer steps between evaluations; 0 = only before and after")
    prompts: int = Field(256, ge=1, description="held-out prompts, the first of the test split")
    samples: int = Field(4, ge=1, description="completions of each")
    ks: tuple[int, ...] = Field((1,), description="the k of each pass@k; at most `samples`")
    panel: tuple[str, ...] = Field((), description="other tasks to evaluate too; TASK@56 = under a cap of 56 tokens")
    standard_panel: bool = Field(True, description="before and after, some short completions of other skills: what became of them")

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluationSettings:
        if not self.ks or min(self.ks) < 1 or max(self.ks) > self.samples:
            raise KeelError(
                f"evaluation.ks is {list(self.ks)} with evaluation.samples = {self.samples}. Expected every k between "
                "1 and the number of samples: pass@k cannot be estimated from fewer than k tries. Raise "
                "evaluation.samples or lower the k."
            )
        return self


class LoraSettings(Section):
    """Low-rank adapters instead of full weights."""

    rank: int = Field(16, ge=1, description="rank of each adapter")
    alpha: float = Field(32.0, gt=0, description="the adapter's output is scaled by alpha / rank")
    targets: tuple[str, ...] | Literal["all-linear"] = Field("all-linear", description="names of the adapted layers")


class CheckpointSettings(Section):
    """When the whole state is saved, so that a run can go on bit for bit."""

    every: int = Field(50, ge=0, description="optimizer steps between checkpoints; 0 = only at the start and the end")
    keep: int = Field(2, ge=1, description="how many of the newest stay on disk")


class RecordSettings(Section):
    """What is kept of single tokens, to be read afterwards: their log-probabilities, entropy, ratio, gap and advantage."""

    tokens_every: int = Field(10, ge=0, description="batches between those whose tokens are kept in tokens.jsonl; 0 = never")
    tokens_groups: int = Field(2, ge=1, description="groups of such a batch, spread over its updates")
    tokens_mb: float = Field(16.0, gt=0, description="tokens.jsonl does not grow beyond this")


class EngineSettings(Section):
    """What samples, and how the local engine is made to differ from the trainer on purpose. By default it does not."""

    name: str = Field("local", description="the engine: local or vllm")
    format: Literal["fp32", "bf16", "fp16", "fp8", "int8"] = Field(
        "fp32", description="of the engine's weights; bf16 and fp16 also of its activations, fp8 and int8 row by row"
    )
    weight_bits: int | None = Field(None, ge=2, le=8, description="round the layers' weights to so many bits, row by row")
    head_format: Literal["fp32", "bf16", "fp16", "fp8", "int8"] | None = Field(
        None, description="of the output head's product; none = as `format` has it"
    )
    order: Literal["fused", "separate"] = Field("fused", description="of sums: separate = each matrix by itself, in parts")
    router_noise: float = Field(0.0, ge=0, description="standard deviation of noise on a mixture's router logits")
    sync_every: int = Field(1, ge=1, description="the engine takes new weights only every so many batches")
    hidden_temperature: float | None = Field(None, gt=0, description="it samples at this one and does not tell: a classic fault")
    hidden_top_p: float | None = Field(None, gt=0, le=1, description="it cuts off like this and does not tell: a classic fault")
    threads: int | None = Field(None, ge=1, description="CPU threads of a worker that samples ahead; none = half of them")
    timeout_s: float = Field(600.0, gt=0, description="seconds within which a batch must come from a worker or a server")
    routed_experts: bool = Field(
        False, description="vLLM says where tokens of a mixture went, for R3; the local engine always does"
    )
    enforce_eager: bool | None = Field(
        None, description="launch kernel by kernel; none = only on a CPU: on a card, decoding steps are captured as CUDA graphs"
    )
    kv_cache_gb: float = Field(1.0, gt=0, description="memory of vLLM's keys and values")
    max_model_len: int | None = Field(
        None, ge=2, description="longest prompt + completion that vLLM makes room for; none = the model's"
    )

    def eager_on(self, device: str) -> bool:
        """Whether steps are launched kernel by kernel on a device of this type."""
        return device != "cuda" if self.enforce_eager is None else self.enforce_eager

    @model_validator(mode="after")
    def _one_rounding(self) -> EngineSettings:
        if self.weight_bits is not None and self.format in ("fp8", "int8"):
            raise KeelError(
                f"engine.weight_bits is {self.weight_bits} and engine.format is {self.format!r}: both round the same weights. "
                "Expected one of them; with weight_bits, format is what the products are computed in: fp32, bf16 or fp16."
            )
        return self


class ClusterSettings(Section):
    """Where the work is done when one process is not enough: workers on a Ray cluster that is running already."""

    ray: str = Field("", description="the Ray cluster: auto, host:port or ray://host:port; empty = none")
    rollout_workers: int = Field(1, ge=1, description="processes on it that sample, each with a model and an engine of its own")
    train_workers: int = Field(0, ge=0, description="processes on it that train one policy; 0 = this process trains")
    start_s: float = Field(300.0, gt=0, description="seconds within which all of them must have begun")
    silence_s: float = Field(3600.0, gt=0, description="seconds within which such trainers must end a step, evaluation included")


class RunConfig(Section):
    """One run. Construct it by `load_config`, or directly: RunConfig(recipe="solid", train={"lr": 1e-4}).

    Raises:
        KeelError: a key is unknown (the nearest is named), a value is out of range, or settings contradict one another.
    """

    recipe: str = Field("solid", description="the objective and what it asks of the loop: `keel papers` lists them")
    model: str = Field("tiny-dense", description="bundled name, hub id, folder, GGUF file or package:NAME")
    task: str = Field("arithmetic:medium", description="prompts, gold answers and their reward")
    template: str = Field("auto", description="how a prompt becomes text; auto = the model's own")
    seed: int = Field(0, ge=0, description="of everything that is drawn")
    steps: int = Field(300, ge=1, description="optimizer steps")
    out: str = Field("", description="run folder; empty = a new one below runs/")
    plugins: tuple[str, ...] = Field((), description="modules to import first, where your own tasks or parts register")
    writers: tuple[str, ...] = Field((), description="besides metrics.jsonl: tensorboard, wandb, trackio")
    train: TrainSettings = Field(default_factory=TrainSettings)
    sampling: SamplingSettings = Field(default_factory=SamplingSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    objective: dict[str, Any] = Field(
        default_factory=dict,
        description="changes to the recipe's objective: surrogate = clip, surrogate.clip_high = 0.28 ...",
    )
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    lora: LoraSettings | None = Field(None, description="train low-rank adapters; none = all weights")
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    record: RecordSettings = Field(default_factory=RecordSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as found:
            raise KeelError(explain(found, RunConfig)) from None

    @field_validator("plugins", mode="after")
    @classmethod
    def _imported(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            import_plugin(name)
        return names

    @field_validator("objective", mode="after")
    @classmethod
    def _dotted(cls, changes: dict[str, Any]) -> dict[str, Any]:
        return dotted(changes)

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        refuse_contradictions(self)
        return self

    def chosen(self) -> Recipe:
        """The recipe with this run's changes to its objective."""
        from keel.objectives.parts import vary
        from keel.objectives.recipes import recipe

        plain = recipe(self.recipe)
        return replace(plain, objective=vary(plain.objective, self.objective)) if self.objective else plain

    def resolved(self) -> RunConfig:
        """The same run with nothing left to the recipe: what `config.toml` records."""
        chosen, train = self.chosen(), self.train
        dynamic = chosen.dynamic_sampling if train.dynamic_sampling is None else train.dynamic_sampling
        updates = train.updates_per_batch or chosen.updates_per_batch
        parallel = "fsdp" if train.parallel == "none" and self.cluster.train_workers > 1 else train.parallel
        return self.replaced({"train.dynamic_sampling": dynamic, "train.updates_per_batch": updates, "train.parallel": parallel})

    @property
    def samples_apart(self) -> bool:
        """Whether other processes than the trainer's sample."""
        return self.train.max_staleness > 0 or bool(self.cluster.ray)

    def resolved_updates(self) -> int:
        """Optimizer steps of one batch: the setting's, else the recipe's."""
        from keel.objectives.recipes import recipe

        return self.train.updates_per_batch or recipe(self.recipe).updates_per_batch

    def replaced(self, overrides: dict[str, Any]) -> RunConfig:
        """A copy with these dotted settings, checked anew."""
        return RunConfig(**merged(self.model_dump(), nested(overrides)))

    def derived(self) -> dict[str, int]:
        """What the settings amount to, each unit in its name."""
        updates = self.resolved().train.updates_per_batch
        prompts, group, cap = self.train.prompts_per_step, self.train.group_size, self.sampling.max_completion_tokens
        batches = -(-self.steps // updates)
        return {
            "updates_per_batch": updates,
            "prompts_per_update": prompts,
            "completions_per_update": prompts * group,
            "prompts_per_batch": prompts * updates,
            "completions_per_batch": prompts * group * updates,
            "completion_tokens_per_update_at_most": prompts * group * cap,
            "batches": batches,
            "prompts_total": batches * prompts * updates,
            "completions_total": batches * prompts * group * updates,
            "completion_tokens_total_at_most": batches * prompts * group * updates * cap,
            "completions_per_evaluation": self.evaluation.prompts * self.evaluation.samples,
        }

    def check_fits(self, context: int, longest_prompt: int) -> None:
        """Refuse a cap that the model cannot hold.

        Args:
            context: longest prompt + completion of the model, in tokens.
            longest_prompt: of the task as rendered, in tokens.
        """
        cap = self.sampling.max_completion_tokens
        if longest_prompt + cap > context:
            room = max(0, context - longest_prompt)
            raise KeelError(
                f"A prompt of {longest_prompt} tokens and sampling.max_completion_tokens = {cap} make "
                f"{longest_prompt + cap} tokens, and {self.model} holds {context}. Expected prompt + completion to "
                f"fit. Lower the cap to {room} or less, drop long prompts from the task, or take a model with a "
                "longer context."
            )


def load_config(source: str = "solid", overrides: dict[str, Any] | None = None) -> RunConfig:
    """The configuration of a TOML file, a shipped configuration or a recipe, with dotted overrides on top.

    Args:
        source: path of a TOML file, name of a shipped configuration (`quickstart`) or of a recipe (`solid`).
        overrides: {"train.lr": 1e-4} or {"train": {"lr": 1e-4}}.
    """
    return RunConfig(**merged(read_source(source), nested(overrides or {})))


def import_plugin(name: str) -> None:
    """Import a module for what it registers.

    Raises:
        KeelError: there is no such module.
    """
    try:
        import_module(name)
    except ModuleNotFoundError as missing:
        raise KeelError(
            f"plugins names {name!r}, and no module {missing.name!r} was found. Expected a module on Python's path "
            "that registers recipes, parts or tasks when it is imported. Run from its folder, install it, or mend the "
            "name."
        ) from None
