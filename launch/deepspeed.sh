#!/usr/bin/env bash
# Starts a training under DeepSpeed's launcher, on this machine or on the hosts of a hostfile (over ssh, by pdsh).
#
#   ./launch/deepspeed.sh configs/digits.yaml train.steps=100                   all GPUs of this machine, or one process
#   ./launch/deepspeed.sh --gpus 2 configs/digits.yaml                          this machine: two ranks
#   ./launch/deepspeed.sh --hostfile hosts configs/digits.yaml parallel.expert_parallel=8
#   ./launch/deepspeed.sh --hostfile hosts --verb verify                        another verb than train
#
#   --hostfile FILE    a line `name slots=8` for each host, slots being its GPUs (on a CPU: ranks)
#   --nodes N          only the first N hosts of the file
#   --gpus N           ranks on each host (default: all slots, all GPUs)
#   --master-addr A    address at which all hosts reach the first one (default: its name in the file)
#   --master-port P    a free port there (default: 29500; on one machine any free one)
#   --ssh-port P       the hosts' port for ssh (default: what ssh is configured for)
#   --verb VERB        what to start: train (default), verify, ...
#   --print            show the environment and the command, and start nothing
#
# Ranks are numbered host by host in the file's order and expert groups are runs of neighbours: parallel.expert_parallel
# up to the slots of a host keeps experts inside hosts, a larger one shards them across. All hosts need the project and
# its environment at the same path (a shared file system) and ssh without a password from here. Relative paths in
# settings start at the project's folder. Variables for the ranks: launch/environment.sh.

extras="log"
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

hostfile="" nodes="" gpus="" master_addr="" master_port="" ssh_port="" verb=train print=""
while [[ "${1:-}" == -* ]]; do
    option="${1%%=*}"
    case "$option" in
        -h | --help) usage "${BASH_SOURCE[0]}"; exit ;;
        --print) print=yes; shift; continue ;;
        --) shift; break ;;
    esac
    if [[ "$1" == *=* ]]; then value="${1#*=}"; shift; else value="${2:-}"; shift; [[ $# == 0 ]] || shift; fi
    [[ -n "$value" && "$value" != -* ]] || fail_launch "$option wants a value; see ./launch/deepspeed.sh --help"
    case "$option" in
        --nodes | --gpus | --master-port | --ssh-port)
            [[ "$value" =~ ^[1-9][0-9]{0,8}$ ]] || fail_launch "$option is $value; give a whole number, at least 1"
            ;;
    esac
    case "$option" in
        --hostfile) hostfile="$value" ;;
        --nodes) nodes="$value" ;;
        --gpus) gpus="$value" ;;
        --master-addr) master_addr="$value" ;;
        --master-port) master_port="$value" ;;
        --ssh-port) ssh_port="$value" ;;
        --verb) verb="$value" ;;
        *) fail_launch "unknown option $option; see ./launch/deepspeed.sh --help (settings are given as key=value)" ;;
    esac
