"""The schema: what it refuses and how it says so, YAML there and back, the arithmetic of a batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from megamult.checkpoint.config import CheckpointConfig
from megamult.checkpoint.info import CheckpointInfo
from megamult.config import Config
from megamult.data.config import DataConfig
from megamult.distributed.config import ParallelConfig
from megamult.models.llama.config import ModelConfig
from megamult.monitor.config import MonitorConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OPTIMIZERS, AdamWConfig, MuonConfig, OptimizerConfig, rule_sections
from megamult.optim.legacy import MOVED
from megamult.train.command_line import parse
from megamult.train.config import BatchRamp, TrainConfig

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = sorted((REPOSITORY / "examples" / "configs").glob("*.yaml"))
SECTIONS: dict[str, type] = {
    "checkpoint": CheckpointConfig,
    "model": ModelConfig,
    "multipliers": MultipliersConfig,
    "optimizer": OptimizerConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "monitor": MonitorConfig,
}


def made(**sections: dict[str, Any]) -> Config:
    makers: dict[str, Any] = SECTIONS | {"optimizer": lambda **keys: OptimizerConfig.of(keys)}
    return Config(**{name: makers[name](**keys) for name, keys in sections.items()})


# sections, what the message must say: key and value (fact), and the remedy
REFUSED: list[tuple[dict[str, dict[str, Any]], str]] = [
    ({"model": {"num_layers": 0}}, r"model\.num_layers is 0: it must be positive"),
    ({"model": {"num_query_groups": 0}}, r"model\.num_query_groups is 0: it must be positive"),
    ({"model": {"vocab_size": -5}}, r"model\.vocab_size is -5: it must be positive"),
    ({"model": {"init_std": float("nan")}}, r"model\.init_std is nan: .*finite"),
    ({"model": {"z_loss": -0.1}}, r"model\.z_loss is -0\.1: it must be 0 or more"),
    (
        {"model": {"hidden_size": 100}},
        r"hidden_size is 100 with model\.num_attention_heads 8: .*set hidden_size to a multiple of 2",
    ),
    # A head of 3 is whole, but rotary embedding turns pairs.
    ({"model": {"hidden_size": 24}}, r"hidden_size is 24 .*whole even number"),
    ({"model": {"num_query_groups": 3}}, r"num_query_groups is 3: it must divide model\.num_attention_heads \(8\)"),
    ({"multipliers": {"placement": "some"}}, r"placement is 'some': use one of all, symmetry_free, scalar"),
    ({"multipliers": {"placement": {"norm": "row"}}}, r"role 'norm': use one of q, k, v"),
    ({"multipliers": {"placement": {"q": ["row", "up"]}}}, r"gives q the side 'up': use row, col or scalar"),
    ({"multipliers": {"lr": 0.0}}, r"multipliers\.lr is 0\.0: it must be positive"),
    ({"multipliers": {"weight_decay": -1.0}}, r"multipliers\.weight_decay is -1\.0: it must be 0 or more"),
    ({"optimizer": {"lr": float("inf")}}, r"optimizer\.lr is inf: .*finite"),
    (
        {"optimizer": {"adamw": {"betas": (0.9, 1.0)}}},
        r"optimizer\.adamw\.betas is \(0\.9, 1\.0\): each must be in \[0, 1\)",
    ),
    (
        {"model": {"tie_embeddings": True}, "multipliers": {"implementation": "folded"}},
        r"tie_embeddings is true with multipliers\.implementation folded .*'all': .*reach the head too; "
        r"use .* multipliers\.placement \{q: \[col, row\], k: .*down: \[col, row\]\}, or implementation layer",
    ),
    (
        {"optimizer": {"name": "muon", "muon": {"momentum": 1.0}}},
        r"optimizer\.muon\.momentum is 1\.0: it must be in \[0, 1\)",
    ),
    ({"optimizer": {"name": "muon", "muon": {"ns_steps": 0}}}, r"optimizer\.muon\.ns_steps is 0: it must be positive"),
    (
        {"optimizer": {"name": "muon", "muon": {"coefficients": "cubic5", "ns_steps": 6}}},
        r"optimizer\.muon\.ns_steps is 6 with optimizer\.muon\.coefficients cubic5: use 5",
    ),
    (
        {"optimizer": {"muon": {"momentum": 0.95}}},
        r"optimizer\.name is 'adamw', which does not use optimizer\.muon\.momentum, .*remove them, or set .* to muon$",
    ),
    ({"optimizer": {"clip_grad_norm": -1.0}}, r"optimizer\.clip_grad_norm is -1\.0"),
    (
        {"optimizer": {"lr_factors": {"heads": 2.0, "q": -1.0}}},
        r"lr_factors names the role 'heads': use one of q, .*; optimizer\.lr_factors\.q is -1\.0: give a number",
    ),
    (
        {"optimizer": {"weight_decay_factors": {"norm": 2.0}}},
        r"weight_decay_factors names the role 'norm': these have weight decay: q, .* head",
    ),
    (
        {"multipliers": {"lr_factors": {"q": {}}}},
        r"multipliers\.lr_factors\.q is empty: name one of its sides col, row, or leave q out",
    ),
    (
        {"optimizer": {"lr_factors": [1.0]}},
        r"optimizer\.lr_factors is \[1\.0\]: give a mapping from roles to numbers",
    ),
    (
        {"multipliers": {"lr_factors": {"head": 2.0}}},
        r"lr_factors names the role 'head', which has no multipliers in t",
    ),
    (
        {"multipliers": {"placement": "symmetry_free", "weight_decay_factors": {"q": {"col": 2.0, "row": "x"}}}},
        r"factors\.q names the side 'col': q has row in .*; multipliers\.weight_decay_factors\.q\.row is 'x': give a",
    ),
    (
        {"multipliers": {"initial": {"down": 2.0}}},
        r"initial\.down is 2\.0, and down has the sides col, row: give a number",
    ),
    ({"multipliers": {"initial": {"down": {"row": 0.0}}}}, r"initial\.down\.row is 0\.0: give a positive number"),
    (
        {"multipliers": {"implementation": "none", "initial": {"q": {"row": 1.0}}, "lr_factors": {"q": 1.0}}},
        r"implementation is none, and then multipliers\.lr_factors, multipliers\.initial has no effect: leave it out",
    ),
    (
        {"multipliers": {"norm": "fixed"}, "optimizer": {"weight_decay_factors": {"q": 2.0, "embedding": 2.0}}},
        r"norm is fixed, and then optimizer\.weight_decay_factors\.q has no effect, .*: leave it out",
    ),
    (
        {"model": {"tie_embeddings": True}, "multipliers": {"initial": {"embedding": {"row": 4.0}}}},
        r"initial\.embedding is given with model\.tie_embeddings .*: the head has the divided weights too, .*; set div",
    ),
    (
        {"multipliers": {"shared_columns": True, "placement": "symmetry_free"}},
        r"shared_columns is true, and no parameter of the model stores two matrices that have column multipliers: give",
    ),
    (
        {"checkpoint": {"start": "imported", "load": "runs/a"}},
        r"checkpoint\.start is 'imported' and checkpoint\.load is 'runs/a': .* leave one of them out",
    ),
    (
        {"multipliers": {"shared_columns": True, "implementation": "none"}},
        r"implementation is none, and then multipliers\.shared_columns has no effect: leave it out",
    ),
    ({"multipliers": {"qk_clip": 0.0}}, r"multipliers\.qk_clip is 0\.0: it must be positive and finite"),
    (
        {"multipliers": {"qk_clip": 100.0, "implementation": "none"}},
        r"implementation is none, and then multipliers\.qk_clip has no effect: leave it out",
    ),
    (
        {"multipliers": {"qk_clip": 100.0, "placement": "scalar"}},
        r"qk_clip is 100\.0, .*placement gives q scalar: one scalar scales all heads; give q the side row, or leave",
    ),
    (
        {"multipliers": {"qk_clip": 100.0, "placement": {"k": "row", "q": "col"}}},
        r"qk_clip is 100\.0, .*placement gives q col; give q the side row, or leave qk_clip out",
    ),
    ({"multipliers": {"qk_clip": 100.0, "placement": {"v": "row"}}}, r"placement gives q no multipliers; give q the s"),
    (
        {"multipliers": {"qk_clip": 100.0, "lr_factors": {"q": {"row": 0.0}}}},
        r"qk_clip is 100\.0, .*lr_factors keeps the row multipliers of q constant: give them a positive factor, or",
    ),
    ({"multipliers": {"clip": "some"}}, r"multipliers\.clip is 'some': use one of out, own, joint"),
    ({"model": {"norms": "none"}}, r"model\.norms is 'none': use one of vector, scalar, frozen"),
    (
        {"model": {"init_std_factors": {"norm": 2.0, "q": 0.0}}},
        r"role 'norm': model\.init_std sets the initial weights of these .*\.q is 0\.0: give a posit",
    ),
    (
        {"model": {"norms": "frozen"}, "optimizer": {"lr_factors": {"norm": 2.0}}},
        r"optimizer\.lr_factors\.norm has no effect, because model\.norms is frozen: leave it out",
    ),
    (
        {"optimizer": {"lr_factors": {"bias": 2.0, "q_norm": 0.5}}},
        r"q_norm has no effect, because model\.qk_norm is false; .*bias has no effect, because model\.attention_bias",
    ),
    (
        {"multipliers": {"qk_clip": 9.0}, "model": {"qk_norm": True}},
        r"qk_clip is 9\.0 with model\.qk_norm true and model\.attention_bias none: .*leave qk_clip out",
    ),
    ({"multipliers": {"qk_clip": 9.0}, "model": {"attention_bias": "qkv"}}, r"qk_clip is 9\.0 with .*_bias qkv: "),
    ({"model": {"head_dim": 0}}, r"model\.head_dim is 0: it must be positive"),
    ({"model": {"attention_bias": True}}, r"model\.attention_bias is True: use one of none, qkv, all"),
    (
        {
            "model": {
                "head_dim": 7,
                "no_rope_layers": [0, 0, 4],
                "rotary_scaling": {"rope_type": "llama3", "factor": -1, "low_freq_factor": 4.0, "mscale": 1.0},
            }
        },
        r"factor is -1: give a positive.*high_freq_factor is None.*original_max_position_embeddings is None.*"
        r"mscale has no effect.*head_dim is 7: .*even.*no_rope_layers has 4: .* 0 to 3.*name each layer once",
    ),
    ({"model": {"rotary_scaling": {"rope_type": "yarn"}}}, r"rope_type is 'yarn': use one of linear, llama3"),
    (
        {"model": {"rotary_scaling": {"rope_type": "linear", "factor": 2}, "no_rope_layers": [0, 1, 2, 3]}},
        r"rotary_scaling has no effect, because no layer has rotary positions",
    ),
    (
        {
            "model": {"tie_embeddings": True, "init_std_factors": {"head": 2.0}},
            "multipliers": {"placement": {"head": "col"}},
            "optimizer": {"lr_factors": {"head": 2.0}},
        },
        r"tie_embeddings is true, .*multipliers\.placement, model\.init_std_factors, optimizer\.lr_factors names",
    ),
    ({"optimizer": {"lr": 0.1, "min_lr": 0.2}}, r"min_lr is 0\.2, above optimizer\.lr 0\.1: lower it"),
    (
        {"optimizer": {"decay": "exponential", "decay_steps": 5}},
        r"min_lr is 0\.0 with optimizer\.decay exponential: .*set a positive min_lr",
    ),
    (
        {"optimizer": {"warmup_steps": 8, "decay_steps": 3}, "train": {"steps": 10}},
        r"warmup_steps 8 \+ optimizer\.decay_steps 3 \+ optimizer\.final_steps 0 exceed train\.steps 10: shorten",
    ),
    (
        {"optimizer": {"decay_steps": 4, "final_steps": 3, "min_lr": 1e-4}, "train": {"steps": 6}},
        r"decay_steps 4 \+ optimizer\.final_steps 3 exceed train\.steps 6: shorten",
    ),
    (
        {"optimizer": {"decay_steps": 4, "final_steps": 3}},
        r"final_steps is 3 with optimizer\.decay_steps 4 and optimizer\.min_lr 0\.0: .*make both positive",
    ),
    ({"parallel": {"tensor": 0}}, r"parallel\.tensor is 0: it must be positive"),
    ({"parallel": {"zero_stage": 4}}, r"parallel\.zero_stage is 4: use 0, 1, 2 or 3"),
    ({"parallel": {"tensor": 3}}, r"num_attention_heads is 8: it must be a multiple of parallel\.tensor \(3\)"),
    (
        {"parallel": {"tensor": 4}, "model": {"ffn_hidden_size": 702}},
        r"ffn_hidden_size is 702: it must be a multiple of parallel\.tensor \(4\)",
    ),
    (
        {
            "parallel": {"tensor": 4},
            "model": {"num_attention_heads": 12, "num_query_groups": 6, "hidden_size": 96},
        },
        r"num_query_groups is 6 and parallel\.tensor 4: one must divide the other",
    ),
    (
        {
            "parallel": {"tensor": 3},
            "model": {"num_attention_heads": 12, "num_query_groups": 3, "hidden_size": 96, "ffn_hidden_size": 132},
        },
        r"parallel\.tensor is 3: it must divide 128",
    ),
    (
        {"parallel": {"tensor": 2, "sequence": True}, "model": {"seq_length": 33}},
        r"seq_length is 33: with parallel\.sequence it must be a multiple of parallel\.tensor \(2\)",
    ),
    (
        {"parallel": {"zero_stage": 0}, "train": {"dtype": "bf16"}},
        r"zero_stage is 0 with train\.dtype bf16: .*use parallel\.zero_stage 1 to 3, or .*grad_accum_dtype bf16",
    ),
    ({"train": {"grad_accum_dtype": "bf16"}}, r"grad_accum_dtype is bf16 with train\.dtype fp32: use auto or fp32"),
    ({"train": {"steps": 0}}, r"train\.steps is 0"),
    ({"train": {"seed": -1}}, r"train\.seed is -1"),
    ({"train": {"seed": 2**63}}, r"train\.seed is 9223372036854775808: it must be less than 2\^63"),
    ({"train": {"run_dir": " "}}, r"train\.run_dir is ' ': name a directory"),
    ({"monitor": {"every": -1}}, r"monitor\.every is -1: it must be 0 or more"),
    ({"data": {"train": {"a": 1.0, "b": 0.0}}}, r"data\.train gives b the weight 0\.0: it must be positive"),
    ({"data": {"valid": {"a": float("nan")}}}, r"data\.valid gives a the weight nan"),
    (
        {"data": {"train": {"a": -1.0}, "valid": {"x": {"b": 0.0}}}},
        r"data\.train gives a the weight -1\.0: .*; data\.valid\.x gives b the weight 0\.0: it must be positive",
    ),
    (
        {"data": {"valid": {"a": 1.0, "b": "c"}}},
        r"data\.valid has weights, .* \(weights for a; corpora for b\): give every name its "
        r"corpora, or every corpus a weight",
    ),
    (
        {"data": {"valid": {"x/y": "a", "z": True, "u": {"q": "r"}, "v": []}}},
        r"a set of the name 'x/y': names consist of .*; data\.valid\.z is True: give a prefix, a list of .*; "
        r"data\.valid\.u is \{'q': 'r'\}: .*; data\.valid\.v is \[\]: ",
    ),
    (
        {"data": {"skip": [[5, 3], [1], [-1, 2], [10, 20], [20, 30], [31, 31], [8, 9]]}},
        r"data\.skip has \[5, 3\]: give \[first, last\] with 0 <= first <= last; data\.skip has \[1\]: .*; "
        r"data\.skip has \[-1, 2\]: .*; data\.skip has \[20, 30\] after a range up to 20: sort the ranges, and join "
        r"those that overlap; data\.skip has \[8, 9\] after a range up to 31",
    ),
    ({"train": {"eval_batches": 0}}, r"train\.eval_batches is 0: it must be positive"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_what_cannot_be_is_refused_with_key_value_and_remedy(sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**sections)


ALLOWED: list[dict[str, dict[str, Any]]] = [
    {},
    # Each is beside a refused one: the rule must not refuse too much.
    {"parallel": {"tensor": 4}, "model": {"num_attention_heads": 12, "num_query_groups": 2, "hidden_size": 96}},
    {"parallel": {"tensor": 2}, "model": {"seq_length": 33}},
    {"parallel": {"zero_stage": 0}, "train": {"dtype": "bf16", "grad_accum_dtype": "bf16"}},
    {"parallel": {"zero_stage": 1}, "train": {"dtype": "bf16"}},
    {"optimizer": {"warmup_steps": 7, "decay_steps": 3}, "train": {"steps": 10}},
    {"optimizer": {"decay": "inverse_sqrt", "decay_steps": 5, "min_lr": 1e-5}},
    {"optimizer": {"clip_grad_norm": 0.0}},
    {"multipliers": {"placement": {"q": "row", "down": ["row", "col"]}}},
]


@pytest.mark.parametrize("sections", ALLOWED)
def test_what_can_be_is_accepted(sections: dict[str, dict[str, Any]]) -> None:
    config = made(**sections)
    for name, keys in sections.items():
        for key, value in keys.items():
            assert getattr(getattr(config, name), key) == value


def test_processes_that_tensor_parallel_does_not_divide_are_refused() -> None:
    config = made(parallel={"tensor": 2})
    config.check_world(4)
    with pytest.raises(ValueError, match="tensor is 2 and 3 processes were started: start a multiple of 2"):
        config.check_world(3)


def test_a_global_batch_that_micro_batches_do_not_divide_is_refused() -> None:
    config = made(train={"global_batch_size": 24, "micro_batch_size": 4})
    config.check_world(3)
    with pytest.raises(ValueError, match=r"global_batch_size is 24: .* = 4 x 4 = 16"):
        config.check_world(4)


def test_every_batch_of_a_ramp_must_be_made_of_micro_batches_and_all_that_is_not_is_said_at_once() -> None:
    ramp = BatchRamp(start=6, increment=3, samples=100)
    config = made(train={"global_batch_size": 24, "micro_batch_size": 1, "batch_ramp": ramp})
    config.check_world(3)
    with pytest.raises(
        ValueError,
        match=r"batch_ramp\.start is 6, train\.batch_ramp\.increment is 3: each must be a multiple of .* = 1 x 4 = 4; ",
    ):
        config.check_world(4)
    with pytest.raises(
        ValueError, match=r"^train\.batch_ramp\.increment is 3: it must be a multiple of .* = 2; change"
    ):
        config.check_world(2)


@pytest.mark.parametrize(
    ("processes", "tensor", "micro", "expected"),
    [(1, 1, 24, 1), (1, 1, 2, 12), (4, 2, 3, 4), (4, 1, 3, 2), (4, 4, 4, 6)],
)
def test_accumulation_times_micro_batch_times_data_parallel_is_the_global_batch(
    processes: int, tensor: int, micro: int, expected: int
) -> None:
    config = made(train={"global_batch_size": 24, "micro_batch_size": micro}, parallel={"tensor": tensor})
    config.check_world(processes)
    data_parallel = processes // tensor
    assert config.accumulation(data_parallel) == expected
    assert expected * micro * data_parallel == 24


def test_no_query_groups_means_one_for_each_head() -> None:
    assert ModelConfig().query_groups == 8
    assert ModelConfig(num_query_groups=2).query_groups == 2


def test_gradients_accumulate_in_fp32_unless_asked_otherwise() -> None:
    assert TrainConfig().accumulation_dtype == TrainConfig(dtype="bf16").accumulation_dtype == "fp32"
    assert TrainConfig(dtype="bf16", grad_accum_dtype="bf16").accumulation_dtype == "bf16"


def test_sources_are_prefixes_with_weights_in_order() -> None:
    assert DataConfig.sources(None) == []
    assert DataConfig.sources("a") == [("a", 1.0)]
    assert DataConfig.sources(["b", "a"]) == [("b", 1.0), ("a", 1.0)]
    assert DataConfig.sources({"b": 0.3, "a": 2.0}) == [("b", 0.3), ("a", 2.0)]


def test_a_mapping_of_weights_is_one_set_and_a_mapping_of_corpora_several() -> None:
    def sets(valid: str) -> dict[str, list[tuple[str, float]]]:
        return parse([f"--data.valid={valid}"])[0].data.validation_sets()

    assert sets("null") == sets("{}") == {}
    assert sets("a") == {"": [("a", 1.0)]}
    assert sets("{a: 1, b: 2.5}") == {"": [("a", 1.0), ("b", 2.5)]}
    assert sets("{speeches: a, code: [b, c], web: {d: 1, e: 3}}") == {
        "speeches": [("a", 1.0)],
        "code": [("b", 1.0), ("c", 1.0)],
        "web": [("d", 1.0), ("e", 3.0)],
    }


def test_a_deepspeed_file_is_read_and_a_bad_one_named(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"overlap_comm": true}}', encoding="utf-8")
    assert Config(deepspeed=str(file)).deepspeed_overrides() == {"zero_optimization": {"overlap_comm": True}}
    assert Config(deepspeed={"a": 1}).deepspeed_overrides() == {"a": 1}
    assert Config().deepspeed_overrides() == {}
    for text, message in (("[1]", "this file holds no JSON object: give a mapping"), ("{", "this file is not JSON")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"ds\.json', and {message}"):
            Config(deepspeed=str(file)).deepspeed_overrides()
    with pytest.raises(ValueError, match=r"deepspeed is '.*none\.json': there is no such file; give a path"):
        Config(deepspeed=str(tmp_path / "none.json")).deepspeed_overrides()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_a_shipped_configuration_parses_and_fits_the_fewest_processes(file: Path) -> None:
    config, _ = parse(["--config", str(file)])
    config.check_world(config.parallel.tensor)
    assert config.parallel.tensor == 1 or file.stem == "llama_70b"
    assert config.data.train and config.data.tokenizer


def test_there_are_shipped_configurations() -> None:
    assert {file.stem for file in EXAMPLES} >= {"quickstart", "tiny", "falcon_h1_tiny"}


# Every section differs from its defaults, with each type that a key can have.
UNUSUAL = [
    "--model.num_query_groups=2",
    "--model.norm_eps=1e-6",
    "--model.tie_embeddings=true",
    "--multipliers.placement={q: row, down: [row, col]}",
    "--multipliers.lr=3e-3",
    "--optimizer.adamw.betas=[0.8, 0.99]",
    "--optimizer.decay=cosine",
    "--optimizer.decay_steps=10",
    "--parallel.zero_stage=3",
    "--data.train={some/corpus: 0.3, other: 2}",
    "--data.valid={speeches: a, code: [b, c], web: {d: 1, e: 0.5}}",
    "--data.tokenizer=t.model",
    "--data.skip=[[160, 319], [400, 400]]",
    "--data.document_mask=true",
    "--train.dtype=bf16",
    "--checkpoint.save_every=10",
    "--monitor.every=7",
    "--train.run_dir=runs/with space: and # marks",
    "--deepspeed={zero_optimization: {overlap_comm: true}}",
]


def test_the_resolved_yaml_gives_the_same_configuration_again(tmp_path: Path) -> None:
    config, resolved = parse(UNUSUAL)
    assert config != Config()
    for section in dataclasses.fields(Config):
        assert getattr(config, section.name) != getattr(Config(), section.name), f"{section.name} is not exercised"
    file = tmp_path / "config.yaml"
    file.write_text(resolved, encoding="utf-8")
    again, resolved_again = parse(["--config", str(file)])
    assert again == config
    assert resolved_again == resolved


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_resolved_yaml_names_every_key_that_the_run_uses(optimizer: str) -> None:
    resolved = yaml.safe_load(parse(["--optimizer.name", optimizer])[1])
    used = OPTIMIZERS[optimizer].sections
    for name, section in SECTIONS.items():
        rules = rule_sections() if name == "optimizer" else {}
        expected = {key.name for key in dataclasses.fields(section) if key.name not in rules or key.name in used}
        assert set(resolved[name]) == expected
        for rule in rules.keys() & expected:
            assert set(resolved[name][rule]) == {key.name for key in dataclasses.fields(rules[rule])}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_print_config_prints_of_an_optimizer_can_be_read(
    optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no key of a rule that the optimizer does not use, and every one of those that it does."""
    with pytest.raises(SystemExit):
        parse(["--optimizer.name", optimizer, "--print_config"])
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    config, resolved = parse(["--config", str(file)])
    assert (config, resolved) == parse(["--optimizer.name", optimizer])
    assert yaml.safe_load(resolved) == {**yaml.safe_load(file.read_text(encoding="utf-8")), "deepspeed": None}


