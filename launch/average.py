"""Average checkpoints of one model: write a checkpoint whose weights are the average, with all multipliers at 1.

The effective weights s diag(r) W diag(c) are averaged, not r, W and c separately. A tied embedding keeps its scalar if
all checkpoints have the same.
"""

import argparse
from pathlib import Path

from megamult.runtime.console import whole_or_nothing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="The result has the step, data state, configuration and tokenizer of the newest checkpoint, and fresh "
        "optimizer state. launch/export_hf.py exports the result. On an error it writes nothing.",
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="checkpoints, such as RUN/checkpoints/step_900 RUN/checkpoints/step_1000; or one run directory, with "
        "--last",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="checkpoint directory to write, which must be empty or not exist",
    )
    parser.add_argument(
        "--last", type=int, metavar="N", help="average the newest N complete checkpoints of the run directory"
    )
    parser.add_argument(
        "--weights",
        default="uniform",
        choices=["uniform", "ema"],
        help="share of each checkpoint in the average. uniform (default): all shares are equal. ema: the k-th "
        "checkpoint before the newest, by step, has a share proportional to decay^k. The shares sum to 1",
    )
    parser.add_argument(
        "--decay", type=float, metavar="D", help="decay of --weights ema, between 0 and 1 (default 0.9)"
    )
    return parser


def main() -> None:
    """Run the command line. The exit code is 0 on success, 2 for a user's mistake and 130 for Ctrl-C."""
    args = _parser().parse_args()
    with whole_or_nothing():
        from megamult.effective.averaging import average  # slow to import; --help must not wait for it

        done = average(args.checkpoints, args.output, last=args.last, kind=args.weights, decay=args.decay)
    for note in done.notes:
        print(f"note: {note}")
    shares = ", ".join(f"{share:.4g} of step {step}" for step, share in zip(done.steps, done.shares, strict=True))
    print(f"{args.output}: {done.parameters} parameters and {done.multipliers} multipliers, {shares}")
    print(f"to continue from it: {done.resume}")


if __name__ == "__main__":
    main()
