"""Opening of a run's tokenizer and corpora. One rank of each node checks a share of the corpora."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from megamult.config import Config
from megamult.data.config import DataConfig
from megamult.data.dataset import BlendedDataset
from megamult.data.described import Described, check_ends, describe_all, others_here, unchecked, validate_all
from megamult.data.skip import NOTHING, Skip
from megamult.data.token_ids import TokenIds
from megamult.data.tokenizer import Tokenizer
from megamult.data.tokenizer_kinds import open_tokenizer
from megamult.data.validation_set import ValidationSet
from megamult.distributed import environment
from megamult.distributed.mesh import Mesh
from megamult.train.command_line import agreed


def vocabulary(config: Config) -> tuple[Tokenizer, int]:
    """Open the tokenizer, and return it and the model's vocabulary size.

    Raises:
        ValueError: there is no tokenizer, or it does not fit model.vocab_size.
    """
    given, size, eod = config.data.tokenizer, config.model.vocab_size, config.data.eod
    if given is None:
        if size is None or not isinstance(eod, int):
            raise ValueError(
                f"data.tokenizer is not set, with model.vocab_size {size} and data.eod {eod!r}: give the tokenizer "
                "that the corpora were encoded with (launch/prepare_data.py writes it beside them), or, for corpora "
                "without a tokenizer, model.vocab_size and data.eod, the id of the token that ends a document"
            )
        return TokenIds(size, eod), size
    tokenizer = open_tokenizer(given, eod)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size is {vocab_size} and the tokenizer {config.data.tokenizer} has "
            f"{tokenizer.vocab_size} tokens: leave vocab_size null, or set it to at least the number of tokens"
        )
    return tokenizer, vocab_size


def open_datasets(
    config: Config, tokenizer: Tokenizer, run_dir: Path, mesh: Mesh, note: Callable[[int], None] = lambda pieces: None
) -> tuple[BlendedDataset, dict[str, ValidationSet]]:
    """Open the samples of data.train and the validation sets of data.valid by their names. Collective over all ranks:
    if one rank finds a user's mistake, all ranks exit.

    One rank of each node reads headers, sizes and a few blocks of the files of its share of the sources, and tells all
    ranks what it has found. A node with other files, such as copies on its own disk, reads all of them, and compares.
    If data.validate is full, every rank then reads its share of all bytes.

    Args:
        mesh: mesh of the processes.
        note: function that is called every few seconds with the number of pieces of files that this rank has checked.
    """
    sources, sets = DataConfig.sources(config.data.train), config.data.validation_sets()
    prefixes = list(dict.fromkeys(prefix for blend in (sources, *sets.values()) for prefix, _ in blend))

    def check(some: Sequence[str]) -> dict[str, Described]:
        if not sources:
            raise ValueError("data.train is not set: give a prefix that launch/prepare_data.py wrote (PREFIX_train)")
        found = describe_all(some, tokenizer)
        if config.data.document_mask:
            check_ends(list(found.values()), tokenizer.eod)
        return found

    described = _described(mesh, prefixes, check)
    full = config.data.validate == "full"
    if full:
        share = (environment.rank(), environment.world_size())
        agreed(mesh, lambda: validate_all(prefixes, tokenizer, share, note))
    doubt = unchecked(list(described.values()), full)
    if doubt is not None and environment.rank() == 0:
        print(f"note: {doubt}", flush=True)

    def opened(blend: list[tuple[str, float]], cache: str, skip: Skip = NOTHING) -> BlendedDataset:
        length, seed = config.model.seq_length, config.train.seed
        return BlendedDataset(blend, tokenizer, length, seed, run_dir / "cache" / cache, skip, described)

    batches = config.train.eval_batches
    limit = None if batches is None else batches * config.train.global_batch_size
    return agreed(
        mesh,
        lambda: (
            opened(sources, "train", Skip.of(config.data.skip)),
            # Sets may share a folder: the folders in it are named by sources.
            {name: ValidationSet(opened(blend, "valid"), limit) for name, blend in sets.items()},
        ),
    )


def _described(
    mesh: Mesh, prefixes: Sequence[str], check: Callable[[Sequence[str]], dict[str, Described]]
) -> dict[str, Described]:
    """Describe all sources. Collective over all ranks: if one rank finds a user's mistake, all ranks exit.

    Args:
        check: function that describes some of the sources from their files.
    """
    reads = environment.local_rank() == 0
    here = mesh.gather_objects((mesh.rank, environment.host()) if reads else None)
    hosts = dict(each for each in cast(list[tuple[int, str] | None], here) if each is not None)
    describers = dict(zip(prefixes, itertools.cycle(hosts)))
    mine = [prefix for prefix, rank in describers.items() if rank == mesh.rank]

    def look() -> tuple[dict[str, Described], str | None]:
        try:
            return (check(mine) if reads else {}), None
        except ValueError as error:
            return {}, str(error)  # one message, below, has the mistakes of all shares

    found = cast(list[tuple[dict[str, Described], str | None]], mesh.gather_objects(agreed(mesh, look)))
    described = {prefix: each for some, _ in found for prefix, each in some.items()}

    def compare() -> None:
        mistakes = [mistake for _, mistake in found if mistake is not None]
        if mistakes:
            raise ValueError("; ".join(dict.fromkeys(mistakes)))
        if not reads:
            return
        others = others_here({prefix: each for prefix, each in described.items() if describers[prefix] != mesh.rank})
        different = [prefix for prefix, each in check(others).items() if each != described[prefix]]
        if different:
            theirs = ", ".join(dict.fromkeys(hosts[describers[prefix]] for prefix in different[:3]))
            raise ValueError(
                f"{environment.host()} has other files than {theirs} under {', '.join(different[:3])} "
                f"({len(different)} data sources differ): put the data on a file system that all nodes share, or copy "
                "it again"
            )

    agreed(mesh, compare)
    return {prefix: described[prefix] for prefix in prefixes}
