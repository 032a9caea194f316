#!/usr/bin/env bash
# Checks everything: ruff, then mypy, then the tests. All three run, also after one failed; the last lines sum them up.
# Sets up its environment first (launch/setup.sh). Arguments go to pytest.
#
#   ./launch/test.sh
#   ./launch/test.sh -x tests/moe

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
case "${1:-}" in -h | --help) usage "${BASH_SOURCE[0]}"; exit ;; esac
setup
cd -- "$root"
export OMP_NUM_THREADS=1

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
check mypy mypy
check pytest pytest -q "$@"

if [[ ${#failed[@]} -gt 0 ]]; then
    printf '\nfailed: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nall passed\n'
