"""launch/prepare_data.py from the outside: a user's mistake is one message, exit code 2, and no file."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megamult.data import encoding
from tests import programs
from tests.data.conftest import make_documents
from tests.programs import Program

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "prepare_data.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return programs.run([SCRIPT, *arguments], ENVIRONMENT, directory)


def good(n: int) -> bytes:
    return b"".join(json.dumps({"text": f"document number {i}"}).encode() + b"\n" for i in range(n))


# input file, its contents (None: it does not exist), further arguments, what the message must say
MISTAKES = [
    ("missing.txt", None, [], r"1 input cannot be opened \(missing\.txt: does not exist: give the path of"),
    ("empty.txt", b"", [], r"hold no document to read \(1 file without text was skipped \(empty\.txt\)\)"),
    ("empty.jsonl", b"", [], r"no document to read \(1 file without text was skipped \(empty\.jsonl\)\)"),
    ("blank.txt", b"\n \n\n", [], r"no document to read \(1 file without text was skipped \(blank\.txt\)\)"),
    (
        "void.jsonl",
        b'{"text": " \\n"}\n\n',
        [],
        r"\(1 blank line was skipped \(void\.jsonl, line 2\); 1 document without text was skipped \(void\.jsonl, line",
    ),
    (
        "latin.txt",
        b"fine\n\nok\ncaf\xe9\n",
        [],
        r"1 line is not UTF-8 \(latin\.txt, line 4: 0xe9 is byte number 4\): convert the file, .*--on_error skip$",
    ),
    ("latin.jsonl", good(2) + b'{"text": "\xff"}\n', [], r"1 line is not UTF-8 \(latin\.jsonl, line 3: 0xff is"),
    ("json.jsonl", good(4) + b'{"text": \n', [], r"1 line is invalid JSON \(json\.jsonl, line 5: Expecting value"),
    ("deep.jsonl", good(4) + b"[" * 200_000 + b"\n", [], r"1 line is invalid JSON \(deep\.jsonl, line 5"),
    ("list.jsonl", good(1) + b"[1]\n", [], r"1 line holds no JSON object \(list\.jsonl, line 2: it holds an array\)"),
    (
        "field.jsonl",
        good(3),
        ["--json_key", "body"],
        r"3 objects have no field of the given name \(field\.jsonl, line 1: it has no 'body'; its fields are 'text'; ",
    ),
    (
        "type.jsonl",
        good(1) + b'{"text": 3}\n{"text": null}\n',
        [],
        r"2 texts are no strings \(type\.jsonl, line 2: 'text' is a number; type\.jsonl, line 3: 'text' is null\)",
    ),
    ("one.txt", b"a single document\n", [], r"has 1 document\(s\), but a train and a valid set need"),
    (
        "vocab.jsonl",
        good(9),
        ["--vocab_size", "90000"],
        r"vocab_size is 90000, but this text yields at most \d+",
    ),
    ("vocab.jsonl", good(9), ["--vocab_size", "12"], r"vocab_size is 12, .* at least 260"),
    ("split.jsonl", good(9), ["--valid_fraction", "1"], r"valid_fraction is 1\.0: give"),
    ("work.jsonl", good(9), ["--workers", "0"], r"workers is 0: give"),
    ("out.jsonl", good(9), ["--output", "data/"], r"output is 'data/': give a prefix"),
    ("out.jsonl", good(9), ["--output", "out.jsonl/x"], r"cannot write under .*out\.jsonl"),
]


@pytest.mark.parametrize(("name", "content", "arguments", "message"), MISTAKES)
def test_a_mistake_is_one_message_and_leaves_nothing(
    tmp_path: Path, name: str, content: bytes | None, arguments: list[str], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    defaults = ["--input", name, "--output", "new/corpus", "--vocab_size", "280", "--workers", "1"]
    result = run(tmp_path, *defaults, *arguments)
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr and result.stdout == ""
    # Only the directory of the output may have been made; it is empty.
    assert [p for p in tmp_path.rglob("*") if p.name != "new"] == before


def test_a_tokenizer_that_changes_text_is_taken_with_a_warning_that_says_how(tmp_path: Path) -> None:
    """Such as a model of sentencepiece's defaults, which has no pieces for bytes and joins spaces."""
    writer = io.BytesIO()
    texts = make_documents(40)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=writer, vocab_size=100, minloglevel=2
    )
    (tmp_path / "lossy.model").write_bytes(writer.getvalue())
    (tmp_path / "c.txt").write_text("plain\n\ntwo  spaces\n")
    arguments = ["--input", "c.txt", "--output", "c", "--tokenizer", "lossy.model", "--workers", "2"]
    result = run(tmp_path, *arguments)
    assert result.returncode == 0 and "c.model: 100 tokens" in result.stdout
    assert result.stderr == (
        "warning: the tokenizer changes the text of 1 of 2 documents, and a model can learn only what it keeps; the "
        "first: c.txt, line 3, from character 4 on, ' spaces' is decoded as 'spaces'\n"
    )
    assert (tmp_path / "c.model").read_bytes() == writer.getvalue()
    library = sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())
    first, second = (library.encode(text) + [library.eos_id()] for text in ("plain", "two  spaces"))
    written = [np.fromfile(tmp_path / f"c_{part}.bin", np.uint16).tolist() for part in ("train", "valid")]
    assert sorted(written) == sorted([first, second])


