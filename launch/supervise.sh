#!/usr/bin/env bash
# Runs a training command, and runs it again from its newest checkpoint when it crashes:
#
#     launch/supervise.sh [options] COMMAND...
#
# COMMAND is any line that starts launch/pretrain.py with --train.run_dir RUN and --checkpoint.load latest: under
# deepspeed, srun, torchrun, in a container, or by itself. Options, before it:
#
#     --max_restarts N   start COMMAND again at most N times in all (10)
#     --max_failures N   give up when COMMAND has ended N times in a row without a newer checkpoint (3)
#     --pause SECONDS    wait this long before a restart, twice as long after each further end in a row without a newer
#                        checkpoint, and never longer than 5 minutes (5)
#     --patience SECONDS wait at most this long for the ranks to save and end after their launcher has ended (900)
#
# SIGTERM, SIGUSR1, SIGINT and SIGHUP are a request to save and stop. The request reaches the ranks without ending the
# launcher, because a launcher that a signal ends loses the ranks' exit code. What happens next depends on the exit code
# of COMMAND:
#
#     0            done, if the newest checkpoint is that of the last step; otherwise a crash, because DeepSpeed's
#                  launcher also returns 0 when a signal ends it
#     75           saved and stopped as asked: returns 75; start the same line again to continue
#     2, 65, 74    a mistake in the command, diverged, the last checkpoint could not be written: returns this code
#     else         a crash: starts COMMAND again; returns this code when it gives up, and 75 if it was asked to stop
#
# Prints each decision to stderr. torchrun returns 1 whatever its ranks return, so under torchrun mistakes are restarted
# too.
set -euo pipefail

readonly user_error=2 diverged=65 no_checkpoint=74 resume=75
readonly longest_pause=300
readonly same_request=5 # signals within this many seconds after the first are the same request; ranks count likewise

max_restarts=10 max_failures=3 pause=5 patience=900

say() { printf 'supervise: %(%F %T)T: %s\n' -1 "$*" >&2; }
die() {
    printf 'error: supervise.sh: %s\n' "$*" >&2
    exit "$user_error"
}

while (($#)); do
    case "$1" in
        --help)
            sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --max_restarts | --max_failures | --pause | --patience)
            [[ "${2-}" =~ ^[0-9]+$ ]] || die "$1 is '${2-}': give a whole number"
            printf -v "${1#--}" %d "$((10#$2))"
            shift 2
            ;;
        --)
            shift
            break
            ;;
        -*) die "unknown option $1: see launch/supervise.sh --help" ;;
        *) break ;;
    esac
done
((max_failures > 0)) || die "--max_failures is 0: give 1 or more"
(($#)) || die "no command: give the line that starts launch/pretrain.py"
command -v "$1" >/dev/null || die "$1 is not a command here: source launch/setup_env.sh first, or give its path"

# Read the run's keys from the command. If a key is given several times, the last value counts, as in pretrain.py.
script="" run_dir="" load="" key="" launcher_passes_signals_on=""
for word in "$@"; do
    if [[ -z "$script" ]]; then
        case "$word" in
            pretrain.py | */pretrain.py) script="$word" ;;
            # These launchers pass SIGUSR1 on to all ranks on all nodes. On SIGTERM, srun would kill the ranks at once.
            srun | */srun | mpirun | */mpirun | mpiexec | */mpiexec) launcher_passes_signals_on=yes ;;
        esac
        continue
    fi
    case "$key" in
        --train.run_dir) run_dir="$word" ;;
        --checkpoint.load) load="$word" ;;
    esac
    key="$word"
    case "$word" in
        --train.run_dir=*) run_dir="${word#*=}" ;;
        --checkpoint.load=*) load="${word#*=}" ;;
    esac
done
[[ -n "$script" ]] || die "no launch/pretrain.py in: $*. Give the whole line that starts it, word by word"
[[ -n "$run_dir" ]] || die "add --train.run_dir RUN to the command: a restart must find the run"
[[ "$load" == latest ]] ||
    die "add --checkpoint.load latest to the command: without it a restart would not go on from the newest checkpoint"