def test_the_table_of_optimizers_is_that_of_the_names() -> None:
    assert set(OPTIMIZERS) == set(get_args(get_type_hints(OptimizerConfig)["name"]))
    assert all(set(choice.sections) <= set(rule_sections()) for choice in OPTIMIZERS.values())


def test_a_section_may_be_null_or_hold_some_of_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optimizer: {name: muon, adamw: null, muon: {momentum: 0.9}}\n", encoding="utf-8")
    config, _ = parse(["--config", str(file), "--optimizer.muon.nesterov", "false"])
    assert config.optimizer.adamw == AdamWConfig() and config.optimizer.muon == MuonConfig(0.9, nesterov=False)
    file.write_text("optimizer: {name: adamw, muon: null}\n", encoding="utf-8")
    assert parse(["--config", str(file)])[0] == Config()


# What an earlier version's config.yaml says of the optimizer, and what today's must be.
OLD = [
    (
        {
            "name": "muon",
            "momentum": 0.9,
            "ns_coefficients": "quintic",
            "update_scale": "spectral",
            "betas": [0.8, 0.9],
        },
        {"name": "muon", "muon": {"momentum": 0.9, "coefficients": "simple", "scale": "unit_rms_norm"}},
    ),
    (
        {"name": "muon", "ns_coefficients": "polar_express", "update_scale": "match_rms_adamw", "ns_dtype": "bf16"},
        {"name": "muon", "muon": {"coefficients": "polar_express", "scale": "match_rms_adamw", "ns_dtype": "bf16"}},
    ),
    ({"name": "adamw", "momentum": 0.9, "ns_coefficients": "quintic", "eps": 1e-6}, {"name": "adamw"}),
    ({"name": "muon", "exchange_dtype": "fp32"}, {"name": "muon", "muon": {"exchange_dtype": "fp32"}}),
    ({"name": "muon", "lr": 2e-3}, {"name": "muon", "lr": 2e-3}),
]