def test_exactly_one_of_vocab_size_and_tokenizer(tmp_path: Path) -> None:
    for arguments in ([], ["--vocab_size", "300", "--tokenizer", "x.model"], ["--tokenizer", "x.model"]):
        result = run(tmp_path, "--input", "c.txt", "--output", "c", *arguments)
        assert result.returncode == 2
        assert "error: " in result.stderr and "Traceback" not in result.stderr


def test_the_summary_is_printed(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("\n\n".join(make_documents(50)))
    (tmp_path / "d.jsonl").write_bytes(good(20))
    arguments = ["--output", "c", "--vocab_size", "400", "--valid_fraction", "0.1", "--workers", "2"]
    result = run(tmp_path, "--input", "c.txt", "d.jsonl", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "c_train: 63 documents" in result.stdout and "c_valid: 7 documents" in result.stdout
    assert re.search(r"bytes per token: \d\.\d+\n", result.stdout)
    entropy = re.search(r"unigram entropy of the training tokens: (\d\.\d+) nats/token", result.stdout)
    assert entropy and 3 < float(entropy[1]) < 6


def start_long_run(directory: Path, model: Path) -> Program:
    """A preparation that takes a while."""
    (directory / "c.txt").write_text("\n\n".join(make_documents(1000) * 30))
    arguments = ["--input", "c.txt", "--output", "c", "--tokenizer", str(model), "--workers", "2"]
    return Program([SCRIPT, *arguments], ENVIRONMENT, directory)


def wait_until_it_writes(process: Program, directory: Path, what: str) -> None:
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in directory.glob(f".c.*.partial/contents/{what}")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code", "when"),
    [(signal.SIGINT, 130, "train.bin"), (signal.SIGTERM, 143, "model"), (signal.SIGHUP, 129, "train.bin")],
)
def test_a_signal_leaves_nothing(tmp_path: Path, model: Path, number: int, code: int, when: str) -> None:
    process = start_long_run(tmp_path, model)
    wait_until_it_writes(process, tmp_path, when)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.txt"]


def test_a_signal_that_another_thread_gets_waits_until_a_worker_has_been_started() -> None:
    class Asked(Exception):
        pass

    def ask(number: int, frame: object) -> None:
        raise Asked

    done, before = threading.Event(), signal.signal(signal.SIGTERM, ask)
    other = threading.Thread(target=done.wait)
    other.start()  # signals are not blocked in it, as in the threads of numerical libraries
    reached = False
    try:
        with pytest.raises(Asked), encoding._signals_held():
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # Python calls handlers between instructions
                time.sleep(0)
            reached = True
    finally:
        done.set()
        other.join()
        signal.signal(signal.SIGTERM, before)
    assert reached


def test_what_a_killed_run_leaves_is_removed_at_the_next_start_and_a_live_one_is_not(
    tmp_path: Path, model: Path
) -> None:
    live = start_long_run(tmp_path, model)
    try:
        wait_until_it_writes(live, tmp_path, "train.bin")
        live.send_signal(signal.SIGSTOP)  # it holds its folder, and does not finish meanwhile
        (living,) = tmp_path.glob(".c.*.partial")
        killed = start_long_run(tmp_path, model)
        while len(list(tmp_path.glob(".c.*.partial/contents/train.bin"))) < 2:
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
        killed.communicate(timeout=30)
        (dead,) = set(tmp_path.glob(".c.*.partial")) - {living}
        (tmp_path / "small.txt").write_text("one\n\ntwo")
        arguments = ["--input", "small.txt", "--output", "c", "--tokenizer", str(model), "--workers", "1"]
        result = run(tmp_path, *arguments)
        assert result.returncode == 0, result.stderr
        assert result.stderr == f"removed {dead.name}, which process {killed.pid} left unfinished\n"
        assert [p.name for p in tmp_path.glob(".c.*.partial")] == [living.name]
    finally:
        live.kill()
        live.communicate(timeout=30)


def test_one_run_reports_everything_that_a_corpus_from_the_world_has(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"Sentence number {n} of a small corpus."}) for n in range(1, 1001)]
    for number, line in {10: "", 20: "   ", 40: '{"text": null}', 50: '["a"]', 60: '{"text": "cut'}.items():
        lines[number - 1] = line
    lines[0] = lines[29] = '{"text": ""}'
    (tmp_path / "bad.jsonl").write_bytes(codecs.BOM_UTF8 + "\r\n".join(lines).encode())
    arguments = ["--input", "bad.jsonl", "--output", "bad", "--vocab_size", "300", "--workers", "1"]
    result = run(tmp_path, *arguments)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    notes = [
        "2 blank lines were skipped (bad.jsonl, line 10; bad.jsonl, line 20)",
        "2 documents without text were skipped (bad.jsonl, line 1; bad.jsonl, line 30)",
    ]
    assert re.fullmatch(
        r"error: 1 line is invalid JSON \(bad\.jsonl, line 60: [^)]*\)\): write one JSON object per line; "
        r"1 line holds no JSON object \(bad\.jsonl, line 50: it holds an array\): write one JSON object per line; "
        r"1 text is no string \(bad\.jsonl, line 40: 'text' is null\): make it a string; "
        r"or drop what is defective with --on_error skip "
        rf"\(also found: {re.escape('; '.join(notes))}\)\n",
        result.stderr,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]

    result = run(tmp_path, *arguments, "--on_error", "skip")
    assert (result.returncode, result.stderr) == (0, "")
    found = result.stdout.splitlines()
    assert [line[:40] for line in found[:3]] == [
        "dropped: 1 line is invalid JSON (bad.jso",
        "dropped: 1 line holds no JSON object (ba",
        "dropped: 1 text is no string (bad.jsonl,",
    ]
    assert found[3:5] == notes
    assert found[6].startswith("bad_train: 983 documents, ") and found[7].startswith("bad_valid: 10 documents, ")


