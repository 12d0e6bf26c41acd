"""Table of the keys of DeepSpeed's sections `zero_optimization` and `bf16`."""

from __future__ import annotations

from megamult.train.deepspeed_key import COUNT, FLAG, POSITIVE, Key, decided, free, refused

OFFLOAD = (
    "megamult clips gradients on the device that computes them; a higher parallel.zero_stage, a larger parallel.tensor "
    "or train.recompute full save memory"
)
"""Reason why keys of offloading are refused, and what to use instead."""
OWN_CHECKPOINTS = "megamult writes its own checkpoints, which a run in any sharding can load (checkpoint.*)"
"""Reason why keys of DeepSpeed's checkpoints are refused."""
REMOVED = "DeepSpeed has removed it; "
"""Beginning of the reason why keys of earlier versions of DeepSpeed are refused."""

_ONE_PARTITION = "megamult needs each parameter unquantized, and in one partition over all data-parallel ranks"
_QUANTIZED_GRADIENTS = "it rounds gradients to 8 bits and fewer; communication_data_type bf16 halves what ranks send"
_EXPORT = "DeepSpeed saves nothing here; launch/export_hf.py writes whole weights"
_WHOLE_MODULES = "ZeRO 3 partitions and gathers every module of the model by itself; leave it to DeepSpeed"


def _stage3(text: str, takes: str = COUNT) -> Key:
    return free(f"ZeRO 3: {text}", takes=takes)


_STAGE3 = {
    "prefetch_bucket_size": _stage3("elements of parameters gathered ahead of use"),
    "param_persistence_threshold": _stage3("parameters with fewer elements are never partitioned"),
    "model_persistence_threshold": _stage3("largest number of elements of all unpartitioned parameters"),
    "max_live_parameters": _stage3("largest number of gathered elements that a rank keeps"),
    "max_reuse_distance": _stage3("gathered parameters are kept if they are used again within so many elements"),
    "use_all_reduce_for_fetch_params": _stage3("gather parameters by an all-reduce", FLAG),
    "allgather_sequential": _stage3("gather parameters one by one: less memory, more calls", FLAG),
    "gather_16bit_weights_on_model_save": refused(_EXPORT),
    "module_granularity_threshold": refused(_WHOLE_MODULES, neutral=0),
}
"""Keys that have two names, with and without the prefix stage3_."""

ZERO_KEYS: dict[str, Key] = {
    "stage": decided("parallel.zero_stage decides"),
    "contiguous_gradients": decided("reduced gradients are copied into one buffer"),
    "compute_grad_norm": decided("megamult's optimizer computes the norm"),
    "overlap_comm": free(
        "reduce gradients while backward runs (default: true with GPUs and several ranks; no effect at ZeRO 1 in bf16)",
        takes=FLAG,
    ),
    "reduce_scatter": free(
        "ZeRO 1 and 2: divide by the number of ranks before the sum instead of after it. In bf16 runs the default is "
        "false: DeepSpeed would divide in bf16, which rounds unless the number of ranks is a power of two",
        takes=FLAG,
    ),
    "reduce_bucket_size": free(
        "elements reduced together (default 50,000,000; ZeRO 2 and 3, and ZeRO 1 in fp32)", takes=POSITIVE
    ),
    "allgather_bucket_size": free(
        "elements gathered together (default 50,000,000; ZeRO 2, and ZeRO 1 in fp32)", takes=POSITIVE
    ),
    "use_multi_rank_bucket_allreduce": free(
        "ZeRO 1 and 2: reduce a bucket with gradients of several ranks by one all-reduce", takes=FLAG
    ),
    "parameter_alignment": free(
        "ZeRO 1 and 2: pad flat buffers so that each parameter begins at a multiple of 16 bytes", takes=FLAG
    ),
    "sub_group_size": _stage3("elements of parameters that the optimizer updates together", POSITIVE),
    **_STAGE3,
    **{f"stage3_{name}": key for name, key in _STAGE3.items()},
    "memory_efficient_linear": _stage3("DeepSpeed's own linear function in place of torch's", FLAG),
    "enable_sanity_checks": _stage3("check that gathered parameters are complete", FLAG),
    "log_trace_cache_warnings": _stage3("warn when the order of modules has changed", FLAG),
    "allgather_partitions": refused("DeepSpeed reads it and does nothing with it", neutral=True),
    "ignore_unused_parameters": refused("every parameter of the model is used in every step", neutral=True),
    "override_module_apply": refused("megamult draws weights without Module.apply", neutral=True),
    "load_from_fp32_weights": refused(OWN_CHECKPOINTS, neutral=True),
    "elastic_checkpoint": refused(OWN_CHECKPOINTS),
    "pipeline_loading_checkpoint": refused(OWN_CHECKPOINTS),
    "stage3_gather_fp16_weights_on_model_save": refused(_EXPORT),
    "round_robin_gradients": refused(
        "it is for offloading, and divides gradients in another order than megamult reads"
    ),
    "leaf_module": refused(_WHOLE_MODULES),
    "legacy_stage1": refused(REMOVED + "parallel.zero_stage 1 is the present one"),
    "offload_optimizer": refused(OFFLOAD, switch="device"),
    "offload_param": refused(OFFLOAD, switch="device"),
    "cpu_offload": refused(OFFLOAD),
    "cpu_offload_param": refused(OFFLOAD),
    "cpu_offload_use_pin_memory": refused(OFFLOAD),
    "zenflow": refused(OFFLOAD),
    "save_muon_momentum_buffer_in_memory": refused("it is for DeepSpeed's Muon; use optimizer.name muon"),
    "zero_quantized_weights": refused(_ONE_PARTITION),
    "zero_quantized_nontrainable_weights": refused(_ONE_PARTITION),
    "zero_quantized_gradients": refused(_QUANTIZED_GRADIENTS),
    "zeropp_loco_param": refused(_QUANTIZED_GRADIENTS),
    "zero_hpz_partition_size": refused(_ONE_PARTITION, neutral=1),
    "mics_shard_size": refused(_ONE_PARTITION, neutral=-1),
    "mics_hierarchical_params_gather": refused(_ONE_PARTITION),
}
"""Treatment of every key of `zero_optimization`."""

BF16_KEYS: dict[str, Key] = {
    "enabled": decided("train.dtype decides"),
    "check_grad_overflow": decided("megamult's optimizer finds and skips bad steps (train.max_bad_steps)"),
    "immediate_grad_update": decided("gradients are added to their sums at once: the same sums with less memory"),
    "bf16_master_weights_and_grads": refused("masters are fp32"),
    "bf16_optimizer_states": refused("the optimizer's state is fp32"),
}
"""Treatment of every key of `bf16`."""
