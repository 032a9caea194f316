#!/usr/bin/env bash
# The one place for what ranks need in their environment: network interfaces and messages of NCCL and gloo, threads, the device.
# launch/deepspeed.sh and launch/slurm.sbatch source it and hand what it sets to every host. What you export yourself wins;
# edit `set_environment` for a cluster of yours. Run by itself it shows what it would set on this machine.
#
#   ./launch/environment.sh
#   GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5 ./launch/deepspeed.sh --hostfile hosts configs/digits.yaml
#   DIFFMOE_EXPORT="HTTPS_PROXY HF_HOME" ./launch/deepspeed.sh ...     further variables of yours that all ranks should have

# What goes to every host: all that is set and begins so, and what DIFFMOE_EXPORT names.
passed_on="NCCL_ GLOO_ TORCH_ PYTORCH_ OMP_ MKL_ DS_ACCELERATOR FI_ UCX_ CUDA_DEVICE_ CUDA_LAUNCH_"

# set_environment RANKS [HOST...]: RANKS on each host, and all hosts when there are several (this machine may be one of them).
set_environment() {
    local ranks="$1" interface="" name
    shift
    for name in ${DIFFMOE_EXPORT:-}; do
        [[ -n "${!name+set}" ]] || fail_launch "DIFFMOE_EXPORT names $name, which is not set; export it, or take it out"
    done
    takes_part=yes
    if (($# > 1)); then
        find_interface "$@"
        if [[ -n "$interface" ]]; then
            # Without a name gloo takes what the host's own name means, often loopback. NCCL makes its first contact over this interface;
            # data go over InfiniBand where there is some.
            export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
            export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$GLOO_SOCKET_IFNAME}"
        fi
    fi
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    if [[ $takes_part == yes ]]; then
        if (($(count_gpus) == 0)); then export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"; fi
        local share=$(($(count_cores) / ranks))
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share < 1 ? 1 : share > 8 ? 8 : share))}"  # more seldom help, and loaders need some
    else
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
    fi
}

count_gpus() {
    if [[ "${DS_ACCELERATOR:-}" == cpu || -n "${CUDA_VISIBLE_DEVICES+set}" && -z "$CUDA_VISIBLE_DEVICES" ]]; then
        echo 0
    elif [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
        awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

count_cores() { "$python" -c 'import os; print(len(os.sched_getaffinity(0)))'; }

# Sets $interface to the one that leads from here to the other hosts, and $takes_part to whether this machine is one of the hosts.
find_interface() {
    local found
    found="$("$python" - "$@" <<'PY'
import socket
import sys

import psutil

names = {one.address.split("%")[0]: name for name, addresses in psutil.net_if_addrs().items() for one in addresses}


def address_of(host):
    try:
        return socket.getaddrinfo(host, None)[0][4][0].split("%")[0]
    except OSError:
        return ""  # a name that only ssh knows


def is_here(address):
    return address in names or address.startswith("127.") or address == "::1"


addresses = [address_of(host) for host in sys.argv[1:]]
others = [(host, address) for host, address in zip(sys.argv[1:], addresses) if address and not is_here(address)]
if not any(map(is_here, addresses)):
    print("elsewhere")
elif others:
    host, address = others[0]
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # asks for the route; a datagram socket sends nothing by this
            print("here", names[probe.getsockname()[0].split("%")[0]])
    except (OSError, KeyError):
        print("unreachable", f"{host} ({address})" if host != address else host)
else:
    print("here")
PY
)"
    case "$found" in
        elsewhere) takes_part=no ;;
        unreachable*)
            [[ -n "${GLOO_SOCKET_IFNAME:-}" ]] ||
                fail_launch "no network leads from this machine to ${found#unreachable }; correct the host's name, or name the interface with" \
                    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            ;;
        *) interface="${found#here}" interface="${interface# }" ;;
    esac
    local name names=()
    IFS=, read -ra names <<<"${GLOO_SOCKET_IFNAME:-}"
    if [[ $takes_part == yes ]]; then
        for name in ${names[@]+"${names[@]}"}; do
            [[ -e "/sys/class/net/$name" ]] ||
                fail_launch "GLOO_SOCKET_IFNAME names the interface $name, which this machine has not; it has" \
                    "$(cd /sys/class/net && echo *)${interface:+, and $interface leads to the other hosts}"
        done
    fi
}

# Lines NAME=value of all that goes to every host.
list_environment() {
    local name prefix
    while read -r name; do
        for prefix in $passed_on; do
            if [[ "$name" == "$prefix"* ]]; then printf '%s=%s\n' "$name" "${!name}"; fi
        done
    done < <(compgen -e)
    for name in ${DIFFMOE_EXPORT:-}; do
        printf '%s=%s\n' "$name" "${!name}"
    done
}

fail_launch() { printf 'launch: %s\n' "$*" >&2; exit 1; }

# show_command WORD...: the line that would do it, quoted so that it can be typed.
show_command() {
    local shown
    printf -v shown '%q ' "$@"
    printf '%s\n' "${shown% }"
}

show_environment() {
    local line
    while IFS= read -r line; do printf 'export %s=%q\n' "${line%%=*}" "${line#*=}"; done < <(list_environment)
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    # shellcheck source=launch/setup.sh
    source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
    case "${1:-}" in
        -h | --help) usage "$0"; exit ;;
        ?*) fail_launch "unknown argument $1; see ./launch/environment.sh --help" ;;
    esac
    find_existing
    python="${python:-$venv/bin/python}"
    set_environment "$(($(count_gpus) > 0 ? $(count_gpus) : 1))"
    show_environment
fi
