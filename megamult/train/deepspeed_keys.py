"""Table of DeepSpeed's configuration keys: what each of them does in a run, or what to use instead.

``python -m megamult.train.deepspeed_keys`` prints the table as Markdown, which is docs/deepspeed.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Key:
    """Treatment of one key of the user's DeepSpeed configuration."""

    use: Literal["free", "decided", "refused"]
    """Treatment. free: the key is passed to DeepSpeed. decided: megamult's own keys set it, and only the same value is
    accepted. refused: the key is an error, because it would have no effect in a run, or a wrong one."""
    text: str
    """Explanation. free: what the key does. decided: which of megamult's keys sets it. refused: why it is refused, and
    what to use instead."""
    neutral: Any = None
    """Value by which a refused key asks for nothing. It is accepted, as null, false and {} are."""
    switch: str | None = None
    """Key of a section that switches the section on. If it is null, false, "none" or "auto", the section asks for
    nothing."""
    values: tuple[str, ...] = ()
    """Values that a free key accepts; empty if it accepts all values."""
    keys: tuple[str, ...] = ()
    """All keys of a section in which DeepSpeed would silently ignore unknown keys; empty for other sections."""
    package: str | None = None
    """Package that the section needs when it is enabled; its module has the same name."""

    def off(self, value: Any) -> bool:
        """Return whether `value` asks for nothing, so that the key may be left out."""
        if self.switch is not None and isinstance(value, dict) and self.switch in value:
            return value[self.switch] in (None, False, "none", "auto")
        return value is None or value is False or value == {} or (self.neutral is not None and value == self.neutral)


def _free(text: str, **more: Any) -> Key:
    return Key("free", text, **more)


def _decided(text: str) -> Key:
    return Key("decided", text)


def _refused(text: str, **more: Any) -> Key:
    return Key("refused", text, **more)


_REMOVED = "DeepSpeed has removed it; "
_OFFLOAD = (
    "megamult clips gradients on the device that computes them; a higher parallel.zero_stage, a larger parallel.tensor "
    "or train.recompute full save memory"
)
_ONE_PARTITION = "megamult needs each parameter unquantized, and in one partition over all data-parallel ranks"
_OWN_CHECKPOINTS = "megamult writes its own checkpoints, which a run in any sharding can load (checkpoint.*)"
_OWN_DATA = "megamult reads its own data (data.*, train.seed)"

