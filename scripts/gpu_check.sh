#!/usr/bin/env bash
# Tests and benchmarks on a GPU, in under ten minutes: scripts/gpu_check.sh [DIRECTORY]
#
# Results go to DIRECTORY, by default scripts/results/DATE-DEVICE. Where python3 has a JAX that sees
# a GPU it is used as it is; else .venv-gpu is made with the cuda13 extra. JKV_GPU_CHECK_CPU=1 tries
# the script itself on a CPU, with a model of no use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh

sees_gpu() {
  JAX_PLATFORMS=cuda "$1" -c 'import jax; jax.devices()' >/dev/null 2>&1
}

tiny=() shape=()
if [ "${JKV_GPU_CHECK_CPU:-}" = 1 ]; then
  make_venv .venv test
  python=.venv/bin/python tiny=(--tiny) shape=(--shape tiny)
  export JAX_PLATFORMS=cpu
elif sees_gpu "$PYTHON"; then
  python=$PYTHON
elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  make_venv .venv-gpu test,cuda13
  python=.venv-gpu/bin/python
  sees_gpu "$python" || die "there is a GPU, and JAX does not see it: JAX_PLATFORMS=cuda $python -c 'import jax; jax.devices()' says why"
else
  die "no GPU found; JKV_GPU_CHECK_CPU=1 tries the script on the CPU"
fi

export PYTHONPATH=$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
# Products of float32 in float32: by default they are rounded to TF32, and equal tokens are luck.
export JAX_DEFAULT_MATMUL_PRECISION=highest
export XLA_PYTHON_CLIENT_PREALLOCATE=false # torch is a guest on the same GPU

name=$("$python" -c 'import jax; print(jax.devices()[0].device_kind.replace(" ", "-"))')
results=${1:-scripts/results/$(date -u +%Y-%m-%d)-$name}
mkdir -p "$results"
{
  date -u '+%Y-%m-%d %H:%M UTC'
  git rev-parse HEAD 2>/dev/null || true
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || true
  "$python" -c 'import jax, platform; print(platform.python_version(), jax.__version__, jax.devices())'
} | tee "$results/hardware.txt"

status=0
# run SECONDS NAME COMMAND...: keeps the output, and goes on whatever comes of it. Together 580 s.
run() {
  local limit=$1 log="$results/$2.txt" start=$SECONDS
  shift 2
  timeout "$limit" "$@" </dev/null 2>&1 | tee "$log" || status=1
  echo "$((SECONDS - start)) s" | tee -a "$log"
}

tests=(tests/ops tests/cache tests/decoding) many=(-n 8)
[ ${#tiny[@]} -eq 0 ] || tests=(tests/ops/test_attention.py) many=()
unmarked="not slow and not compare and not tpu_compile"
# The kernels alone first: each of their tests compiles, which the processors can do side by side.
run 110 kernels "$python" -m pytest -q ${many[@]+"${many[@]}"} tests/ops/test_on_gpu.py
run 130 attention "$python" -m bench attention ${tiny[@]+"${tiny[@]}"} --seconds 110 \
  --json "$results/attention.json" --plot "$results/attention.png"
run 150 llama "$python" -m bench decode --gpu --only llama ${shape[@]+"${shape[@]}"} \
  --seconds 120 --json "$results/llama.json"
run 110 tests "$python" -m pytest -q -m "$unmarked" "${tests[@]}" --ignore tests/ops/test_on_gpu.py
run 80 bench "$python" -m bench decode --quick ${tiny[@]+"${tiny[@]}"} --only one-row \
  eight-rows buffers bandwidth first-token --json "$results/bench.json" --plot "$results/bench.png"
echo "Results: $results"
exit $status
