#!/usr/bin/env bash
# Runs one config with several seeds, one after the other, and prints each held-out comparison.
#
#   launch/seeds.sh ddpo runs/ddpo 0 1 2
set -euo pipefail

if [ "$#" -lt 3 ]; then
  echo "usage: $0 CONFIG WORKDIR SEED..." >&2
  exit 2
fi
config=$1
workdir=$2
shift 2
for seed in "$@"; do
  echo "== seed $seed"
  python -m jaxalign.main --config="$config" --config.seed="$seed" --workdir="$workdir/seed_$seed"
done
