#!/usr/bin/env bash
# Everything that needs a GPU, in one command on a machine that has one: build for its architecture,
# run the tests marked gpu, compute-sanitizer on a small run, time the kernels, train briefly.
#
#   benchmarks/gpu_suite.sh [folder for results]
#
# Needs nvcc, and the package's test dependencies in the active environment. Written without a GPU at
# hand and not run yet: mend what the first run finds. Steps go on after a failure; the summary and
# summary.json in the folder say which failed, and the exit status counts them.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-gpu_results}" && cd "${1:-gpu_results}" && pwd)

arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)
commit=$(git describe --always --dirty)
[ -n "$arch" ] || { echo "nvidia-smi finds no GPU" >&2; exit 1; }

names=() states=() seconds=()
step() { # name, command...
    local name=$1 begin=$SECONDS
    shift
    echo "== $name"
    if "$@" > "$out/$name.log" 2>&1; then states+=(ok); else states+=(FAILED); fi
    names+=("$name")
    seconds+=($((SECONDS - begin)))
    tail -3 "$out/$name.log"
}
# One small shape of each kernel; PyTorch's own allocator would hide accesses out of bounds.
sanitize() { # tool
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
        --target-processes all --kernel-name kernel_substring=run_kernel \
        pytest -q python_tests/test_cuda_kernels.py \
        -k "(test_critic or test_policy or test_density or test_reweighted) and not 257"
}

export FLAME_EXT_REQUIRE_NATIVE=1
step build pip install --no-deps --force-reinstall . \
    -C cmake.define.FLAME_EXT_CUDA=ON -C cmake.define.FLAME_EXT_CUDA_ARCHS="$arch"
step tests pytest -q -m gpu
for tool in memcheck racecheck initcheck; do step "$tool" sanitize "$tool"; done
step kernels python benchmarks/cuda_kernels.py --json "$out/kernels.json"
step train flame-ext train HalfCheetah-v5 --backend cuda --device cuda --steps 7000 \
    --run-dir "$out/run"

[ -f "$out/kernels.log" ] && cat "$out/kernels.log"
failed=0
{
    printf '{"device": "%s", "commit": "%s", "steps": [' "$device" "$commit"
    for i in "${!names[@]}"; do
        [ "$i" = 0 ] || printf ', '
        printf '{"name": "%s", "state": "%s", "seconds": %s}' "${names[$i]}" "${states[$i]}" \
            "${seconds[$i]}"
    done
    printf ']}\n'
} > "$out/summary.json"
echo "== $device, sm_$arch, commit $commit"
for i in "${!names[@]}"; do
    printf '%-12s %-8s %5s s\n' "${names[$i]}" "${states[$i]}" "${seconds[$i]}"
    [ "${states[$i]}" = ok ] || failed=$((failed + 1))
done
exit "$failed"
