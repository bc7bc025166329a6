#!/usr/bin/env bash
# A run on several machines under SLURM:
#
#   sbatch launch/slurm.sh --config=ddpo --workdir=/shared/runs/ddpo
#
# Submit it from the root of the checkout, with an environment active that has jaxalign. The workdir
# must be on a file system that all machines share. The same command continues a run that was
# stopped. Edit:
#SBATCH --job-name=jaxalign
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8 # as many as GPUs of a node: JAX gives each process one of them
#SBATCH --cpus-per-task=8 # host rewards are computed there
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#
# Two minutes before the time is up all processes are told to save and stop.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

status=0
srun --kill-on-bad-exit=1 python -m jaxalign.main --distributed "$@" || status=$?

# After a lost process the job goes back to the queue, at most three times, and continues from the
# last checkpoint.
if [ "$status" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
