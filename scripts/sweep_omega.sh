#!/usr/bin/env bash
# The weight omega of the KL term, 0.1 to 1e-5, times seeds, one run after the other.
#
#   scripts/sweep_omega.sh                                              cartpole swingup, seeds 0 to 4
#   TASKS="cheetah-run" SEEDS="0 1" scripts/sweep_omega.sh --save_model
#   OMEGAS="0.01 0.001" scripts/sweep_omega.sh
#
# Each omega has its own folder, runs/omega/<omega>/. A run whose folder is already there is skipped: remove the
# folder of a killed run to start it again, and give runs with other flags another WORK_DIR.
set -euo pipefail
cd "$(dirname "$0")/.."

TASKS=${TASKS:-"cartpole-swingup"}
SEEDS=${SEEDS:-"0 1 2 3 4"}
OMEGAS=${OMEGAS:-"0.1 0.01 0.001 1e-4 1e-5"}
WORK_DIR=${WORK_DIR:-runs/omega}
PYTHON=${PYTHON:-.venv/bin/python}

failed() { # a run that diverged is a result: go on, but not after Ctrl-C
  if [ "$1" -eq 130 ]; then exit 130; fi
  echo "failed with exit code $1: $2" >&2
}

for omega in $OMEGAS; do
  for seed in $SEEDS; do
    for task in $TASKS; do
      if compgen -G "$WORK_DIR/$omega/$task/*-s$seed" > /dev/null; then
        echo "skipped: $(compgen -G "$WORK_DIR/$omega/$task/*-s$seed") is already there"
        continue
      fi
      "$PYTHON" train.py --domain_name "${task%%-*}" --task_name "${task#*-}" --seed "$seed" \
        --omega_cody_loss "$omega" --work_dir "$WORK_DIR/$omega" --save_tb "$@" || failed $? "omega $omega, $task, seed $seed"
    done
  done
done
