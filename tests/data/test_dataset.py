"""Samples are a function of (seed, source, k), epochs are permutations, ranks open them together."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megamult.data.dataset import BlendedDataset
from megamult.distributed import environment
from tests.data.conftest import SEQ, StubTokenizer, distinct_ids, of, same_lengths, window

Write = Callable[..., str]


TWO = [("one", 10, 3.0), ("two", 1000, 1.0)]  # name, first token id, weight


def test_each_epoch_has_each_token_once_and_is_shuffled_anew(write_indexed: Write, make: Callable) -> None:
    documents = distinct_ids(0, seed=1)  # ids 0, 1 and 2 too: none is taken for padding
    ids = [i for d in documents for i in d]
    follows = {a: b for d in documents for a, b in itertools.pairwise(d)}
    dataset = make(write_indexed("a", documents))
    (per_epoch,) = dataset.samples_per_epoch
    assert per_epoch == (len(ids) - 1) // SEQ
    epochs = []
    for epoch in range(3):
        windows = [window(dataset[epoch * per_epoch + k]) for k in range(per_epoch)]
        tokens = [i for w in windows for i in w[:-1]]
        assert len(set(tokens)) == len(tokens) == per_epoch * SEQ
        assert set(tokens) <= set(ids)
        # Inside a document the text's order is kept.
        pairs = [p for w in windows for p in itertools.pairwise(w)]
        assert all(b == follows[a] for a, b in pairs if a in follows)
        epochs.append(windows)
    firsts = [[w[0] for w in windows] for windows in epochs]
    assert len({tuple(f) for f in firsts}) == 3
    # Documents are reordered as well, so windows are cut elsewhere.
    assert sorted(firsts[0]) != sorted(firsts[1])
    # Within an epoch samples are shuffled: they do not just follow the documents' order.
    ends = [w[-1] for w in epochs[0]]
    assert sum(a == b for a, b in zip(ends, firsts[0][1:], strict=False)) < per_epoch // 2


def test_a_sample_does_not_depend_on_what_else_is_asked(write_indexed: Write, make: Callable) -> None:
    a, b = write_indexed("a", distinct_ids(0, 1)), write_indexed("b", distinct_ids(5000, 2))
    alone = make(a)
    (per_epoch,) = alone.samples_per_epoch
    expected = [window(alone[k]) for k in range(3 * per_epoch)]
    backwards = make(a, cache_dir=f"{a}_cache")
    assert [window(backwards[k]) for k in reversed(range(3 * per_epoch))] == expected[::-1]
    for weights in ((1.0, 1.0), (0.9, 0.2)):
        blended, seen = make((a, weights[0]), (b, weights[1])), 0
        for i in range(3 * per_epoch):
            source, k = blended.blend.locate(i)
            if source == 0:
                assert k == seen and window(blended[i]) == expected[k]
                seen += 1
            else:
                assert min(window(blended[i])) >= 5000
        assert abs(seen - 3 * per_epoch * weights[0] / sum(weights)) <= 2


def test_seed_and_position_give_other_orders(write_indexed: Write, make: Callable) -> None:
    a = write_indexed("a", distinct_ids(0, 1))
    orders = [[window(make(a, seed=s)[k]) for k in range(5)] for s in (7, 8, -1, 2**63)]
    twice = make(a, a)
    orders.append([window(twice[i]) for i in range(20) if twice.blend.locate(i)[0] == 1][:5])
    assert len({str(order) for order in orders}) == len(orders)


def test_prepare_opens_on_rank_0_first_and_keeps_what_is_in_use(
    write_indexed: Write, make: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a = write_indexed("a", distinct_ids(0, 1))
    rank, reached = 1, []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: rank)
    monkeypatch.setattr(environment, "rank", lambda: rank)
    leader, follower = make(a), make(a)
    (per_epoch,) = leader.samples_per_epoch

    def barrier() -> None:
        # Rank 1 has built nothing when it arrives; meanwhile rank 0 builds.
        nonlocal rank
        reached.append(len(list(tmp_path.glob("cache/*/epoch_*"))))
        rank = 0
        leader.prepare(first, last)
        rank = 1

    for first, last, built in [
        (0, 4, [0]),
        (4, per_epoch, []),
        (per_epoch - 1, per_epoch + 1, [1]),
        (per_epoch + 1, per_epoch + 3, []),
        (5 * per_epoch, 5 * per_epoch + 1, [2]),
    ]:
        reached.clear()
        follower.prepare(first, last, barrier)
        assert reached == built
        for i in range(first, last):
            assert window(follower[i]) == window(leader[i])
        used = {i // per_epoch for i in range(first, last)}
        assert set(follower._sources[0]._epochs) == used


def test_an_index_that_rank_0_did_not_share_is_named(
    write_indexed: Write, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 3)
    monkeypatch.setattr(environment, "rank", lambda: 3)
    monkeypatch.setattr("megamult.data.source._SHARED_FILES_SECONDS", 0)
    with pytest.raises(RuntimeError, match=r"rank 3 does not see .* file system that all nodes share"):
        make(write_indexed("a", distinct_ids(0, 1))).prepare(0, 4, lambda: None)


def test_a_killed_build_leaves_no_index_behind(
    write_indexed: Write, make: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a = write_indexed("a", distinct_ids(0, 1))
    save = np.save

    def killed(path: str, array: np.ndarray, **options: object) -> None:
        save(path, array, **options)
        if "shuffle" in str(path):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            make(a)[0]
    assert not list(tmp_path.glob("cache/*/epoch_*"))
    assert window(make(a)[0]) == window(make(a, cache_dir=tmp_path / "other")[0])


def test_an_index_that_another_version_has_written_is_written_anew(
    write_indexed: Write, make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_indexed("a", distinct_ids(0, 1))
    wanted = of(make(a), range(10))

    def spoil() -> None:
        for file in tmp_path.glob("cache/*/epoch_0/*"):
            file.rename(file.with_name("of_another_version_" + file.name))

    spoil()
    assert of(make(a), range(10)) == wanted
    spoil()
    monkeypatch.setattr(environment, "world_size", lambda: 2)  # another rank may have these files open
    with pytest.raises(ValueError, match=r"index files in .*epoch_0 are those of another version: remove"):
        make(a)[0]


def test_a_corpus_prepared_anew_does_not_meet_the_old_index(write_indexed: Write, make: Callable) -> None:
    for seed in (1, 2):
        dataset = make(write_indexed("a", distinct_ids(0, seed)))
        windows = [window(dataset[k]) for k in range(dataset.samples_per_epoch[0])]
        assert len({i for w in windows for i in w[:-1]}) == SEQ * len(windows)


def test_no_output_from_megatron(
    write_indexed: Write, make: Callable, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    make(write_indexed("a", distinct_ids(0, 1)))[0]
    assert not [r for r in caplog.records if r.name.startswith("megatron")]
    assert capfd.readouterr() == ("", "")


def test_mistakes_are_named(write_indexed: Write, make: Callable) -> None:
    with pytest.raises(ValueError, match=r"short has 8 tokens, but one sample takes 9"):
        make(write_indexed("short", [[1] * 5, [1] * 3]))
    assert make(write_indexed("enough", [[1] * 5, [1] * 4])).samples_per_epoch == [1]
    good = write_indexed("good", [[1] * 50])
    with pytest.raises(ValueError, match="weight of data source 1 is 0"):
        make(good, (good, 0))
    with pytest.raises(ValueError, match="seq_length is 0"):
        make(good, seq_length=0)
    with pytest.raises(ValueError, match=r"nowhere\.idx does not exist"):
        make("nowhere")
    for wrong in (100, -1):  # -1 is what Megatron pads with
        dataset = make(write_indexed("w", [[5] * 8 + [wrong]], np.int32), tokenizer=StubTokenizer(vocab_size=100))
        with pytest.raises(ValueError, match=rf"w, sample 0: token id {wrong} is outside the vocabulary of 100"):
            dataset[0]
    with pytest.raises(IndexError):
        make(good)[-1]


def test_a_run_goes_on_with_the_next_sample_of_every_source(write_indexed: Write, make: Callable) -> None:
    sources = [(write_indexed(name, distinct_ids(start, start)), weight) for name, start, weight in TWO]
    dataset = make(*sources)
    again = make(*sources)
    again.load_state_dict(dataset.state_dict(), 13)
    for i in range(13, 40):
        assert window(again[i]) == window(dataset[i]), i


def test_after_a_change_of_the_blend_every_source_goes_on_where_it_was(write_indexed: Write, make: Callable) -> None:
    """Sample k of a source is a function of seed, source and k alone: what a blend takes is k = 0, 1, 2 ... of each."""
    (a, _), (b, _) = sources = [(write_indexed(n, distinct_ids(start, start)), weight) for n, start, weight in TWO]
    third = write_indexed("third", distinct_ids(3000, 5))
    alone = {prefix: make(prefix) for prefix in (a, b, third)}
    taken = dict.fromkeys(alone, 0)

    def check(dataset: BlendedDataset, first: int, last: int) -> None:
        for i in range(first, last):
            found = window(dataset[i])
            source = a if found[0] < 1000 else b if found[0] < 3000 else third
            assert found == window(alone[source][taken[source]]), (i, source)
            taken[source] += 1

    one = make(*sources)
    check(one, 0, 17)
    two = make((third, 2.0), (a, 1.0))  # b is left out for a while
    two.load_state_dict(one.state_dict(), 17)
    check(two, 17, 30)
    three = make((b, 1.0), (third, 1.0), (a, 3.0))
    three.load_state_dict(json.loads(json.dumps(two.state_dict())), 30)
    check(three, 30, 41)
    four = make((b, 1.0), (third, 1.0), (a, 3.0))
    four.load_state_dict(three.state_dict(), 41)
    check(four, 41, 60)
    assert min(taken.values()) > 8, taken


def test_corpora_of_equal_lengths_that_swap_places_go_on_each_with_its_own_samples(
    write_indexed: Write, make: Callable
) -> None:
    a, b = write_indexed("a", same_lengths(0)), write_indexed("b", same_lengths(5000))
    first = make((a, 3.0), (b, 1.0))
    before = of(first, range(20))
    straight = of(first, range(20, 60))
    swapped = make((b, 1.0), (a, 3.0))
    notes = swapped.load_state_dict(json.loads(json.dumps(first.state_dict())), 20)
    after = of(swapped, range(20, 60))
    for mine in (lambda w: w[0] < 5000, lambda w: w[0] >= 5000):
        ours, theirs = list(filter(mine, after)), list(filter(mine, straight))
        n = min(len(ours), len(theirs))
        assert n > 8 and ours[:n] == theirs[:n]
        assert not [w for w in ours if w in before]
    assert notes == []


def test_another_corpus_under_a_known_name_is_a_new_source_and_that_is_said(
    write_indexed: Write, make: Callable
) -> None:
    a = write_indexed("a", same_lengths(0))
    first = make(a)
    state = json.loads(json.dumps(first.state_dict()))
    write_indexed("a", same_lengths(5000))
    other = make(a)
    assert other.load_state_dict(state, 7) == [
        f"data source {a} is new to this run and begins with its first sample",
        "1 of the 1 data sources that the run had are not in its blend any more",
    ]
    write_indexed("a", same_lengths(0))
    back = make(a)
    back.load_state_dict(json.loads(json.dumps(other.state_dict())), 9)
    assert window(back[9]) == window(make(a)[7])  # seven of its samples were taken before it left


def test_a_checkpoint_without_digests_of_tokens_goes_on_with_the_same_samples(
    write_indexed: Write, make: Callable
) -> None:
    sources = [(write_indexed("a", same_lengths(0)), 3.0), (write_indexed("b", same_lengths(5000)), 1.0)]
    first = make(*sources)
    old = {key: value for key, value in first.state_dict().items() if key != "contents"}
    again = make(*sources)
    (note,) = again.load_state_dict(json.loads(json.dumps(old)), 13)
    assert note.startswith("the checkpoint holds no digests of the tokens")
    assert of(again, range(13, 50)) == of(first, range(13, 50))
    assert again.state_dict()["contents"] == first.state_dict()["contents"] != {}


def test_the_order_of_samples_is_that_of_older_versions(write_indexed: Write, make: Callable) -> None:
    """Drawn by the code of version 0.1.0: a run of that time has the same losses today."""
    a, b = write_indexed("a", distinct_ids(0, 1)), write_indexed("b", same_lengths(5000))
    found = [window(make(a, b, b)[i])[0] for i in range(0, 120, 7)]
    assert found == [92, 5290, 5262, 198, 5192, 5216, 240, 5324, 5356, 165, 5114, 5068, 61, 5280, 5234, 138, 5066, 5140]


def test_one_with_more_documents_than_megatron_numbers_is_refused(
    write_indexed: Write, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megamult.data.source.MOST_DOCUMENTS", 29)
    with pytest.raises(
        ValueError, match=r"a has 30 documents, but Megatron's sample index has numbers for only 29: prepare"
    ):
        make(write_indexed("a", distinct_ids(0, 1)))


def test_a_file_that_is_cut_off_meanwhile_is_an_error(write_indexed: Write, make: Callable) -> None:
    """Not SIGBUS, which a mapped file gives, and which kills the process without a word."""
    prefix = write_indexed("a", [list(range(40))] * 500)
    dataset = make(prefix)
    dataset.prepare(0, dataset.samples_per_epoch[0])
    os.truncate(f"{prefix}.bin", 4096)
    with pytest.raises(
        ValueError, match=r"a\.bin has 4096 bytes, and the run reads up to byte \d+, so the file has been cut off"
    ):
        of(dataset, range(dataset.samples_per_epoch[0]))
