#!/usr/bin/env bash
# From a bare machine to a pretrained small model: makes the environment, fetches and tokenizes the default corpus,
# trains by examples/configs/quickstart.yaml, and says where the results are. An existing environment or corpus is kept;
# each call trains anew, in a run directory of its own. Takes pretrain.py's overrides. Paths in them are relative to the
# repository:
#
#     launch/quickstart.sh [--section.key value ...]
set -euo pipefail

cpu_processes=1 # number of ranks, which share the cores, if there is no GPU; otherwise each GPU has one rank

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/setup_env.sh

launch/default_corpus.sh

run_dir="" previous=""
for argument in "$@"; do
    case "$argument" in
        --train.run_dir=*) run_dir="${argument#*=}" ;;
        *) [[ "$previous" != --train.run_dir ]] || run_dir="$argument" ;;
    esac
    previous="$argument"
done
if [[ -z "$run_dir" ]]; then
    name="runs/quickstart-$(date +%Y%m%d-%H%M%S)" number=1
    run_dir="$name"
    mkdir -p runs
    # If two quickstarts begin in the same second, only one of them can make this directory.
    until mkdir "$run_dir" 2>/dev/null; do
        if [[ ! -e "$run_dir" ]]; then
            echo "error: $PWD/$run_dir cannot be made: make sure that runs/ can be written" >&2
            exit 2
        fi
        number=$((number + 1))
        run_dir="$name-$number"
    done
    trap 'rmdir "$run_dir" 2>/dev/null || true' EXIT # removes the directory only if it is empty
    set -- --train.run_dir "$run_dir" "$@"
fi

# A port that is free now, so that two runs on one machine do not meet.
port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
if [[ "$MEGAMULT_GPUS" == 0 ]]; then
    processes="$cpu_processes"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) / processes > 0 ? $(nproc) / processes : 1))}"
else
    processes=1 # becomes the largest power of two up to the number of GPUs: it must divide the batch of 16 sequences
    while ((processes * 2 <= MEGAMULT_GPUS && processes < 16)); do processes=$((processes * 2)); done
fi
set -- --train.micro_batch_size $((16 / processes)) "$@"
ranks=(--num_gpus "$processes")
if [[ "$MEGAMULT_GPUS" != 0 && -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    # The launcher lets --num_gpus override this variable; without the flag, it starts one rank for each device in it.
    CUDA_VISIBLE_DEVICES="$(cut -d , -f "1-$processes" <<<"$CUDA_VISIBLE_DEVICES")"
    export CUDA_VISIBLE_DEVICES
    ranks=()
fi
deepspeed "${ranks[@]}" --master_port "$port" launch/pretrain.py --config examples/configs/quickstart.yaml "$@"

cat <<END

The run is in $run_dir: metrics.jsonl has one line per step, config.yaml every setting.
Look at the curves and at the multipliers:

    ${VIRTUAL_ENV#"$PWD/"}/bin/tensorboard --logdir ${run_dir@Q}
END
