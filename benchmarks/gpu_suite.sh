#!/usr/bin/env bash
# Every test that needs a GPU, then every benchmark with its peers: what a GPU machine is asked to run.
#
#   benchmarks/gpu_suite.sh OUT [--rehearse] [--quick] [STEP...]
#
# OUT receives one JSON file a benchmark, the log of each step and summary.txt. STEPs (default: all, in this order):
#   native      the compiled libraries are there and load; builds _C for this Python if it is missing
#   tests       all tests whose imports this machine has; those that need CUDA run here
#   triton      the op tests again, served by Triton on the GPU
#   sanitizer   a few op tests under compute-sanitizer, where that tool exists
#   tune        benchmarks/tune_lora.py: rows for kernels/lora_table.py, into its log
#   bench       every benchmarks/bench_*.py
#   growth      benchmarks/growth.py: memory and epoch time of the CPU from 1M pairs on
#   distributed benchmarks/distributed.py on all GPUs, where there are at least two
#   gowalla     benchmarks/lightgcn_gowalla.py: 1000 epochs, their time, recall@20 and NDCG@20
# A step that fails does not stop the next; the exit code is 1 if one failed, 2 for a bad call. --rehearse runs on the
# CPU, to try this script without a GPU; --quick takes the benchmarks' small sizes.
#
# Needs Python >= 3.11 (PYTHON=...) with torch, triton, numpy, pytest, transformers and peft; pybind11 and g++ to build
# _C. Installs nothing and uses no network: the package is put on the path beside its kernels by links in a temporary
# folder.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
device=cuda
quick=()
all=(native tests triton sanitizer tune bench growth distributed gowalla)
steps=()
out=""
for argument in "$@"; do
  case $argument in
    --rehearse) device=cpu ;;
    --quick) quick=(--quick) ;;
    native | tests | triton | sanitizer | tune | bench | growth | distributed | gowalla) steps+=("$argument") ;;
    -*) echo "gpu_suite: expected OUT [--rehearse] [--quick] [STEP...], got $argument" >&2; exit 2 ;;
    *)
      if [[ -n $out ]]; then
        echo "gpu_suite: expected a step of ${all[*]}, got $argument" >&2
        exit 2
      fi
      out=$argument
      ;;
  esac
done
if [[ -z $out ]]; then
  echo "gpu_suite: expected the folder for the results, got nothing" >&2
  exit 2
