#!/usr/bin/env bash
# Checks and measures everything that needs a GPU in one call, in under ten minutes on one card; no GPU has run it yet.
# It runs real training steps of the 4.6B text-to-image model beside the plan (where a card holds 130 GB), the tests marked
# `gpu`, the laws (diffmoe verify), an MoE layer and whole steps of L-E16 in bf16 beside their dense twins, and the digits: the
# numbers that matter most first, each stage with a limit. A table comes last; files go to gpu_check/.
# Sets up its environment first (launch/setup.sh).
#
#   ./launch/gpu_check.sh                                     with configs/cluster/h200x1.yaml
#   CLUSTER=mine.yaml ./launch/gpu_check.sh                    on another card
#   WHEELS=.wheels ./launch/gpu_check.sh                       without a network: python3, and wheels of launch/gpu_wheels.sh

extras="${extras:-prep,sample}"  # neither linters nor encoders
# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
case "${1:-}" in -h | --help) usage "${BASH_SOURCE[0]}"; exit ;; esac
if [[ -n "${WHEELS:-}" ]]; then
    DIFFMOE_PYTHON="${DIFFMOE_PYTHON:-python3}"
    site="$(mktemp -d)"
    trap 'rm -rf -- "$site"' EXIT
    "$DIFFMOE_PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl ||
        fail "the wheels in $WHEELS do not fit $DIFFMOE_PYTHON; make them with FOR_PYTHON=... ./launch/gpu_wheels.sh"
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
setup
cd -- "$root"
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu_check: torch finds no CUDA device here; nothing was checked")'

out="${OUT:-gpu_check}"
cluster="${CLUSTER:-configs/cluster/h200x1.yaml}"
mkdir -p -- "$out"
failed=()
stage() {  # NAME SECONDS COMMAND...: runs it with a limit, keeps what it prints, and goes on when it fails
    local name="$1" limit="$2" started=$SECONDS
    shift 2
    printf '\n== %s\n' "$name"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.txt" || failed+=("$name")
    printf '== %s: %d s\n' "$name" $((SECONDS - started))
}
diffmoe() { stage "$1" "$2" "$python" -m diffmoe_ep "${@:3}"; }

memory="$("$python" -c 'import torch; print(torch.cuda.mem_get_info()[1] // 10**9)')"
if ((memory >= 130)); then
    diffmoe text 150 bench train configs/text/diffmoe_e16_4.6b.yaml train.global_batch=16 train.schedule.warmup=0 parallel.expert_parallel=1 \
        parallel.zero_stage=0 --cluster "$cluster" --json "$out/text.json"
else
    printf '\n== text: left out, the 4.6B model trains on one card of 130 GB or more, this one has %s GB\n' "$memory"
fi
stage tests 110 "$python" -m pytest -q -rs -m gpu tests/test_gpu.py tests/moe/test_experts.py tests/parallel/test_one_rank.py  # named: finding them among all takes a minute
diffmoe step 75 bench step --size L --compute bfloat16 --batch 32 --json "$out/step.json"
diffmoe layer 75 bench layer --compute bfloat16 --sizes 1024:8192:16,1024:16384:16,1408:16384:16 --json "$out/layer.json"
diffmoe verify 60 verify
stage data 15 "$python" -m data_prep digits --out data/digits
for precision in float32 bf16; do
    rm -rf -- "$out/digits-$precision"
    diffmoe "digits-$precision-train" 35 train configs/digits.yaml "folder=$out/digits-$precision" "train.precision=$precision" \
        train.steps=200 train.global_batch=1024 log.every=20 sample.grid_every=0 checkpoint.every=1000 parallel.expert_parallel=1
done

"$python" - "$out" <<'PY' || failed+=(table)
import json
import statistics
import sys
from pathlib import Path

import torch

out = Path(sys.argv[1])


def read(name):
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def median(timing):
    return statistics.median(timing["seconds"])


rows = []
for row in (read("layer") or {"rows": []})["rows"]:
    case, times = row["case"], {name: median(timing) for name, timing in row["timings"].items()}
    name = f"layer, D {case['hidden']}, {case['tokens']} tokens, N {case['experts']}, over dense"
    others = ", ".join(f"{other} {times[other] / times['dense']:.2f}" for other in ("deepspeed", "loop", "batched") if other in times)
    rows.append((name, f"{times['ours'] / times['dense']:.2f}", others))
if step := read("step"):
    times = {name: median(timing) for name, timing in step["timings"].items()}
    mfu = {name: step["flops"][name] / times[name] / step["peak"] for name in step["flops"] if name in times}
    told = ", ".join(f"{name} {value:.2f}" for name, value in mfu.items())
    rows.append(("step of L, MFU of the measured matmul peak", "", told))
if text := read("text"):
    rows.append(("4.6B, batch 16: step, ms", f"{1e3 * text['measured']:.0f}", f"planned {1e3 * text['predicted']:.0f}"))
    rows.append(("4.6B: MFU of the bf16 peak", f"{text['mfu']:.1%}", f"planned {text['mfu_predicted']:.1%}"))
    rows.append(("4.6B: memory at the peak, GB", f"{text['peak'] / 1e9:.1f}", f"planned {text['peak_predicted'] / 1e9:.1f}"))
    rows.append(("4.6B: loss, first and last step", f"{text['losses'][-1]:.4f}", f"from {text['losses'][0]:.4f}"))
for precision in ("float32", "bf16"):
    path = out / f"digits-{precision}" / "metrics.jsonl"
    if path.exists():
        lines = [json.loads(line) for line in path.read_text().splitlines()][1:]
        speed, wait = (statistics.median(line[key] for line in lines) for key in ("samples_per_second", "data_wait"))
        rows.append((f"digits, {precision}: samples/s", f"{speed:,.0f}", f"data wait {wait:.1%}, last loss {lines[-1]['loss']:.4f}"))
print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
width = max(len(row[0]) for row in rows) if rows else 0
for name, value, beside in rows:
    print(f"{name:<{width}}  {value:>9}  {beside}")
PY
if [[ ${#failed[@]} -gt 0 ]]; then
    printf '\nfailed: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nall passed\n'
