#!/usr/bin/env bash
# Wheels for a GPU machine without a network that has a Python with CUDA's torch: what this project needs beside torch and what
# mostly comes with it (numpy, PyYAML, psutil, pillow, scikit-learn, pytest, ...), in the versions of constraints.txt. Makes them
# where there is a network; carry the folder over with the project's own, and name it there:
#
#   ./launch/gpu_wheels.sh                      into .wheels (another folder: ./launch/gpu_wheels.sh FOLDER)
#   WHEELS=.wheels ./launch/gpu_check.sh        there: unpacks them beside python3's own packages, and checks the GPU
#
#   FOR_PYTHON=3.12                             the Python of that machine
# Sets up its environment first (launch/setup.sh), which DeepSpeed's wheel is built in.

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
case "${1:-}" in -h | --help) usage "${BASH_SOURCE[0]}"; exit ;; esac
extras="prep" setup
out="${1:-$root/.wheels}"
mkdir -p -- "$out"

packages=(megatron-core webdataset safetensors torchdiffeq tqdm)
packages+=(einops hjson msgpack ninja py-cpuinfo pydantic)  # DeepSpeed asks for these,
packages+=(annotated-types braceexpand pydantic-core typing-extensions typing-inspection)  # and these for those
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
for old in 2014 2010 1; do platforms+=(--platform "manylinux${old}_x86_64"); done

wheels() { PIP_CONSTRAINT="" "$python" -m pip "$1" --quiet --disable-pip-version-check --no-deps --constraint "$root/constraints.txt" "${@:2}"; }
say "fetching ${packages[*]}"
wheels download --dest "$out" --only-binary=:all: --implementation cp --python-version "${FOR_PYTHON:-3.12}" "${platforms[@]}" "${packages[@]}"
# It comes as source alone; without its operators it is plain Python, for any version.
say "building deepspeed"
DS_BUILD_OPS=0 wheels wheel --wheel-dir "$out" --no-build-isolation deepspeed
say "$(find "$out" -name '*.whl' | wc -l) wheels in $out, $(du -sh -- "$out" | cut -f 1)"
