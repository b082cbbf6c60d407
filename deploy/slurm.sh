#!/usr/bin/env bash
#
# Trains on several nodes of a Slurm cluster. Submit it from the folder of this repository, with the flags of train.py:
#
#   sbatch deploy/slurm.sh --flagfile=configs/digits_aib_qt.flags --output_dir=runs/digits
#   sbatch --nodes=8 --time=4:00:00 deploy/slurm.sh ...      # options of sbatch go before those of this file
#
# PYTHON      the interpreter; default .venv/bin/python, which `make install` made, on a file system of all nodes
# ATTEMPTS    how often the workers are started when one of them is lost; default 3
#
# A worker is one task on one node and uses all of its GPUs. It finds the others in the variables of srun.
# This file was run with stand-ins for srun and scontrol only (tests/test_deploy_training.py), on no Slurm cluster.

#SBATCH --job-name=aib_tf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

set -uo pipefail

fail() {
  printf 'slurm.sh: %s\n' "$1" >&2
  exit 2
}

python=${PYTHON:-.venv/bin/python}
attempts=${ATTEMPTS:-3}
[[ -n ${SLURM_JOB_ID:-} ]] || fail "There is no job of Slurm. Submit this file with sbatch."
[[ -f scripts/train.py ]] || fail "There is no scripts/train.py in $PWD. Submit from the folder of the repository."
command -v "$python" > /dev/null || fail "There is no $python. Run make install, or name another with PYTHON=."

workers=
ending=
# Slurm says with USR1 that the time is nearly up (--signal), with TERM that the job is to end. srun passes TERM on to
# the workers, which save their state and end with exit code 75.
trap 'ending=${ending:-time}; [[ -z $workers ]] || kill -TERM "$workers"' USR1
trap 'ending=stop; [[ -z $workers ]] || kill -TERM "$workers"' TERM

# Since Slurm 22.05, srun no longer takes this from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

for ((attempt = 1; ; attempt++)); do
  # Those that lose a worker notice it themselves, and say so; what hangs all the same is killed ten minutes later.
  srun --distribution=block --kill-on-bad-exit=0 --wait=600 --label \
    "$python" scripts/train.py --strategy=multi_worker "$@" &
  workers=$!
  # A trap ends `wait` before its time.
  while
    wait "$workers"
    code=$?
    ((code > 128)) && kill -0 "$workers" 2> /dev/null
  do :; done
  wait "$workers"
  code=$?
  workers=
  # 143: the time ended while the trained model was measured, outside of a training step.
  if [[ $ending == time ]] && ((code == 75 || code == 143)); then
    echo "slurm.sh: the time is up and the state is saved; the job goes back into the queue" >&2
    exec scontrol requeue "$SLURM_JOB_ID"
  fi
  # srun's code is the highest of the workers', 128 + n for signal n.
  [[ -z $ending ]] && ((code == 75 || code > 128)) && ((attempt < attempts)) || exit "$code"
  echo "slurm.sh: a worker was lost (exit code $code); starting all workers again ($attempt of $((attempts - 1)))" >&2
done
