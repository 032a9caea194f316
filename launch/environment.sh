#!/usr/bin/env bash
# The one place for what ranks need in their environment: network interfaces and messages of NCCL and gloo, threads, the device.
# The launchers source it and hand what it sets to every host. What you export yourself wins;
# edit `set_environment` for a cluster of yours. Run by itself it shows what it would set on this machine.
#
#   ./launch/environment.sh
#   GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5 ./launch/deepspeed.sh --hostfile hosts configs/digits.yaml
#   DIFFMOE_EXPORT="HTTPS_PROXY HF_HOME" ./launch/deepspeed.sh ...     further variables of yours that all ranks should have

# What goes to every host: all that is set and begins so, and what DIFFMOE_EXPORT names.
passed_on="NCCL_ GLOO_ TORCH_ PYTORCH_ OMP_ MKL_ DS_ACCELERATOR FI_ UCX_ CUDA_DEVICE_ CUDA_LAUNCH_"

# set_environment RANKS [HOST...]: RANKS on each host, and all hosts when there are several (this machine may be one of them).
set_environment() {
    local ranks="$1" name
    interface="" address="" others=0
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
    # Numbers of rows change from step to step: blocks of memory that can grow leave no holes that nothing fits in.
    if [[ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]]; then export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"; fi
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

count_cores() { env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc; }  # nproc goes by both

# Any Python will do to look up hosts and ports, before anything is installed: the environment's where there is one.
plain_python() {
    local candidate
    for candidate in "$python" "${PYTHON:-}" python3 python3.11 python3.12 python3.13; do
        if [[ -n "$candidate" ]] && "$candidate" -c '' 2>/dev/null; then "$candidate" "$@"; return; fi
    done
    fail_launch "there is no Python here to look up hosts and ports with; name one with PYTHON=/path/to/python"
}

# Sets $interface and $address to those that lead from here to the other hosts, $others to how many hosts are not known to be this
# machine, and $takes_part to whether it is one of them.
# shellcheck disable=SC2034  # launch/torchrun.sh uses what is set
find_interface() {
    local found
    found="$(plain_python - "$@" <<'PY'
import array
import fcntl
import socket
import struct
import sys

names = {}  # address: interface
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    table = array.array("B", bytes(1 << 16))
    asked = fcntl.ioctl(probe.fileno(), 0x8912, struct.pack("iP", len(table), table.buffer_info()[0]))  # SIOCGIFCONF
    rows = table.tobytes()[: struct.unpack("iP", asked)[0]]
for row in (rows[start : start + 40] for start in range(0, len(rows), 40)):
    names[socket.inet_ntoa(row[20:24])] = row[:16].split(b"\0")[0].decode().split(":")[0]
try:
    with open("/proc/net/if_inet6") as lines:
        for line in lines:
            names[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line.split()[0]))] = line.split()[-1]
except OSError:
    pass  # a machine without IPv6


def address_of(host):
    try:
        return socket.getaddrinfo(host, None)[0][4][0].split("%")[0]
    except OSError:
        return ""  # a name that only ssh knows


def is_loopback(address):
    return address.startswith("127.") or address == "::1"


def is_here(address):
    return address in names or is_loopback(address)


addresses = [address_of(host) for host in sys.argv[1:]]
others = [(host, address) for host, address in zip(sys.argv[1:], addresses) if address and not is_here(address)]
elsewhere = len(addresses) - sum(map(is_here, addresses))
own = [address for address in addresses if address in names and not is_loopback(address)]
if elsewhere == len(addresses):
    print("elsewhere")
elif others:
    host, address = others[0]
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # asks for the route; a datagram socket sends nothing by this
            source = probe.getsockname()[0].split("%")[0]
            print("here", elsewhere, source, names[source])
    except (OSError, KeyError):
        print("unreachable", f"{host} ({address})" if host != address else host)
else:
    print("here", elsewhere, *([own[0], names[own[0]]] if own else []))
PY
)"
    case "$found" in
        elsewhere) takes_part=no ;;
        unreachable*)
            [[ -n "${GLOO_SOCKET_IFNAME:-}" ]] ||
                fail_launch "no network leads from this machine to ${found#unreachable }; correct the host's name, or name the interface with" \
                    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            ;;
        *) read -r _ others address interface <<<"$found" ;;
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
