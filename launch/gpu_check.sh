#!/usr/bin/env bash
# Checks and measures everything that needs a GPU, in one call of a few minutes: the tests marked `gpu`, then training speed of
# the digits model in float32 and bf16; a table comes last. Sets up its environment first (launch/setup.sh).
#
#   ./launch/gpu_check.sh

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
case "${1:-}" in -h | --help) usage "${BASH_SOURCE[0]}"; exit ;; esac
setup
cd -- "$root"
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu_check: torch finds no CUDA device here; nothing was checked")'

status=0
"$python" -m pytest -q -m gpu -rs || status=$?
"$python" -m data_prep digits --out data/digits
work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT
for precision in float32 bf16; do
    "$python" -m diffmoe_ep train configs/digits.yaml "folder=$work/$precision" "train.precision=$precision" train.steps=200 train.batch=1024 \
        log.every=20 sample.grid_every=0 checkpoint.every=1000 parallel.expert=1 || status=$?
done
"$python" - "$work" <<'PY'
import json, statistics, sys
from pathlib import Path

import torch

print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
print(f"{'digits model, batch 1024':<26}{'samples/s (median)':>20}{'data wait':>12}{'last loss':>12}")
for precision in ("float32", "bf16"):
    lines = [json.loads(line) for line in (Path(sys.argv[1]) / precision / "metrics.jsonl").read_text().splitlines()][1:]
    speed, wait = (statistics.median(line[key] for line in lines) for key in ("samples_per_second", "data_wait"))
    print(f"{precision:<26}{speed:>20,.0f}{wait:>12.1%}{lines[-1]['loss']:>12.4f}")
PY
exit "$status"