KEYS: dict[str, Key] = {
    # Batch, optimizer and precision.
    "train_batch_size": _decided("train.global_batch_size decides"),
    "train_micro_batch_size_per_gpu": _decided("train.micro_batch_size decides"),
    "gradient_accumulation_steps": _decided(
        "it follows from train.global_batch_size, train.batch_ramp, train.micro_batch_size and the number of processes"
    ),
    "managed_gradient_accumulation": _decided("megamult tells DeepSpeed which micro-batch is the last of a step"),
    "gradient_clipping": _decided("optimizer.clip_grad_norm clips"),
    "gradient_allreduce_op": _decided("gradients are averaged over data-parallel ranks"),
    "zero_allow_untested_optimizer": _decided("the optimizer is megamult's"),
    "optimizer": _refused("optimizer.* and multipliers.* decide"),
    "scheduler": _refused("optimizer.warmup_steps, decay_steps, decay and min_lr decide"),
    "fp16": _refused("train.dtype decides: fp32 or bf16", switch="enabled"),
    "bfloat16": _refused("train.dtype decides; the section's present name is bf16", switch="enabled"),
    "amp": _refused(_REMOVED + "train.dtype decides", switch="enabled"),
    "torch_autocast": _refused("train.dtype decides", switch="enabled"),
    "bf16.enabled": _decided("train.dtype decides"),
    "bf16.check_grad_overflow": _decided("megamult's optimizer finds and skips bad steps (train.max_bad_steps)"),
    "bf16.immediate_grad_update": _decided("gradients are added to their sums at once: the same sums with less memory"),
    "bf16.bf16_master_weights_and_grads": _refused("masters are fp32"),
    "bf16.bf16_optimizer_states": _refused("the optimizer's state is fp32"),
    "data_types.grad_accum_dtype": _decided("train.grad_accum_dtype decides"),
    "data_types.param_dtype": _refused("train.dtype decides"),
    "data_types.buffer_dtype": _refused("the model's buffers have the dtype that they need"),
    "data_types.keep_in_fp32_modules": _refused("train.dtype decides for the whole model"),
    # Communication of gradients between ranks.
    "communication_data_type": _free(
        "dtype in which gradients are summed over data-parallel ranks (default: the dtype in which they are "
        "accumulated, train.grad_accum_dtype). bf16 sends half as much as fp32 and rounds every partial sum to 8 "
        "significant bits; fp16 would turn sums above 65,504 into infinity",
        values=("fp32", "bf16"),
    ),
    "seq_parallel_communication_data_type": _refused(
        "it is for DeepSpeed's sequence parallelism; parallel.sequence is Megatron's"
    ),
    "prescale_gradients": _refused("it keeps fp16 sums finite, and no sum is in fp16 here (communication_data_type)"),
    "gradient_predivide_factor": _refused(
        "it keeps fp16 sums finite, and no sum is in fp16 here (communication_data_type)", neutral=1.0
    ),
    "disable_allgather": _refused("DeepSpeed reads it and does nothing with it"),
    "sparse_gradients": _refused(_REMOVED + "gradients are dense"),
    # ZeRO. Keys that are not in this table are passed on to DeepSpeed, which refuses unknown ones.
    "zero_optimization.stage": _decided("parallel.zero_stage decides"),
    "zero_optimization.contiguous_gradients": _decided("reduced gradients are copied into one buffer"),
    "zero_optimization.compute_grad_norm": _decided("megamult's optimizer computes the norm"),
    "zero_optimization.overlap_comm": _free(
        "reduce gradients while backward runs (default: true with GPUs and several ranks; no effect at ZeRO 1 in bf16)"
    ),
    "zero_optimization.reduce_scatter": _free(
        "ZeRO 1 and 2: divide by the number of ranks before the sum instead of after it. In bf16 runs the default is "
        "false: DeepSpeed would divide in bf16, which rounds unless the number of ranks is a power of two"
    ),
    "zero_optimization.reduce_bucket_size": _free(
        "elements reduced together (default 50,000,000; ZeRO 2 and 3, and ZeRO 1 in fp32)"
    ),
    "zero_optimization.allgather_bucket_size": _free("elements gathered together (default 50,000,000; ZeRO 1 and 2)"),
    "zero_optimization.offload_optimizer": _refused(_OFFLOAD, switch="device"),
    "zero_optimization.offload_param": _refused(_OFFLOAD, switch="device"),
    "zero_optimization.cpu_offload": _refused(_OFFLOAD),
    "zero_optimization.cpu_offload_param": _refused(_OFFLOAD),
    "zero_optimization.zenflow": _refused(_OFFLOAD),
    "zero_optimization.elastic_checkpoint": _refused(_OWN_CHECKPOINTS),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _refused(
        "DeepSpeed saves nothing here; launch/export_hf.py writes whole weights"
    ),
    "zero_optimization.gather_16bit_weights_on_model_save": _refused(
        "DeepSpeed saves nothing here; launch/export_hf.py writes whole weights"
    ),
    "zero_optimization.zero_quantized_weights": _refused(_ONE_PARTITION),
    "zero_optimization.zero_quantized_nontrainable_weights": _refused(_ONE_PARTITION),
    "zero_optimization.zero_hpz_partition_size": _refused(_ONE_PARTITION, neutral=1),
    "zero_force_ds_cpu_optimizer": _refused(_OFFLOAD),
    "aio": _refused("it is for offloading to disks. " + _OFFLOAD),
    # Other parallelism, and other ways to save memory.
    "activation_checkpointing": _refused("it acts on DeepSpeed's own checkpoint function; use train.recompute full"),
    "tensor_parallel": _refused("use parallel.tensor", neutral={"autotp_size": 0}),
    "sequence_parallel_size": _refused("use parallel.sequence with parallel.tensor", neutral=1),
    "pipeline": _refused("there is no pipeline parallelism; use parallel.tensor and parallel.zero_stage 3"),
    "expert_parallel": _refused("there are no experts in the model", switch="enabled"),
    "use_data_before_expert_parallelism": _refused("there are no experts in the model"),
    "hybrid_engine": _refused("it is for generation during training; a run only trains", switch="enabled"),
    "compile": _refused("the engine is never compiled; megamult compiles and fuses its own functions"),
    "graph_harvesting": _refused(_REMOVED + "nothing takes its place"),
    "elasticity": _refused(
        _REMOVED + "a run resumes on any number of processes by checkpoint.load latest", switch="enabled"
    ),
    # Data and methods of training.
    "dataloader_drop_last": _refused(_OWN_DATA),
    "data_efficiency": _refused(_OWN_DATA + "; weights of sources are in data.train", switch="enabled"),
    "curriculum_learning": _refused(_REMOVED + "weights of sources are in data.train", switch="enabled"),
    "progressive_layer_drop": _refused(_REMOVED + "every layer is trained in every step", switch="enabled"),
    "sparse_attention": _refused(_REMOVED + "attention is dense"),
    "compression_training": _refused(_REMOVED + "train without it, and compress what launch/export_hf.py writes"),
    "quantize_training": _refused(_REMOVED + "train without it, and quantize what launch/export_hf.py writes"),
    "weight_quantization": _refused("it is for inference; quantize what launch/export_hf.py writes"),
    "eigenvalue": _refused(_REMOVED + "nothing takes its place", switch="enabled"),
    "autotuning": _refused("choose train.micro_batch_size and parallel.* by short runs", switch="enabled"),
    "vocabulary_size": _refused("model.vocab_size or the tokenizer decides"),
    # Checkpoints.
    "checkpoint": _refused(_OWN_CHECKPOINTS),
    "nebula": _refused(_REMOVED + "checkpoint.asynchronous true writes while training goes on", switch="enabled"),
    "datastates_ckpt": _refused("checkpoint.asynchronous true writes while training goes on"),
    # DeepSpeed's own output and measurements.
    "steps_per_print": _free("steps between DeepSpeed's own progress lines (default: none)"),
    "wall_clock_breakdown": _free("print the seconds that forward, backward and step take; this waits for the device"),
    "memory_breakdown": _free("print the memory in use before and after forward, backward and step"),
    "flops_profiler": _free(
        "print the FLOP and seconds of each module at one step, or write them to a file",
        keys=(
            *("enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
            "recompute_fwd_factor",
        ),
    ),
    "timers": _free(
        "throughput: DeepSpeed's timer (default: off; it waits for the device in every micro-batch). With "
        "train.batch_ramp, its running average is wrong, because it multiplies all steps by the present batch",
        keys=("throughput",),
    ),
    "disable_python_gc": _free("collect Python's garbage only between steps"),
    "tensorboard": _free(
        "write DeepSpeed's few scalars; megamult's are always written to train.run_dir/tensorboard",
        package="tensorboard",
    ),
    "csv_monitor": _free("write DeepSpeed's few scalars to csv files; megamult's are always written to metrics.jsonl"),
    "wandb": _free("send DeepSpeed's few scalars (learning rate)", package="wandb"),
    "comet": _free("send DeepSpeed's few scalars (learning rate)", package="comet_ml"),
    "comms_logger": _refused("nothing prints what it collects; use wall_clock_breakdown or a profiler"),
    "dump_state": _refused("DeepSpeed's log lines below warnings are not shown; config.yaml has every key of the run"),
    "log_level": _refused("DeepSpeed's warnings and errors are shown, and no lower levels"),
}
"""Treatment of each key, by dotted name. The sections `zero_optimization` and `bf16` are not complete: the table has
only those of their keys that need an explanation. DeepSpeed itself refuses unknown keys in these two sections, and in
every free section without `keys`."""

SECTIONS = frozenset(name.partition(".")[0] for name in KEYS if "." in name)
"""Top-level keys whose own keys are in the table."""

CHECKED_BY_DEEPSPEED = frozenset({"zero_optimization", "bf16"})
"""Sections of the table in which DeepSpeed checks the keys that are not in the table. It does not do so in
`data_types`, where it ignores unknown keys."""

TOP_LEVEL = SECTIONS | {name for name in KEYS if "." not in name}
"""All top-level keys that DeepSpeed knows."""


def as_markdown() -> str:
    """Return the table as Markdown, the text of docs/deepspeed.md."""
    parts = [
        "# Keys of a DeepSpeed configuration\n",
        "`deepspeed` takes a mapping or a JSON file and merges it into the configuration that the run's own keys "
        'produce. `"auto"`, at any depth, means megamult\'s value. A section that is switched off (`enabled: false`) '
        "has no effect. A refused key is an error, and so is another value of a key that is decided by other keys. One "
        "message names all errors. This file is written by `python -m megamult.train.deepspeed_keys`.\n",
    ]
    heads = {
        "free": ("Free", "what it does"),
        "decided": ("Decided by other keys (the same value is accepted)", "which key decides"),
        "refused": ("Refused", "why, and what to use instead"),
    }
    for use, (title, column) in heads.items():
        rows = [f"| `{name}` | {key.text} |" for name, key in KEYS.items() if key.use == use]
        parts.append("\n".join([f"## {title}\n", f"| key | {column} |", "|---|---|", *rows]) + "\n")
    parts.append("Other keys of `zero_optimization` and `bf16` are handed on, and DeepSpeed refuses unknown ones.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(as_markdown(), end="")