fi
[[ ${#steps[@]} -gt 0 ]] || steps=("${all[@]}")
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
if [[ $device == cuda ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_suite: expected a CUDA GPU that this torch can use, got none (--rehearse runs on the CPU)" >&2
  exit 2
fi

# The package as an installation would lay it out: collm_fast with kernels inside.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/collm_fast"
for path in "$root"/collm_fast/*; do
  ln -s "$path" "$site/collm_fast/"
done
ln -s "$root/kernels" "$site/collm_fast/kernels"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
# The checkout's own collm_fast lacks the kernels, so the working folder must not come first on the path.
export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
cd "$root" || exit 2
COLLM_FAST_COMMIT=${COLLM_FAST_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
export COLLM_FAST_COMMIT

failed=0
summary=()
# run NAME COMMAND...: its output goes to the log and the terminal, its result into the summary.
run() {
  local name=$1 begin=$SECONDS code=0
  shift
  echo "=== $name"
  "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  if [[ $code -eq 0 ]]; then
    summary+=("ok      $name ($((SECONDS - begin)) s): $(tail -n 1 "$out/$name.log" | cut -c -100)")
  else
    summary+=("FAILED  $name ($((SECONDS - begin)) s, code $code): see $out/$name.log")
    failed=1
  fi
}

native() {
  if ! "$python" -c 'import torch, collm_fast._C' 2>/dev/null; then
    local suffix include definitions=() sources=("$root/csrc/bindings.cpp") file name
    suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))') || return 1
    include=$("$python" -m pybind11 --includes) || return 1
    for file in "$root"/csrc/host/*.cpp; do
      name=$(basename "$file" .cpp)
      sources+=("$file")
      definitions+=("-DCOLLM_FAST_HAS_${name^^}")
    done
    # shellcheck disable=SC2086
    g++ -std=c++20 -O3 -DNDEBUG -fPIC -shared -pthread -fvisibility=hidden -ffp-contract=off -I"$root/csrc" $include \
      "${definitions[@]}" '-DCOLLM_FAST_VERSION="gpu-suite"' '-DCOLLM_FAST_TORCH_VERSION="none"' \
      '-DCOLLM_FAST_CUDA_VERSION=""' "${sources[@]}" -o "$site/collm_fast/_C$suffix" || return 1
    echo "built _C$suffix"
  fi
  "$python" - "$device" <<'PY'
import sys

from collm_fast import _native
from collm_fast import ops  # noqa: F401  (registers the ops)

print("problems:", _native.problems)
for name, served in _native.backends.items():
    print(f"{name}: {served}")
# What has no CUDA kernel: Triton or plain torch serve it on a GPU.
plain = ("rms_norm", "swiglu", "rotate_heads", "path_attention")
without = {"lightgcn_layer", *plain, *(f"{name}_backward" for name in plain)} if sys.argv[1] == "cuda" else set()
wrong = [n for n, served in _native.backends.items() if n not in without and served[sys.argv[1]] != "native"]
print("native serves every op" if not wrong else f"not native on {sys.argv[1]}: {', '.join(wrong)}")
sys.exit(bool(wrong))
PY
}

# The test files whose imports exist here, one a line; the others are named on stderr with what they lack.
test_files() {
  "$python" - "$root/tests" <<'PY'
import ast
import importlib.util
import sys
from pathlib import Path

root = Path(sys.argv[1])
own = {path.stem for path in root.rglob("*.py")} | {"collm_fast", "benchmarks"}
for path in sorted(root.rglob("test_*.py")):
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    missing = sorted(n for n in names - own - set(sys.stdlib_module_names) if importlib.util.find_spec(n) is None)
    if path.name == "test_packaging.py":
        missing = ["an installed package"]
    if missing:
        print(f"not run: {path.relative_to(root.parent)} needs {', '.join(missing)}", file=sys.stderr)
    else:
        print(path)
PY
}

tests() {
  local files
  mapfile -t files < <(test_files)
  [[ ${#files[@]} -gt 0 ]] || return 1
  "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors "${files[@]}"
}

triton() {
  local keyword="cuda and not child and not interpreter and not backend and not compiles"
  [[ $device == cuda ]] || keyword="embed_inject_forward and odd and not bfloat16"
  COLLM_FAST_BACKEND=triton COLLM_FAST_TEST_CHILD=triton TRITON_INTERPRET=$([[ $device == cpu ]] && echo 1 || echo 0) \
    "$python" -m pytest -q -p no:cacheprovider tests/ops -k "$keyword"
}

sanitizer() {
  if [[ $device != cuda ]] || ! command -v compute-sanitizer > /dev/null; then
    echo "no compute-sanitizer or no GPU on this machine: not run"
    return 0
  fi
  # Without torch's caching every tensor is its own allocation, so a read past its end is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" -m pytest -q -x -p no:cacheprovider tests/ops -k "cuda and odd and forward and float32"
}

tune() {
  if [[ $device != cuda ]]; then
    echo "no GPU on this machine: not run"
    return 0
  fi
  "$python" "$root/benchmarks/tune_lora.py" ${quick[@]+"${quick[@]}"} --json "$out/tune_lora.json"
}

bench() {
  local script=$1
  env -u PYTHONSAFEPATH "$python" "$script" --device "$device" ${quick[@]+"${quick[@]}"} \
    --json "$out/$(basename "$script" .py).json"
}

growth() {
  local sizes=()
  [[ ${#quick[@]} -eq 0 ]] || sizes=(--pairs 20k 50k --large --seconds 1)
  env -u PYTHONSAFEPATH "$python" "$root/benchmarks/growth.py" ${sizes[@]+"${sizes[@]}"} ${quick[@]+"${quick[@]}"} \
    --threads "$(nproc)" --out "$out"
}

distributed() {
  local ranks graphs=()
  ranks=$([[ $device == cpu ]] && echo 2 || "$python" -c 'import torch; print(torch.cuda.device_count())')
  if [[ $ranks -lt 2 ]]; then
    echo "one GPU on this machine: not run"
    return 0
  fi
  [[ ${#quick[@]} -eq 0 ]] || graphs=(--graphs "power-law 50k")
  env -u PYTHONSAFEPATH "$python" "$root/benchmarks/distributed.py" --device "$device" --ranks "$ranks" \
    ${graphs[@]+"${graphs[@]}"} --json "$out/distributed.json"
}

gowalla() {
  local data="${COLLM_FAST_TEST_DATA:-$root/../shared/data}/gowalla-lightgcn" epochs=1000
  if [[ ! -f $data/train.parquet ]]; then
    echo "no gowalla-lightgcn/train.parquet: not run"
    return 0
  fi
  [[ ${#quick[@]} -eq 0 ]] || epochs=1
  env -u PYTHONSAFEPATH "$python" "$root/benchmarks/lightgcn_gowalla.py" --data "$data" --device "$device" \
    --epochs "$epochs" --every 50 --folder "$out/gowalla" --out "$out"
}

for step in "${steps[@]}"; do
  if [[ $step == bench ]]; then
    for script in "$root"/benchmarks/bench_*.py; do
      run "$(basename "$script" .py)" bench "$script"
    done
  else
    run "$step" "$step"
  fi
done

{
  echo "$device, $("$python" -c 'import torch; print("torch", torch.__version__, torch.version.cuda)'), commit $COLLM_FAST_COMMIT"
  printf '%s\n' "${summary[@]}"
} | tee "$out/summary.txt"
exit "$failed"
