"""What --mcore does with every field of megatron-core's TransformerConfig: served, set by Lathe, or refused.

A field is served where a module that Lathe builds reads it and does what its name says. All others are refused with
a reason: a setting that nothing reads would be believed. `tests/engine/test_mcore_fields.py` holds the names against
megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Served:
    """A field that can be given: the values it takes, and what of `NEEDS` the run must have for it to be read."""

    takes: type | tuple[str, ...]
    needs: str | None = None
    least: int = 0  # of whole numbers

    def refusal(self, value: Any) -> str | None:
        """Why the value cannot be meant, or None. PyYAML reads `true` and `1`, and keeps the two apart."""
        if isinstance(self.takes, tuple):
            return None if value in self.takes else f"choose one of {', '.join(self.takes)}"
        if type(value) is not self.takes:
            return "give true or false" if self.takes is bool else "give a whole number"
        return f"it must be at least {self.least}" if type(value) is int and value < self.least else None


# What a run must have for a field to be read, and how it is asked for.
NEEDS = {
    "te": "--backend te",
    # Where attention has windows or sinks, Lathe's own brings tokens to other ranks.
    "te and cp": "--backend te, --cp above 1 and a model without windows and sinks",
    "delayed": "--precision fp8 --fp8 delayed",
    "not delayed": "--precision fp8 and another recipe than --fp8 delayed",
    "bf16 layers": "--precision fp8 and --mcore.first_last_layers_bf16 true",
    "full": "--recompute full",
    "batched p2p": "--pp above 1 without --vpp",
    "vpp": "--vpp above 1",
    "sp": "--tp above 1 with sequence parallelism",
    "experts": "a model with experts",
}

SERVED = {
    "batch_p2p_sync": Served(bool, "batched p2p"),
    # Interleaved stages send their outputs while they go on: what is freed meanwhile arrives wrong.
    "deallocate_pipeline_outputs": Served(bool, "batched p2p"),
    "overlap_p2p_comm_warmup_flush": Served(bool, "vpp"),
    "clone_scatter_output_in_embedding": Served(bool, "sp"),
    "recompute_method": Served(("uniform", "block"), "full"),
    "recompute_num_layers": Served(int, "full", least=1),
    "moe_router_dtype": Served(("fp32", "fp64"), "experts"),
    # Transformer Engine 2.12 gathers keys and values of no packed documents, so all_gather cannot run.
    "cp_comm_type": Served(("p2p", "a2a"), "te and cp"),
    "disable_parameter_transpose_cache": Served(bool, "te"),
    "first_last_layers_bf16": Served(bool, "not delayed"),
    "num_layers_at_start_in_bf16": Served(int, "bf16 layers"),
    "num_layers_at_end_in_bf16": Served(int, "bf16 layers"),
    "fp8_margin": Served(int, "delayed"),
    "fp8_amax_history_len": Served(int, "delayed", least=1),
    "fp8_amax_compute_algo": Served(("most_recent", "max"), "delayed"),
}

# By the flag that sets them.
_BY_FLAG = {
    "--tp": "tensor_model_parallel_size",
    "--pp": "pipeline_model_parallel_size microbatch_group_size_per_vp_stage",
    "--vpp": "virtual_pipeline_model_parallel_size overlap_p2p_comm batch_p2p_comm",
    "--pp-layout": """pipeline_model_parallel_layout num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split""",
    "--cp": "context_parallel_size",
    "--ep": "expert_model_parallel_size",
    "--etp": "expert_tensor_parallel_size moe_extended_tp",
    "--sp": "sequence_parallel",
    "--precision": "fp16 bf16 fp8 params_dtype pipeline_dtype enable_autocast autocast_dtype",
    "--fp8": "fp8_recipe",
    "--backend": "transformer_impl",
    "--recompute": "recompute_granularity moe_layer_recompute",
    "--recompute-modules": "recompute_modules",
    "--moe.dispatcher": "moe_token_dispatcher_type",
    "--moe.aux-loss": "moe_aux_loss_coeff",
    "--deterministic": "deterministic_mode",
}

# Why the others cannot be given, the nearest thing that works behind it where there is one.
_REFUSED = {
    "is set by the model's config.json and cannot be given by hand": """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
        normalization layernorm_epsilon layernorm_zero_centered_gamma apply_residual_connection_post_layernorm
        gated_linear_unit activation_func glu_linear_offset activation_func_clamp_value add_bias_linear add_qkv_bias
        qk_layernorm qk_l2_norm softmax_scale softmax_type apply_query_key_layer_scaling attention_output_gate
        window_size window_attn_skip_freq rotary_interleaved no_rope_freq mrope_section multi_latent_attention
        experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
        dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss linear_attention_freq linear_conv_kernel_dim
        linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads is_hybrid_model
        mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path
        heterogeneous_block_specs hetereogenous_dist_checkpoint mtp_num_layers mtp_loss_scaling_factor mtp_standalone
        num_moe_experts moe_ffn_hidden_size moe_layer_freq moe_latent_size moe_shared_expert_intermediate_size
        moe_shared_expert_gate moe_shared_expert_overlap moe_router_topk moe_router_topk_limited_devices
        moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk moe_router_pre_softmax
        moe_router_score_function moe_router_enable_expert_bias moe_router_bias_update_rate
        moe_apply_probs_on_input""",
    "is set by Lathe itself, whose losses and schedules rest on it, and cannot be given by hand": """
        calculate_per_token_loss hidden_dropout attention_dropout finalize_model_grads_func grad_scale_func
        no_sync_func grad_sync_func param_sync_func variable_seq_lengths bias_dropout_fusion bias_activation_fusion
        gradient_accumulation_fusion apply_rope_fusion moe_grouped_gemm disable_bf16_reduced_precision_matmul""",
    "changes how weights are drawn, and Lathe loads them": """
        perform_initialization use_cpu_initialization init_model_with_meta_device init_method
        output_layer_init_method embedding_init_method init_method_std embedding_init_method_std""",
    "would capture steps as CUDA graphs, which Lathe does not do: lengths of documents differ from step to step": """
        enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_scope cuda_graph_use_single_mempool
        cuda_graph_retain_backward_graph cuda_graph_warmup_steps""",
    "moves activations to the host, which Lathe's layers do not do; --recompute selective or full saves memory": """
        cpu_offloading cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights
        cpu_offloading_double_buffering _cpu_offloading_context fine_grained_activation_offloading offload_modules
        min_offloaded_tensor_size""",
    "splits what is recomputed over tensor-parallel ranks, as sequence parallelism does: give --sp on": """
        distribute_saved_activations""",
    "needs --mcore fields and a schedule that Lathe does not run; --recompute full takes every microbatch": """
        num_microbatches_with_partial_activation_checkpoints""",
    "needs Transformer Engine's userbuffers, which Lathe does not set up; gradients overlap by --overlap": """
        tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs
        tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend""",
    # models/gpt/fine_grained_callables.py and pipeline_parallel/combined_1f1b.py of megatron-core 0.16.1.
    "is not served: its schedule calls routers without the packed documents that tell tokens from padding": """
        overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release""",
    "has no effect on Lathe's own loss, which never holds whole logits": """
        cross_entropy_loss_fusion cross_entropy_fusion_impl defer_embedding_wgrad_compute wgrad_deferral_limit""",
    "has no effect on Lathe's own attention, or a wrong one": """
        attention_backend attention_softmax_in_fp32 masked_softmax_fusion fused_single_qkv_rope qk_clip qk_clip_alpha
        qk_clip_threshold log_max_attention_logit hierarchical_context_parallel_sizes hybrid_context_parallel
        max_seqlen_per_dp_cp_rank""",
    "has no effect on Lathe's own norms and activations, or a wrong one": """
        persist_layer_norm memory_efficient_layer_norm fp32_residual_connection activation_func_fp8_input_store
        use_te_activation_func use_fused_weighted_squared_relu""",
    "has no effect on Lathe's own router and experts, or a wrong one": """
        moe_router_load_balancing_type moe_router_force_load_balancing moe_router_padding_for_quantization
        moe_router_padding_for_fp8 moe_enable_routing_replay moe_expert_capacity_factor
        moe_pad_expert_input_to_capacity moe_token_dropping moe_token_drop_policy moe_input_jitter_eps
        moe_z_loss_coeff moe_permute_fusion moe_router_fusion moe_use_legacy_grouped_gemm moe_per_layer_logging""",
    "needs a dispatcher that Lathe does not have; see --moe.dispatcher": """
        moe_enable_deepep moe_flex_dispatcher_backend moe_deepep_num_sms moe_hybridep_num_sms""",
    "is a format that Lathe does not train in; see --precision and --fp8": """
        fp4 fp4_recipe fp4_param fp4_quantizer_factory fp8_quantizer_factory use_kitchen use_kitchen_attention
        kitchen_attention_backend quant_recipe""",
    "would keep weights in FP8, whose master weights and checkpoints Lathe does not know": "fp8_param",
    "would compute attention in FP8, which was not tried on packed documents": """
        fp8_dot_product_attention fp8_multi_head_attention""",
    "asks for ranks' scales to be reduced over other groups than Lathe's": "tp_only_amax_red",
    "is ignored by Transformer Engine, fp8_interval since 1.8": "fp8_interval fp8_wgrad",
    "is ignored by megatron-core 0.16.1": "async_tensor_model_parallel_allreduce",
    "speaks of timers and logs that Lathe does not keep; see metrics.jsonl": """
        timers barrier_with_L1_time config_logger_dir test_mode""",
    "speaks of process groups, which Lathe makes itself": """
        pipeline_model_parallel_comm_backend use_ring_exchange_p2p""",
    "has no effect where nothing is drawn at random": "use_te_rng_tracker",
    "speaks of inference": """
        flash_decode batch_invariant_mode inference_rng_tracker inference_sampling_seed symmetric_ar_type
        use_inference_optimized_layers inference_fuse_tp_communication mlp_chunks_for_prefill""",
}


def _by_name(groups: dict[str, str]) -> dict[str, str]:
    return {name: key for key, names in groups.items() for name in names.split()}


SET_BY_FLAG = _by_name(_BY_FLAG)
REFUSED = _by_name(_REFUSED)
FIELDS = (*SERVED, *SET_BY_FLAG, *REFUSED)


def refusal(name: str, value: Any) -> str | None:
    """Why a field of `FIELDS` cannot be given, as a sentence; None where it can, if the run has what it needs."""
    if name in SERVED:
        wrong = SERVED[name].refusal(value)
        return None if wrong is None else f"--mcore.{name} {value}: {wrong}"
    if name in SET_BY_FLAG:
        return f"--mcore.{name} is set by Lathe's own flag {SET_BY_FLAG[name]}: give that"
    return f"--mcore.{name} {REFUSED[name]}"


def check_needs(given: dict[str, Any], present: Collection[str]) -> None:
    """Refuses fields that nothing in this run would read. `present`: what of `NEEDS` the run has."""
    for name in given:
        needs = SERVED[name].needs
        if needs is not None and needs not in present:
            raise ValueError(f"--mcore.{name} has an effect with {NEEDS[needs]} alone: leave it out, or give that")
