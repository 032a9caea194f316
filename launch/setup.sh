#!/usr/bin/env bash
# Makes the environment that everything else here runs in, or checks the one that it is given. Run it again at any time:
# what is there is kept, and a set-up that was interrupted is done anew.
#
#   ./launch/setup.sh            sets up .venv in the project's folder: torch first, then the rest, as constraints.txt pins it
#   ./launch/setup.sh --check    says what would be used and what is missing, and changes nothing
#
#   DIFFMOE_PYTHON=/path/to/python   an environment of yours; nothing is installed in it (an activated one counts, too)
#   PYTHON=/path/to/python           the Python (3.11 or newer) that .venv is made from
#
# The other scripts source this file and then have: $root, the project's folder; $python, the interpreter to use.

set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
extras="${extras:-prep,sample,eval,encode,fast,log,dev}"

say() { printf 'set-up: %s\n' "$*" >&2; }
fail() { printf 'set-up: %s\n' "$@" >&2; exit 1; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$1"; }

# Sets $python and $origin to the environment that the user named or activated, if there is one.
find_existing() {
    python="" origin=""
    if [[ -n "${DIFFMOE_PYTHON:-}" ]]; then
        python="$(command -v -- "$DIFFMOE_PYTHON" || true)"
        origin="DIFFMOE_PYTHON"
        [[ -n "$python" ]] || fail "DIFFMOE_PYTHON=$DIFFMOE_PYTHON is no program; name a Python, or unset it to use $venv"
    elif [[ -n "${VIRTUAL_ENV:-}" && ! "$VIRTUAL_ENV" -ef "$venv" ]]; then
        python="$VIRTUAL_ENV/bin/python"
        origin="the activated VIRTUAL_ENV"
        [[ -x "$python" ]] || fail "VIRTUAL_ENV=$VIRTUAL_ENV has no bin/python; run 'deactivate', or unset VIRTUAL_ENV, to use $venv"
    elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base ]]; then
        python="$CONDA_PREFIX/bin/python"
        origin="the activated conda environment"
        [[ -x "$python" ]] || fail "CONDA_PREFIX=$CONDA_PREFIX has no bin/python; run 'conda deactivate' to use $venv"
    fi
    if [[ "$python" == */* && "$python" != /* ]]; then python="$PWD/$python"; fi
}

# Names the packages that $python lacks, from their metadata alone: importing torch would take seconds.
check_existing() {
    "$python" - "$root" "$extras" "$origin" <<'PY' || exit 1
import sys

root, extras, origin = sys.argv[1:]
if sys.version_info < (3, 11):
    sys.exit("set-up: %s is Python %d.%d (%s); 3.11 or newer is needed" % ((origin,) + sys.version_info[:2] + (sys.executable,)))

import importlib.metadata
import re
import shlex
import tomllib
from pathlib import Path

project = tomllib.loads(Path(root, "pyproject.toml").read_text())["project"]
wanted = project["dependencies"] + [one for extra in extras.split(",") for one in project["optional-dependencies"][extra]]
canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()
names = sorted({canonical(re.match(r"[\w.-]+", one)[0]) for one in wanted})
pins = dict(line.split("==") for line in Path(root, "constraints.txt").read_text().split() if "==" in line)
pins = {canonical(name): version for name, version in pins.items()}
present = {canonical(one.metadata["Name"] or "") for one in importlib.metadata.distributions()}
missing = [name for name in names if name not in present]
if missing:
    pip = f"{shlex.quote(sys.executable)} -m pip install "
    commands = [pip + "torch==" + pins["torch"]] if "torch" in missing else []
    commands += [pip + " ".join(f"{name}=={pins[name]}" for name in missing if name != "torch")] if missing != ["torch"] else []
    sys.exit(
        f"set-up: {origin} ({sys.executable}) lacks {', '.join(missing)}. Two ways out:\n"
        f"  install them there:  {' && '.join(commands)}\n"
        f"  or leave it ('deactivate', or unset DIFFMOE_PYTHON) and run this again, which sets up {root}/.venv"
    )
PY
}

# Sets $base to a Python that can make .venv, or says for each one that was tried why it cannot.
find_base() {
    local candidate reason reasons=()
    # 3.11 first: the pinned versions are tested with it. They have wheels up to 3.13.
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        base="$(command -v -- "$candidate" || true)"
        if [[ -z "$base" ]]; then
            reason="not found"
        elif ! reason="$("$base" -c 'import sys; print("is Python %d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))' 2>&1)"; then
            reason="${reason%%$'\n'*}"
        elif ! "$base" -c 'import venv, ensurepip' 2>/dev/null; then
            reason="$reason, without the modules venv and ensurepip (Debian, Ubuntu: install its package python3-venv)"
        else
            return 0
        fi
        reasons+=("  $candidate: $reason")
    done
    fail "no Python 3.11 or newer that can make a virtual environment:" "${reasons[@]}" "name one with PYTHON=/path/to/python, or an environment with DIFFMOE_PYTHON"
}

# What .venv was made for; a copied folder, or other pins, make another one.
wanted_stamp() { { printf '%s\n' "$root"; cat "$root/pyproject.toml" "$root/constraints.txt"; } | cksum; }

ready() { [[ -x "$venv/bin/python" && -f "$venv/stamp" && "$(cat "$venv/stamp")" == "$(wanted_stamp)" ]]; }

# pip with its output in the log, whose end is shown when it fails; the user's own pip configuration holds.
# Left to itself, pip would compile every file of torch and more, most of the whole time; `import_once` does those in use.
pip() {
    local options=(--disable-pip-version-check --no-compile --constraint "$root/constraints.txt")
    PIP_USER=0 DS_BUILD_OPS=0 "$venv/bin/python" -m pip install "${options[@]}" "$@" >>"$log" 2>&1 || fail_with_log "pip install $*"
}

# Compiles what every start imports, also for users whose Python is told to write no bytecode, and shows that it can be imported.
import_once() {
    local modules="torch.distributed.checkpoint, torch.utils.tensorboard, deepspeed, megatron.core.parallel_state, webdataset, yaml, tqdm"
    modules+=", sklearn.svm, sklearn.datasets, scipy.linalg, matplotlib.pyplot, PIL.Image, pytest, hypothesis"
    PYTHONDONTWRITEBYTECODE="" DS_ACCELERATOR=cpu "$venv/bin/python" -c "import $modules" >>"$log" 2>&1 || fail_with_log "importing what was installed"
}

fail_with_log() { tail -n 20 -- "$log" >&2; fail "$1 failed; the lines above are the end of $log"; }

install() {
    log="$root/.venv.log"
    local started=$SECONDS
    exec 9>>"$log"
    if command -v flock >/dev/null; then
        flock -n 9 || { say "another set-up of $root is at work; waiting for it"; flock 9; }
    fi
    if ready; then return; fi
    : >"$log"
    command -v g++ >/dev/null || say "no g++ found: only compute.compile and DeepSpeed's optional operators need one"
    if [[ -e "$venv/unfinished" ]] || ! "$venv/bin/python" -m pip --version >>"$log" 2>&1; then
        find_base
        say "making $venv with $("$base" -V 2>&1) ($base)"
        "$base" -m venv --clear "$venv" >>"$log" 2>&1 || fail_with_log "$base -m venv $venv"
    fi
    touch "$venv/unfinished"
    say "installing torch, the largest part"
    pip "$(grep '^torch==' "$root/constraints.txt")"
    say "installing what DeepSpeed is built with"
    pip ninja numpy packaging setuptools wheel
    say "installing DeepSpeed, Megatron-core and the rest"
    pip --no-build-isolation --editable "${root}[prep,sample,eval,encode,fast,log,dev]"
    say "importing all of it once"
    import_once
    rm "$venv/unfinished"
    wanted_stamp >"$venv/stamp"
    exec 9>&-
    say "done in $((SECONDS - started)) s: $venv"
}

setup() {
    find_existing
    if [[ -n "$python" ]]; then
        check_existing
        say "using $python, from $origin"
        export TORCH_EXTENSIONS_DIR="$root/.torch_extensions"
    else
        ready || install
        python="$venv/bin/python"
        export TORCH_EXTENSIONS_DIR="$venv/torch_extensions"  # private: a stale lock in a shared one makes every later start hang
    fi
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    case "${1:-}" in
        -h | --help) usage "$0" ;;
        --check)
            find_existing
            if [[ -n "$python" ]]; then
                check_existing
                say "$python, from $origin, has all that is needed"
            elif ready; then
                say "$venv is ready"
            else
                find_base
                fail "$venv is not set up yet; ./launch/setup.sh would make it from $base"
            fi
            ;;
        "") setup ;;
        *) fail "unknown argument $1; see ./launch/setup.sh --help" ;;
    esac
fi
