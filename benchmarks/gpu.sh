#!/usr/bin/env bash
# Checks and times updates on a CUDA GPU, in about ten minutes on one card:
#     bash benchmarks/gpu.sh gpu                  # logs and runs go to the folder gpu/
#     DEVICE=cpu bash benchmarks/gpu.sh try       # the same lines in small, on a machine without a GPU
out=$(realpath -m "${1:?names the folder for logs}")
cd "$(dirname "$0")/.." || exit
device=${DEVICE:-cuda}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"

sizes="128 512" updates=20 precisions="fp32 tf32 bf16"
short="--num_train_steps 1300 --eval_freq 650 --num_eval_episodes 2 --batch_size 128"
if [ "$device" = cpu ]; then
  sizes="8" updates=2 precisions="fp32 bf16"
  short="--num_train_steps 60 --init_steps 20 --eval_freq 30 --num_eval_episodes 1 --batch_size 8 --action_repeat 50"
fi

step() {  # step NAME COMMAND...: run it, keep its output, and go on if it fails
  local name=$1 start=$SECONDS
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.log" | tail -n 25
  echo "== $name: exit code ${PIPESTATUS[0]}, $((SECONDS - start)) s"
}

step driver nvidia-smi
step egl "$python" -c "import rendering as r; print('CUDA number of each EGL device:', r.egl_devices(), 'drawn by', r.renderer('egl'))"
step tests "$python" -m pytest -q -rs tests/test_speed.py tests/test_cuda.py tests/test_golden.py
rows=""
for precision in $precisions; do
  rows="$rows,--update_mode sequential --precision $precision,--update_mode joint --precision $precision"
  rows="$rows,--update_mode joint --precision $precision --compile"
done
step throughput "$python" -m benchmarks.throughput --rows="${rows#,}" --batch_sizes "$sizes" --updates $updates --flags="--device $device"
step agents "$python" -m benchmarks.throughput --rows="--agent cody_sac, --agent sac, --agent sac_ae, --cody_objective published" \
  --batch_sizes "${sizes%% *}" --updates $updates --flags="--device $device"
step replay "$python" -m benchmarks.throughput --rows="--replay_device $device, --replay_device cpu" --batch_sizes "$sizes" \
  --updates $updates --flags="--device $device"
step copies "$python" - "$device" <<'PY'
import sys, timeit, torch
frames = torch.randint(0, 256, (512 * 5, 3, 84, 84), dtype=torch.uint8)
def copy(pinned):
    (frames.pin_memory() if pinned else frames).to(sys.argv[1], non_blocking=pinned, copy=True)
    if sys.argv[1] == "cuda":
        torch.cuda.synchronize()
for pinned in (False, True) if torch.cuda.is_available() else (False,):
    copy(pinned)
    print("pinned" if pinned else "plain ", f"{1e3 * timeit.timeit(lambda: copy(pinned), number=20) / 20:.2f} ms for a batch of 512")
PY

# equal bits: two runs, and one that is killed and resumed
for run in a b; do
  step "deterministic_$run" "$python" train.py --device "$device" --deterministic $short --seed 1 --run_dir "$out/$run"
done
"$python" train.py --device "$device" --deterministic $short --seed 1 --checkpoint_minutes 0.02 --run_dir "$out/killed" \
  > "$out/killed.log" 2>&1 &
training=$!
until grep -q '^| train' "$out/killed.log" || ! kill -0 $training; do sleep 0.2; done
sleep 3
kill -KILL $training && echo "== killed: $(tail -n 1 "$out/killed.log" | cut -c1-60)"
wait $training 2> /dev/null
step resumed "$python" train.py --run_dir "$out/killed"
step bits "$python" - "$out" <<'PY'
import pathlib, sys, torch
runs = {name: torch.load(max((pathlib.Path(sys.argv[1]) / name / "model").glob("*.pt")), weights_only=True) for name in ("a", "b", "killed")}
for name in ("b", "killed"):
    equal = [torch.equal(runs["a"][key], runs[name][key]) for key in runs["a"]]
    print(f"a and {name}: {sum(equal)} of {len(equal)} tensors have equal bits")
PY

# memory on the GPU, of the training process (type C) and of the workers that draw (type G)
"$python" train.py --device "$device" $short --seed 2 --run_dir "$out/memory" > "$out/memory.run.log" 2>&1 &
until grep -q '^| train' "$out/memory.run.log" || ! kill -0 $!; do sleep 0.2; done
step memory nvidia-smi
wait
