"""Table of DeepSpeed's configuration keys: what each of them does in a run, or what to use instead.

``python -m megamult.train.deepspeed_keys`` prints the table as Markdown, which is docs/deepspeed.md.
"""

from __future__ import annotations

from megamult.train.deepspeed_key import COUNT, FLAG, NUMBER, PAIR, POSITIVE, Key, decided, free, refused, translated
from megamult.train.deepspeed_zero_keys import BF16_KEYS, OFFLOAD, OWN_CHECKPOINTS, REMOVED, ZERO_KEYS

_OWN_DATA = "megamult reads its own data (data.*, train.seed)"
_ALL_SCALARS = "every scalar of the run, megamult's and DeepSpeed's, over the number of sequences,"
_ONE_ADAM = "there is one implementation of AdamW, with fp32 state"
_OF_RUN = "where the fall ends: train.steps, with optimizer.decay_steps = train.steps - optimizer.warmup_steps"

_OPTIMIZER: dict[str, Key] = {
    "type": translated(
        "optimizer.name adamw; for Muon set optimizer.name muon and optimizer.muon.*", values=("AdamW", "Adam")
    ),
    "params.lr": translated("optimizer.lr", takes=NUMBER),
    "params.betas": translated("optimizer.adamw.betas", takes=PAIR),
    "params.eps": translated("optimizer.adamw.eps", takes=NUMBER),
    "params.weight_decay": translated(
        "optimizer.weight_decay. Norms have no weight decay, and multipliers have multipliers.weight_decay",
        takes=NUMBER,
    ),
    "params.adam_w_mode": translated("weight decay is decoupled in every run", values=("true",)),
    "params.bias_correction": translated("moments are corrected for their start at 0 in every run", values=("true",)),
    "params.amsgrad": refused("megamult's AdamW does not have it"),
    "params.max_grad_norm": refused("use optimizer.clip_grad_norm"),
    "params.torch_adam": refused(_ONE_ADAM),
    "params.fused": refused(_ONE_ADAM),
    "params.foreach": refused(_ONE_ADAM),
    "params.fp32_optimizer_states": refused(_ONE_ADAM, neutral=True),
    "legacy_fusion": refused(_ONE_ADAM),
}
_SCHEDULER: dict[str, Key] = {
    "type": translated(
        "the curve over optimizer.decay_steps: none, optimizer.decay linear, or optimizer.decay cosine",
        values=("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"),
    ),
    "params.warmup_num_steps": translated("optimizer.warmup_steps", takes=COUNT),
    "params.warmup_type": translated("the warm-up is linear in every run", values=("linear",)),
    "params.warmup_min_lr": translated("the warm-up begins at 0 in every run", values=("0", "0.0")),
    "params.warmup_min_ratio": translated("the warm-up begins at 0 in every run", values=("0", "0.0")),
    "params.warmup_max_lr": translated("optimizer.lr", takes=NUMBER),
    "params.total_num_steps": translated(_OF_RUN, takes=COUNT),
    "params.cos_min_ratio": translated("optimizer.min_lr, divided by optimizer.lr", takes=NUMBER),
    "params.last_batch_iteration": refused("a run resumes by checkpoint.load latest", neutral=-1),
}

