#!/usr/bin/env bash
# Starts a training under torchrun: on this machine, or on hosts without ssh, where the same line is started on each of them by
# whatever starts things there (a person, a batch system, Kubernetes). The number of hosts may change while it trains.
#
#   ./launch/torchrun.sh --gpus 2 configs/digits.yaml                             this machine: two ranks
#   ./launch/torchrun.sh --nnodes 2 --rdzv-endpoint node1:29400 configs/digits.yaml parallel.expert_parallel=8       on each host
#   ./launch/torchrun.sh --nnodes 1:2 --rdzv-endpoint node1:29400 configs/digits.yaml parallel.elastic=true          one or two hosts
#   ./launch/torchrun.sh --nnodes 2 --rdzv-endpoint node1:29400 --verb verify     another verb than train
#
#   --nnodes N | MIN:MAX     hosts (default: 1). With MIN:MAX the run starts again on those that are left, or that have come, and
#                            goes on at its last checkpoint
#   --rdzv-endpoint H:PORT   where hosts meet: a free port of one of them, by the name or address at which all reach it (default port:
#                            29400). A run outlives any host but that one
#   --rdzv-id ID             tells this run from others that meet there (default: diffmoe)
#   --rdzv-conf KEY=N,...    torchrun's own settings of the meeting: join_timeout, last_call_timeout, ...
#   --gpus N                 ranks on each host (default: all its GPUs; on a CPU one)
#   --max-restarts N         how often the ranks may be started again after one of them failed (default: 0, or 100 with MIN:MAX)
#   --shutdown-timeout S     seconds that ranks have to save when torchrun is told to stop (default: 30)
#   --verb VERB              what to start: train (default), verify, ...
#   --print                  show the environment and the command, and start nothing
#
# Ranks are numbered host by host and expert groups are runs of neighbours. All hosts need the run folder and the data at the same
# paths (a shared file system), and the project, wherever it lies. Variables for the ranks: launch/environment.sh.

extras="log"
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

nnodes=1 endpoint="" id=diffmoe conf="" gpus="" restarts="" grace=30 verb=train print=""
while [[ "${1:-}" == -* ]]; do
    option="${1%%=*}"
    case "$option" in
        -h | --help) usage "${BASH_SOURCE[0]}"; exit ;;
        --print) print=yes; shift; continue ;;
        --) shift; break ;;
    esac
    if [[ "$1" == *=* ]]; then value="${1#*=}"; shift; else value="${2:-}"; shift; [[ $# == 0 ]] || shift; fi
    [[ -n "$value" && "$value" != -* ]] || fail_launch "$option wants a value; see ./launch/torchrun.sh --help"
    case "$option" in
        --gpus | --shutdown-timeout)
            [[ "$value" =~ ^[1-9][0-9]{0,5}$ ]] || fail_launch "$option is $value; give a whole number, at least 1"
            ;;
        --max-restarts) [[ "$value" =~ ^[0-9]{1,6}$ ]] || fail_launch "$option is $value; give a whole number" ;;
        --nnodes)
            if [[ ! "$value" =~ ^([1-9][0-9]{0,5})(:([1-9][0-9]{0,5}))?$ ]] || ((BASH_REMATCH[1] > ${BASH_REMATCH[3]:-999999})); then
                fail_launch "--nnodes is $value; give a number of hosts, or MIN:MAX with MIN not above MAX"
            fi
            ;;
        --rdzv-endpoint)
            if [[ ! "$value" =~ ^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:([1-9][0-9]{0,4}))?$ ]] || ((${BASH_REMATCH[3]:-0} > 65535)); then
                fail_launch "--rdzv-endpoint is $value; give HOST:PORT, for example node1:29400"
            fi
            host="${BASH_REMATCH[1]}" port="${BASH_REMATCH[3]:-29400}"
            ;;
        --rdzv-conf)
            [[ "$value" =~ ^[a-z_]+=[0-9]+(,[a-z_]+=[0-9]+)*$ ]] || fail_launch "--rdzv-conf is $value; give KEY=N,..., for example join_timeout=900"
            ;;
    esac
    case "$option" in
        --nnodes) nnodes="$value" ;;
        --rdzv-endpoint) endpoint="$host:$port" ;;
        --rdzv-id) id="$value" ;;
        --rdzv-conf) conf="$value" ;;
        --gpus) gpus="$value" ;;
        --max-restarts) restarts="$value" ;;
        --shutdown-timeout) grace="$value" ;;
        --verb) verb="$value" ;;
        *) fail_launch "unknown option $option; see ./launch/torchrun.sh --help (settings are given as key=value)" ;;
    esac
done
[[ $# -gt 0 || $verb != train ]] || fail_launch "which config? For example: ./launch/torchrun.sh configs/digits.yaml"
[[ $nnodes == 1 || -n "$endpoint" ]] ||
    fail_launch "--nnodes is $nnodes, but where do the hosts meet? Give all the same --rdzv-endpoint HOST:PORT, HOST being one of them"
words=("$@")
if [[ -f "${1:-}" ]]; then words[0]="$(realpath -- "$1")"; fi
if [[ -z "$restarts" ]]; then restarts=0; if [[ $nnodes == *:* ]]; then restarts=100; fi; fi

# wait_for NAME [PORT]: until the name is known, as that of a host that is started later is not yet, and somebody listens at the port.
wait_for() {
    plain_python - "$@" <<'PY' || fail_launch "nobody answers at $* after ten minutes; start the same command there, or correct --rdzv-endpoint"
import socket
import sys
import time

host, port = sys.argv[1], sys.argv[2:]
end, told = time.monotonic() + 600, False
while True:
    try:
        if port:
            socket.create_connection((host, int(port[0])), timeout=5).close()
        else:
            socket.getaddrinfo(host, None)
        break
    except OSError as error:
        if not told:
            print(f"launch: waiting for {' '.join(sys.argv[1:])} ({error})", file=sys.stderr, flush=True)
        told = True
        if time.monotonic() > end:
            sys.exit(1)
        time.sleep(1)
PY
}

find_existing
python="${python:-$venv/bin/python}"
ranks="${gpus:-$(count_gpus)}"
ranks=$((ranks > 0 ? ranks : 1))
if [[ -z "$endpoint" ]]; then
    set_environment "$ranks"
    meeting=(--standalone)
else
    host="${host#[}" host="${host%]}"
    if [[ -z "$print" ]]; then wait_for "$host"; fi
    set_environment "$ranks" localhost "$host"
    # Torchrun would find out by the machine's name whether it is that host, and tell ranks the first host's name, not its address:
    # both fail where a name leads to another interface, or nowhere.
    meeting=(--rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$id")
    # By torch's shared store (2.13) a host that comes later waits for an address that was told in an earlier round alone.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    meeting+=(--rdzv-conf "is_host=$((others == 0))${conf:+,$conf}" ${address:+--local-addr "$address"})
fi
started=("$python" -m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$ranks" "${meeting[@]}")
started+=(--max-restarts "$restarts" --shutdown-timeout "$grace" -m diffmoe_ep "$verb" ${words[@]+"${words[@]}"})

if [[ -n "$print" ]]; then
    show_environment
    show_command cd "$root"
    show_command "${started[@]}"
    exit
fi
setup
cd -- "$root"
if [[ -n "$endpoint" && $others != 0 ]]; then wait_for "$host" "$port"; fi
exec "${started[@]}"
