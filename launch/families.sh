#!/usr/bin/env bash
# Trains the four model families on the digits at equal activated compute, with the same seeds, scores them and lays them side by side.
# Does its own set-up. Three to four minutes for each of the twelve runs on one CPU core beside other work (2026-11-21). Arguments are
# overrides (key=value) of every run.
#
#   ./launch/families.sh
#   SEEDS="0" FAMILIES="dense diffmoe" ./launch/families.sh train.steps=200
#   RUNS=runs/experts-32 ./launch/families.sh model.num_experts=32

extras="prep,sample,eval,log"
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
case "${1:-}" in -h | --help) usage "${BASH_SOURCE[0]}"; exit ;; esac
runs="$(realpath -m -- "${RUNS:-$root/runs/families}")"
data="$(realpath -m -- "${DATA:-$root/data/digits}")"
setup
cd -- "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

"$python" -m data_prep digits --out "$data"
done=()
for seed in ${SEEDS:-0 1 2}; do
    for family in ${FAMILIES:-dense tc ec diffmoe}; do
        run="$runs/$family-$seed"
        printf '\n== %s\n' "$run"
        "$python" -m diffmoe_ep train configs/digits.yaml "folder=$run" "data.folder=$data/train" "model.family=$family" "seed=$seed" \
            parallel.expert_parallel=1 data.workers=0 sample.grid_every=0 "$@"
        "$python" -m diffmoe_ep evaluate "$run" --reference "$data/train" --heldout "$data/heldout" --out "$run/scores"
        done+=("$run")
    done
done
printf '\n== side by side\n'
"$python" -m diffmoe_ep compare "${done[@]}" --json "$runs/table.json"
