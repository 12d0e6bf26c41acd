"""Prepare a corpus: text, JSON lines or Parquet -> tokenizer, indexed train set and indexed valid set."""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures.process import BrokenProcessPool

from megamult.data.corpus import prepare_corpus
from megamult.runtime.console import whole_or_nothing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Writes PREFIX_{train,valid}.{bin,idx,stamp.json} and the tokenizer, PREFIX.model or the directory "
        "PREFIX_tokenizer; on an error it writes nothing.",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="INPUT",
        help="files, folders (all files below them, in sorted order, except hidden ones and earlier outputs) or quoted "
        "patterns such as 'data/*.jsonl.gz'. A file holds Parquet, with one document per row, or JSON lines, with one "
        "document per line, or UTF-8 text, with one document per block between blank lines. JSON lines and text may be "
        "compressed with gzip, zstd, bzip2 or xz. The content decides; the name counts only where the content leaves a "
        "doubt",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="prefix of the files to write")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--vocab_size", type=int, metavar="N", help="train a tokenizer of N tokens on this corpus")
    tokenizer.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="use this tokenizer: a sentencepiece model, a tokenizer.json, or the directory of one of them",
    )
    parser.add_argument(
        "--eod",
        metavar="TOKEN",
        help="token that ends a document, as text or as id (default: the one that the tokenizer's files call eos)",
    )
    parser.add_argument(
        "--valid_fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="fraction of documents held out (default 0.01)",
    )
    parser.add_argument(
        "--json_key",
        default="text",
        metavar="KEY",
        help="name of the field of a JSON line, or of the column of a Parquet file, that holds the text (default text)",
    )
    parser.add_argument(
        "--on_error",
        choices=["fail", "skip"],
        default="fail",
        help="what to do with lines, rows and files that cannot be read: 'fail' (default) reports all of them and "
        "writes nothing, 'skip' drops and counts them. Blank lines and documents without text are skipped and counted "
        "either way",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        metavar="N",
        help="number of encoding processes; it does not change the result (default: number of usable cores)",
    )
    return parser


def main() -> None:
    """Run the command line. The exit code is 0 on success, 2 for a user's mistake and 130 for Ctrl-C."""
    args = _parser().parse_args()
    with whole_or_nothing():
        try:
            summary = prepare_corpus(
                args.input,
                args.output,
                vocab_size=args.vocab_size,
                tokenizer=args.tokenizer,
                valid_fraction=args.valid_fraction,
                json_key=args.json_key,
                workers=args.workers,
                on_error=args.on_error,
                eod=int(args.eod) if args.eod is not None and args.eod.isdecimal() else args.eod,
            )
        except BrokenProcessPool:
            raise ValueError("an encoding process died, perhaps out of memory: try fewer --workers") from None
    if summary.first_change is not None:
        documents = summary.train_documents + summary.valid_documents
        print(
            f"warning: the tokenizer changes the text of {summary.changed} of {documents} documents, and a model can "
            f"learn only what it keeps; the first: {summary.first_change}",
            file=sys.stderr,
        )
    lines = [
        *summary.report.lines(),
        f"{summary.tokenizer}: {summary.vocab_size} tokens in the vocabulary",
        f"{args.output}_train: {summary.train_documents} documents, {summary.train_tokens} tokens",
    ]
    if summary.valid_documents:
        lines.append(f"{args.output}_valid: {summary.valid_documents} documents, {summary.valid_tokens} tokens")
    lines.append(f"bytes per token: {summary.bytes_per_token:.4f}")
    lines.append(f"unigram entropy of the training tokens: {summary.unigram_entropy:.4f} nats/token")
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # Nobody reads on, as with `| head -1`. The corpus is written all the same, so this is no failure. Python would
        # write the rest at its end, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
