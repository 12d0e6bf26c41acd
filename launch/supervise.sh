#!/usr/bin/env bash
# Runs a training command, and runs it again from its newest checkpoint when it crashes:
#
#     launch/supervise.sh [options] COMMAND...
#
# COMMAND is any line that starts launch/pretrain.py with --train.run_dir RUN and --checkpoint.load latest: under
# deepspeed, srun, torchrun, in a container, or by itself. Options, before it:
#
#     --max_restarts N   how often to start it again in all (10)
#     --max_failures N   give up after so many ends in a row without a newer checkpoint (3)
#     --pause SECONDS    before the first restart; twice as long after each further failure, up to 5 minutes (5)
#     --patience SECONDS how long a run whose launcher has ended may take to save and to end itself (900)
#
# SIGTERM, SIGUSR1, SIGINT and SIGHUP are a request to save and stop. They reach the ranks without ending the launcher
# between, which would lose their exit code. Decides by exit code:
#
#     0            done, if the newest checkpoint is that of the last step (DeepSpeed's launcher also returns 0 when
#                  a signal ended it); otherwise a crash
#     75           saved and stopped as asked: passed on, start the same line again
#     2, 65, 74    a mistake in the command, diverged, the last checkpoint could not be written: passed on
#     else         a crash: restarted, unless it had been asked to stop (then 75); passed on when it gives up
#
# Says each decision on stderr. torchrun's exit code is 1 whatever its ranks' is: with it, mistakes are tried again too.
set -euo pipefail

readonly user_error=2 diverged=65 no_checkpoint=74 resume=75
readonly longest_pause=300
readonly same_request=5 # signals that follow within so many seconds are the same request, as they are to the ranks

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

# What the command says about its run; the last of several values counts, as it does to pretrain.py.
script="" run_dir="" load="" key="" launcher_passes_signals_on=""
for word in "$@"; do
    if [[ -z "$script" ]]; then
        case "$word" in
            pretrain.py | */pretrain.py) script="$word" ;;
            # They hand SIGUSR1 on to every rank on every node; SIGTERM makes srun kill them at once.
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

# Step of the newest checkpoint; -1: there is none.
newest_step() {
    local name=""
    { read -r name || true; } 2>/dev/null <"$run_dir/checkpoints/latest" || true
    if [[ "$name" =~ ^step_([0-9]+)$ ]]; then echo "$((10#${BASH_REMATCH[1]}))"; else echo -1; fi
}

describe() { if (($1 < 0)); then echo "no checkpoint"; else echo "newest checkpoint step_$1"; fi; }

# train.steps of the run's resolved configuration; nothing if it has none.
all_steps() {
    awk '/^[^ #]/ { section = $1 } section == "train:" && $1 == "steps:" { print $2 }' "$run_dir/config.yaml" \
        2>/dev/null || true
}

is_complete() {
    local steps
    steps="$(all_steps)"
    [[ "$steps" =~ ^[0-9]+$ ]] && (("$(newest_step)" >= steps))
}

# Every process that the command starts on this machine inherits this mark, also where it leaves its session.
mark="MEGAMULT_SUPERVISED=$$.$(date +%s%N)"

our_processes() {
    local file
    # Whole NUL-terminated words; processes that have just ended cannot be read.
    { grep -lszxF -e "$mark" /proc/[0-9]*/environ || true; } | while IFS=/ read -r _ _ file _; do echo "$file"; done
}

# The ranks among them: Python running pretrain.py. A launcher has the script's name later in its line.
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
    # `return` alone would give the status of the command that the signal interrupted, and `set -e` end all.
    if [[ -n "$asked" ]] && ((SECONDS - asked_at <= same_request)); then return 0; fi
    told=() # a request that is repeated later shall end the ranks at once, as they promise
    asked="$1" asked_at="$SECONDS"
    say "SIG$asked: asking the run to save and stop, $(describe "$(newest_step)")"
    if [[ -z "$pid" ]] || ! kill -0 "$pid" 2>/dev/null; then return 0; fi
    if [[ -n "$launcher_passes_signals_on" ]]; then
        kill -s USR1 "$pid" 2>/dev/null || true
    elif ! tell_ranks; then
        # Its ranks are on other hosts, or there are none yet.
        kill -s TERM "$pid" 2>/dev/null || true
    fi
}
trap 'request TERM' TERM
trap 'request USR1' USR1
trap 'request INT' INT
trap 'request HUP' HUP

# A sleep that a signal ends.
rest() {
    sleep "$1" &
    wait "$!" || true
}

# Whether a live process holds the run's lock, on any host. Where locks reach no further than one node, only the record
# in the file tells: a live holder writes into it every three seconds. Keeps what it saw in this shell.
readonly longest_beat=8
lock_text="" lock_since=0
is_locked() {
    local status=0 text="" here
    [[ -e "$run_dir/lock" ]] || return 1
    # Another status than 9 says that locks do not work here.
    flock --shared --nonblock --conflict-exit-code 9 "$run_dir/lock" true 2>/dev/null || status=$?
    ((status != 9)) || return 0
    { text="$(<"$run_dir/lock")"; } 2>/dev/null || return 1
    here="\"machine\": \"$(uname -n) $(</proc/sys/kernel/random/boot_id)\""
    # A live holder on this host would have it locked.
    [[ "$text" == *'"machine": '* && "$text" != *"$here"* ]] || return 1
    if [[ "$text" != "$lock_text" ]]; then lock_text="$text" lock_since="$SECONDS"; fi
    ((SECONDS - lock_since < longest_beat))
}

# A launcher may be gone before its ranks, which then save and end by themselves.
await_end() {
    local began="$SECONDS" left
    while left="$(our_processes)" && { [[ -n "$left" ]] || is_locked; }; do
        if ((SECONDS == began)); then
            rest 0.2
            continue
        fi
        [[ -z "$asked" ]] || tell_ranks || true # those that have started since
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

# Names the ranks on this host that ended without a word of their own: killed, or out of memory.
tell_who_left() {
    local file name step
    step="$(tail -n 1 "$run_dir/metrics.jsonl" 2>/dev/null | sed -n 's/^{"step": \([0-9]*\),.*/\1/p')" || true
    for file in "$run_dir"/logs/rank_*.running; do
        { read -r name <"$file"; } 2>/dev/null || continue
        [[ "$name" == *" on $(uname -n) (process "* ]] || continue # others may still be about to end
        rm -f "$file"
        say "$name ended without a word (killed, or out of memory?), last step in metrics.jsonl: ${step:-none}"
    done
}

# Runs the command to its end; sets code.
run_once() {
    told=()
    # In a session of its own: Ctrl-C in a terminal would otherwise reach launchers and ranks before this request does.
    env "$mark" setsid "$@" &
    pid=$!
    # A trapped signal ends `wait` early; the last `wait` has the exit code in any case.
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
# Asked to stop before it was started again.
say "stopped by SIG$asked between two starts, $(describe "$(newest_step)"): returning $resume"
exit "$resume"
