#!/usr/bin/env bash
# Train on several machines. Run it on each with the same arguments, and run_dir on a file system that all share.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/multi_node.sh model=llama_7b run_dir=/shared/my_run     # on node0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 launch/multi_node.sh model=llama_7b run_dir=/shared/my_run     # on node1
#
# Or elastic: on each the same command, and machines may go and come back.
#
#   NNODES=1:4 MASTER_ADDR=node0 MAX_RESTARTS=3 launch/multi_node.sh model=llama_7b run_dir=/shared/my_run
#
# NNODES       number of machines, or the least and the most of them
# NODE_RANK    this machine's number, from 0; not for least:most
# MASTER_ADDR  name or address of machine 0, as the other machines reach it
# MASTER_PORT  a free port on machine 0; default 29500
# GPUS         number of processes on this machine; default: one per visible GPU
# MAX_RESTARTS how often all processes are started again, from the last checkpoint, when one dies or hangs; default 0
set -euo pipefail

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

command -v torchrun >/dev/null || fail "torchrun is not on PATH: activate the environment in which sltrain is installed"
NEEDED=(NNODES NODE_RANK MASTER_ADDR)
[[ "${NNODES:-}" != *:* ]] || NEEDED=(NNODES MASTER_ADDR)
for variable in "${NEEDED[@]}"; do
  [[ -n "${!variable:-}" ]] || fail "$variable is not set: see the top of $0"
done
[[ "$NNODES" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NNODES=$NNODES: give the number of machines, such as 2, or 1:4"
if [[ "$NNODES" != *:* ]] && { [[ ! "$NODE_RANK" =~ ^[0-9]+$ ]] || ((10#$NODE_RANK >= NNODES)); }; then
  fail "NODE_RANK=$NODE_RANK: of $NNODES machines, each has a number of its own from 0 to $((NNODES - 1))"
fi
if command -v getent >/dev/null && ! getent ahosts "$MASTER_ADDR" >/dev/null; then
  fail "MASTER_ADDR=$MASTER_ADDR is no name that this machine knows: give the address of machine 0"
fi
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
if [[ "$NNODES" == *:* ]]; then
  # The address from which this machine reaches machine 0: its own name may be unknown to others, or mean the loopback.
  OWN=()
  if command -v getent >/dev/null && command -v ip >/dev/null; then
    read -r ADDRESS _ < <(getent ahostsv4 "$MASTER_ADDR") || true
    [[ ! "$(ip -4 route get "${ADDRESS:-}" 2>/dev/null)" =~ src\ ([0-9.]+) ]] || OWN=(--local_addr="${BASH_REMATCH[1]}")
  fi
  exec torchrun \
    --nnodes="$NNODES" --nproc_per_node="${GPUS:-gpu}" \
    --rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv_id=sltrain "${OWN[@]}" \
    -m sltrain.train "$@"
fi
echo "$(basename "$0"): machine $NODE_RANK of $NNODES; the run begins when all have come to $MASTER_ADDR" >&2
exec torchrun \
  --nnodes="$NNODES" --node_rank="$NODE_RANK" --nproc_per_node="${GPUS:-gpu}" \
  --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}" \
  -m sltrain.train "$@"
