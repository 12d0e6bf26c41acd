"""Import a Hugging Face model (Llama, Mistral, Qwen2, Qwen3, SmolLM3, Falcon-H1) as a checkpoint.

All multipliers are 1, unless --forward_multipliers initial gives them other values.
"""

import argparse
from pathlib import Path

from megamult.runtime.console import whole_or_nothing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="If config.json asks for something that megamult's model does not have, such as a sliding window, an "
        "error names the field. On an error it writes nothing.",
    )
    parser.add_argument(
        "--input",
        required=True,
        type=Path,
        metavar="DIR",
        help="directory with config.json, safetensors files and, if any, tokenizer files",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="checkpoint directory to write, which must be empty or not exist",
    )
    parser.add_argument(
        "--placement",
        default="all",
        choices=["all", "none", "symmetry_free", "scalar"],
        help="placement of the multipliers (default all). none: a model without multipliers",
    )
    parser.add_argument(
        "--forward_multipliers",
        default="merge",
        choices=["merge", "initial"],
        help="where the constant factors in config.json of a Falcon-H1 go: into the weights (merge, the default), or "
        "into the initial values of the multipliers (initial). Either way the model computes the same function. All "
        "other multipliers start at 1",
    )
    return parser


def main() -> None:
    """Run the command line. The exit code is 0 on success, 2 for a user's mistake and 130 for Ctrl-C."""
    args = _parser().parse_args()
    with whole_or_nothing():
        from megamult.huggingface.importing import import_  # slow to import; --help must not wait for it

        done = import_(args.input, args.output, args.placement, args.forward_multipliers)
    for note in done.notes:
        print(f"note: {note}")
    print(f"{args.output}: {done.parameters} parameters and {done.multipliers} multipliers, {done.dtype}")
    print(f"to continue from it: launch/pretrain.py --config {args.output}/config.yaml --data.train PREFIX_train")


if __name__ == "__main__":
    main()
