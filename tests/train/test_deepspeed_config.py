"""The user's part of the DeepSpeed configuration: what is handed on, what is refused, and with which remedy."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest

from megamult.config import Config
from megamult.distributed.config import ParallelConfig
from megamult.monitor.config import MonitorConfig, WandbConfig
from megamult.train.config import TrainConfig
from megamult.train.deepspeed_config import deepspeed_config

REPOSITORY = Path(__file__).parents[2]


def made(overrides: dict[str, Any], stage: int = 1, dtype: Any = "bf16", **train: Any) -> dict[str, Any]:
    return deepspeed_config(
        Config(
            parallel=ParallelConfig(zero_stage=stage),
            train=TrainConfig(dtype=dtype, global_batch_size=16, micro_batch_size=4, **train),
            deepspeed=overrides,
        ),
        data_parallel=2,
    )


def test_one_run_at_weights_and_biases_is_enough() -> None:
    config = Config(
        monitor=MonitorConfig(wandb=WandbConfig(project="mine")), deepspeed={"wandb": {"enabled": True, "project": "x"}}
    )
    with pytest.raises(ValueError, match=r"deepspeed\.wandb is enabled and monitor\.wandb\.project is 'mine'.*one of"):
        deepspeed_config(config, data_parallel=1)
    deepspeed_config(dataclasses.replace(config, deepspeed={"wandb": {"enabled": False}}), data_parallel=1)


def refusals(overrides: dict[str, Any], **more: Any) -> list[str]:
    """Return the parts of the one error, key by key."""
    with pytest.raises(ValueError, match="deepspeed") as caught:
        made(overrides, **more)
    return str(caught.value).split("; deepspeed.")


# Each is a configuration that did nothing, something else, or crashed; and what must be said of it.
ALONE: list[tuple[dict[str, Any], str]] = [
    ({"gradient_acumulation_steps": 4}, r"not a DeepSpeed key: did you mean gradient_accumulation_steps$"),
    ({"zero_optimizaton": {"stage": 1}}, r"not a DeepSpeed key: did you mean zero_optimization$"),
    ({"superoffload": True}, r"superoffload is not a DeepSpeed key: remove it$"),
    ({"data_types": {"grad_acum_dtype": "fp32"}}, r"not a DeepSpeed key: did you mean data_types\.grad_accum_dtype$"),
    ({"flops_profiler": {"enabled": True, "profile_setp": 2}}, r"did you mean flops_profiler\.profile_step$"),
    ({"timers": {"thruput": {}}}, r"timers\.thruput is not a DeepSpeed key"),
    ({"communication_data_type": "fp16"}, r"is 'fp16': .*65,504 into infinity; use fp32 or bf16, or remove it$"),
    (
        {"activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True}},
        r"activation_checkpointing is .*use train\.recompute full; remove it$",
    ),
    ({"comet": {"enabled": True}}, r"the package comet_ml is not installed: pip install comet_ml, or remove it$"),
    ({"comet": {"enabled": True}}, r"the package comet_ml is not installed: pip install comet_ml, or remove it$"),
    ({"tensor_parallel": {"autotp_size": 2}}, r"tensor_parallel is .*: use parallel\.tensor; remove it$"),
    ({"sequence_parallel_size": 2}, r"sequence_parallel_size is 2: use parallel\.sequence"),
    ({"checkpoint": {"load_universal": True}}, r"checkpoint is .*\(checkpoint\.\*\); remove it$"),
    ({"hybrid_engine": {"enabled": True}}, r"hybrid_engine\.enabled is True: .*; remove it$"),
    ({"compile": {"deepcompile": True}}, r"compile is .*never compiled.*; remove it$"),
    ({"elasticity": {"enabled": True, "version": 0.1}}, r"elasticity\.enabled is True: .*checkpoint\.load latest"),
    ({"prescale_gradients": True}, r"prescale_gradients is True: .*no sum is in fp16 here.*; remove it$"),
    ({"gradient_predivide_factor": 2.0}, r"gradient_predivide_factor is 2\.0: .*; remove it$"),
    ({"gradient_allreduce_op": "sum"}, r"is 'sum', and this run needs 'mean': gradients are averaged.*; remove it$"),
    ({"amp": {"enabled": True}}, r"amp\.enabled is True: .*train\.dtype decides; remove it$"),
    ({"fp16": {"enabled": True}}, r"fp16\.enabled is True: train\.dtype decides"),
    ({"optimizer": {"type": "Lamb"}}, r"is 'Lamb': .*optimizer\.name muon.*; use AdamW or Adam, or remove it$"),
    ({"optimizer": {"params": {"lrr": 1}}}, r"not a DeepSpeed key: did you mean optimizer\.params\.lr$"),
    (
        {"optimizer": {"params": {"adam_w_mode": False}}},
        r"is False: weight decay is decoupled.*; use true, or remove it",
    ),
    ({"optimizer": {"params": {"max_grad_norm": 1.0}}}, r"is 1\.0: use optimizer\.clip_grad_norm; remove it$"),
    (
        {"optimizer": {"params": {"betas": 0.9}}},
        r"betas is 0\.9: optimizer\.adamw\.betas; give two numbers, or remove it$",
    ),
    ({"scheduler": {"type": "OneCycle"}}, r"is 'OneCycle': .*; use WarmupLR or WarmupDecayLR or WarmupCosineLR, or"),
    (
        {"gradient_clipping": 2.0},
        r"is 2\.0, which means optimizer\.clip_grad_norm 2\.0, and this run has 1\.0: change one of them, or remove",
    ),
    ({"zero_optimization": {"reduce_bucket_siz": 7}}, r"did you mean zero_optimization\.reduce_bucket_size$"),
    (
        {"zero_optimization": {"sub_group_size": "many"}},
        r"'many': .*; give a positive whole number, or remove it$",
    ),
    ({"zero_optimization": {"zero_quantized_gradients": True}}, r"is True: it rounds gradients.*; remove it$"),
    ({"zero_optimization": {"round_robin_gradients": True}}, r"is True: it is for offloading.*; remove it$"),
    ({"zero_optimization": {"leaf_module": {"names": ["layers"]}}}, r"is .*: ZeRO 3 partitions.*; remove it$"),
    (
        {"zero_optimization": {"allgather_partitions": False}},
        r"is False: DeepSpeed reads it and does nothing.*; remove",
    ),
    ({"bf16": {"enabld": True}}, r"did you mean bf16\.enabled$"),
    ({"tensorboard": {"outptu_path": "x"}}, r"did you mean tensorboard\.output_path$"),
    ({"timers": {"throughput": {"enabeld": True}}}, r"did you mean timers\.throughput\.enabled$"),
    ({"timers": {"throughput": {"enabled": True}}}, r"prints nothing without steps_per_print: give it too, or remove"),
    ({"steps_per_print": 0}, r"is 0: .*; give a positive whole number, or remove it$"),
    ({"csv_monitor": True}, r"csv_monitor is True: give a mapping of the section's keys$"),
    ({"train_batch_size": 7}, r"is 7, and this run needs 16: train\.global_batch_size decides; remove it$"),
    ({"zero_optimization": {"stage": 3}}, r"is 3, and this run needs 1: parallel\.zero_stage decides; remove it$"),
    ({"zero_optimization": True}, r"zero_optimization is True: give a mapping of the section's keys"),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}},
        r"offload_optimizer\.device is 'cpu': .*higher parallel\.zero_stage.*recompute full.*; remove it$",
    ),
    ({"bf16": {"enabled": False}}, r"bf16\.enabled is False, and this run needs True: train\.dtype decides; remove it"),
    ({"log_level": "debug"}, r"log_level is 'debug': .*; remove it$"),
    (
        {"zero_optimization": {"zero_hpz_partition_size": 8}},
        r"hpz_partition_size is 8: .*in one partition.*; remove it$",
    ),
    (
        {"zero_optimization": {"zero_quantized_weights": True}},
        r"weights is True: .*in one partition .*; remove it$",
    ),
]


@pytest.mark.parametrize(("overrides", "says"), ALONE, ids=[next(iter(case)) for case, _ in ALONE])
def test_a_key_that_does_not_do_what_it_says_is_refused_with_its_remedy(
    overrides: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no monitor's package is there
    (said,) = refusals(overrides)
    assert re.search(says, said), said


def test_mistakes_of_every_kind_are_in_one_error() -> None:
    """Eleven: misspelt at the top and inside, without effect, of another value, of a wrong type, and untranslatable."""
    file = {
        "gradient_acumulation_steps": 4,
        "train_batch_size": 7,
        "wall_clock_breakdown": "yes",
        "activation_checkpointing": {"partition_activations": True},
        "zero_optimization": {"reduce_bucket_siz": 7, "zero_quantized_gradients": True, "overlap_comm": "yes"},
        "optimizer": {"type": "Lamb", "params": {"lr": 3.0}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    }
    said = [each.removeprefix("deepspeed.").split(" ")[0] for each in refusals(file, stage=2)]
    assert sorted(said) == [
        *("activation_checkpointing", "gradient_acumulation_steps", "optimizer.params.lr", "optimizer.type"),
        *("scheduler.params.warmup_num_steps", "scheduler.params.warmup_type", "train_batch_size"),
        *("wall_clock_breakdown", "zero_optimization.overlap_comm", "zero_optimization.reduce_bucket_siz"),
        "zero_optimization.zero_quantized_gradients",
    ]


def test_all_mistakes_are_in_one_error() -> None:
    """A Hugging Face file with its autos resolved, of which every conflict is named at once."""
    file = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "scheduler": {"type": "WarmupLR"},
        "fp16": {"enabled": True},
        "gradient_accumulation_steps": 7,
        "gradient_clipping": 2.0,
        "train_batch_size": 7,
        "train_micro_batch_size_per_gpu": 7,
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "sub_group_size": 7},
        "gradient_acumulation_steps": 4,
        "steps_per_print": 10,
    }
    said = refusals(file)
    named = {each.removeprefix("deepspeed.").split(" ")[0] for each in said}
    assert named == {
        *("optimizer.params.lr", "fp16.enabled", "gradient_accumulation_steps", "gradient_clipping"),
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_acumulation_steps"),
        *("zero_optimization.stage", "zero_optimization.stage3_gather_16bit_weights_on_model_save"),
    }


def test_zero_keys_without_effect_at_the_stage_of_the_run_are_refused() -> None:
    zero = {"overlap_comm": True, "reduce_bucket_size": 7, "allgather_bucket_size": 7}
    one = refusals({"zero_optimization": zero})  # DeepSpeed's BF16_Optimizer, and megamult's gathering in its place
    names = [each.split(" ")[0].rpartition(".")[2] for each in one]
    assert names == ["allgather_bucket_size", "overlap_comm", "reduce_bucket_size"]
    # Gradients that travel in another dtype leave the gathering to DeepSpeed, which reads that key.
    theirs = refusals({"zero_optimization": zero, "communication_data_type": "bf16"})
    assert [each.split(" ")[0].rpartition(".")[2] for each in theirs] == names[1:]
    assert all(each.endswith("use parallel.zero_stage 2, or remove it") for each in one)
    assert made({"zero_optimization": zero}, dtype="fp32")["zero_optimization"]["reduce_bucket_size"] == 7
    none = refusals({"zero_optimization": zero | {"stage": 0}}, stage=0, dtype="fp32")
    assert len(none) == 3 and all("no effect at parallel.zero_stage 0: raise parallel" in each for each in none)


def test_auto_means_megamults_value_at_any_depth() -> None:
    file = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "auto", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "communication_data_type": "auto",
        "zero_optimization": {
            "stage": "auto",
            "reduce_bucket_size": "auto",
            "allgather_bucket_size": "auto",
            "offload_optimizer": {"device": "auto", "pin_memory": True},
        },
    }
    assert made(file, stage=2) == made({}, stage=2)
    assert made(file, stage=2)["zero_optimization"]["reduce_bucket_size"] == 50_000_000


def test_what_is_switched_off_or_equal_asks_for_nothing() -> None:
    file = {
        "fp16": {"enabled": False, "loss_scale": 0},
        "amp": {"enabled": False},  # DeepSpeed refuses the section by its mere presence
        "elasticity": {"enabled": False},
        "sequence_parallel_size": 1,
        "gradient_predivide_factor": 1.0,
        "prescale_gradients": False,
        "dump_state": False,
        "gradient_clipping": 1,  # as optimizer.clip_grad_norm
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "adam_w_mode": True}},
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": None,
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "zero_optimization": {
            "stage": 1,
            "allgather_partitions": True,
            "offload_optimizer": {"device": "none"},
            "cpu_offload": False,
        },
        "wandb": {"enabled": False},
    }
    assert {k: v for k, v in made(file).items() if k != "wandb"} == made({})


def test_free_keys_are_handed_on() -> None:
    file = {
        "communication_data_type": "BF16",
        "zero_optimization": {"reduce_bucket_size": 7, "parameter_alignment": True},
        "steps_per_print": 3,
        "timers": {"throughput": {"synchronized": False}},
        "tensorboard": {"enabled": True, "output_path": "x"},
        "flops_profiler": {"enabled": True, "profile_step": 2},
    }
    result = made(file, stage=2)
    assert result["communication_data_type"] == "BF16"
    assert result["zero_optimization"]["reduce_bucket_size"] == 7
    assert result["zero_optimization"]["parameter_alignment"] is True
    assert result["zero_optimization"]["allgather_bucket_size"] == 50_000_000
    assert result["timers"] == {"throughput": {"enabled": False, "synchronized": False}}
    assert result["flops_profiler"]["profile_step"] == 2 and result["tensorboard"]["enabled"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("dtype", "accumulation"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_gradients_travel_in_what_they_are_accumulated_in(stage: int, dtype: str, accumulation: Any) -> None:
    if stage == 0 and dtype != accumulation:
        pytest.skip("refused: DeepSpeed accumulates in bf16 there")
    assert made({}, stage, dtype, grad_accum_dtype=accumulation)["communication_data_type"] == accumulation


class _Recording(dict[str, Any]):
    """A mapping that notes which keys it was asked for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Recording:
        return _Recording(self.items())


