#!/usr/bin/env bash
# Variants x tasks x seeds, one run after the other.
#
#   scripts/sweep.sh                                                every variant below on cartpole swingup, seeds 0 to 4
#   ONLY="default omega_0.1 omega_0.01 omega_1e-4 omega_1e-5" scripts/sweep.sh --save_tb           weight of the KL term
#   ONLY=default TASKS="walker-walk cheetah-run" SEEDS="0 1" scripts/sweep.sh --batch_size 512     more flags to each run
#
# Each variant has its own folder, $WORK_DIR/<variant>/. A run whose folder is already there is skipped: remove the
# folder of a killed run to start it again (or go on with train.py --run_dir), and give runs with other flags another WORK_DIR.
set -euo pipefail
cd "$(dirname "$0")/.."

TASKS=${TASKS:-"cartpole-swingup"}
SEEDS=${SEEDS:-"0 1 2 3 4"}
ONLY=${ONLY:-}
WORK_DIR=${WORK_DIR:-runs/sweep}
PYTHON=${PYTHON:-.venv/bin/python}

variants() {
  cat <<'LIST'
default
omega_0             --omega_cody_loss 0
omega_0.1           --omega_cody_loss 0.1
omega_0.01          --omega_cody_loss 0.01
omega_1e-4          --omega_cody_loss 1e-4
omega_1e-5          --omega_cody_loss 1e-5
kl_prior_none       --kl_prior none
kl_prior_unit       --kl_prior unit_gaussian
kl_prior_shared     --kl_prior shared
kl_encoder_online   --kl_encoder online
key_encoder_online  --key_encoder online
no_layer_norm       --no_dynamics_layer_norm
reward_none         --reward_prediction none
reward_regression   --reward_prediction regression
reward_symmetric    --reward_norm symmetric
reward_raw          --reward_norm none
action_encoder      --action_encoder
projection_none     --projection none
projection_linear   --projection linear
predictor_3         --predictor_layers 3
protorl             --encoder_type protorl
state               --agent sac --encoder_type identity
batch_512           --batch_size 512
small               --hidden_dim 256 --num_filters 16
published           --cody_objective published
sac                 --agent sac
sac_ae              --agent sac_ae
LIST
}

variants | while read -r name flags; do
  if [ -n "$ONLY" ] && [[ " $ONLY " != *" $name "* ]]; then continue; fi
  for task in $TASKS; do
    for seed in $SEEDS; do
      if compgen -G "$WORK_DIR/$name/$task/*-s$seed" > /dev/null; then
        echo "skipped: $(compgen -G "$WORK_DIR/$name/$task/*-s$seed") is already there"
        continue
      fi
      code=0
      # shellcheck disable=SC2086  # the flags of a variant are several words
      "$PYTHON" train.py --domain_name "${task%%-*}" --task_name "${task#*-}" --seed "$seed" \
        --work_dir "$WORK_DIR/$name" $flags "$@" < /dev/null || code=$?
      if [ $code -eq 130 ]; then exit 130; fi # Ctrl-C
      if [ $code -ne 0 ]; then echo "failed with exit code $code: $name, $task, seed $seed" >&2; fi # a result too
    done
  done
done