KEYS: dict[str, Key] = {
    # Batch, optimizer and precision.
    "train_batch_size": decided("train.global_batch_size decides"),
    "train_micro_batch_size_per_gpu": decided("train.micro_batch_size decides"),
    "gradient_accumulation_steps": decided(
        "it follows from train.global_batch_size, train.batch_ramp, train.micro_batch_size and the number of processes"
    ),
    "managed_gradient_accumulation": decided("megamult tells DeepSpeed which micro-batch is the last of a step"),
    "gradient_clipping": translated("optimizer.clip_grad_norm", takes=NUMBER),
    "gradient_allreduce_op": decided("gradients are averaged over data-parallel ranks"),
    "zero_allow_untested_optimizer": decided("the optimizer is megamult's"),
    **{f"optimizer.{name}": key for name, key in _OPTIMIZER.items()},
    **{f"scheduler.{name}": key for name, key in _SCHEDULER.items()},
    "fp16": refused("train.dtype decides: fp32 or bf16", switch="enabled"),
    "bfloat16": refused("train.dtype decides; the section's present name is bf16", switch="enabled"),
    "amp": refused(REMOVED + "train.dtype decides", switch="enabled"),
    "torch_autocast": refused("train.dtype decides", switch="enabled"),
    **{f"bf16.{name}": key for name, key in BF16_KEYS.items()},
    "data_types.grad_accum_dtype": decided("train.grad_accum_dtype decides"),
    "data_types.param_dtype": refused("train.dtype decides"),
    "data_types.buffer_dtype": refused("the model's buffers have the dtype that they need"),
    "data_types.keep_in_fp32_modules": refused("train.dtype decides for the whole model"),
    # Communication of gradients between ranks.
    "communication_data_type": free(
        "dtype in which gradients are summed over data-parallel ranks (default: the dtype in which they are "
        "accumulated, train.grad_accum_dtype). bf16 sends half as much as fp32 and rounds every partial sum to 8 "
        "significant bits; fp16 would turn sums above 65,504 into infinity",
        values=("fp32", "bf16"),
    ),
    "seq_parallel_communication_data_type": refused(
        "it is for DeepSpeed's sequence parallelism; parallel.sequence is Megatron's"
    ),
    "prescale_gradients": refused("it keeps fp16 sums finite, and no sum is in fp16 here (communication_data_type)"),
    "gradient_predivide_factor": refused(
        "it keeps fp16 sums finite, and no sum is in fp16 here (communication_data_type)", neutral=1.0
    ),
    "disable_allgather": refused("DeepSpeed reads it and does nothing with it"),
    "sparse_gradients": refused(REMOVED + "gradients are dense"),
    # ZeRO.
    **{f"zero_optimization.{name}": key for name, key in ZERO_KEYS.items()},
    "zero_force_ds_cpu_optimizer": refused(OFFLOAD),
    "aio": refused("it is for offloading to disks. " + OFFLOAD),
    # Other parallelism, and other ways to save memory.
    "activation_checkpointing": refused("it acts on DeepSpeed's own checkpoint function; use train.recompute full"),
    "tensor_parallel": refused("use parallel.tensor"),
    "sequence_parallel_size": refused("use parallel.sequence with parallel.tensor", neutral=1),
    "pipeline": refused("there is no pipeline parallelism; use parallel.tensor and parallel.zero_stage 3"),
    "expert_parallel": refused("there are no experts in the model", switch="enabled"),
    "use_data_before_expert_parallelism": refused("there are no experts in the model"),
    "hybrid_engine": refused("it is for generation during training; a run only trains", switch="enabled"),
    "compile": refused("the engine is never compiled; megamult compiles and fuses its own functions"),
    "graph_harvesting": refused(REMOVED + "nothing takes its place"),
    "elasticity": refused(
        REMOVED + "a run resumes on any number of processes by checkpoint.load latest", switch="enabled"
    ),
    # Data and methods of training.
    "dataloader_drop_last": refused(_OWN_DATA),
    "data_efficiency": refused(_OWN_DATA + "; weights of sources are in data.train", switch="enabled"),
    "curriculum_learning": refused(REMOVED + "weights of sources are in data.train", switch="enabled"),
    "progressive_layer_drop": refused(REMOVED + "every layer is trained in every step", switch="enabled"),
    "sparse_attention": refused(REMOVED + "attention is dense"),
    "compression_training": refused(REMOVED + "train without it, and compress what launch/export_hf.py writes"),
    "quantize_training": refused(REMOVED + "train without it, and quantize what launch/export_hf.py writes"),
    "weight_quantization": refused("it is for inference; quantize what launch/export_hf.py writes"),
    "eigenvalue": refused(REMOVED + "nothing takes its place", switch="enabled"),
    "autotuning": refused("choose train.micro_batch_size and parallel.* by short runs", switch="enabled"),
    "vocabulary_size": refused("model.vocab_size or the tokenizer decides"),
    # Checkpoints.
    "checkpoint": refused(OWN_CHECKPOINTS),
    "nebula": refused(REMOVED + "checkpoint.asynchronous true writes while training goes on", switch="enabled"),
    "datastates_ckpt": refused("checkpoint.asynchronous true writes while training goes on"),
    # DeepSpeed's own output and measurements.
    "steps_per_print": free("steps between DeepSpeed's own progress lines (default: none)", takes=POSITIVE),
    "wall_clock_breakdown": free(
        "print the seconds that forward, backward and step take; this waits for the device", takes=FLAG
    ),
    "memory_breakdown": free("print the memory in use before and after forward, backward and step", takes=FLAG),
    "flops_profiler": free(
        "print the FLOP and seconds of each module at one step, or write them to a file",
        keys=(
            *("enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
            "recompute_fwd_factor",
        ),
    ),
    "timers.throughput": free(
        "DeepSpeed's timer of sequences per second, printed every steps_per_print steps (default: off; it waits for "
        "the device in every micro-batch). With train.batch_ramp, its running average is wrong, because it multiplies "
        "all steps by the present batch",
        keys=("enabled", "synchronized"),
    ),
    "disable_python_gc": free("collect Python's garbage only between steps", takes=FLAG),
    "tensorboard": free(
        f"write {_ALL_SCALARS} to output_path/job_name; train.run_dir/tensorboard always has megamult's",
        package="tensorboard",
        keys=("enabled", "output_path", "job_name"),
    ),
    "csv_monitor": free(
        f"write {_ALL_SCALARS} to csv files in output_path/job_name; train.run_dir/metrics.jsonl always has megamult's",
        keys=("enabled", "output_path", "job_name"),
    ),
    "wandb": free(
        f"send {_ALL_SCALARS} to Weights & Biases. monitor.wandb sends them over the step, and goes on with the same "
        "run there after a resume. A run may use only one of "
        "the two",
        package="wandb",
        keys=("enabled", "group", "team", "project"),
    ),
    "comet": free(
        f"send {_ALL_SCALARS} to Comet",
        package="comet_ml",
        keys=(
            *("enabled", "samples_log_interval", "project", "workspace", "api_key", "experiment_name"),
            *("experiment_key", "online", "mode"),
        ),
    ),
    "comms_logger": refused("nothing prints what it collects; use wall_clock_breakdown or a profiler"),
    "dump_state": refused("DeepSpeed's log lines below warnings are not shown; config.yaml has every key of the run"),
    "log_level": refused("DeepSpeed's warnings and errors are shown, and no lower levels"),
}
"""Treatment of every key that DeepSpeed has or had, by dotted name."""

TRANSLATED = ("gradient_clipping", "optimizer", "scheduler")
"""Top-level keys that are read as keys of megamult's, and never handed to DeepSpeed."""

SECTIONS = frozenset(name.rsplit(".", depth)[0] for name in KEYS for depth in range(1, name.count(".") + 1))
"""Sections whose own keys are in the table."""

TOP_LEVEL = frozenset(name.partition(".")[0] for name in KEYS)
"""All top-level keys that DeepSpeed knows."""


def as_markdown() -> str:
    """Return the table as Markdown, the text of docs/deepspeed.md."""
    parts = [
        "# Keys of a DeepSpeed configuration\n",
        "`deepspeed` takes a mapping or a JSON file and merges it into the configuration that the run's own keys "
        'produce. `"auto"`, at any depth, and null mean megamult\'s value. A section that is switched off (`enabled: '
        "false`) has no effect. A refused key is an error, and so are an unknown key and another value of a key that "
        "is decided by other keys. One message names all errors. This file is written by `python -m "
        "megamult.train.deepspeed_keys`.\n",
    ]
    heads = {
        "free": ("Free", "what it does"),
        "translated": ("Translated", "key of megamult's that says the same"),
        "decided": ("Decided by other keys (the same value is accepted)", "which key decides"),
        "refused": ("Refused", "why, and what to use instead"),
    }
    notes = {
        "translated": "A run reads these keys as keys of its own and prints how. A key that they leave out, or give as "
        '`"auto"`, has the value that it has without them, not DeepSpeed\'s default. If the command line or its files '
        "give the key of megamult's too, its value must be the same. DeepSpeed warms up by a logarithm unless "
        "`warmup_type` says linear, so this key must be given beside a number of `warmup_num_steps`. DeepSpeed's "
        "schedules are one or two steps behind: its first two updates have the learning rate 0.\n\n"
    }
    for use, (title, column) in heads.items():
        rows = [f"| `deepspeed.{name}` | {key.text} |" for name, key in KEYS.items() if key.use == use]
        parts.append(f"## {title}\n\n{notes.get(use, '')}" + "\n".join([f"| key | {column} |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    print(as_markdown(), end="")