def test_the_table_has_every_key_that_deepspeed_reads() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    from megamult.train.deepspeed_keys import TOP_LEVEL

    ours = made({}, stage=2)
    DeepSpeedConfig(_Recording(ours | {"train_batch_size": 8, "gradient_accumulation_steps": 2}))
    assert len(_Recording.asked) > 50
    # zero.Init's and initialize's are read elsewhere.
    assert _Recording.asked <= TOP_LEVEL, _Recording.asked - TOP_LEVEL
    assert ours.keys() <= TOP_LEVEL


def test_the_table_has_exactly_the_keys_of_deepspeeds_sections() -> None:
    """DeepSpeed refuses other keys in these sections, but only after the start, and each section by itself."""
    from deepspeed.monitor import config as monitors
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    from megamult.train.deepspeed_keys import KEYS
    from megamult.train.deepspeed_zero_keys import BF16_KEYS, ZERO_KEYS

    removed = {"zeropp_loco_param", "mics_shard_size", "mics_hierarchical_params_gather"}
    fields = DeepSpeedZeroConfig.model_fields
    assert ZERO_KEYS.keys() - removed == {*fields, *(field.alias for field in fields.values() if field.alias)}
    assert BF16_KEYS.keys() == set(DeepSpeedBF16Config.model_fields)
    for name, section in {
        "tensorboard": monitors.TensorBoardConfig,
        "csv_monitor": monitors.CSVConfig,
        "wandb": monitors.WandbConfig,
        "comet": monitors.CometConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }.items():
        assert set(KEYS[name].keys) == set(section.model_fields), name
    assert set(KEYS["flops_profiler"].keys) == set(vars(DeepSpeedFlopsProfilerConfig({})))


def test_the_document_is_the_table() -> None:
    from megamult.train.deepspeed_keys import as_markdown

    assert (REPOSITORY / "docs" / "deepspeed.md").read_text(encoding="utf-8") == as_markdown(), (
        "python -m megamult.train.deepspeed_keys > docs/deepspeed.md"
    )
