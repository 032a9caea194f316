#!/usr/bin/env bash
# From real images to samples on two ranks: prepares 1,797 handwritten digits, trains a DiffMoE model whose experts are
# sharded over two ranks with DeepSpeed's launcher, draws samples and scores them. Sets up its environment first
# (launch/setup.sh). Run it again and it goes on where it was, or says that it is finished.
#
#   ./launch/quickstart.sh
#   ./launch/quickstart.sh train.steps=100                 other settings: any key=value of configs/digits.yaml
#   RUN=runs/mine ./launch/quickstart.sh pool.span=1       another run folder (a finished run keeps its settings)
#   DATA=/big/digits ./launch/quickstart.sh                another place for the data (usual: data/digits)

extras="prep,sample,eval,log"
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
case "${1:-}" in -h | --help) usage "${BASH_SOURCE[0]}"; exit ;; esac
run="$(realpath -m -- "${RUN:-$root/runs/digits}")"
data="$(realpath -m -- "${DATA:-$root/data/digits}")"
setup
cd -- "$root"

title() { printf '\n== %s\n' "$*"; }

title "data: $data"
"$python" -m data_prep digits --out "$data"

gpus=0
if command -v nvidia-smi >/dev/null; then gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"; fi
if ((gpus >= 2)); then
    place="2 of $gpus GPUs"
else
    place="the CPU ($gpus GPUs found; two ranks need two)"
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
title "training: two ranks on $place; the first step comes after about 20 s"
# This module is the command `deepspeed`. An empty hostfile name keeps a cluster's own /job/hostfile out of it.
"$python" -m deepspeed.launcher.runner --quiet --hostfile "" --num_gpus 2 --master_port "$port" --no_local_rank \
    --module diffmoe_ep train configs/digits.yaml "folder=$run" "data.folder=$data/train" "$@"

title "samples"
"$python" -m diffmoe_ep sample "$run" --out "$run/drawn" --samples 100

title "scores"
"$python" -m diffmoe_ep evaluate "$run" --reference "$data/train" --heldout "$data/heldout" --samples 500 --out "$run/scores"

diffmoe="$python -m diffmoe_ep"
if [[ "$python" == "$venv"/* ]]; then diffmoe=".venv/bin/diffmoe"; fi
shown="${run#"$root"/}"
cat <<END

== where to look (in $root)
  $shown/drawn/grid.png      100 samples, a column for each digit
  $shown/samples/            the same grid while it was training
  $shown/curves.png          loss and capacity over the steps; the numbers are in metrics.jsonl beside it
  $shown/checkpoints/        $(cat "$run/checkpoints/latest") is the newest
  $shown/scores/scores.json  the scores above

== three things to try next (from $root)
  $diffmoe sample $shown sample.guidance=3 --classes 3,8 --out $shown/threes-and-eights
  RUN=runs/digits-16 ./launch/quickstart.sh model.num_experts=16     twice the experts at the same compute
  RUN=runs/digits-own ./launch/quickstart.sh pool.span=1             each sample chooses for itself: what does the wide pool bring?
END
