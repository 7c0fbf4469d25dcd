#!/usr/bin/env bash
# Everything that needs a GPU, offline: `bash benchmarks/gpu.sh all`, or the parts one by one where a run may be cut off.
#
#   build        the module and the conformance program
#   test         what runs on the chip, with PYCM_REQUIRE_GPU=1: tests/test_cuda*.py, and tests/simt with the chip's kernels
#   test-all     the other tests
#   conformance  each hardware primitive against the PTX ISA's figures
#   sanitize     compute-sanitizer over every kernel: memcheck, racecheck, synccheck, initcheck
#   temporal     the cases of benchmarks/gpu/temporal_cases.py, in four minutes; run again, it goes on where it stopped
#   bench        all cases of benchmarks/gpu/*cases.py that are left, likewise
#   ncu          hardware counters of the main kernels
#   report       gpu.json and gpu.md of all that
#
# Needs a compiler, nvcc, cmake, ninja, and a Python with torch, nanobind and pytest (PYTHON, python3 by default). Works in
# build/gpu; what is worth keeping is copied to $OUT where that is set. No part takes more than LIMIT seconds (540).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
work=$root/build/gpu
python=${PYTHON:-python3}
limit=${LIMIT:-540}
export PYTHONPATH=$root PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$work"

part_build() {
  cmake -S . -B "$work/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPYCM_CUDA=ON -DPYCM_SIMT=ON \
    -DPython_EXECUTABLE="$(command -v "$python")"
  cmake --build "$work/cmake" --target _C conformance_gpu
  cp "$work"/cmake/_C.*.so pycm/
  "$python" -c "import pycm; print(pycm.backend_info()['cuda'], pycm.backend_info()['build'])"
}

part_test() {
  PYCM_REQUIRE_GPU=1 "$python" -m pytest -q tests/test_cuda*.py
  PYCM_REQUIRE_GPU=1 PYCM_SIMT_ARCH=chip "$python" -m pytest -q tests/simt
}

part_test-all() {
  "$python" -m pytest -q tests --ignore=tests/simt --ignore-glob='tests/test_cuda*.py'
}

part_conformance() {
  "$work/cmake/conformance_gpu"
}

part_sanitize() {
  local tool
  for tool in memcheck racecheck synccheck initcheck; do
    printf -- '-- %s\n' "$tool"
    # torch's allocator hands out parts of large blocks, whose borders the sanitizer does not see.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout $((limit / 4)) compute-sanitizer --tool "$tool" --kernel-name kns=pycm \
      --error-exitcode 9 --print-limit 20 "$python" benchmarks/gpu/exercise.py
  done
}

part_bench() {
  "$python" benchmarks/gpu/bench.py --out "$work/bench" --seconds $((limit - 60))
}

part_temporal() {
  "$python" benchmarks/gpu/bench.py --out "$work/bench" --seconds 230 --case 'temporal-*'
}

part_ncu() {
  # The first launches of the library's kernels in one exact top-k, and the screens of one with few queries.
  local kernels
  for kernels in regex:pycm regex:screen_few; do
    ncu --clock-control none --kernel-name-base demangled --kernel-name "$kernels" --launch-count 12 \
      --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section LaunchStats \
      "$python" benchmarks/gpu/exercise.py --large
  done
}

part_report() {
  "$python" benchmarks/gpu/report.py "$work"
}

keep() {
  [[ -n ${OUT:-} ]] || return 0
  "$python" benchmarks/gpu/report.py "$work" >/dev/null
  cp "$work"/gpu.json "$work"/gpu.md "$work/part-$1.log" "$OUT"/
}

run_part() {
  local part=$1 status=ok began=$SECONDS
  declare -F "part_$part" >/dev/null || { printf 'no part %s; parts: %s\n' "$part" "${parts[*]}" >&2; exit 2; }
  printf '\n==== %s\n' "$part"
  # A shell of its own, so that the first failure ends the part and `timeout` can end the shell.
  timeout "$limit" bash "$0" --part "$part" 2>&1 | tee "$work/part-$part.log" || status="FAILED (status ${PIPESTATUS[0]})"
  [[ ($part != bench && $part != temporal) || $status != *"status 3"* ]] || status="not finished: run it again"
  printf '%s, %d s' "$status" $((SECONDS - began)) >"$work/part-$part.status"
  printf '==== %s: %s\n' "$part" "$(cat "$work/part-$part.status")"
  keep "$part"
  [[ $status == ok ]] || failed=1
}

parts=(build test conformance sanitize temporal bench ncu test-all report)
if [[ ${1:-} == --part ]]; then
  "part_$2"
  exit
fi
(($# > 0)) || { sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2; }
failed=0
[[ $1 != all ]] || set -- "${parts[@]}"
for part in "$@"; do run_part "$part"; done
exit "$failed"
