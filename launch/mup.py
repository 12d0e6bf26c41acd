"""Print the keys with which muP transfers settings from the base width at which they were tuned to this run's width."""

import argparse

import yaml

from megamult.models.llama.mup import at_width, mup
from megamult.optim.build import update_norm
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
        help="hidden_size of the model whose settings were tuned. Its other widths are smaller or larger in "
        "proportion, and its heads have the same size",
    )
    parser.add_argument(
        "--learned",
        action="store_true",
        help="train the factors of the forward pass as multipliers, from the same initial values; without it, they are "
        "constants",
    )
    return parser


def main() -> None:
    """Run the command line. The exit code is 0 on success, 2 for a user's mistake and 130 for Ctrl-C."""
    args, rest = _parser().parse_known_args()
    with whole_or_nothing():
        config, _ = parse(rest)
        base = at_width(config.model, args.base_hidden_size)
        factors = mup(config.model, base, update_norm(config.optimizer))
        overrides = factors.overrides(config.model, config.optimizer, config.multipliers, args.learned)
    print(yaml.safe_dump(overrides, sort_keys=False), end="")


if __name__ == "__main__":
    main()
