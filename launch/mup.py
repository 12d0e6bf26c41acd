"""Print configuration keys that adapt settings tuned at a base width to the width of this run, as muP prescribes."""

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
        help="hidden_size of the base model, whose settings were tuned. Its num_attention_heads, num_query_groups and "
        "ffn_hidden_size are those of this run times N / model.hidden_size, so its heads have the same size",
    )
    parser.add_argument(
        "--learned",
        action="store_true",
        help="muP multiplies the head by N / model.hidden_size in the forward pass. With --learned, this factor is a "
        "trained multiplier that starts at this value; without, it is a constant",
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
