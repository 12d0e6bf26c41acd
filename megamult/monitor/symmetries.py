"""Imbalance of pairs of multipliers of which only the product matters (arXiv 2601.04890).

A symmetry of the model is that such a pair (a, b) may become (t a, b / t) without any change of the model's output. The
imbalance of a pair is ln|a| - ln|b|. It is 0 if both multipliers start at 1, and changes when they drift along the
symmetry. A symmetry has many pairs, for example one for each i: the multipliers of row i of W_up and
column i of W_down. The mean and the standard deviation of the imbalances of these pairs are recorded.

Pure functions, without I/O or communication.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

from torch import Tensor

Logs = Callable[[str, str], Tensor | None]
"""Function (role, side) -> ln|multiplier| of each row or column of a layer's matrix, scalar included, or None if that
side has no multipliers."""

Pairs = tuple[Tensor, Tensor]
"""ln|a| and ln|b| of all pairs (a, b) of one symmetry."""


def query_key(query: Tensor, key: Tensor, head_dim: int) -> Pairs:
    """Return ln|a| and ln|b| of factors a of W_Q and b of W_K of which only the product matters.

    a and b are vectors [groups * head_dim / 2], with one element for every two rows i and i + head_dim / 2 of a key
    head, because rotary positions turn these two rows together. All query heads of a group meet the same key head, so
    an element of a scales the same two rows in all of them. ln|b| is the mean of ln|multiplier| over the two rows of
    the key head, and ln|a| the mean over the two rows of all query heads of its group.

    Args:
        query: [heads * head_dim] ln|row multiplier| of W_Q.
        key: [groups * head_dim] ln|row multiplier| of W_K.
        head_dim: rows of one head.
    """
    half = head_dim // 2
    groups = len(key) // head_dim
    of_query = query.reshape(groups, -1, 2, half).mean((1, 2))
    return of_query.flatten(), key.reshape(groups, 2, half).mean(1).flatten()


def value_out(value: Tensor, out: Tensor, head_dim: int) -> Pairs:
    """Return ln|a| of W_V's rows and ln|b| of the output projection's columns, each [groups * head_dim].

    Row j of a value head meets column j of each query head of its group, so the logarithms of these columns are
    averaged.

    Args:
        value: [groups * head_dim] ln|row multiplier| of W_V.
        out: [heads * head_dim] ln|column multiplier| of the output projection.
        head_dim: rows of one head.
    """
    groups = len(value) // head_dim
    return value, out.reshape(groups, -1, head_dim).mean(1).flatten()


def pairs(logs: Logs, head_dim: int, broken: Container[str] = ()) -> dict[str, Pairs]:
    """Return ln|a| and ln|b| of all pairs of multipliers (a, b) in a layer, by the name of the symmetry.

    Pairs of a norm's weight and columns that read it are not among them (see :func:`norm_columns`).

    A symmetry is absent if the layer has no multipliers for a or for b, or if it is broken.

    Args:
        logs: logarithms of the layer's multipliers.
        head_dim: rows of one attention head.
        broken: names of symmetries that the model does not have: `q_k` with QK-norm, and those of rows with a bias,
            which multipliers do not scale.
    """
    found: dict[str, Pairs] = {}
    query, key = logs("q", "row"), logs("k", "row")
    if query is not None and key is not None:
        found["q_k"] = query_key(query, key, head_dim)
    value, out = logs("v", "row"), logs("attention_out", "col")
    if value is not None and out is not None:
        found["v_out"] = value_out(value, out, head_dim)
    up, down = logs("up", "row"), logs("down", "col")
    if up is not None and down is not None:
        found["up_down"] = up, down
    return {name: pair for name, pair in found.items() if name not in broken}


def imbalances(logs: Logs, head_dim: int, broken: Container[str] = ()) -> dict[str, Tensor]:
    """Return the imbalances of all pairs of multipliers in a layer (:func:`pairs`), by the name of the symmetry."""
    return {symmetry: a - b for symmetry, (a, b) in pairs(logs, head_dim, broken).items()}


def norm_columns(norm: Tensor, columns: Sequence[Tensor | None]) -> Tensor | None:
    """Return the imbalance of a norm's weights against the columns of the matrices that read the norm's output, [in].

    The imbalance is ln|weight| minus the mean of ln|column multiplier| over these matrices. The symmetry exists only if
    all of them have column multipliers. If one has none, or there are no such matrices, the result is None.

    Args:
        norm: [in] weights of the norm.
        columns: [in] ln|column multiplier| of each matrix, or None for a matrix without column multipliers.
    """
    present = [each for each in columns if each is not None]
    if not columns or len(present) < len(columns):
        return None
    return norm.double().abs().log() - sum(present[1:], present[0]) / len(present)


def redundant_pairs(sides: Mapping[str, frozenset[str]], broken: Container[str] = ()) -> list[str]:
    """Return the symmetries that multipliers of these sides have, each in words, such as "rows of q and k".

    A symmetry is returned if each of its two matrices has multipliers on the side that the words name, or a scalar, and
    if it is not broken.

    Args:
        sides: sides that have multipliers, by role.
        broken: names of symmetries that the model does not have, as for :func:`pairs`.
    """
    pairs = {
        "q_k": ("rows of q and k", ("q", "row"), ("k", "row")),
        "v_out": ("rows of v and columns of attention_out", ("v", "row"), ("attention_out", "col")),
        "up_down": ("rows of up and columns of down", ("up", "row"), ("down", "col")),
    }
    return [
        words
        for name, (words, *pair) in pairs.items()
        if name not in broken
        and all(side in sides.get(role, ()) or "scalar" in sides.get(role, ()) for role, side in pair)
    ]
