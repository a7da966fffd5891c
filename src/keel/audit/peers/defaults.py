"""What other frameworks' knobs default to, in the versions named; nothing of them needs to be installed to read a configuration."""

from __future__ import annotations

from typing import Any

TRL_VERSION = "1.16.0"

# the knobs of GRPOConfig that touch what is minimised
TRL: dict[str, Any] = {
    "num_generations": 8,
    "max_completion_length": 512,
    "generation_batch_size": None,
    "steps_per_generation": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "use_vllm": False,
    "beta": 0.0,
    "num_iterations": 1,
    "epsilon": 0.2,
    "delta": None,
    "epsilon_high": None,
    "sapo_temperature_neg": 1.05,
    "sapo_temperature_pos": 1.0,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "importance_sampling_level": "token",
    "reward_weights": None,
    "multi_objective_aggregation": "sum_then_normalize",
    "scale_rewards": "group",
    "loss_type": "dapo",
    "mask_truncated_completions": False,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "entropy_coef_min": 0.0,
    "entropy_coef_max": 1.0,
    "entropy_coef_delta": 0.005,
    "entropy_target": 0.2,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_cap": None,
    "off_policy_mask_threshold": None,
    "use_bias_correction_kl": True,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 8,
}

# the rest of GRPOConfig, its own and those of transformers' TrainingArguments: known, and no part of the objective
TRL_OTHERS = frozenset(
    """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16 bf16_full_eval cache_implementation
    cast_lm_head_to_fp32 chat_template_kwargs data_seed dataloader_drop_last dataloader_in_order
    dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph
    ddp_timeout debug deepspeed disable_dropout disable_tqdm do_eval do_predict do_train ds3_gather_for_generation
    enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy
    eval_use_gather_object fp16 fp16_full_eval fsdp fsdp_config full_determinism generation_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
    hub_token ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names label_smoothing_factor
    learning_rate length_column_name liger_kernel_config load_best_model_at_end local_rank log_completions
    log_completions_hub_repo log_level log_level_replica log_multimodal log_on_each_node log_unique_prompts logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps
    max_tool_calling_iterations metric_for_best_model model_init_kwargs neftune_noise_alpha num_completions_to_print
    num_generations_eval num_train_epochs optim optim_args optim_target_modules output_dir pad_to_multiple_of
    parallelism_config per_device_eval_batch_size prediction_loss_only project push_to_hub remove_unused_columns report_to
    restore_callback_states_from_checkpoint resume_from_checkpoint router_aux_loss_coef run_name save_on_each_node
    save_only_model save_steps save_strategy save_total_limit seed shuffle_dataset skip_memory_metrics tf32 torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
    trackio_static_space_id train_sampling_strategy transformers_continuous_batching_config trust_remote_code use_cache
    use_cpu use_liger_kernel use_transformers_continuous_batching use_transformers_paged vllm_enable_sleep_mode
    vllm_gpu_memory_utilization vllm_group_port vllm_max_model_length vllm_mode vllm_model_impl vllm_server_base_url
    vllm_server_host vllm_server_port vllm_server_timeout vllm_structured_outputs_regex vllm_tensor_parallel_size warmup_steps
    weight_decay
    """.split()
)

# what TRL's command-line scripts read beside it
TRL_SCRIPT = frozenset(
    """
    attn_implementation bnb_4bit_quant_storage bnb_4bit_quant_type dataset_config dataset_name dataset_streaming
    dataset_test_split dataset_train_split dtype ignore_bias_buffers load_in_4bit load_in_8bit lora_alpha lora_dropout
    lora_modules_to_save lora_r lora_target_modules lora_target_parameters lora_task_type model_name_or_path model_revision
    reward_funcs reward_model_name_or_path use_bnb_nested_quant use_dora use_peft use_rslora
    """.split()
)

VERL_VERSION = "0.9.1"

