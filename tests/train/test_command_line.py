"""A user's mistake ends the command line at once, on every rank: exit code 2, one line, nothing touched."""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from megamult.data.sentencepiece_tokenizer import train_tokenizer
from megamult.train import command_line, pretrain
from tests.processes import run_distributed
from tests.train.command import VOCAB, answers, data_arguments, snapshot, start
from tests.train.mistaken import make_checkpoints, make_long

# What is wrong before any process group exists: arguments (FOLDER is a folder with the files below), and the line.
FILES = {
    "ok.yaml": "train:\n  steps: 5\n",
    "key.yaml": "model:\n  num_layer: 2\n",
    "section.yaml": "modle:\n  num_layers: 2\n",
    "type.yaml": "model:\n  num_layers: many\n",
    "muon.yaml": "optimizer:\n  muon:\n    nesterov: false\n",
    "scalar.yaml": "model: 3\n",
    "ramp.yaml": "train:\n  batch_ramp: null\n",
    "list.yaml": "- 1\n",
    "broken.yaml": "model: [1\n",
    "list.json": "[1]",
    "broken.json": "{",
    "conflict.json": '{"train_batch_size": 7, "wall_clok_breakdown": true}',
}
EARLY: list[tuple[list[str], str]] = [
    # bad key
    (["--modle.num_layers", "2"], r"unrecognized arguments: --modle\.num_layers 2; --help lists every key"),
    (["--model.num_layer", "2"], r"unrecognized arguments: --model\.num_layer 2; --help lists"),
    (["--checkpoint.load", "latest"], r"checkpoint\.load is latest and train\.run_dir is not set: name"),
    (["--checkpoint.load", " "], r"checkpoint\.load is ' ': name a directory, or latest"),
    (
        ["--checkpoint.reset_optimizer", "true"],
        r"checkpoint\.reset_optimizer is true, and neither checkpoint\.load nor checkpoint\.start is set: give",
    ),
    (["--checkpoint.save_every", "-1"], r"checkpoint\.save_every is -1: it must be 0 or more"),
    (["--checkpoint.keep", "-1"], r"checkpoint\.keep is -1: it must be 0 or more"),
    (["--train.max_minutes", "0"], r"train\.max_minutes is 0\.0: it must be positive"),
    (["5"], r"unrecognized arguments: 5; --help lists"),
    (["--config", "FOLDER/key.yaml"], r"'num_layer'.*--help lists"),
    (["--config", "FOLDER/section.yaml"], r"Option 'modle\.num_layers' is not accepted; --help lists"),
    # bad value or type
    (["--model.num_layers", "two"], r'"model\.num_layers": Expected .*int.* Got value: two; --help lists'),
    (["--model.num_layers", "2.5"], r'"model\.num_layers": Expected .*int.* Got value: 2\.5; --help lists'),
    (["--model.num_layers"], r"--model\.num_layers: expected one argument; --help lists"),
    (["--train.dtype", "fp16"], r"\"train\.dtype\": Expected .*'fp32', 'bf16'.* Got value: fp16; --help lists"),
    (["--optimizer.name", "sgd"], r"\"optimizer\.name\": Expected .*'adamw', 'muon'.* Got value: sgd; --help lists"),
    (["--optimizer.adamw.betas", "[0.9]"], r'"optimizer\.adamw\.betas": Expected .*2 elements.* Got value: \[0\.9\]'),
    # keys of rules that the optimizer does not use, and of an earlier version
    (
        ["--optimizer.muon.momentum", "0.95", "--config", "FOLDER/muon.yaml"],
        r"optimizer\.name is 'adamw', which does not use optimizer\.muon\.(momentum|nesterov), "
        r"optimizer\.muon\.(momentum|nesterov): remove them, or set optimizer\.name to muon",
    ),
    (["--optimizer.muon.momentum=1"], r"which does not use optimizer\.muon\.momentum: remove it, or set"),
    (
        ["--optimizer.momentum", "0.9", "--optimizer.update_scale=spectral"],
        r"optimizer\.momentum is optimizer\.muon\.momentum now, optimizer\.update_scale is optimizer\.muon\.scale now "
        r"\(where spectral is called unit_rms_norm\): use the new keys",
    ),
    (["--optimizer.muon.momentu", "0.9"], r"unrecognized arguments: --optimizer\.muon\.momentu 0\.9; --help lists"),
    (["--optimizer.name", "muon", "--optimizer.muon.scale", "rms"], r"'match_rms_adamw', 'spectral'.* Got value: rms"),
    (["--config", "FOLDER/type.yaml"], r"model\.num_layers.*Got value: many; --help lists"),
    (["--config", "FOLDER/scalar.yaml"], r"model is 3: give a mapping of the section's keys"),
    (["--config", "FOLDER/list.yaml"], r"Unexpected config: - 1; --help lists"),
    (["--config", "FOLDER/broken.yaml"], r"Problems parsing config: .*line 2"),
    (["--config", "FOLDER/latin.yaml"], r"--config names is not UTF-8 .*0xe9.*: save it as UTF-8"),
    (["--train.steps", "0"], r"train\.steps is 0: it must be positive"),
    # missing config file
    (["--config", "FOLDER/none.yaml"], r'"config": File does not exist: .*none\.yaml'),
    (["--config", "FOLDER"], r'"config": Path is not a file'),
    # bad combinations
    (["--model.hidden_size", "100"], r"hidden_size is 100 with .*num_attention_heads 8: .*set hidden_size"),
    (["--optimizer.warmup_steps", "200"], r"warmup_steps 200 .* exceed train\.steps 100: shorten them"),
    (
        ["--config", "FOLDER/ok.yaml", "--optimizer.decay_steps", "6"],
        r"decay_steps 6 .* exceed train\.steps 5: shorten",
    ),
    (["--parallel.zero_stage", "0", "--train.dtype", "bf16"], r"zero_stage is 0 with .* bf16: .*grad_accum_dtype bf16"),
    (["--train.grad_accum_dtype", "bf16"], r"grad_accum_dtype is bf16 with train\.dtype fp32: use auto or fp32"),
    # sizes that tensor parallel, processes or batches do not divide
    (["--parallel.tensor", "3"], r"num_attention_heads is 8: it must be a multiple of parallel\.tensor \(3\)"),
    (["--parallel.tensor", "8", "--model.ffn_hidden_size", "700"], r"ffn_hidden_size is 700: .*multiple .*\(8\)"),
    (
        ["--parallel.tensor", "2", "--parallel.sequence", "true", "--model.seq_length", "33"],
        r"seq_length is 33: with parallel\.sequence it must be a multiple of parallel\.tensor \(2\)",
    ),
    (["--parallel.tensor", "2"], r"parallel\.tensor is 2 and 1 processes were started: start a multiple of 2"),
    (["--train.global_batch_size", "33"], r"global_batch_size is 33: it must be a multiple of .* = 8 x 1 = 8"),
    # batches that grow
    (
        ["--train.batch_ramp.start", "4", "--train.batch_ramp.increment", "4", "--train.batch_ramp.samples", "100"],
        r"batch_ramp\.start is 4, train\.batch_ramp\.increment is 4: each must be a multiple of .* = 8 x 1 = 8; change",
    ),
    (
        ["--train.batch_ramp", "{start: 8, increment: 16, samples: 100}"],
        r"train\.batch_ramp\.increment is 16: it must divide .* = 32 - 8 = 24",
    ),
    (
        ["--train.batch_ramp", "{start: 32, increment: 8, samples: 100}"],
        r"start is 32, and train\.global_batch_size is 32: the batch would never grow; lower start, or leave",
    ),
    (
        ["--train.batch_ramp.samples", "100"],
        r"given without train\.batch_ramp\.start, train\.batch_ramp\.increment: .*; give all three, or none",
    ),
    (
        ["--train.batch_ramp", "{start: 8, increment: 0, samples: -1}"],
        r"train\.batch_ramp\.increment is 0, train\.batch_ramp\.samples is -1: each must be positive",
    ),
    (["--train.batch_ramp.lr_scaling", "none"], r"lr_scaling is none, which has no effect without a ramp: leave"),
    (["--config", "FOLDER/ramp.yaml"], r"train\.batch_ramp is None: give a mapping of the section's keys"),
    # placements
    (["--multipliers.placement", "everywhere"], r"placement is 'everywhere': use one of all, symmetry_free, scalar"),
    (["--multipliers.placement", "{norm: row}"], r"placement names the role 'norm': use one of q, k, v"),
    (["--optimizer.lr_factors", "{heads: 2}"], r"optimizer\.lr_factors names the role 'heads': use one of q, k, v"),
    (
        ["--multipliers.qk_clip", "100", "--multipliers.placement", "scalar"],
        r"qk_clip is 100\.0, .*placement gives q scalar: one scalar scales all heads; give q the side row, or leave",
    ),
    (["--multipliers.qk_clip", "high"], r"multipliers\.qk_clip.*Expected a .*float.* Given value: high"),
    (["--multipliers.initial", "{q: {row: 0}}"], r"multipliers\.initial\.q\.row is 0\.0: give a positive number"),
    (["--model.norms", "none"], r"'vector', 'scalar', 'frozen'.* Got value: none"),
    (["--multipliers.placement", "{q: diagonal}"], r"placement gives q the side 'diagonal': use row, col or scalar"),
    # DeepSpeed file
    (["--deepspeed", "FOLDER/none.json"], r"deepspeed is '.*none\.json': there is no such file; give a path"),
    (["--deepspeed", "FOLDER/list.json"], r"list\.json', and this file holds no JSON object: give a mapping"),
    (["--deepspeed", "FOLDER/broken.json"], r"broken\.json', and this file is not JSON .*line 1"),
    (
        ["--deepspeed", "FOLDER/conflict.json"],
        r"deepspeed\.train_batch_size is 7, and this run needs 32: train\.global_batch_size decides; remove it; "
        r"deepspeed\.wall_clok_breakdown is not a DeepSpeed key: did you mean wall_clock_breakdown",
    ),
    (
        ["--deepspeed", "{gradient_clipping: 1.0}", "--optimizer.clip_grad_norm", "2"],
        r"gradient_clipping is 1\.0, which means optimizer\.clip_grad_norm 1\.0, and this run has 2\.0: change one",
    ),
    (["--deepspeed", "{tensor_parallel: {autotp_size: 2}}"], r"tensor_parallel is .*: use parallel\.tensor; remove it"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.yaml").write_bytes(b"train:\n  run_dir: caf\xe9\n")
    return folder


@pytest.mark.parametrize(("arguments", "message"), EARLY, ids=[" ".join(arguments) for arguments, _ in EARLY])
def test_a_mistake_in_the_keys_is_one_line_and_code_2_before_anything_runs(
    arguments: list[str],
    message: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*_: object) -> NoReturn:
        pytest.fail("the mistake was not seen")

    monkeypatch.setattr(pretrain, "run", run)
    before = snapshot(files)
    with pytest.raises(SystemExit) as exit_:
        pretrain.main([argument.replace("FOLDER", str(files)) for argument in arguments])
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", said.err), said.err  # no dot matches a newline: one line
    assert snapshot(files) == before


def test_ranks_other_than_0_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(command_line, "HEAD_START_SECONDS", 0.0)
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--train.steps", "0"])
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "")


# What only the data, the directory or DeepSpeed can tell: further arguments (FOLDER as made below), and the line.
LATE: list[tuple[list[str], str]] = [
    (["--data.train=FOLDER/none_train"], r"FOLDER/none_train\.idx does not exist: give the prefix"),
    (["--data.train=null"], r"data\.train is not set: give a prefix"),
    (["--data.valid=FOLDER/none_valid"], r"FOLDER/none_valid\.idx does not exist: give the prefix"),
    (["--data.train=FOLDER/cut"], r"FOLDER/cut\.bin has \d+ bytes, but .*cut\.idx describes \d+: .*cut off: .*rerun"),
    (
        ["--data.train=FOLDER/foreign"],
        rf"FOLDER/foreign\.bin: token id {VOCAB} at token 7 .*outside the vocabulary of {VOCAB}: use the tokenizer",
    ),
    (["--data.valid=[FOLDER/tiny_valid, FOLDER/foreign]"], rf"FOLDER/foreign\.bin: token id {VOCAB} at token 7 "),
    (
        ["--model.seq_length=100000"],
        r"tiny_train has \d+ tokens, but one sample takes 100001 .*shorten model\.seq_length",
    ),
    (
        ["--data.tokenizer=null"],
        r"data\.tokenizer is not set, with model\.vocab_size None and data\.eod None: give the",
    ),
    (["--data.tokenizer=FOLDER/none.model"], r"cannot read the tokenizer FOLDER/none\.model \(No such file.*: give"),
    (
        ["--data.tokenizer=FOLDER/damaged.model"],
        r"damaged\.model \(\d+ bytes\) is neither a sentencepiece model nor a tokenizer\.json, .*: copy it",
    ),
    (
        ["--model.vocab_size=399"],
        rf"vocab_size is 399 and the tokenizer FOLDER/tiny\.model has {VOCAB} tokens: leave vocab_size null",
    ),
    (["--train.run_dir=FOLDER/used"], r"train\.run_dir FOLDER/used holds another run .*, choose another"),
    (["--train.run_dir=FOLDER/file"], r"train\.run_dir FOLDER/file cannot be written \(.*\): choose another"),
    (["--train.run_dir=FOLDER/file/run"], r"train\.run_dir FOLDER/file/run cannot be written \(.*\): choose another"),
    (["--checkpoint.load=FOLDER/none"], r"checkpoint\.load is 'FOLDER/none': no checkpoint is there; name"),
    (
        ["--checkpoint.load=" + 300 * "x"],
        r"checkpoint\.load is 'x{200}', which cannot be read \(File name too long\)",
    ),
    (["--checkpoint.load=FOLDER/used"], r"checkpoint\.load is 'FOLDER/used': no checkpoint is there; name"),
    (
        ["--checkpoint.load=FOLDER/saved/cut"],
        r"cut/shard_00000_0000\.safetensors has another checksum .*; load another",
    ),
    (["--checkpoint.load=FOLDER/saved/flipped"], r"flipped/checkpoint\.json has another checksum .*; load another"),
    (["--checkpoint.load=FOLDER/saved/lost"], r"shard_00000_0000\.safetensors cannot be read .*; load another"),
    (["--checkpoint.load=FOLDER/saved/unlisted"], r"unlisted is no complete checkpoint: SHA256SUMS cannot be read"),
    (
        ["--checkpoint.load=latest", "--train.run_dir=FOLDER/broken"],
        r"none of the 2 checkpoints in FOLDER/broken/checkpoints is usable: load another checkpoint\. The problem of "
        r"the oldest \(.*\): .*step_1/shard_",
    ),
    (
        ["--checkpoint.load=FOLDER/saved/whole", "--multipliers.implementation=none"],
        r"does not fit this run: model\.num_layers is 4 and the checkpoint's is 3; model\.hidden_size is 256 and the "
        r"checkpoint's is 128; model\.head_dim is 32 and the checkpoint's is 16; model\.num_query_groups is 8 and the "
        r"checkpoint's is 4; model\.tie_embeddings is False "
        rf"and the checkpoint's is True; model\.vocab_size is {VOCAB} and the checkpoint's is 500; train\.seed "
        r"\(the data's order\) is 1234 and the checkpoint's is 7; the SHA-256 of data\.tokenizer is '\w{64}' and the "
        r"checkpoint's is '0{64}' \(tokenizer\.model\); optimizer\.name is 'adamw' and the checkpoint's is 'muon' "
        r"\(.*\); multipliers\.placement gives q no col and row multipliers, .*: set them back",
    ),
    (
        ["--data.tokenizer=FOLDER/other.model"],
        r"data source FOLDER/tiny_train was encoded with another tokenizer than FOLDER/other\.model: FOLDER/tiny_train"
        rf"\.stamp\.json records one with the SHA-256 \w{{12}}\.\.\. and {VOCAB} tokens, but the given one has "
        r"the SHA-256 \w{12}.*; data source FOLDER/tiny_valid was encoded with another tokenizer",
    ),
    (
        ["--data.train=FOLDER/swapped"],
        r"FOLDER/swapped\.bin and \.idx are not those that .* was written for: contents '",
    ),
    (
        ["--data.train=FOLDER/late", "--data.validate=full"],
        rf"FOLDER/late\.bin: token id {VOCAB} at token \d+ .* is outside the vocabulary of {VOCAB}: use the tokenizer",
    ),
    (
        ["--checkpoint.load=FOLDER/saved/imported"],
        r"does not fit this run: the SHA-256 of data\.tokenizer is '\w{64}' and the checkpoint's is '0{64}' "
        r"\(hf_tokenizer/tokenizer\.json\): set them back",
    ),
    (
        ["--checkpoint.load=FOLDER/saved/imported_before"],
        rf"the checkpoint's is '{hashlib.sha256(b'{}').hexdigest()}' \(hf_tokenizer/tokenizer\.json\): set them back",
    ),
    (
        ["--deepspeed={csv_monitor: {enabled: perhaps}, comet: {samples_log_interval: often}}"],
        r"deepspeed: DeepSpeed refuses these keys \(comet\.samples_log_interval: .*; csv_monitor\.enabled: .*\); corr",
    ),
]


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good corpus (tiny), damaged ones, and a directory that holds a run."""
    folder = tmp_path_factory.mktemp("corpus")
    shutil.copytree(corpus.parent, folder, dirs_exist_ok=True)
    tiny = folder / corpus.name
    for name in ("cut", "foreign"):
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{tiny}_train{suffix}", folder / f"{name}{suffix}")
    whole = (folder / "cut.bin").read_bytes()
    (folder / "cut.bin").write_bytes(whole[:-10])
    (folder / "foreign.bin").write_bytes(whole[:14] + struct.pack("<H", VOCAB) + whole[16:])  # uint16 token 7
    for suffix in (".idx", ".stamp.json"):
        shutil.copy(f"{tiny}_train{suffix}", folder / f"swapped{suffix}")
    (folder / "swapped.bin").write_bytes(whole[2:4] + whole[:2] + whole[4:])
    make_long(folder / "late")
    other = (folder / "text.txt").read_text(encoding="utf-8").upper()
    train_tokenizer([other], VOCAB, folder / "other.model")
    (folder / "damaged.model").write_bytes((folder / "tiny.model").read_bytes()[:500])
    (folder / "file").write_text("a file", encoding="utf-8")
    (folder / "used" / "tensorboard").mkdir(parents=True)
    (folder / "used" / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n', encoding="utf-8")
    (folder / "used" / "config.yaml").write_text("train: {steps: 1}\n", encoding="utf-8")
    make_checkpoints(folder)
    return folder


def late_arguments(folder: Path, further: list[str]) -> list[str]:
    base = [f"--train.run_dir={folder}/new", "--train.global_batch_size=16", "--model.seq_length=32"]
    return [*data_arguments(folder / "tiny"), *base, *(x.replace("FOLDER", str(folder)) for x in further)]


@pytest.fixture(scope="module")
def late(folder: Path) -> Iterator[list[list[tuple[object, str]]]]:
    """Per rank: what the command line answered in each case of LATE."""
    before = snapshot(folder)
    yield run_distributed(2, answers, [late_arguments(folder, further) for further, _ in LATE])
    assert snapshot(folder) == before, "a mistake left a file, or changed one"


@pytest.mark.parametrize("case", range(len(LATE)), ids=[" ".join(further) for further, _ in LATE])
def test_a_mistake_that_one_rank_sees_ends_both_and_rank_0_says_it(
    late: list[list[tuple[object, str]]], folder: Path, case: int
) -> None:
    message = LATE[case][1].replace("FOLDER", re.escape(str(folder)))
    (code, said), (other_code, other_said) = (rank[case] for rank in late)
    assert (code, other_code) == (2, 2)
    lines = said.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:], said
    assert re.search(message, lines[-1]), lines[-1]
    assert "Traceback" not in said and "error:" not in other_said


# The same from outside: processes, arguments, the line.
OUTSIDE: dict[str, tuple[int | None, list[str], str]] = {
    "a bad key": (None, ["--model.num_layer=2"], r"unrecognized arguments: --model\.num_layer=2; --help"),
    "a bad key, two ranks": (2, ["--model.num_layer=2"], r"unrecognized arguments: --model\.num_layer=2; --help"),
    "a directory in use": (None, ["--train.run_dir=FOLDER/used"], r"FOLDER/used holds another run .*, choose another"),
    "a corpus of other tokens, under DeepSpeed's launcher": (
        2,
        ["--parallel.tensor=2", "--data.train=FOLDER/foreign"],
        rf"foreign\.bin: token id {VOCAB} at token 7 ",
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_command_ends_with_code_2_one_line_and_no_process_left(folder: Path, name: str) -> None:
    processes, further, message = OUTSIDE[name]
    before = snapshot(folder)
    # The last one brings everything that an import or a launcher may add to what is said.
    # A rank that waited for another one in a collective would take longer than `start` waits.
    outcome = start(late_arguments(folder, further), processes, launcher="launcher" in name)
    assert outcome.code == 2, outcome.text
    assert len(outcome.errors) == 1, outcome.text
    assert re.search(message.replace("FOLDER", re.escape(str(folder))), outcome.errors[0])
    assert "Traceback" not in outcome.text
    assert outcome.left == []
    assert snapshot(folder) == before
