"""The section `model` of Falcon-H1: which keys it has, what it refuses, and that the command line finds its class."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamult.config import Config
from megamult.distributed.config import ParallelConfig
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.models.llama.config import ModelConfig
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.train.command_line import parse

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "llama"}, r"architecture is 'llama': these are the keys of falcon_h1"),
    ({"ssm_heads": 0, "ssm_state_size": -1}, r"ssm_heads is 0: it must be positive"),
    ({"layers": "HHH"}, r"layers is 'HHH' with model\.num_layers 4: give one letter for each layer \(H: attention and"),
    ({"layers": "HMAB"}, r"layers is 'HMAB' with model\.num_layers 4: .*; M: a mixer; \*: attention; -: an MLP"),
    ({"ssm_norm": "inside"}, r"ssm_norm is 'inside': use one of none, before_gate, after_gate"),
    ({"layers": "HM*-", "no_rope_layers": [0, 1, 3]}, r"no_rope_layers has 1, 3, and these layers have no attention"),
    (
        {"layers": "*M*M", "no_rope_layers": [0, 2], "rotary_scaling": {"rope_type": "linear", "factor": 2.0}},
        r"rotary_scaling has no effect, because no layer has rotary positions: leave it out",
    ),
    # Keys of blocks that no layer has, all at once.
    (
        {
            "layers": "MMMM",
            "qk_norm": True,
            "attention_bias": "qkv",
            "mlp_bias": True,
            "rotary_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        r"layers is 'MMMM': there is no attention, and then model\.rotary_scaling, model\.attention_bias, "
        r"model\.qk_norm has no effect; there is no MLP, and then model\.mlp_bias has no effect: leave it out",
    ),
    (
        {"layers": "****", "mlp_bias": True, "ssm_norm": "after_gate", "ssm_heads": 7},
        r"'\*\*\*\*': there is no MLP, and then model\.mlp_bias .*; there is no mixer, and then model\.ssm_heads, "
        r"model\.ssm_norm has",
    ),
    (
        {"layers": "--M-", "num_attention_heads": 4},
        r"no attention, and then model\.num_attention_heads has no",
    ),
]


@pytest.mark.parametrize(("keys", "said"), REFUSED)
def test_impossible_sizes_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FalconH1Config(**keys)


@pytest.mark.parametrize(
    ("keys", "tensor", "said"),
    [
        ({"ssm_heads": 8, "ssm_groups": 3}, 1, r"ssm_heads is 8 and model\.ssm_groups 3: .*divides that of the heads"),
        ({"ssm_heads": 6}, 4, r"parallel\.tensor is 4, model\.ssm_heads 6 and model\.ssm_groups 1: it must divide"),
        ({"ssm_heads": 12, "ssm_groups": 3}, 2, r"parallel\.tensor is 2, model\.ssm_heads 12 and model\.ssm_groups 3"),
    ],
)
def test_heads_that_the_ranks_cannot_share_are_refused(keys: dict[str, Any], tensor: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config(model=FalconH1Config(**keys), parallel=ParallelConfig(tensor=tensor))


@pytest.mark.parametrize(
    ("keys", "tensor"),
    [
        ({"layers": "MM", "ssm_heads": 16}, 16),
        ({"layers": "MM", "hidden_size": 36}, 2),
        ({"layers": "M-", "num_attention_heads": 8, "ssm_heads": 16}, 16),
        ({"layers": "*-", "num_attention_heads": 16}, 16),
        ({"layers": "M*", "num_attention_heads": 128, "ssm_heads": 128}, 128),  # 704 of the MLP
    ],
    ids=str,
)
def test_sizes_of_blocks_that_the_model_lacks_are_not_checked(keys: dict[str, Any], tensor: int) -> None:
    Config(model=FalconH1Config(num_layers=2, **keys), parallel=ParallelConfig(tensor=tensor))
    whole = {"num_attention_heads": 8, **keys, "layers": "HH"}
    with pytest.raises(ValueError, match=r"num_attention_heads|ffn_hidden_size|ssm_heads"):
        Config(model=FalconH1Config(num_layers=2, **whole), parallel=ParallelConfig(tensor=tensor))


def test_the_role_bias_is_that_of_the_convolution_too() -> None:
    factors = OptimizerConfig(lr_factors={"bias": 2.0})
    Config(model=FalconH1Config(), optimizer=factors)
    for sizes in (FalconH1Config(ssm_conv_bias=False), FalconH1Config(layers="*-*-")):
        with pytest.raises(
            ValueError, match=r"lr_factors\.bias has no effect, because .*, and no mixer has a bias: leave"
        ):
            Config(model=sizes, optimizer=factors)


ARGUMENTS = ["--model.architecture", "falcon_h1", "--model.layers", "HM*-", "--model.ssm_norm", "before_gate"]


@pytest.mark.parametrize(
    ("layers", "placement", "remedy"),
    [
        (
            "HM",
            "symmetry_free",
            "give the side col to q, k and v or to gate and up or to ssm_z, ssm_x, ssm_b, ssm_c and ssm_dt in",
        ),
        ("MM", {"ssm_dt": ["row", "col"], "embedding": "col"}, "give the side col to ssm_z, ssm_x, ssm_b, ssm_c and"),
        ("*-", {"k": "col", "up": "col"}, "give the side col to q, k and v or to gate and up in multipliers.placement"),
    ],
)
def test_columns_that_no_matrix_can_share_are_refused(layers: str, placement: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match="stores two matrices that have column multipliers: ") as error:
        Config(
            model=FalconH1Config(num_layers=2, layers=layers),
            multipliers=MultipliersConfig(placement=placement, shared_columns=True),
        )
    assert remedy in str(error.value)
    Config(model=FalconH1Config(num_layers=2, layers=layers), multipliers=MultipliersConfig(shared_columns=True))


def test_the_command_line_reads_the_keys_of_the_architecture_that_it_names(tmp_path: Path) -> None:
    config, resolved = parse(ARGUMENTS)
    assert config.model == FalconH1Config(layers="HM*-", ssm_norm="before_gate")
    assert set(yaml.safe_load(resolved)["model"]) == {key.name for key in dataclasses.fields(FalconH1Config)}
    file, section = tmp_path / "config.yaml", tmp_path / "model.yaml"
    file.write_text(resolved, encoding="utf-8")
    assert parse(["--config", str(file)]) == (config, resolved)
    section.write_text("{architecture: falcon_h1, ssm_heads: 16}\n", encoding="utf-8")
    assert parse(["--model", str(section)])[0].model == FalconH1Config(ssm_heads=16)
    # Letters that begin with "-" look like an option, so they need "=".
    assert parse([*ARGUMENTS[:2], "--model.layers=-M-M"])[0].model == FalconH1Config(layers="-M-M")
    # The last argument that names an architecture decides, and a file without it does not change it.
    other = tmp_path / "other.yaml"
    other.write_text("model: {ssm_heads: 16}\n", encoding="utf-8")
    both = parse(["--config", str(file), "--config", str(other)])[0].model
    assert both == dataclasses.replace(config.model, ssm_heads=16)
    section.write_text("{architecture: llama}\n", encoding="utf-8")
    assert parse([*ARGUMENTS[:2], "--model", str(section)])[0].model == ModelConfig()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.ssm_heads", "4"], r"ssm_heads"),
        (["--model.architecture", "mamba"], r"model\.architecture is 'mamba': use one of llama, falcon_h1"),
        (["--model", "{architecture: [llama]}"], r"model\.architecture is \['llama'\]: use one of llama, falcon_h1"),
        (
            [*ARGUMENTS, "--multipliers.placement", "{ssm_out: row}"],
            r"placement names the role 'ssm_out': use one of q",
        ),
        (
            ["--model", "{architecture: falcon_h1, layers: MMMM}", "--multipliers.qk_clip", "30"],
            r"qk_clip is 30\.0, .* the model has no attention: leave qk_clip out",
        ),
        # The weights of the convolution are drawn as Mamba's, whatever init_std.
        (
            ["--model", "{architecture: falcon_h1, init_std_factors: {ssm_conv: 2}}"],
            r"init_std_factors names the role 'ssm_conv': model\.init_std sets the initial .* only: q, .* ssm_out",
        ),
    ],
)
def test_a_key_or_role_that_the_model_has_no_use_for_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(arguments)


def test_help_describes_every_key_of_the_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*ARGUMENTS, "--help"])
    text = capsys.readouterr().out
    for key in dataclasses.fields(FalconH1Config):
        at = text.rfind(f"  --model.{key.name} ")
        assert at >= 0, f"--model.{key.name} is not in --help"
        words = text[at:].split("(type:", 1)[0].split()
        assert len([word for word in words if not word.startswith(("--", "{")) and not word.isupper()]) > 1, key.name
