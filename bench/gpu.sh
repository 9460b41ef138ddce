#!/usr/bin/env bash
# Builds the package against the torch of this machine, tests it on its GPU, and measures it there.
#
#   bench/gpu.sh OUT [quick]
#
# OUT gets at most ten files: a log per step, the benchmarks' reports and figures, and summary.md, which is
# printed as well. A step that fails is told there, and the next one runs; the exit status tells of any.
#
#   STEPS       which of "build test sanitize bench" to do; without build, the last one's is used
#   TIME_LIMIT  seconds for everything (540); the benchmarks take what the others leave
#   SITE        where the package is installed (build/gpu-site)
#   PYTHON      the Python that has torch (python3)
#   ARCH        what to compile for (90)
#   BENCH_ARGS  more arguments for `python -m bench.gpu`
set -euo pipefail

if [[ $# -lt 1 || $# -gt 2 || ${2:-quick} != quick ]]; then
  echo "usage: bench/gpu.sh OUT [quick]" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
quick=${2:+--quick}
steps=${STEPS:-build test sanitize bench}
limit=${TIME_LIMIT:-540}
python=${PYTHON:-python3}
site=${SITE:-$root/build/gpu-site}
arch=${ARCH:-90}
for step in $steps; do
  case $step in
    build | test | sanitize | bench) ;;
    *) echo "gpu.sh: STEPS has '$step'; expected some of: build test sanitize bench" >&2 && exit 2 ;;
  esac
done

cd "$root"
export PATH=$PATH:/usr/local/cuda/bin
# The installed package, never the one in python/; bench/ and tests/ from here.
export PYTHONPATH=$site:$root PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
rm -f "$out"/{build,tests,sanitize,bench}.log "$out"/{mma_rate.json,summary.md}
started=$(mktemp)
trap 'rm -f "$started"' EXIT
rows=()
failed=0

left() { echo $((limit - SECONDS)); }

# run NAME LOG SECONDS COMMAND...: at most so long, and no longer than there is time left.
run() {
  local name=$1 log=$2 most=$3 start=$SECONDS status=0 seconds
  shift 3
  seconds=$(($(left) < most ? $(left) : most))
  if ((seconds < 10)); then
    rows+=("| $name | no time left | |")
    failed=1
    return 0
  fi
  echo "== $name"
  echo "== $name: $*" >>"$out/$log"
  timeout --kill-after=5 "$seconds" "$@" >>"$out/$log" 2>&1 || status=$?
  case $status in
    0) rows+=("| $name | ok | $((SECONDS - start)) |") ;;
    124 | 137) rows+=("| $name | ended after its time | $((SECONDS - start)) |") ;;
    *) rows+=("| $name | **failed**, status $status | $((SECONDS - start)) |") ;;
  esac
  if ((status)); then
    failed=1
    # ptxas has an opinion on every mma.sp.
    grep -v 'Advisory:' "$out/$log" | tail -n 15
  fi
}

build() {
  # Optimisations of one file run in parallel: there are two large ones.
  CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-16} run build build.log 300 \
    "$python" -m pip --disable-pip-version-check install --no-deps --no-build-isolation --upgrade \
    --target "$site" --config-settings=cmake.define.SPARSEKIT_CUDA=ON \
    "--config-settings=cmake.define.SPARSEKIT_CUDA_ARCHITECTURES=$arch" \
    --config-settings=cmake.define.CMAKE_CUDA_FLAGS=--split-compile=0 .
  run "what was built" build.log 60 "$python" -c \
    'import sys, sparsekit as sk
print(sk.__file__, sk.dispatch.doctor(), sk.kernels(), sep="\n")
sys.exit(not any(kernel.device == "cuda" and kernel.available for kernel in sk.kernels()))'
  run "mma_rate: build" build.log 60 nvcc -std=c++17 -O3 "-arch=sm_$arch" -I csrc -o "$site/mma_rate" \
    bench/micro/mma_rate.cu
}

tests() {
  run "pytest -m gpu" tests.log 240 \
    "$python" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors tests
}

sanitize() {
  # Every tensor is an allocation of its own, so that reads and writes beside one are seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    run "compute-sanitizer: $tool" sanitize.log 120 \
      compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 "$python" -m bench.gpu_sample
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

bench() {
  if [[ -x $site/mma_rate ]]; then
    run mma_rate bench.log 60 bash -c "'$site/mma_rate' >'$out/mma_rate.json'"
  fi
  # Each stops by itself before it would be ended: the case under way takes a few seconds more.
  local conv=90 rest=$(($(left) - 100))
  # shellcheck disable=SC2086
  run bench bench.log "$rest" "$python" -m bench.gpu --out "$out" --rates "$out/mma_rate.json" \
    --seconds $((rest - 30)) $quick ${BENCH_ARGS:-}
  run "bench: convolutions" bench.log "$conv" "$python" -m bench.gpu_conv --out "$out" \
    --seconds $((conv - 30))
}

for step in $steps; do
  case $step in
    test) tests ;;
    *) "$step" ;;
  esac
done

{
  echo "| step | result | seconds |"
  echo "| --- | --- | ---: |"
  printf '%s\n' "${rows[@]}"
  echo
  # The tables of goals and regimes; the single cases are in the report.
  find "$out" -maxdepth 1 -name '*-gpu.md' -newer "$started" -exec sed '/^## Cases/,$d' {} +
  if [[ -f $out/tests.log ]]; then tail -n 15 "$out/tests.log"; fi
} >"$out/summary.md"
cat "$out/summary.md"
exit "$failed"