# Prints the step of the newest checkpoint, or -1 if there is none.
newest_step() {
    local name=""
    { read -r name || true; } 2>/dev/null <"$run_dir/checkpoints/latest" || true
    if [[ "$name" =~ ^step_([0-9]+)$ ]]; then echo "$((10#${BASH_REMATCH[1]}))"; else echo -1; fi
}

describe() { if (($1 < 0)); then echo "no checkpoint"; else echo "newest checkpoint step_$1"; fi; }

# Prints train.steps of the run's config.yaml, or nothing if it cannot be read.
all_steps() {
    awk '/^[^ #]/ { section = $1 } section == "train:" && $1 == "steps:" { print $2 }' "$run_dir/config.yaml" \
        2>/dev/null || true
}

is_complete() {
    local steps
    steps="$(all_steps)"
    [[ "$steps" =~ ^[0-9]+$ ]] && (("$(newest_step)" >= steps))
}

# Every process that the command starts on this machine inherits this mark, even a process that leaves the session.
mark="MEGAMULT_SUPERVISED=$$.$(date +%s%N)"

our_processes() {
    local file
    # Match the mark with whole NUL-terminated words. Files of processes that have just ended cannot be read.
    { grep -lszxF -e "$mark" /proc/[0-9]*/environ || true; } | while IFS=/ read -r _ _ file _; do echo "$file"; done
}

# Prints the ranks among these processes: those that are Python with pretrain.py as its script. A launcher's script is
# another one, and pretrain.py comes later in its line.
our_ranks() {
    local pid words word
    for pid in $(our_processes); do
        { mapfile -d '' -t words <"/proc/$pid/cmdline"; } 2>/dev/null || continue
        [[ "${words[0]-}" == *python* ]] || continue
        for word in "${words[@]:1}"; do
            case "$word" in
                -[!mc]*) ;;
                pretrain.py | */pretrain.py)
                    echo "$pid"
                    break
                    ;;
                *) break ;;
            esac
        done
    done
}

pid="" asked="" asked_at=0
declare -A told=() # ranks that have got the request; a second signal would end them without a checkpoint

tell_ranks() {
    local rank found=1
    for rank in $(our_ranks); do
        found=0
        [[ -z "${told[$rank]-}" ]] || continue
        told[$rank]=yes
        kill -s USR1 "$rank" 2>/dev/null || true
    done
    return "$found"
}

# shellcheck disable=SC2317,SC2329 # the traps call it
request() {
    # `return` without 0 would return the status of the command that the signal interrupted, and `set -e` would then end
    # this script.
    if [[ -n "$asked" ]] && ((SECONDS - asked_at <= same_request)); then return 0; fi
    told=() # tell all ranks again: a later, repeated request makes them end at once
    asked="$1" asked_at="$SECONDS"
    say "SIG$asked: asking the run to save and stop, $(describe "$(newest_step)")"
    if [[ -z "$pid" ]] || ! kill -0 "$pid" 2>/dev/null; then return 0; fi
    if [[ -n "$launcher_passes_signals_on" ]]; then
        kill -s USR1 "$pid" 2>/dev/null || true
    elif ! tell_ranks; then
        # The ranks are on other hosts, or none has started yet: tell the launcher.
        kill -s TERM "$pid" 2>/dev/null || true
    fi
}
trap 'request TERM' TERM
trap 'request USR1' USR1
trap 'request INT' INT
trap 'request HUP' HUP

# Sleeps $1 seconds, or until a signal comes.
rest() {
    sleep "$1" &
    wait "$!" || true
}

# Does a live process on any host hold the run's lock? If file locks do not reach across nodes, only the record in the
# file tells: a live holder writes it every three seconds. The record seen last is kept in variables of this shell.
readonly longest_beat=8
lock_text="" lock_since=0
is_locked() {
    local status=0 text="" here
    [[ -e "$run_dir/lock" ]] || return 1
    # A status other than 0 and 9 means that file locks do not work here.
    flock --shared --nonblock --conflict-exit-code 9 "$run_dir/lock" true 2>/dev/null || status=$?
    ((status != 9)) || return 0
    { text="$(<"$run_dir/lock")"; } 2>/dev/null || return 1
    here="\"machine\": \"$(uname -n) $(</proc/sys/kernel/random/boot_id)\""
    # A live holder on this host would have locked the file.
    [[ "$text" == *'"machine": '* && "$text" != *"$here"* ]] || return 1
    if [[ "$text" != "$lock_text" ]]; then lock_text="$text" lock_since="$SECONDS"; fi
    ((SECONDS - lock_since < longest_beat))
}

