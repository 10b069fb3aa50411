#!/usr/bin/env bash
# Train on the GPUs of this machine, one process a GPU.
#
#   launch/single_node.sh model=llama_350m run_dir=outputs/my_run
#   GPUS=4 launch/single_node.sh model=llama_350m
#
# Everything after the name goes to sltrain-train. GPUS is the number of processes; without it there is one for each
# GPU that CUDA_VISIBLE_DEVICES lets through.
set -euo pipefail

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

command -v torchrun >/dev/null || fail "torchrun is not on PATH: activate the environment in which sltrain is installed"
if [[ -z "${GPUS:-}" ]] && ! command -v nvidia-smi >/dev/null; then
  fail "no GPU found: set GPUS to the number of processes to start"
fi

# How long torchrun waits, once signalled, for its processes to save; its own 30 s are short for a 7B checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}"
exec torchrun --standalone --nproc_per_node="${GPUS:-gpu}" -m sltrain.train "$@"
