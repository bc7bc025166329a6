#!/usr/bin/env bash
# Runs the main command in N processes on this machine, which find each other on loopback.
#
#   launch/local.sh 2 --config=ddpo --workdir=runs/ddpo
#
# With GPUs, give each process its own through CUDA_VISIBLE_DEVICES in a wrapper, or use one process
# for all of them, which needs no launcher. The first process that fails ends the others, and this
# script with its status. SIGTERM and Ctrl-C reach all processes, which save and stop together.
# PYTHON names another interpreter, PORT a fixed port.
set -euo pipefail
set -m # Ctrl-C then reaches this script alone, which passes it on once

if [ "$#" -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  echo "usage: $0 N --config=FILE --workdir=FOLDER [FLAG...]" >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-python}
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${PORT:-$("$python" -c "$free_port")}

processes=()
for ((id = 0; id < count; id++)); do
  "$python" -m jaxalign.main "$@" \
    --coordinator_address="127.0.0.1:$port" --num_processes="$count" --process_id="$id" &
  processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT

# `wait -n` returns for each process that ends, and for each signal, which ends none by itself.
while pids=$(jobs -rp) && [ -n "$pids" ]; do
  status=0
  wait -n || status=$?
  if [ "$status" -gt 0 ] && [ "$(jobs -rp | wc -l)" -lt "$(wc -w <<<"$pids")" ]; then
    echo "error: a process ended with status $status; the others are stopped" >&2
    for ((tenth = 0; tenth < 50; tenth++)); do # for their own messages
      [ -n "$(jobs -rp)" ] || break
      sleep 0.1
    done
    kill -KILL $(jobs -rp) 2>/dev/null || true
    exit "$status"
  fi
done
