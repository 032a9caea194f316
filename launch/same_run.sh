#!/usr/bin/env bash
# The promise as a picture: trains the digits in six layouts of ranks, expert parallelism and ZeRO stage, and draws their
# losses on one another and their distances from the run on one rank. The learning rate is the paper's 1e-4: at the digits'
# own 4e-3 a training amplifies rounding, whatever its layout. Four ranks at most, on CPUs: a few minutes on two cores. Sets
# up its environment first (launch/setup.sh). Finished runs are kept. Arguments are overrides (key=value) of every run.
#
#   ./launch/same_run.sh                                              .github/same_run.png, from runs/same_run
#   RUNS=runs/short OUT=a.png ./launch/same_run.sh train.steps=40      another training, elsewhere

extras="prep,log"
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
case "${1:-}" in -h | --help) usage "${BASH_SOURCE[0]}"; exit ;; esac
runs="$(realpath -m -- "${RUNS:-$root/runs/same_run}")"
data="$(realpath -m -- "${DATA:-$root/data/digits}")"
out="$(realpath -m -- "${OUT:-$root/.github/same_run.png}")"
setup
cd -- "$root"
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""

"$python" -m data_prep digits --out "$data"
drawn=()
for layout in "1 1 0" "2 1 1" "2 2 2" "4 2 1" "4 4 2" "4 2 0"; do
    read -r world expert zero <<<"$layout"
    run="$runs/$world-$expert-$zero"
    printf '\n== ranks %s, expert parallelism %s, ZeRO %s\n' "$world" "$expert" "$zero"
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$world" -m diffmoe_ep train configs/digits.yaml "folder=$run" \
        "data.folder=$data/train" "parallel.expert_parallel=$expert" "parallel.zero_stage=$zero" train.precision=float32 train.steps=100 \
        train.optimizer.lr=1e-4 data.workers=0 log.every=1 sample.grid_every=0 "$@"
    drawn+=("$run")
done
"$python" -m diffmoe_ep.verify.layouts "$out" "${drawn[@]}"
