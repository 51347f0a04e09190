#!/usr/bin/env bash
# Everything that needs a GPU, in one command on a machine that has one: build for its architecture,
# run the tests marked gpu, time the kernels, compute-sanitizer on a small run, train briefly.
#
#   benchmarks/gpu_suite.sh [folder for results]
#
# COMMIT names the commit where git cannot.
# Needs nvcc, scikit-build-core, pybind11, ninja and the package's test dependencies in the active
# environment (without gymnasium and mujoco it trains nothing). Written without a GPU at hand and not
# run yet: mend what the first run finds. Steps have time limits and go on after a failure; the
# summary and summary.json in the folder say which failed, and the exit status counts them.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-gpu_results}" && cd "${1:-gpu_results}" && pwd)

arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)
commit=${COMMIT:-$(git describe --always --dirty)}
[ -n "$arch" ] || { echo "nvidia-smi finds no GPU" >&2; exit 1; }
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "needs Python 3.11 or later, which has -P" >&2
    exit 1
}

names=() states=() seconds=()
summarise() {
    {
        printf '{"device": "%s", "commit": "%s", "steps": [' "$device" "$commit"
        for i in "${!names[@]}"; do
            [ "$i" = 0 ] || printf ', '
            printf '{"name": "%s", "state": "%s", "seconds": %s}' "${names[$i]}" "${states[$i]}" \
                "${seconds[$i]}"
        done
        printf ']}\n'
    } > "$out/summary.json"
}
readonly eight_minutes=480
left() { echo $((eight_minutes - SECONDS)); }
step() { # name, seconds at most, command...
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    echo "== $name"
    [ "$(left)" -lt "$limit" ] && limit=$(left)
    if [ "$limit" -le 0 ]; then
        states+=("no time")
    elif timeout -s INT -k 10 "$limit" "$@" > "$out/$name.log" 2>&1; then
        states+=(ok)
    else
        states+=(FAILED)
    fi
    names+=("$name")
    seconds+=($((SECONDS - begin)))
    [ -f "$out/$name.log" ] && tail -3 "$out/$name.log"
    summarise
}
# One small shape of each kernel; PyTorch's own allocator would hide accesses out of bounds. Not
# initcheck: it does not see what PyTorch's kernels write.
sanitize() { # tool
    step "$1" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" \
        --error-exitcode 1 --report-api-errors no --target-processes all \
        --kernel-name kernel_substring=run_kernel \
        python3 -P -m pytest -q python_tests/test_cuda_kernels.py \
        -k "31-17-6 or 1-32-17 or reweighted or flame-True or monotonicity"
}

export FLAME_EXT_REQUIRE_NATIVE=1
step build 200 python3 -m pip install --no-build-isolation --no-index --no-deps --force-reinstall . \
    -C cmake.define.FLAME_EXT_CUDA=ON -C cmake.define.FLAME_EXT_CUDA_ARCHS="$arch"
# Tests are skipped where the runtime finds no device. -P: not the source tree's package.
step device 60 python3 -P -c 'from flame_ext import _core; d = _core.cuda_devices(); print(d); assert d'
[ "${states[-1]}" = ok ] || exit 1
# In several processes where pytest-xdist is: a broken kernel spoils all that follows in its own.
side_by_side=$(python3 -c 'import xdist' 2> /dev/null && echo "-n 4")
# shellcheck disable=SC2086
step tests 120 python3 -P -m pytest -q -m gpu $side_by_side python_tests/test_cuda_kernels.py \
    python_tests/test_philox.py
step kernels 60 python3 benchmarks/cuda_kernels.py --json "$out/kernels.json"
for tool in racecheck synccheck memcheck; do sanitize "$tool"; done
if python3 -P -c 'import gymnasium; gymnasium.make("HalfCheetah-v5")' 2> /dev/null; then
    rm -rf "$out/run"
    step train 120 flame-ext train HalfCheetah-v5 --backend cuda --device cuda --steps 7000 \
        --run-dir "$out/run"
fi
# With what time is left; the benchmark stops compiling by itself.
compile_seconds=$(($(left) - 30))
[ "$compile_seconds" -ge 30 ] && step compiled $((compile_seconds + 30)) \
    python3 benchmarks/cuda_kernels.py --compile-seconds "$compile_seconds" --json "$out/compiled.json"

cat "$out/kernels.log" "$out/compiled.log" 2> /dev/null
failed=0
echo "== $device, sm_$arch, commit $commit"
for i in "${!names[@]}"; do
    printf '%-12s %-8s %5s s\n' "${names[$i]}" "${states[$i]}" "${seconds[$i]}"
    [ "${states[$i]}" = ok ] || failed=$((failed + 1))
done
exit "$failed"