done
[[ $# -gt 0 || $verb != train ]] || fail_launch "which config? For example: ./launch/deepspeed.sh configs/digits.yaml"
words=("$@")
if [[ -f "${1:-}" ]]; then words[0]="$(realpath -- "$1")"; fi

# Sets $hosts and $slots from the hostfile, cut to --nodes and --gpus.
read_hostfile() {
    [[ -f "$hostfile" ]] || fail_launch "there is no hostfile $hostfile; write one with a line 'name slots=8' for each host"
    local line where host shown number=0 known=" "
    if IFS= read -r -d '' _ <"$hostfile"; then  # as far as a zero byte, which bash itself passes over
        fail_launch "$hostfile is no text; write a line 'name slots=8' for each host"
    fi
    while IFS= read -r line || [[ -n "$line" ]]; do
        number=$((number + 1))
        line="${line%%#*}"
        [[ "$line" =~ [^[:space:]] ]] || continue
        where="$hostfile, line $number"
        shown="${line:0:60}"
        [[ ${#line} -le 200 ]] || fail_launch "$where: ${shown@Q}... is longer than any host's line; write for example 'node-1 slots=8'"
        [[ "$line" =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
            fail_launch "$where: ${line@Q} does not say how many ranks the host takes; write for example '${line%%[!A-Za-z0-9_.:-]*} slots=8'"
        host="${BASH_REMATCH[1]}"
        slots+=("${BASH_REMATCH[2]}")
        [[ ${#BASH_REMATCH[2]} -le 4 ]] || fail_launch "$where: slots is ${BASH_REMATCH[2]}; a host takes at most 9999 ranks"
        # Nothing else reaches ssh and pdsh, to which a name could be an option, a file or a pattern.
        [[ "$host" =~ ^([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_]([A-Za-z0-9_.:-]*[A-Za-z0-9_])?$ ]] ||
            fail_launch "$where: ${host@Q} is no name or address of a host; write for example 'node-1 slots=8'"
        [[ "$known" != *" $host "* ]] || fail_launch "$where: $host stands there twice; give it one line with all its slots"
        known+="$host "
        hosts+=("$host")
    done <"$hostfile"
    [[ ${#hosts[@]} -gt 0 ]] || fail_launch "the hostfile $hostfile names no host; write a line 'name slots=8' for each"
    if [[ -n "$nodes" ]]; then
        ((nodes <= ${#hosts[@]})) ||
            fail_launch "--nodes is $nodes, but $hostfile names ${#hosts[@]} hosts; add some, or lower --nodes"
        hosts=("${hosts[@]:0:nodes}")
        slots=("${slots[@]:0:nodes}")
    fi
    local index
    for index in "${!hosts[@]}"; do
        if [[ -n "$gpus" ]]; then
            ((gpus <= slots[index])) ||
                fail_launch "--gpus is $gpus, but ${hosts[index]} has ${slots[index]} slots in $hostfile; raise them, or lower --gpus"
            slots[index]="$gpus"
        fi
        [[ ${#hosts[@]} == 1 || "${hosts[index]}" != localhost ]] ||
            fail_launch "$hostfile names localhost beside other hosts; give the name or address by which they reach it"
    done
}

# Says in one line what keeps a host from taking part. check_hosts [PROGRAM]: it must be there, too, once it was set up.
check_hosts() {
    command -v pdsh >/dev/null ||
        fail_launch "pdsh is not installed here; DeepSpeed starts the other hosts with it (Debian, Ubuntu: apt install pdsh)"
    local index port=() checks script
    if [[ -n "$ssh_port" ]]; then port=(-p "$ssh_port"); fi
    checks="$(mktemp -d)"
    # shellcheck disable=SC2016  # these are for the host's shell
    script='same="the project and its environment must lie at the same path on all hosts (a shared file system)"
[ -d "$2" ] || { echo "has no folder $2; $same"; exit; }
[ -z "$1" ] || [ -x "$1" ] || { echo "has no program $1; $same"; exit; }
for name in $(echo "$3" | tr , " "); do
    [ -e "/sys/class/net/$name" ] && continue
    echo "has no interface $name, but" $(ls /sys/class/net)"; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to names that all hosts have"
    exit
done
echo fine'
    script="$(printf '%q ' sh -c "$script" sh "${1:-}" "$root" "${GLOO_SOCKET_IFNAME:-}")"
    for index in "${!hosts[@]}"; do
        {
            ssh -n -o BatchMode=yes -o ConnectTimeout=15 ${port[@]+"${port[@]}"} "${hosts[index]}" "$script" 2>"$checks/$index.error" ||
                echo "cannot be used over ssh ($(tail -n 1 "$checks/$index.error")); 'ssh ${port[*]}${port:+ }${hosts[index]}' must work" \
                    "from here without a password"
        } >"$checks/$index" &
    done
    wait
    local problem=""
    for index in "${!hosts[@]}"; do
        if [[ "$(cat "$checks/$index")" != fine ]]; then problem="host ${hosts[index]} $(cat "$checks/$index")"; break; fi
    done
    rm -rf -- "$checks"
    [[ -z "$problem" ]] || fail_launch "$problem"
}

# A word as DeepSpeed must get it so that it comes out unchanged on a host: DeepSpeed puts words with spaces in double quotes, escaping
# only those inside, and others in none; pdsh fills in %h, %n and %u.
for_hosts() {
    local word="${1//%/%%}"
    if [[ "$word" == *" "* ]]; then
        printf '%s' "$word" | sed 's/[\\$`]/\\&/g'
    elif [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
        printf '%s' "$word"
    else
        printf "'%s'" "${word//\'/\'\\\'\'}"
    fi
}

# Lines for DeepSpeed's file of variables for the hosts: ours, then those of the user's own such file, which win.
variables_for_hosts() {
    local file line
    list_environment | sed 's/%/%%/g; s/[\\$`"]/\\&/g'
    for file in "${DS_ENV_FILE:-}" ~/.deepspeed_env "$root/.deepspeed_env"; do
        if [[ -n "$file" && -f "$file" ]]; then grep '^[^#]*=' -- "$file" || true; break; fi
    done
}

hosts=() slots=()
if [[ -n "$hostfile" ]]; then read_hostfile; fi
find_existing
python="${python:-$venv/bin/python}"
several=""
if [[ ${#hosts[@]} -gt 1 || ${#hosts[@]} == 1 && "${hosts[0]}" != localhost && "${hosts[0]}" != "$(hostname)" ]]; then several=yes; fi

if [[ -n "$several" ]]; then
    set_environment "${slots[0]}" "${hosts[@]}"
    [[ $takes_part == yes ]] ||
        echo "launch: this machine is none of the hosts: interfaces and devices are left to them; set GLOO_SOCKET_IFNAME" \
            "if ranks cannot find each other" >&2
    master_addr="${master_addr:-${hosts[0]}}" master_port="${master_port:-29500}"
    # What is started stands in a file of our own, cut to the hosts and slots that were asked for.
    list="$(for index in "${!hosts[@]}"; do printf '%s slots=%s\n' "${hosts[index]}" "${slots[index]}"; done)"
    launcher=(--force_multi --no_ssh_check --master_addr "$master_addr" --master_port "$master_port")
    if [[ -n "$ssh_port" ]]; then launcher+=(--ssh_port "$ssh_port"); fi
    words=("$verb" ${words[@]+"${words[@]}"})
    for index in "${!words[@]}"; do words[index]="$(for_hosts "${words[index]}")"; done
else
    ranks="${gpus:-${slots[0]:-$(count_gpus)}}"
    ranks=$((ranks > 0 ? ranks : 1))
    set_environment "$ranks"
    free='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
    launcher=(--master_port "${master_port:-$(plain_python -c "$free")}")
    if [[ "${CUDA_VISIBLE_DEVICES:-}" =~ ^[0-9]+(,[0-9]+)*$ && "${DS_ACCELERATOR:-}" != cpu ]]; then
        launcher+=(--include "localhost:$(cut -d, -f "1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")  # a number would mean the first of all GPUs
    else
        launcher+=(--num_gpus "$ranks")
    fi
    words=("$verb" ${words[@]+"${words[@]}"})
fi

# This module is the command `deepspeed`. An empty hostfile name keeps a cluster's own /job/hostfile out of it.
compose() {
    started=("$python" -m deepspeed.launcher.runner --quiet --hostfile "$1" "${launcher[@]}" --no_local_rank --module diffmoe_ep "${words[@]}")
}

if [[ -n "$print" ]]; then
    show_environment
    show_command cd "$root"
    if [[ -z "$several" ]]; then
        compose ""
        show_command "${started[@]}"
        exit
    fi
    compose HOSTS
    echo "DS_ENV_FILE=VARIABLES $(show_command "${started[@]}")"
    printf '\n# HOSTS is a temporary file of\n%s\n# VARIABLES is one of\n%s\n# ranks:\n' "$list" "$(variables_for_hosts)"
    first=0
    for index in "${!hosts[@]}"; do
        printf '#   %s: %s\n' "${hosts[index]}" "$(seq -s ' ' "$first" $((first + slots[index] - 1)))"
        first=$((first + slots[index]))
    done
    exit
fi

if [[ -z "$several" ]]; then
    setup
    cd -- "$root"
    compose ""
    exec "${started[@]}"
fi

# Hosts first: what is wrong with one should not be heard after minutes of installing.
if [[ -z "$origin" ]] && ! ready; then check_hosts; fi
setup
cd -- "$root"
check_hosts "$python"
work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT
# Without this ssh, and pdsh with it, would wait for ever for a host behind a cut link.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
printf '%s\n' "$list" >"$work/hosts"
variables_for_hosts >"$work/variables"
compose "$work/hosts"

# DeepSpeed's own way to stop would end every DeepSpeed job of this Python on the hosts; address and port tell ours apart.
# shellcheck disable=SC2317  # a trap calls it
stop() {
    trap '' INT TERM
    stopped=yes
    local names pattern="^[^ ]+ -u -m deepspeed[.]launcher[.]launch .*--master_addr=${master_addr//./[.]} --master_port=$master_port "
    printf -v names '%s,' "${hosts[@]}"
    printf 'launch: stopping the ranks on %s\n' "${hosts[*]}" >&2
    PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND+="${ssh_port:+ -p $ssh_port}" timeout 30 pdsh -w "${names%,}" "pkill -TERM -f '$pattern'" || true
}
set -m  # a process group of its own, which an interrupt at the terminal does not reach: `stop` does it in order
DS_ENV_FILE="$work/variables" "${started[@]}" </dev/null &
launched=$! stopped=""
trap 'stop' INT TERM
status=0
wait "$launched" || status=$?
while kill -0 "$launched" 2>/dev/null; do status=0; wait "$launched" || status=$?; done  # a signal ends `wait` before its time
if [[ -n "$stopped" ]]; then exit 143; fi
exit "$status"
