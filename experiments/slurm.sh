#!/bin/bash
# The batch script of sweep.py --slurm. Copy and edit it for a cluster that wants more, such as `module load cuda`, and
# name the copy with --slurm_script; sweep.py replaces what stands between @s.
#SBATCH --job-name="@NAME@"
#SBATCH --array=@ARRAY@
#SBATCH --output="@FOLDER@/slurm/%A_%a.log"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@90
#SBATCH @OPTIONS@

cd "@HERE@" || exit
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_ON_NODE}

# the runs of this element, one after the other; what has been begun goes on
"@PYTHON@" "@SWEEP@" --resume "@FOLDER@" --array @NUMBER@ --element "$SLURM_ARRAY_TASK_ID" &
sweep=$!

# USR1 comes 90 seconds before the time limit: save, and come back later. TERM: cancelled, or preempted, where Slurm
# itself brings the element back: save.
trap 'again=yes; kill -TERM $sweep' USR1
trap 'again=; kill -TERM $sweep' TERM
while kill -0 $sweep 2> /dev/null; do wait $sweep; done
wait $sweep
code=$?
if [ $code -eq 75 ] && [ "$again" ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit $code
