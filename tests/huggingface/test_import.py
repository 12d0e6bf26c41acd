"""An import is the same model: exported again, it is the original bit by bit; what cannot be taken over is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megamult.checkpoint import streamed
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.config import Config
from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megamult.effective.reading import EffectiveModel
from megamult.huggingface.exporting import export
from megamult.huggingface.importing import import_
from megamult.huggingface.stored import Stored
from megamult.huggingface.tokenizer import convert
from megamult.models.llama.config import ModelConfig
from megamult.models.llama.hf_names import weights
from megamult.parameters.roles import resolve
from tests.huggingface.corpus import VOCAB, make_tokenizer

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny.model")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """make(dtype, tied, size of a shard) -> a directory that transformers wrote."""

    def write(dtype: torch.dtype = torch.float32, tied: bool = False, shard: str = "5GB") -> Path:
        torch.manual_seed(3)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=[2, 9]))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.to(dtype).save_pretrained(tmp_path / "input", max_shard_size=shard)
        return tmp_path / "input"

    return write


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("placement", ["all", "none", "scalar"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_import_then_export_gives_the_original_back(
    make: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, tied: bool, placement: str
) -> None:
    source = make(dtype, tied, "40KB" if placement == "all" else "5GB")
    done = import_(source, tmp_path / "checkpoint", placement)
    again = export(tmp_path / "checkpoint", tmp_path / "hf")
    original = tensors(source)
    assert len(original) == 20 + (not tied) and {tensor.dtype for tensor in original.values()} == {dtype}
    assert_same_tensors(tensors(tmp_path / "hf"), original)
    assert done.parameters == again.parameters == sum(tensor.numel() for tensor in original.values())
    before, after = (LlamaConfig.from_pretrained(path).to_dict() for path in (source, tmp_path / "hf"))
    assert {key: after[key] for key in before} == before


def test_blocks_of_rows_make_the_whole(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 7 * 48 * 4)  # 7 rows: no matrix is a multiple of it
    source = make(torch.bfloat16)
    import_(source, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "hf")
    assert_same_tensors(tensors(tmp_path / "hf"), tensors(source))


@pytest.mark.parametrize("placement", ["all", "symmetry_free", "scalar", "none"])
def test_the_checkpoint_is_one_to_begin_from(make: Callable[..., Path], tmp_path: Path, placement: str) -> None:
    done = import_(make(), tmp_path / "checkpoint", placement)
    saved = SavedCheckpoint(tmp_path / "checkpoint")
    saved.verify()
    info = saved.info
    assert (info.step, info.samples, info.optimizer, info.vocab_size) == (0, 0, None, VOCAB)
    sections = {field.name: field for field in dataclasses.fields(Config)}
    assert info.config.keys() == sections.keys()  # as resolved as a run's own
    model = ModelConfig(**info.config["model"])
    assert (model.rotary_base, model.norm_eps, model.seq_length, model.query_groups) == (700.0, 3e-5, 64, 2)
    assert (model.vocab_size, info.config["train"]["dtype"]) == (VOCAB, "fp32")
    implementation = "none" if placement == "none" else "layer"
    assert info.config["multipliers"]["implementation"] == implementation
    expected: dict[str, tuple[int, ...]] = {}
    sides = {} if placement == "none" else resolve(placement)
    for weight in weights(model, VOCAB):
        multipliers = weight.multipliers(sides)
        expected |= {weight.logical: weight.shape, **multipliers}
    assert saved.shapes == {f"model.{name}": shape for name, shape in expected.items()}
    multipliers = {name: saved.read(name) for name in saved.shapes if name.endswith("multiplier")}
    assert all((values == 1).all() for values in multipliers.values())
    assert all(EffectiveModel(saved).all_ones(each, side) for each in ("q", "down") for side in sides.get(each, ()))
    assert done.multipliers == sum(values.numel() for values in multipliers.values())


def test_the_tokenizer_comes_along_and_back(make: Callable[..., Path], tmp_path: Path, tokenizer: Path) -> None:
    source = make()
    files = {**convert(tokenizer, 64), "tokenizer.model": tokenizer.read_bytes(), "chat_template.jinja": b"{{ x }}"}
    for name, content in files.items():
        (source / name).write_bytes(content)
    assert import_(source, tmp_path / "checkpoint").notes == []
    saved = SavedCheckpoint(tmp_path / "checkpoint")
    assert saved.info.tokenizer_sha256 == SentencePieceTokenizer(tokenizer).sha256
    assert (saved.path / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    export(tmp_path / "checkpoint", tmp_path / "hf")
    files["generation_config.json"] = (source / "generation_config.json").read_bytes()
    assert {name: (tmp_path / "hf" / name).read_bytes() for name in files} == files
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 9])


def test_a_tokenizer_of_another_kind_is_known_by_the_files_that_define_it(
    make: Callable[..., Path], tmp_path: Path, tokenizer: Path
) -> None:
    source = make()
    files = {"vocab.json": b"{}", "merges.txt": b"a b", "chat_template.jinja": b"{{ x }}"}
    digests: list[str] = []
    for number, (name, content, expected) in enumerate(
        [
            ("vocab.json", b"{}", "hf_tokenizer/vocab.json, hf_tokenizer/merges.txt"),
            ("merges.txt", b"a c", "hf_tokenizer/vocab.json, hf_tokenizer/merges.txt"),
            ("tokenizer.model", b"no sentencepiece", "hf_tokenizer/tokenizer.model"),
            ("tokenizer.json", b"{}", "hf_tokenizer/tokenizer.json"),
            ("chat_template.jinja", b"{{ y }}", "hf_tokenizer/tokenizer.json"),
            ("tokenizer.model", tokenizer.read_bytes(), "tokenizer.model"),
        ]
    ):
        files[name] = content
        for each, its in files.items():
            (source / each).write_bytes(its)
        done = import_(source, tmp_path / str(number))
        info = SavedCheckpoint(tmp_path / str(number)).info
        assert info.tokenizer_files == expected
        readable = number >= 3
        assert readable == (done.notes == []) and (readable or "write a tokenizer.json with" in done.notes[0])
        assert info.tokenizer_sha256 is not None
        digests.append(info.tokenizer_sha256)
    assert digests[3] == digests[4] == hashlib.sha256(b"{}").hexdigest()  # as sha256sum says of tokenizer.json
    assert digests[5] == SentencePieceTokenizer(tokenizer).sha256
    assert len(set(digests)) == 5


def test_without_a_tokenizer_special_ids_survive(make: Callable[..., Path], tmp_path: Path) -> None:
    source = make()
    (source / "generation_config.json").unlink()
    (source / "tokenizer.model").write_bytes(b"no sentencepiece")
    (note,) = import_(source, tmp_path / "checkpoint").notes
    assert note.startswith("the tokenizer (tokenizer.model) is neither a tokenizer.json nor a sentencepiece model")
    export(tmp_path / "checkpoint", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [2, 9]
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"no sentencepiece"
    (source / "tokenizer.model").unlink()
    done = import_(source, tmp_path / "second")
    assert "the input has no tokenizer" in done.notes[0]
    assert SavedCheckpoint(tmp_path / "second").info.tokenizer_sha256 is None


def test_a_tied_model_may_carry_its_head(make: Callable[..., Path], tmp_path: Path) -> None:
    source = make(tied=True)
    found = tensors(source)
    head = found["model.embed_tokens.weight"].clone()
    extra = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(found | extra, source / "model.safetensors")
    import_(source, tmp_path / "checkpoint")
    head[-1, -1] += 1e-3
    save_file(found | extra, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        import_(source, tmp_path / "second")


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        found: dict[str, Any] = tensors(source) | changes
        kept = {name: tensor for name, tensor in found.items() if tensor is not None}
        save_file(kept, source / "model.safetensors", metadata={"format": "pt"})

    return change


def without_head(source: Path) -> None:
    change_tensors(**{"lm_head.weight": None})(source)
    path = source / "config.json"
    content = json.loads(path.read_text())
    del content["tie_word_embeddings"]
    path.write_text(json.dumps(content))


def pickled(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def truncated(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def indexed(content: str) -> Callable[[Path], None]:
    return lambda source: (source / "model.safetensors.index.json").write_text(content) and None


def twice(source: Path) -> None:
    shutil.copy(source / "model.safetensors", source / "b.safetensors")
    indexed('{"weight_map": {"x": "model.safetensors", "y": "b.safetensors"}}')(source)


UP, BIAS = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias"
BIASES = sorted(f"model.layers.{i}.self_attn.{which}_proj.bias" for i in range(2) for which in "qko")
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "config": (change_config(hidden_act="gelu"), "input/config.json: hidden_act is 'gelu', not 'silu'"),
    "no biases": (change_config(attention_bias=True), "has no tensor model.layers.0.self_attn.q_proj.bias (48,), "),
    "no tie": (
        without_head,
        '"tie_word_embeddings": true is probably missing in config.json: add it',
    ),
    "untied": (
        change_tensors(**{"lm_head.weight": None}),
        'set "tie_word_embeddings" in config.json to true (it is false)',
    ),
    "no config": (lambda source: (source / "config.json").unlink(), "config.json cannot be read (No such file"),
    "bad config": (lambda source: (source / "config.json").write_text("{"), "config.json is no JSON file"),
    "a list": (lambda source: (source / "config.json").write_text("[]"), "config.json holds no JSON object"),
    "missing": (change_tensors(**{UP: None}), f"has no tensor {UP} (72, 48): config.json asks for it"),
    "bias": (
        change_tensors(**{BIAS: torch.ones(48)}),
        f"holds {BIAS} (48,), which a LlamaForCausalLM with this config.json",
    ),
    "biases": (
        change_tensors(**{bias: torch.ones(48) for bias in BIASES}, **{UP: None}),
        f"has no tensor {UP} (72, 48): config.json asks for it; holds {', '.join(f'{b} (48,)' for b in BIASES[:5])} "
        "and 1 more, which a LlamaForCausalLM with this config.json does not have (number of such tensors: 6)",
    ),
    "layers": (
        change_config(num_hidden_layers=1),
        "holds model.layers.1.input_layernorm.weight (48,), model.layers.1.mlp.down_proj.weight (48, 72), ",
    ),
    "shape": (
        change_tensors(**{UP: torch.ones(72, 47)}),
        f"{UP} has shape (72, 47), and config.json asks for (72, 48)",
    ),
    "vocabulary": (change_config(vocab_size=500), "model.embed_tokens.weight has shape (400, 48), and config.json as"),
    "integers": (change_tensors(**{UP: torch.ones(72, 48, dtype=torch.int8)}), f"{UP} is of dtype I8: save the model"),
    "pickle": (pickled, "holds pytorch_model.bin, a pickle, which can run code"),
    "nothing": (lambda source: (source / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "truncated": (truncated, "model.safetensors cannot be read ("),
    "no map": (indexed("{}"), "index.json has no weight_map"),
    "lost shard": (indexed('{"weight_map": {"x": "lost.safetensors"}}'), "lost.safetensors cannot be read ("),
    "twice": (twice, "so does another file of the model"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_leaves_nothing(make: Callable[..., Path], tmp_path: Path, name: str) -> None:
    spoil, message = MISTAKES[name]
    spoil(make())
    with pytest.raises(ValueError, match=re.escape(message)):
        import_(tmp_path / "input", tmp_path / "new" / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["input"]


def test_placement_and_output_are_checked_first(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="there exists and is not empty: choose another output"):
        import_(tmp_path / "nowhere", tmp_path / "there")
    with pytest.raises(ValueError, match="placement is 'most': use one of all, none, symmetry_free, scalar"):
        import_(tmp_path / "nowhere", tmp_path / "new", "most")


def test_a_failed_write_leaves_nothing(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **named: Any) -> torch.Tensor:
        raise OSError(5, "Input/output error")

    source = make()
    monkeypatch.setattr(Stored, "rows", broken)
    with pytest.raises(OSError, match="Input/output error"):
        import_(source, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["input"]
