#!/usr/bin/env bash
# The six tasks of docs/algorithm.md's table, seeds 0 to 4, one run after the other.
#
#   scripts/train_dmc6.sh                                       everything
#   WORK_DIR=runs/b512 scripts/train_dmc6.sh --batch_size 512   every run with extra flags
#   TASKS="walker-walk" SEEDS="0 1" scripts/train_dmc6.sh       some of it
#   CUDA_VISIBLE_DEVICES=1 SEEDS=3 scripts/train_dmc6.sh        one process per GPU: give each its own seeds
#
# A run whose folder is already there is skipped: remove the folder of a killed run to start it again, and give runs with other flags another WORK_DIR.
set -euo pipefail
cd "$(dirname "$0")/.."

TASKS=${TASKS:-"cartpole-swingup ball_in_cup-catch reacher-easy cheetah-run finger-spin walker-walk"}
SEEDS=${SEEDS:-"0 1 2 3 4"}
WORK_DIR=${WORK_DIR:-runs/dmc6}
PYTHON=${PYTHON:-.venv/bin/python}

failed() { # a run that diverged is a result: go on, but not after Ctrl-C
  if [ "$1" -eq 130 ]; then exit 130; fi
  echo "failed with exit code $1: $2" >&2
}

for seed in $SEEDS; do
  for task in $TASKS; do
    if compgen -G "$WORK_DIR/$task/*-s$seed" > /dev/null; then
      echo "skipped: $(compgen -G "$WORK_DIR/$task/*-s$seed") is already there"
      continue
    fi
    "$PYTHON" train.py --domain_name "${task%%-*}" --task_name "${task#*-}" --seed "$seed" \
      --work_dir "$WORK_DIR" --save_tb "$@" || failed $? "$task, seed $seed"
  done
done
