"""Is this image sound? The last step of its build; also `docker run --rm IMAGE python docker/check_image.py`.

    python docker/check_image.py [--base-torch]

Prints what is installed, then makes the default corpus if it is missing and trains the quickstart's model for two
steps through DeepSpeed, without a network where the corpus is there. Exit code 1 and a reason if anything is amiss.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 4096
"""Of the default corpus' tokenizer (launch/quickstart.sh)."""


def say(name: str, value: object) -> None:
    """A line of what is installed."""
    print(f"{name:<16} {value}", flush=True)


def check_torch(base_torch: bool) -> None:
    """Say what torch is; with `base_torch` it must be the base image's, and a CUDA build."""
    import torch

    place = Path(torch.__file__).resolve()
    say("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, {place.parent}")
    if not base_torch:
        return
    say("NCCL", ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none")
    if ROOT in place.parents:
        raise RuntimeError(f"torch is {place}: the installation hides the one that the base image brings")
    if torch.version.cuda is None:
        raise RuntimeError("the base image's torch is a CPU build")


def check_packages() -> None:
    """What a run imports is there, and our package is this folder."""
    for name in ("deepspeed", "megatron-core", "numpy", "sentencepiece", "tensorboard"):
        say(name, metadata.version(name))
    importlib.import_module("megatron.core")
    ours = Path(str(importlib.import_module("megamult").__file__)).resolve()
    say("megamult", f"{metadata.version('megamult')}, {ours.parent}")
    if ours.parents[1] != ROOT:
        raise RuntimeError(f"megamult is imported from {ours.parents[1]}, not from {ROOT}")


def check_user() -> None:
    """An image that runs as root writes root's files into folders that are mounted."""
    say("user", f"{os.getuid()}:{os.getgid()}, home {Path.home()}")
    if os.getuid() == 0:
        raise RuntimeError("the user is root")


def check_training() -> None:
    """Two steps begin at the loss of the uniform distribution and end below it, on text not trained on."""
    with tempfile.TemporaryDirectory() as folder:
        keys = {
            "train.run_dir": f"{folder}/run",
            "train.steps": "2",
            "train.eval_every": "0",
            "train.eval_batches": "1",
            "optimizer.lr": "1e-3",
            "optimizer.warmup_steps": "0",
            "optimizer.decay_steps": "0",
        }
        arguments = [part for key, value in keys.items() for part in (f"--{key}", value)]
        subprocess.run([str(ROOT / "launch" / "quickstart.sh"), *arguments], check=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records if "loss" in record]
    (valid,) = (record["valid_loss"] for record in records if "valid_loss" in record)
    say("losses", f"{losses}, valid {valid}")
    # A fresh model knows nothing: ln(4096) = 8.32, and a little more for what its random logits spread.
    uniform = math.log(VOCABULARY)
    if len(losses) != 2 or not 0 <= losses[0] - uniform < 0.1 or not valid < uniform:
        raise RuntimeError(f"two steps of training begin at the loss {losses[0]:.3f} and end at {valid:.3f}")


def main() -> int:
    """Check one thing after the other."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--base-torch", action="store_true", help="torch must be the base image's, with CUDA")
    chosen = made.parse_args()
    say("python", sys.version.split()[0])
    try:
        check_user()
        check_torch(chosen.base_torch)
        check_packages()
        check_training()
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        print(f"error: this image is not sound: {error}", file=sys.stderr)
        return 1
    print("this image is sound")
    return 0


if __name__ == "__main__":
    sys.exit(main())