# the knobs of verl's trainer that touch what is minimised; the overlong buffer is read by its "dapo" reward manager only
VERL: dict[str, Any] = {
    "algorithm.adv_estimator": "gae",
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.filter_groups.enable": False,
    "algorithm.filter_groups.metric": "reward",
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_penalty": "kl",
    "algorithm.kl_ctrl.type": "fixed",
    "algorithm.kl_ctrl.kl_coef": 0.001,
    "algorithm.kl_ctrl.horizon": 10000,
    "algorithm.kl_ctrl.target_kl": 0.1,
    "algorithm.use_pf_ppo": False,
    "algorithm.pf_ppo.reweight_method": "pow",
    "algorithm.pf_ppo.weight_pow": 2.0,
    "algorithm.rollout_correction.rollout_is": None,
    "algorithm.rollout_correction.rollout_is_threshold": 2.0,
    "algorithm.rollout_correction.rollout_is_batch_normalize": False,
    "algorithm.rollout_correction.rollout_rs": None,
    "algorithm.rollout_correction.rollout_rs_threshold": None,
    "algorithm.rollout_correction.bypass_mode": False,
    "algorithm.rollout_correction.loss_type": "ppo_clip",
    "actor_rollout_ref.actor.clip_ratio": 0.2,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.2,
    "actor_rollout_ref.actor.clip_ratio_c": 3.0,
    "actor_rollout_ref.actor.tau_pos": 1.0,
    "actor_rollout_ref.actor.tau_neg": 1.05,
    "actor_rollout_ref.actor.policy_loss.loss_mode": "vanilla",
    "actor_rollout_ref.actor.policy_loss.clip_cov_ratio": 0.0002,
    "actor_rollout_ref.actor.policy_loss.clip_cov_lb": 1.0,
    "actor_rollout_ref.actor.policy_loss.clip_cov_ub": 5.0,
    "actor_rollout_ref.actor.policy_loss.kl_cov_ratio": 0.0002,
    "actor_rollout_ref.actor.policy_loss.ppo_kl_coef": 0.1,
    "actor_rollout_ref.actor.policy_loss.dro_beta": None,
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.loss_scale_factor": None,
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.kl_loss_coef": 0.001,
    "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 256,
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1,
    "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    "data.train_batch_size": 1024,
    "data.max_response_length": 512,
    "reward.reward_manager.name": "naive",
    "reward.reward_kwargs.overlong_buffer_cfg.enable": False,
    "reward.reward_kwargs.overlong_buffer_cfg.len": 0,
    "reward.reward_kwargs.overlong_buffer_cfg.penalty_factor": 0.0,
    "reward.reward_kwargs.overlong_buffer_cfg.log": False,
    "reward.reward_kwargs.max_resp_len": None,
}

OPENRLHF_VERSION = "0.11.2"

# the arguments of OpenRLHF's train_ppo_ray that touch what is minimised
OPENRLHF: dict[str, Any] = {
    "actor.eps_clip": 0.2,
    "actor.eps_clip_low_high": None,
    "actor.dual_clip": None,
    "actor.policy_loss_type": "ppo",
    "actor.loss_agg_mode": "token-mean",
    "actor.entropy_coef": None,
    "algo.advantage.estimator": "gae",
    "algo.advantage.gamma": 1.0,
    "algo.advantage.lambd": 1.0,
    "algo.advantage.no_std_norm": False,
    "algo.advantage.is_correction_level": "off",
    "algo.advantage.is_correction_mode": "mask",
    "algo.advantage.is_correction_gating": "ratio",
    "algo.advantage.is_correction_threshold": (0.5, 5.0),
    "algo.kl.init_coef": 0.01,
    "algo.kl.estimator": "k1",
    "algo.kl.use_loss": False,
    "algo.kl.unbiased_gradient": False,
    "reward.clip_range": (-10, 10),
    "reward.overlong_buffer_len": None,
    "reward.overlong_penalty_factor": 1.0,
    "reward.stop_properly_penalty_coef": None,
}

# parts of verl's tree in which an unknown key is a mistake of someone who tunes the loss
VERL_BRANCHES = ("algorithm.", "actor_rollout_ref.actor.")

# what else verl knows there
VERL_OTHERS = frozenset(
    [f"algorithm.filter_groups.{name}" for name in ("max_num_gen_batches", "max_inflight_gen_batches")]
    + [
        f"actor_rollout_ref.actor.{name}"
        for name in """
        calculate_entropy calculate_sum_pi_squared checkpoint data_loader_seed entropy_checkpointing entropy_from_logits_chunk_size
        entropy_from_logits_with_chunking freeze_vision_tower fsdp_config grad_clip megatron optim pad_to_length
        ppo_infer_max_token_len_per_gpu ppo_infer_micro_batch_size_per_gpu ppo_max_token_len_per_gpu ppo_micro_batch_size
        ppo_micro_batch_size_per_gpu profile profiler qat rollout_n router_replay shuffle strategy torchtitan
        ulysses_sequence_parallel_size use_dynamic_bsz use_fused_kernels use_prefix_grouper use_remove_padding
        use_rollout_log_probs use_torch_compile veomni
        """.split()
    ]
)

_MOVED_BUFFER = (
    "reward_model.overlong_buffer is where verl's DAPO recipe read it; verl 0.9 reads reward.reward_kwargs.overlong_buffer_cfg. "
    "It is taken as if it stood there."
)

# older places of knobs, and what to say about them
VERL_MOVED: dict[str, tuple[str, str]] = {
    "reward_model.reward_manager": ("reward.reward_manager.name", ""),
    "reward_model.reward_kwargs.max_resp_len": ("reward.reward_kwargs.max_resp_len", ""),
    **{
        f"reward_model.{old}.{name}": (f"reward.reward_kwargs.overlong_buffer_cfg.{name}", remark)
        for old, remark in (("overlong_buffer", _MOVED_BUFFER), ("reward_kwargs.overlong_buffer_cfg", ""))
        for name in ("enable", "len", "penalty_factor", "log")
    },
}
