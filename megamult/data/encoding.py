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
from typing import Any, NamedTuple

import numpy as np

from megamult.data.documents import Document
from megamult.data.passages import Passage, cut
from megamult.data.tokenizer import Tokenizer
from megamult.data.tokenizer_kinds import open_tokenizer

_BATCH_CHARS = 1 << 18
_worker_tokenizer: Tokenizer | None = None


class Encoded(NamedTuple):
    """Token ids of a passage."""

    ids: np.ndarray
    """Ids of the text, int32[tokens]. The end-of-document token follows the document's last passage."""
    changed: str | None
    """Description of the place where the text of the ids begins to differ from the passage's, or None if it is the
    same."""
    last: bool
    """Whether the passage is the document's last one."""


def encode_passage(passage: Passage, tokenizer: Tokenizer) -> Encoded:
    """Encode a passage.

    Raises:
        ValueError: the text cannot be encoded.
    """
    text = passage.text
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"{passage.place}: {error}") from None
    decoded, changed = tokenizer.decode(ids), None
    if decoded != text:
        pairs = zip(decoded, text, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(decoded), len(text)))
        changed = (
            f"{passage.place}, from character {passage.start + at} on, {text[at : at + 20]!r} is decoded as "
            f"{decoded[at : at + 20]!r}"
        )
    return Encoded(np.array([*ids, tokenizer.eod] if passage.last else ids, dtype=np.int32), changed, passage.last)


def encode_in_order(
    documents: Iterable[Document], path: str | Path, eod: int | str | None, workers: int
) -> Generator[Encoded, None, None]:
    """Yield the ids of each passage of each document, in order, whatever the number of processes.

    Args:
        documents: the documents.
        path, eod: arguments of :func:`megamult.data.tokenizer_kinds.open_tokenizer`.
        workers: number of processes.

    Raises:
        ValueError: a document cannot be encoded.
    """
    tokenizer = open_tokenizer(path, eod)
    passages = cut(documents, tokenizer)
    if workers == 1:
        for passage in passages:
            yield encode_passage(passage, tokenizer)
        return
    resource_tracker.ensure_running()  # start it before signals are held below: its start would unblock them
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(str(path), eod)
    )
    pending: collections.deque[Future[list[Encoded]]] = collections.deque()
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
    arguments, the worker would print a traceback. The mask holds back signals from this thread, and workers inherit it.
    The kernel may give a signal to another thread, such as one of a numerical library. Python then calls the handler in
    the main thread all the same, so handlers are replaced too.
    """
    received: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                if callable(handler := signal.getsignal(number)):
                    handlers[number] = handler
                    signal.signal(number, lambda number, _: received.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for first in received[:1]:
            signal.raise_signal(first)


def _start_worker(path: str, eod: int | str | None) -> None:
    global _worker_tokenizer
    # Ctrl-C and a hang-up of the terminal reach the whole process group. Only the parent acts on them and cleans up.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # These signals are blocked here, because a worker inherits the mask of `_signals_held`.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker_tokenizer = open_tokenizer(path, eod)


def _die_with_parent() -> None:
    # A killed parent cannot shut its pool down. Without this thread, the workers would then wait for work forever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_batch(batch: list[Passage]) -> list[Encoded]:
    assert _worker_tokenizer is not None
    return [encode_passage(passage, _worker_tokenizer) for passage in batch]