@pytest.mark.parametrize(("old", "expected"), OLD, ids=[" ".join(old) for old, _ in OLD])
def test_a_configuration_of_an_earlier_version_means_the_same(
    old: dict[str, Any], expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adamw = {key: tuple(old[key]) if key == "betas" else old[key] for key in ("betas", "eps") if key in old}
    wanted = OptimizerConfig.of({**expected, "adamw": adamw})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"optimizer": old, "train": {"steps": 7}}), encoding="utf-8")
    for arguments in (["--config", str(file)], [f"--config={file}"]):
        config, resolved = parse(arguments)
        assert (config.optimizer, config.train.steps) == (wanted, 7)
        said = capsys.readouterr()
        notes = said.err.splitlines()
        flat = [key for key in old if key in MOVED]
        assert said.out == "" and len(notes) == bool(flat)
        assert all(f"optimizer.{key} " in notes[0] for key in flat)
    file.write_text(resolved, encoding="utf-8")
    assert parse(["--config", str(file)]) == (config, resolved)
    assert capsys.readouterr().err == "", "what a new run saves is not old"
    kept = CheckpointInfo(1, 1, {"optimizer": old}, 8).to_json()
    assert OptimizerConfig.of(CheckpointInfo.from_json(kept).config["optimizer"] | {"adamw": adamw}) == wanted


