"""Export a checkpoint as a Hugging Face model (Llama, Qwen3, Falcon-H1 and others), with the multipliers merged in."""

import argparse
from pathlib import Path

from megamult.runtime.console import whole_or_nothing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Needs `pip install megamult[export]`, and memory for one shard at a time. On an error it writes "
        "nothing.",
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="a checkpoint, such as RUN/checkpoints/step_1000"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="directory to write, which must be empty or not exist"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of the weights (default auto: float32 for an fp32 run, bfloat16 for a bf16 run)",
    )
    parser.add_argument(
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="largest size of one file (default 5GB); a larger tensor is not cut, and gets a file of its own",
    )
    return parser


def main() -> None:
    """Run the command line. The exit code is 0 on success, 2 for a user's mistake and 130 for Ctrl-C."""
    args = _parser().parse_args()
    with whole_or_nothing():
        try:
            from megamult.huggingface.exporting import export  # slow to import; --help must not wait for it
        except ImportError as error:
            raise ValueError(f"the export cannot start ({error}): pip install -U megamult[export]") from None
        done = export(args.checkpoint, args.output, args.dtype, args.max_shard_size)
    for note in done.notes:
        print(f"note: {note}")
    print(f"{args.output}: {done.parameters} parameters in {done.tensors} tensors, {done.dtype}")


if __name__ == "__main__":
    main()
