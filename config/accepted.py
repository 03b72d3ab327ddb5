"""torchtitan v0.2's keys that are accepted without effect, so that its FLUX files load unchanged.

Who builds the part that reads a key moves the key from here into the dataclass of its section.
"""

from typing import Any, Literal

NO_EFFECT_YET: dict[str, Any] = {
    "profiling.enable_profiling": bool,
    "profiling.save_traces_folder": str,
    "profiling.profile_freq": int,
    "profiling.profiler_active": int,
    "profiling.profiler_warmup": int,
    "profiling.enable_memory_snapshot": bool,
    "profiling.save_memory_snapshot_folder": str,
    "metrics.save_for_all_ranks": bool,
    "model.print_after_conversion": bool,
    "training.gc_freq": int,
    "training.gc_debug": bool,
    "parallelism.enable_async_tensor_parallel": bool,
    "comm.trace_buf_size": int,
    "comm.save_traces_folder": str,
    "comm.save_traces_file_prefix": str,
}

# Language models, pipeline and expert parallelism, and torchtitan's own machinery: nothing here will read these. (Its
# context parallel always rotates keys and values; parallelism.context_parallel_method chooses among more ways. The
# recomputation of this transformer needs no random state: it draws nothing.)
NOT_USED_HERE: dict[str, Any] = {
    "job.save_config_file": str | None,
    "job.custom_config_module": str,
    "metrics.disable_color_printing": bool,
    "model.hf_assets_path": str,
    "model.tokenizer_path": str | None,
    "optimizer.early_step_in_backward": bool,
    "training.seq_len": int,
    "parallelism.disable_loss_parallel": bool,
    "parallelism.pipeline_parallel_degree": int,
    "parallelism.module_fqns_per_model_part": list[list[str]] | None,
    "parallelism.pipeline_parallel_first_stage_less_layers": int,
    "parallelism.pipeline_parallel_last_stage_less_layers": int,
    "parallelism.pipeline_parallel_layers_per_stage": int | None,
    "parallelism.pipeline_parallel_schedule": str,
    "parallelism.pipeline_parallel_schedule_csv": str | None,
    "parallelism.pipeline_parallel_microbatch_size": int,
    "parallelism.pipeline_parallel_expert_parallel_overlap": bool,
    "parallelism.context_parallel_load_balancer": str | None,
    "parallelism.context_parallel_rotate_method": Literal["allgather", "alltoall"],
    "parallelism.expert_parallel_degree": int,
    "parallelism.expert_tensor_parallel_degree": int,
    "parallelism.expert_parallel_comm_backend": Literal["standard", "deepep"],
    "checkpoint.enable_ft_dataloader_checkpoints": bool,
    "checkpoint.initial_load_in_hf_quantized": bool,
    "activation_checkpoint.early_stop": bool,
    "activation_checkpoint.preserve_rng_state": bool,
    "activation_checkpoint.determinism_check": str,
    "activation_checkpoint.debug": bool,
    "activation_checkpoint.visualize_memory_budget_pareto": bool,
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": list[str],
    "quantize.grouped_mm.*": Any,
    "memory_estimation.enable": bool,
    "memory_estimation.disable_fake_mode": bool,
    "fault_tolerance.enable": bool,
    "fault_tolerance.process_group": str,
    "fault_tolerance.process_group_timeout_ms": int,
    "fault_tolerance.replica_id": int,
    "fault_tolerance.group_size": int,
    "fault_tolerance.min_replica_size": int,
    "fault_tolerance.semi_sync_method": str | None,
    "experimental.custom_import": str,
    "experimental.custom_args_module": str,
    "validation.seq_len": int,
    "debug.moe_force_load_balance": bool,
}