def test_an_old_file_counts_for_the_optimizer_that_the_command_line_names(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("optimizer: {name: adamw, momentum: 0.9, update_scale: spectral}\n", encoding="utf-8")
    for words in (["--optimizer.name", "muon"], ["--optimizer.name=muon"]):
        config, _ = parse(["--config", str(file), *words])
        assert config.optimizer == OptimizerConfig(name="muon", muon=MuonConfig(0.9, scale="unit_rms_norm"))
    assert parse(["--config", str(file)])[0].optimizer == OptimizerConfig()


def test_an_unknown_optimizer_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.name is 'sgd': use one of adamw, muon, normuon"):
        OptimizerConfig(name="sgd")  # type: ignore[arg-type]


def test_an_old_key_beside_its_new_one_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optimizer: {name: muon, momentum: 0.8, muon: {momentum: 0.9}}\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"optimizer\.momentum is 0\.8, and optimizer\.muon\.momentum is 0\.9: .* remove"
    ):
        parse(["--config", str(file)])


def test_overrides_win_over_the_file_and_the_rest_of_the_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  steps: 7\n  seed: 9\n", encoding="utf-8")
    config, _ = parse(["--config", str(file), "--train.steps", "8"])
    assert (config.train.steps, config.train.seed, config.train.micro_batch_size) == (8, 9, 8)


def test_print_config_prints_what_config_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse([*UNUSUAL, "--print_config"])
    assert exit_.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert parse(["--config", str(file)])[0] == parse(UNUSUAL)[0]


def test_help_lists_every_key_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    rules = {f"optimizer.{name}": section for name, section in rule_sections().items()}
    for name, section in (SECTIONS | rules).items():
        for key in dataclasses.fields(section):
            if f"{name}.{key.name}" in rules:
                continue  # its keys are listed
            at = text.rfind(f"  --{name}.{key.name} ")  # the last: usage comes first
            assert at >= 0, f"--{name}.{key.name} is not in --help"
            words = text[at:].split("(type:", 1)[0].split()
            prose = [word for word in words if not word.startswith(("--", "{")) and not word.isupper()]
            assert len(prose) > 1, f"--{name}.{key.name} has no description"
