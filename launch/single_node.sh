#!/usr/bin/env bash
# Train on the GPUs of this machine, one process per GPU.
#
#   launch/single_node.sh model=llama_350m run_dir=outputs/my_run
#   GPUS=4 launch/single_node.sh model=llama_350m
#
# All arguments go to sltrain-train. GPUS is the number of processes; default: one per GPU visible under
# CUDA_VISIBLE_DEVICES. MAX_RESTARTS: how often the processes are started again, from the last checkpoint, when one dies
# or hangs; default 0.
set -euo pipefail

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

command -v torchrun >/dev/null || fail "torchrun is not on PATH: activate the environment in which sltrain is installed"
if [[ -z "${GPUS:-}" ]] && ! command -v nvidia-smi >/dev/null; then
  fail "no GPU found: set GPUS to the number of processes to start"
fi

# Seconds torchrun waits for its processes to save after a signal; the default of 30 s is short for a 7B checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}"
# Signals that torchrun passes on to its processes, which then save. SIGHUP stays ignored under nohup.
PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGUSR2
[[ "$(</proc/self/status)" =~ SigIgn:[[:space:]]+[0-9a-f]*[13579bdf]$'\n' ]] || PET_SIGNALS_TO_HANDLE+=,SIGHUP
export PET_SIGNALS_TO_HANDLE
export PET_MAX_RESTARTS="${MAX_RESTARTS:-0}"
# A store of its own for every start: in one that is shared, processes find the addresses of those before them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --standalone --nproc_per_node="${GPUS:-gpu}" -m sltrain.train "$@"
