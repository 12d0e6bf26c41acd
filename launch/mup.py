"""Print the keys by which muP adapts settings that were tuned at a base width to the width of the run."""

import argparse
from collections.abc import Callable
from dataclasses import replace

import yaml

from megamult.models.llama.mup import mup
from megamult.optim.config import OptimizerConfig
from megamult.optim.muon.newton_schulz import SCALES
from megamult.runtime.console import whole_or_nothing
from megamult.train.command_line import parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All other arguments are those of launch/pretrain.py: --config FILE.yaml and --section.key value. Give "
        "the printed keys to launch/pretrain.py as a second --config. Sources: arXiv 2203.03466 (AdamW) and "
        "2310.17813 (Muon).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--base_hidden_size",
        required=True,
        type=int,
        metavar="N",
        help="hidden_size of the model whose settings were tuned. Its other widths are in proportion, with heads of "
        "the same size",
    )
    parser.add_argument(
        "--learned",
        action="store_true",
        help="train the factors of the forward pass as multipliers, from the same initial values; without it, they are "
        "constants",
    )
    return parser


def _update_norm(optimizer: OptimizerConfig) -> Callable[[int, int], float] | None:
    """Return the function from a matrix's shape to the spectral norm of its update, or None for AdamW."""
    if optimizer.name == "adamw":
        return None
    # NorMuon's updates have the same RMS as Muon's with the scale match_rms_adamw, and about equal singular values.
    rule = "match_rms_adamw" if optimizer.muon is None else optimizer.muon.scale
    return SCALES[rule]


def main() -> None:
    """Run the command line. The exit code is 0 on success, 2 for a user's mistake and 130 for Ctrl-C."""
    args, rest = _parser().parse_known_args()
    with whole_or_nothing():
        config, _ = parse(rest)
        model, base = config.model, args.base_hidden_size
        widths = {
            "model.num_attention_heads": model.num_attention_heads,
            "model.num_query_groups": model.query_groups,
            "model.ffn_hidden_size": model.ffn_hidden_size,
        }
        wrong = [f"{key} {size}" for key, size in widths.items() if size * base % model.hidden_size]
        if base < 1 or wrong:
            raise ValueError(
                f"base_hidden_size is {base} with model.hidden_size {model.hidden_size}: it must be positive, and "
                f"{', '.join(wrong or widths)}, times base_hidden_size / model.hidden_size, must be whole numbers"
            )
        heads, groups, ffn = (size * base // model.hidden_size for size in widths.values())
        narrow = replace(
            model, hidden_size=base, num_attention_heads=heads, num_query_groups=groups, ffn_hidden_size=ffn
        )
        overrides = mup(model, narrow, _update_norm(config.optimizer)).overrides(
            model, config.optimizer, config.multipliers, args.learned
        )
    print(yaml.safe_dump(overrides, sort_keys=False), end="")


if __name__ == "__main__":
    main()
