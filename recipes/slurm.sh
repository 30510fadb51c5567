#!/bin/bash
# Four machines of eight GPUs each, one process on each machine: sbatch recipes/slurm.sh
# Given again after the job has ended, it goes on with the run.
#SBATCH --job-name=caesura
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before its time is over every process gets SIGTERM: all save after the same step and end.
#SBATCH --signal=TERM@300

set -u
OUT=${OUT:-$PWD/runs/sfe-147M}  # on a file system that all machines see

if [ -f "$OUT/config.json" ]; then
  set -- --resume
else
  set -- --estimator sfe --model 147M --dataset fineweb --mesh.fsdp 8 "$@"
fi

# The processes of srun find each other by its variables. Without --kill-on-bad-exit=0 it may kill those that are still to say why they
# end. --label puts the number of its process before every line.
srun --label --kill-on-bad-exit=0 .venv/bin/python -m experiments.run --out "$OUT" "$@" --log-seconds 60
code=$?

# 143: stopped by SIGTERM, with everything saved.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
