#!/bin/bash
# Makes this folder's data/, step_4/ and losses.json with the code of commit adfe557, once. Never run it with newer code.
# Usage, in an environment of that commit on a CPU:  make.sh CHECKOUT_OF_adfe557
set -eu
code=$(cd "$1" && pwd)
cd "$(dirname "$0")"
test "$(git -C "$code" rev-parse --short=7 HEAD)" = adfe557
test -z "$(git -C "$code" status --porcelain)"
test ! -e step_4 # it is made once
export PYTHONPATH=$code OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu

mkdir -p data
python - >data/text.txt <<'P'
import random

draw = random.Random(15)
words = ["".join(draw.choices("abcdefghijkl", k=draw.randint(1, 3))) for _ in range(20)]
print("\n\n".join(" ".join(draw.choices(words, k=20)) for _ in range(12)))
P
python "$code/launch/prepare_data.py" --input data/text.txt --output data/corpus --vocab_size 275 \
    --valid_fraction 0 --workers 1
rm data/text.txt

train() { # RUN_DIR PROCESSES ARGUMENTS...: a run by the launcher
    local run=$1 processes=$2
    shift 2
    deepspeed --num_gpus "$processes" --master_port 29615 "$code/launch/pretrain.py" --config config.yaml \
        --train.run_dir "$run" "$@"
}
train run/whole 4
load=(--checkpoint.load run/whole/checkpoints/step_4)
train run/own 4 "${load[@]}"
train run/other 2 "${load[@]}" --parallel.tensor 1 --parallel.zero_stage 3 --train.micro_batch_size 4

cp -r run/whole/checkpoints/step_4 step_4
python - <<'P'
import json
from pathlib import Path

import torch

keys = ("step", "loss", "lr", "grad_norm", "multiplier_grad_norm")


def steps(run: str) -> list[dict[str, float]]:
    records = map(json.loads, Path(f"run/{run}/metrics.jsonl").read_text().splitlines())
    return [{key: record[key] for key in keys} for record in records if "loss" in record]


about = dict(line.split(":", 1) for line in open("/proc/cpuinfo").read().partition("\n\n")[0].splitlines())
about = {key.strip(): value.strip() for key, value in about.items()}
cpu = " ".join(about[key] for key in ("vendor_id", "cpu family", "model"))
found = {
    "machine": {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "cpu": cpu},
    **{run: steps(run) for run in ("whole", "own", "other")},
}
Path("losses.json").write_text(json.dumps(found, indent=1) + "\n")
P
rm -r run