def test_all_bad_inputs_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("fine\n\ntext\n")
    (tmp_path / "table.csv").write_text("id,text\n1,one\n")
    (tmp_path / "list.json").write_text('[\n {"text": "a"},\n {"text": "b"}\n]\n')
    (tmp_path / "cut.jsonl").write_bytes(good(2) + b'{"text": "on')
    names = ["nowhere.txt", "good.txt", "table.csv", "list.json", "cut.jsonl"]
    result = run(tmp_path, "--input", *names, "--output", "c", "--vocab_size", "280", "--workers", "1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: 1 input cannot be opened (nowhere.txt: does not exist: ")
    for part in (
        "; 2 files have formats that are not read (table.csv: it is a table ('id,text'): ",
        "; list.json: it looks like one JSON array",
        "; 1 line is invalid JSON (cut.jsonl, line 3: ",
    ):
        assert part in result.stderr
    assert "--on_error" not in result.stderr  # it would not help against a missing file
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])


def test_an_input_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "c_train.stamp.json").write_bytes(good(5))
    result = run(tmp_path, "--input", "c_train.stamp.json", "--output", "c", "--vocab_size", "280")
    assert result.returncode == 2
    assert "input c_train.stamp.json is also the output file c_train.stamp.json: choose another prefix" in result.stderr
