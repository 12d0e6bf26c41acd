"""Opening of a run's tokenizer and corpora. One rank of each node checks the corpora, then all ranks open them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megamult.config import Config
from megamult.data.config import DataConfig
from megamult.data.dataset import BlendedDataset
from megamult.data.described import Described, check_ends, describe_all, unchecked, validate_all
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

    One rank of each node reads headers, sizes, time stamps and a few bytes of the files. Rank 0 sends its findings to
    all ranks, and the reading rank of each node compares them with its own findings. If data.validate is full, every
    rank then reads its share of all bytes.

    Args:
        mesh: mesh of the processes.
        note: function that is called every few seconds with the number of pieces of files that this rank has checked.
    """
    sources, sets = DataConfig.sources(config.data.train), config.data.validation_sets()
    prefixes = list(dict.fromkeys(prefix for blend in (sources, *sets.values()) for prefix, _ in blend))

    def look() -> dict[str, Described] | None:
        if not sources:
            raise ValueError("data.train is not set: give a prefix that launch/prepare_data.py wrote (PREFIX_train)")
        if environment.local_rank() != 0:
            return None
        found = describe_all(prefixes, tokenizer)
        if config.data.document_mask:
            check_ends(list(found.values()), tokenizer.eod)
        return found

    mine = agreed(mesh, look)
    sent: list[Any] = [mine]
    mesh.broadcast_objects(sent)
    described = sent[0]
    assert described is not None
    agreed(mesh, lambda: _check_same(mine, described))
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


def _check_same(mine: Mapping[str, Described] | None, described: Mapping[str, Described]) -> None:
    """Check that this node has the same files as rank 0's node.

    Args:
        mine: findings of this rank, or None if another rank of the node has read the files.
        described: findings of rank 0.

    Raises:
        ValueError: the findings differ.
    """
    different = [prefix for prefix, found in (mine or {}).items() if found != described[prefix]]
    if different:
        raise ValueError(
            f"{environment.host()} has other files than rank 0's host under {', '.join(different[:3])} "
            f"({len(different)} data sources differ): put the data on a file system that all nodes share, or copy it "
            "again"
        )
