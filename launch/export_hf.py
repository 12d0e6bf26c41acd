"""Export a checkpoint as a Hugging Face model (LlamaForCausalLM), multipliers merged into the weights."""

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Needs `pip install megamult[export]`. Memory: one shard. On an error it writes nothing.",
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="a checkpoint, as RUN/checkpoints/step_1000"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="the directory to write; must not exist, or be empty"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights (default auto: float32 for an fp32 run, bfloat16 for a bf16 run)",
    )
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of one safetensors file (default 5GB)")
    return parser


def main() -> int:
    """Run the command line; the exit code is 0, 2 for a user's mistake, 130 for Ctrl-C."""
    args = _parser().parse_args()
    # Clean up on the way out, as for Ctrl-C.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        from megamult.checkpoint.hf_export import export  # heavy: --help and a wrong argument need not wait for it

        done = export(args.checkpoint, args.output, args.dtype, args.max_shard_size)
    except (ValueError, OSError) as error:
        print("error:", " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error.name} is not installed: pip install megamult[export]", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    for note in done.notes:
        print(f"note: {note}")
    print(f"{args.output}: {done.parameters} parameters in {done.tensors} tensors, {done.dtype}")
    return 0


def _terminate(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
