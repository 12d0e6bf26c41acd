#!/usr/bin/env bash
# Functions that the batch scripts beside this file share. They source it after they have set
#
#     container       image to run the ranks in, or nothing
#     mounts          folders to mount in the container besides the repository, separated by commas
#     srun_options    array of further options of srun
#     requeue         yes: a run that saved and stopped goes back into the queue
#     max_requeues    how many times at most
#     supervision     array of options of launch/supervise.sh
#
# and then call `run_job` with pretrain.py's arguments. `run_job` ends the script.
declare container mounts requeue max_requeues
declare -a srun_options supervision

readonly resume=75 # pretrain.py saved a checkpoint and stopped because it was asked to

job_id="${SLURM_JOB_ID:?this is a batch script: submit it with sbatch}"
# In one task of an array, SLURM_JOB_ID is the number of the array itself, which scontrol takes for all its tasks.
[[ -z "${SLURM_ARRAY_TASK_ID:-}" ]] || job_id="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"

say() { printf 'job %s: %(%F %T)T: %s\n' "$job_id" -1 "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# last_value KEY ARGUMENTS...: prints the last value of KEY among pretrain.py's arguments, which is the one that counts.
last_value() {
    local key="$1" value="" previous="" word
    shift
    for word in "$@"; do
        [[ "$previous" != "$key" ]] || value="$word"
        [[ "$word" != "$key="* ]] || value="${word#*=}"
        previous="$word"
    done
    echo "$value"
}

# Sets step to the command that starts all ranks, in the container if there is one.
describe_step() {
    # Use --wait instead of --kill-on-bad-exit. The latter sends SIGTERM to ranks that are about to end by themselves,
    # and their exit code, which tells the reason, would be lost. It is not needed, because the watchdog ends the peers
    # of a dead rank within seconds.
    step=(srun --label --kill-on-bad-exit=0 --wait=60 "${srun_options[@]}")
    # Since Slurm 22.05, srun does not inherit this option from sbatch.
    [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    case "$container" in
        "") ;;
        *.sif)
            step+=(apptainer exec --bind "$PWD${mounts:+,$mounts}" --pwd "$PWD")
            [[ -z "${SLURM_GPUS_ON_NODE:-}" ]] || step+=(--nv)
            step+=("$container")
            ;;
        *) # srun has these options where the Pyxis plugin is installed
            step+=(--container-image="$container" --container-mounts="$PWD:$PWD${mounts:+,$mounts}")
            step+=(--container-workdir="$PWD")
            ;;
    esac
    step+=(python launch/pretrain.py)
}

# Puts the job back into the queue, unless Slurm is ending it or `requeue` or `max_requeues` forbids this.
go_on_later() {
    local restarts="${SLURM_RESTART_COUNT:-0}" state
    state="$(scontrol --oneliner show job "$job_id" | sed -n 's/.*JobState=\([^ ]*\).*/\1/p')" || state=unknown
    if [[ "$state" != RUNNING ]]; then
        # The user has cancelled the job, or Slurm itself requeues it.
        say "saved and stopped; Slurm is ending this job ($state), so it is not requeued from here"
    elif [[ "$requeue" != yes ]]; then
        say "saved and stopped; requeue is $requeue: to continue, submit the same command with --train.run_dir $run_dir"
    elif ((restarts >= max_requeues)); then
        say "saved and stopped; not requeued: it has been requeued $restarts times, and max_requeues is $max_requeues"
    elif scontrol requeue "$job_id"; then
        say "saved and stopped; requeued"
    else
        say "saved and stopped; cannot be requeued: to continue, submit the same command with --train.run_dir $run_dir"
    fi
}

# run_job ARGUMENTS...: runs pretrain.py on every task of the job until the run is done or stopped, then exits.
run_job() {
    local code=0 supervisor signal
    run_dir="$(last_value --train.run_dir "$@")"
    if [[ -z "$run_dir" ]]; then
        run_dir="runs/$SLURM_JOB_NAME-$SLURM_JOB_ID" # the same after a requeue
        set -- "$@" --train.run_dir "$run_dir"
    fi
    [[ -n "$(last_value --checkpoint.load "$@")" ]] || set -- "$@" --checkpoint.load latest

    # shellcheck source=launch/setup_env.sh
    [[ -n "$container" ]] || source launch/setup_env.sh
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    describe_step
    say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, ${SLURM_NTASKS:-1} ranks; $run_dir"

    launch/supervise.sh "${supervision[@]}" "${step[@]}" "$@" &
    supervisor=$!
    # Slurm signals the ranks. Some signals come to this script too, or only to this script. Never trap CONT: Slurm
    # sends it just before USR1, and bash then loses the USR1.
    for signal in TERM USR1 INT; do
        # shellcheck disable=SC2064 # expand both variables now
        trap "kill -s TERM $supervisor 2>/dev/null || true" "$signal"
    done
    # A trapped signal ends `wait` early, so wait again. The last `wait` returns the supervisor's exit code.
    while kill -0 "$supervisor" 2>/dev/null; do wait "$supervisor" || true; done
    wait "$supervisor" || code=$?
    if ((code == resume)); then go_on_later; fi
    say "end, exit code $code"
    exit "$code"
}
