#!/usr/bin/env bash
# Text to image from nothing on two ranks: makes a tiny text encoder, prepares canvases of handwritten digits with captions, trains a
# dense model and a DiffMoE of equal activated compute, fine-tunes both on a cleaner subset, draws prompts, and scores how well they are
# followed (single object, two objects, counting, position) before and after. 38 minutes on two CPU cores (2026-11-21); the table is last.
# Sets up its environment first (launch/setup.sh). Run it again and it goes on where it was, or says that it is finished.
#
#   ./launch/text_to_image.sh
#   FAMILIES=diffmoe ./launch/text_to_image.sh train.optimizer.lr=1e-3      one family; any key=value, of every run
#   STEPS=200 SFT_STEPS=50 RUNS=runs/short ./launch/text_to_image.sh          shorter, elsewhere (a finished run keeps its settings)
#   DATA=/big/captions ENCODER=/big/tiny_t5 ./launch/text_to_image.sh         other places (usual: data/digits_captions, data/tiny_t5)
#   SAMPLES=800 ./launch/text_to_image.sh                                     pictures that are scored of each model (usual: 400)

extras="prep,sample,eval,encode,log"
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
case "${1:-}" in -h | --help) usage "${BASH_SOURCE[0]}"; exit ;; esac
runs="$(realpath -m -- "${RUNS:-$root/runs/text_to_image}")"
data="$(realpath -m -- "${DATA:-$root/data/digits_captions}")"
encoder="$(realpath -m -- "${ENCODER:-$root/data/tiny_t5}")"
samples="${SAMPLES:-400}"
setup
cd -- "$root"
started=$SECONDS

title() { printf '\n== %s (%d min since the start)\n' "$*" $(((SECONDS - started) / 60)); }

gpus=0
if command -v nvidia-smi >/dev/null; then gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"; fi
if ((gpus < 2)); then export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# two MODULE ...: starts a module on two ranks with DeepSpeed's launcher. An empty hostfile name keeps a cluster's own /job/hostfile out.
two() {
    local port
    port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    "$python" -m deepspeed.launcher.runner --quiet --hostfile "" --num_gpus 2 --master_port "$port" --no_local_rank --module "$@"
}

title "text encoder: $encoder"
"$python" -m data_prep tiny_t5 --out "$encoder"

title "data: $data, and the cleaner subset $data-clean"
text=(--t5 "$encoder" --t5-length 96)
two data_prep digits_captions --out "$data" --samples 12000 "${text[@]}"
two data_prep digits_captions --out "$data-clean" --samples 6000 --heldout 100 --legible 0.5 --caption-weights 2,1,2 "${text[@]}"

# score RUN: judges its pictures, unless that was done with its newest checkpoint.
score() {
    if [[ "$1/scores/composition.json" -nt "$1/checkpoints/latest" ]]; then
        echo "$1/scores/composition.json is there"
    else
        two diffmoe_ep evaluate "$1" --composition --reference "$data/train" --heldout "$data/heldout" --samples "$samples" --out "$1/scores"
    fi
}

done=()
for family in ${FAMILIES:-dense diffmoe}; do
    same=("text.folder=$encoder" "$@")
    run="$runs/$family"
    title "pretraining: $run"
    two diffmoe_ep train "configs/text/digits_$family.yaml" "folder=$run" "data.folder=$data/train" ${STEPS:+"train.steps=$STEPS"} "${same[@]}"
    score "$run"
    title "fine-tuning on the cleaner subset: $run-sft"
    sft=("init_from=$run" train.optimizer.lr=5e-4 "train.steps=${SFT_STEPS:-600}" train.schedule.warmup=20)
    two diffmoe_ep train "configs/text/digits_$family.yaml" "folder=$run-sft" "data.folder=$data-clean/train" "${sft[@]}" "${same[@]}"
    score "$run-sft"
    "$python" -m diffmoe_ep sample "$run-sft" --out "$run-sft/drawn" --per-prompt 6 --prompt "one 3" --prompt "one 2 and one 7" \
        --prompt "three 5s" --prompt "an 8 above a 4" --prompt "two digits: a 6 at the top left and a 9 at the bottom right" \
        --prompt "three digits: a 1 at the top left, a 2 at the centre and a 3 at the bottom right"
    done+=("$run" "$run-sft")
done

title "pictures"
printf '  %s\n' "${done[@]/%//scores/grid.png}" "$runs/*-sft/drawn/grid.png"
title "how well prompts are followed: share of $samples pictures that show what was asked for; shuffled: beside the prompts of others"
"$python" -m diffmoe_ep compare --composition "${done[@]}" --json "$runs/table.json"
