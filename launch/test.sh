#!/usr/bin/env bash
# Checks everything: ruff, then mypy, then the tests. All of them run, also after one failed; the last lines sum them up.
# Sets up its environment first (launch/setup.sh). Arguments go to pytest.
#
#   ./launch/test.sh                 all of it, as CI does
#   ./launch/test.sh --fast          without the tests marked slow: under two minutes on two cores, before every push
#   ./launch/test.sh --lint          ruff and mypy alone
#   ./launch/test.sh -x tests/moe    some of the tests
#
#   TEST_PROCESSES=1                 processes that share the tests (usual: one a core, at most four, each with 5 GB of memory)

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
tests=yes chosen=() dist=loadfile
case "${1:-}" in
    -h | --help) usage "${BASH_SOURCE[0]}"; exit ;;
    --fast) chosen=(-m "not slow") dist=loadgroup; shift ;;
    --lint) tests=""; shift ;;
esac
setup
cd -- "$root"
export OMP_NUM_THREADS=1

# Each process has ranks of its own, which live as long as it does.
count_processes() {
    local cores memory
    cores="$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)"  # nproc goes by OMP_NUM_THREADS
    memory="$(awk '/^MemAvailable/ {print int($2 / 5e6)}' /proc/meminfo 2>/dev/null || true)"
    printf '%s\n' "$cores" "${memory:-1}" 4 | sort -n | head -n 1
}

failed=()
check() {
    local name="$1" started=$SECONDS status=0
    shift
    printf '\n== %s\n' "$name"
    "$python" -m "$@" || status=$?
    printf '== %s: %s after %d s\n' "$name" "$([[ $status == 0 ]] && echo passed || echo "FAILED (exit status $status)")" $((SECONDS - started))
    [[ $status == 0 ]] || failed+=("$name")
}
check ruff ruff check .
check format ruff format --check .
check mypy mypy
if [[ -n "$tests" ]]; then
    processes="${TEST_PROCESSES:-$(count_processes)}"
    parallel=()
    if ((processes > 1)); then parallel=(-n "$processes" --dist "$dist"); fi
    check pytest pytest -q ${parallel[@]+"${parallel[@]}"} ${chosen[@]+"${chosen[@]}"} "$@"
fi

if [[ ${#failed[@]} -gt 0 ]]; then
    printf '\nfailed: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nall passed\n'
