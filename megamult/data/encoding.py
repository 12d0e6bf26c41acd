"""Encoding of documents to token ids by several processes, in order, with a bounded amount of text in memory.

Worker processes import this file. So it must not import torch or Megatron, which take seconds to load.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np

from megamult.data.documents import Document
from megamult.data.passages import Passage, cut
from megamult.data.tokenizer import Tokenizer

_BATCH_CHARS = 1 << 18
_worker_tokenizer: Tokenizer | None = None


def encode_passage(passage: Passage, tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids of a passage, int32[tokens]. The end-of-document token follows the document's last passage.

    Raises:
        ValueError: the text cannot be encoded, or its ids decode to another text, so that training would lose part of
            it.
    """
    try:
        ids = tokenizer.encode(passage.text)
    except ValueError as error:
        raise ValueError(f"{passage.place}: {error}") from None
    decoded = tokenizer.decode(ids)
    if decoded != passage.text:
        pairs = zip(decoded, passage.text, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(decoded), len(passage.text)))
        raise ValueError(
            f"{passage.place}: the tokenizer {tokenizer.model_path} does not keep the text (from character "
            f"{passage.start + at} of the document on, {passage.text[at : at + 20]!r} is decoded as "
            f"{decoded[at : at + 20]!r}): use a model with identity normalization and byte fallback, or let "
            "launch/prepare_data.py train one"
        )
    return np.array([*ids, tokenizer.eod] if passage.last else ids, dtype=np.int32)


def encode_in_order(
    documents: Iterable[Document], model_path: str | Path, workers: int
) -> Generator[tuple[np.ndarray, bool], None, None]:
    """Yield the ids of each passage of each document, and whether the passage is the document's last one.

    They come in the order of `documents`, whatever the number of processes.

    Raises:
        ValueError: the ids of a document do not decode to its text (see `encode_passage`).
    """
    tokenizer = Tokenizer(model_path)
    passages = cut(documents, tokenizer)
    if workers == 1:
        for passage in passages:
            yield encode_passage(passage, tokenizer), passage.last
        return
    resource_tracker.ensure_running()  # start it before signals are held below: its start would unblock them
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(str(model_path),)
    )
    pending: collections.deque[Future[list[tuple[np.ndarray, bool]]]] = collections.deque()
    try:
        for batch in _batches(passages):
            with _signals_held():
                pending.append(pool.submit(_encode_batch, batch))
            if len(pending) > 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    size = 0
    for passage in passages:
        batch.append(passage)
        size += len(passage.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back the signals that end the program, until the context is left.

    `submit` may start a worker. If a signal's exception interrupted `submit` before the worker had been sent its
    arguments, the worker would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(model_path: str) -> None:
    global _worker_tokenizer
    # Ctrl-C and a hang-up of the terminal reach the whole process group. Only the parent acts on them and cleans up.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # These signals are blocked here, because a worker inherits the mask of `_signals_held`.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker_tokenizer = Tokenizer(model_path)


def _die_with_parent() -> None:
    # A killed parent cannot shut its pool down. Without this thread, the workers would then wait for work forever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_batch(batch: list[Passage]) -> list[tuple[np.ndarray, bool]]:
    assert _worker_tokenizer is not None
    return [(encode_passage(passage, _worker_tokenizer), passage.last) for passage in batch]
