#!/bin/bash
# The batch script of sweep.py --slurm. If your cluster needs more, such as `module load cuda`, edit a copy and pass it
# as --slurm_script; sweep.py replaces the placeholders between @s.
#SBATCH --job-name="@NAME@"
#SBATCH --array=@ARRAY@
#SBATCH --output="@FOLDER@/slurm/%A_%a.log"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@90
#SBATCH @OPTIONS@

cd "@HERE@" || exit
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_ON_NODE}

# execute the runs of this element one after the other, resuming those that have started
SWEEP_ELEMENT="@NUMBER@:$SLURM_ARRAY_TASK_ID" "@PYTHON@" "@SWEEP@" --resume "@FOLDER@" &
sweep=$!

# Slurm sends USR1 90 seconds before the time limit: save a checkpoint and requeue. TERM means scancel or preemption:
# save only; after a preemption Slurm itself requeues the element.
trap 'again=yes; kill -TERM $sweep' USR1
trap 'again=; kill -TERM $sweep' TERM
while kill -0 $sweep 2> /dev/null; do wait $sweep; done
wait $sweep
code=$?
if [ $code -eq 75 ] && [ "$again" ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit $code