# Waits until all processes of the run have ended. A launcher may end before its ranks, which then save and end by
# themselves.
await_end() {
    local began="$SECONDS" left
    while left="$(our_processes)" && { [[ -n "$left" ]] || is_locked; }; do
        if ((SECONDS == began)); then
            rest 0.2
            continue
        fi
        [[ -z "$asked" ]] || tell_ranks || true # ranks that have started since the request
        if ((SECONDS - began > patience)); then
            if [[ -z "$left" ]]; then
                say "$run_dir/lock is still held $patience s after the command's end, by a process that is not on" \
                    "this host: not starting a second one beside it"
                return 1
            fi
            say "still there $patience s after the command's end, killed: $(tr '\n' ' ' <<<"$left")"
            # shellcheck disable=SC2086 # one word a process
            kill -s KILL $left 2>/dev/null || true
            patience=$((patience + 30))
        fi
        rest 1
    done
}

# Names the ranks on this host that ended without a message of their own, as killed ranks do.
tell_who_left() {
    local file name step
    step="$(tail -n 1 "$run_dir/metrics.jsonl" 2>/dev/null | sed -n 's/^{"step": \([0-9]*\),.*/\1/p')" || true
    for file in "$run_dir"/logs/rank_*.running; do
        { read -r name <"$file"; } 2>/dev/null || continue
        [[ "$name" == *" on $(uname -n) (process "* ]] || continue # ranks on other hosts may still be ending
        rm -f "$file"
        say "$name ended without a message (killed, or out of memory?), last step in metrics.jsonl: ${step:-none}"
    done
}

# Runs the command to its end; sets code.
run_once() {
    told=()
    # Start the command in a session of its own. Otherwise Ctrl-C in a terminal would reach launchers and ranks before
    # the request of this script does.
    env "$mark" setsid "$@" &
    pid=$!
    # A trapped signal ends `wait` early, so wait again. The last `wait` returns the command's exit code.
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    code=0
    wait "$pid" || code=$?
    pid=""
}

restarts=0 failures=0 best="$(newest_step)" code=0
while [[ -z "$asked" ]]; do
    run_once "$@"
    ended=yes
    await_end || ended=""
    [[ -n "$asked" ]] || tell_who_left
    step="$(newest_step)"
    state="exit code $code, $(describe "$step")"
    case "$code" in
        0)
            if is_complete; then
                say "$state: done"
                exit 0
            fi
            state+=", not the last of $(all_steps) steps"
            ;;
        "$user_error" | "$diverged" | "$no_checkpoint" | "$resume")
            say "$state: not restarted"
            exit "$code"
            ;;
    esac
    if [[ -n "$asked" ]]; then
        say "$state: stopped by SIG$asked, returning $resume"
        exit "$resume"
    fi
    ((code != 0)) || code=1
    [[ -n "$ended" ]] || exit "$code"
    if ((step > best)); then
        best="$step" failures=0
    else
        failures=$((failures + 1))
    fi
    if ((failures >= max_failures)); then
        say "$state: giving up after $failures failures in a row without a newer checkpoint"
        exit "$code"
    elif ((restarts >= max_restarts)); then
        say "$state: giving up after $restarts restarts"
        exit "$code"
    fi
    restarts=$((restarts + 1))
    seconds=$((pause << (failures > 0 ? failures - 1 : 0)))
    ((seconds <= longest_pause)) || seconds="$longest_pause"
    say "$state: restart $restarts of $max_restarts in $seconds s"
    ((seconds == 0)) || rest "$seconds"
done
# The request to stop came before the command was started again.
say "stopped by SIG$asked between two starts, $(describe "$(newest_step)"): returning $resume"
exit "$resume"
