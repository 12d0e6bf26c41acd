"""Which rule trains what, counted by hand; and an optimizer whose matrix rule trains nothing is refused."""

from __future__ import annotations

import pytest
import torch

import megamult
from megamult.optim.ownership import Share


class Small(torch.nn.Module):
    """One matrix for the blocks, an embedding, a norm and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.up = torch.nn.Linear(4, 6)
        self.norm = torch.nn.LayerNorm(6, bias=False)


RULES = {r"embedding\.weight$": "embedding", r"up\.weight$": "up"}


def test_fold_says_what_each_rule_owns_and_returns_it(capsys: pytest.CaptureFixture[str]) -> None:
    made = megamult.fold({"name": "muon"}, Small(), RULES)
    # up is 6 x 4, the embedding 10 x 4; rows and columns of both have multipliers; bias and norm have 6 elements each.
    assert made.ownership.matrices == {"Muon": Share(1, 24), "AdamW": Share(1, 40)}
    assert made.ownership.vectors == Share(2, 12)
    assert made.ownership.multipliers == Share(4, 6 + 4 + 10 + 4)
    assert capsys.readouterr().out == (
        "megamult: Muon 1 matrix (24); AdamW 1 matrix (40), 2 vectors (12), 4 vectors (24) of multipliers, with their "
        "elements in parentheses\n"
    )


def test_a_convolution_is_no_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    model = Small()
    model.conv = torch.nn.Conv1d(6, 6, 3, groups=6)  # weights 6 x 1 x 3, bias 6
    made = megamult.fold({"name": "adamw"}, model, {**RULES, r"conv\.weight$": "norm"})
    assert made.ownership.matrices == {"AdamW": Share(2, 64)} and made.ownership.vectors == Share(3, 18)
    assert made.ownership.others == Share(1, 18)
    assert "3 vectors (18), 1 tensor of 3 or more dimensions (18), 4 vectors (24) of" in capsys.readouterr().out


def test_shared_columns_count_once() -> None:
    from megamult.multipliers.config import MultipliersConfig
    from megamult.optim.build import make_optimizer
    from megamult.optim.config import OptimizerConfig
    from megamult.parameters.spec import ParameterSpec, Part, Segment
    from megamult.parameters.stated import set_spec

    model = torch.nn.Module()
    model.gate_up = torch.nn.Parameter(torch.ones(6, 4))
    parts = (Part("gate", "gate", (3, 4)), Part("up", "up", (3, 4)))
    segments = (Segment(0, 0, 0, 3), Segment(3, 1, 0, 3))
    set_spec(model.gate_up, ParameterSpec(parts, (6, 4), segments, orthogonalize=True))
    settings = MultipliersConfig("folded", {"gate": ["row", "col"], "up": ["row", "col"]}, shared_columns=True)
    made = make_optimizer(model, OptimizerConfig(name="adamw"), settings)
    assert made.ownership.matrices == {"AdamW": Share(2, 24)}
    assert made.ownership.multipliers == Share(3, 3 + 3 + 4)


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_an_optimizer_for_matrices_that_gets_none_is_refused(name: str) -> None:
    model = Small()
    del model.up
    with pytest.raises(ValueError, match=rf"optimizer\.name is {name}, and no trainable parameter .* adamw"):
        megamult.fold({"name": name}, model, {r"embedding\.weight$": "embedding"})
