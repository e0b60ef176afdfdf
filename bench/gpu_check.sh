#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under nine minutes: report, build, tests,
# compute-sanitizer, benchmarks, results.
#
#   bench/gpu_check.sh [--fresh] [--budget SECONDS] [FOLDER]
#
# Logs and finished stages are kept in FOLDER (bench/results/work): a second call goes on with what
# is not finished; --fresh starts again, and so do changed sources. The results land in bench/results
# and in FOLDER.
# PYTHON names the interpreter (python3), TIR_CUDA_ARCHS the architectures that are built (the
# GPU's). No network is needed. The exit status is 0 if no stage failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; }

python=${PYTHON:-python3}
time_limit=525 # seconds for everything
budget=160     # of these for the benchmarks, but
episodes=80    # for those of whole few-shot runs
fresh=false
folder=bench/results/work
while (($#)); do
    case $1 in
        --fresh) fresh=true ;;
        --budget)
            [[ ${2:-} =~ ^[0-9]+$ ]] || { echo "--budget needs a number of seconds" >&2; exit 2; }
            budget=$2
            shift
            ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
        *) folder=$1 ;;
    esac
    shift
done

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: $python sees no CUDA GPU through PyTorch; this script needs one." >&2
    echo "Without a GPU run: pytest, and python -m bench --device cpu" >&2
    exit 2
fi

mkdir -p "$folder" bench/results || exit 1
folder=$(cd "$folder" && pwd)
records=$folder/records.json

# What an older state of the sources passed says nothing about this one.
sources=$(find setup.py bench csrc python_tests tir_kernels -type f \
    \( -name '*.py' -o -name '*.sh' -o -name '*.cu*' -o -name '*.cpp' -o -name '*.h' \) \
    -print0 2>/dev/null | sort -z | xargs -0 sha256sum | sha256sum)
if [[ -e $folder/sources && $(<"$folder/sources") != "$sources" ]]; then
    echo "the sources have changed since the last call: starting again"
    fresh=true
fi
$fresh && rm -f "$folder"/*.done "$folder"/*.log "$records"
echo "$sources" >"$folder/sources"

reserve=35 # seconds kept for the last stage
failed=() unfinished=() passed=()
child=

# timeout moves its command to a process group of its own, where Ctrl-C does not reach it.
trap '[[ -n $child ]] && kill -TERM "$child" 2>/dev/null
      echo "gpu_check: interrupted; call again to go on" >&2; exit 130' INT TERM

remaining() { echo $((time_limit - reserve - SECONDS)); }

# stage NAME SECONDS COMMAND...: run it once, under a time limit, with a log of its own. Status 75
# means that it has more to do: the next call goes on with it.
stage() {
    local name=$1 limit=$2 status
    shift 2
    if [[ -e $folder/$name.done ]]; then
        echo "== $name: finished before"
        passed+=("$name")
        return
    fi
    ((limit > $(remaining))) && limit=$(remaining)
    if ((limit < 5)); then
        echo "== $name: no time left"
        unfinished+=("$name")
        return
    fi
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" >"$folder/$name.log" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    child=
    tail -n 3 "$folder/$name.log" | sed 's/^/   /'
    case $status in
        0) touch "$folder/$name.done"; passed+=("$name") ;;
        75) echo "   has more to do: call again"; unfinished+=("$name") ;;
        124 | 137) echo "   FAILED: longer than $limit s"; failed+=("$name") ;;
        *) echo "   FAILED with status $status: $folder/$name.log"; failed+=("$name") ;;
    esac
}

environment_report() {
    nvidia-smi
    nvcc --version
    "$python" -m tir_kernels
}

build() {
    export TIR_CUDA_ARCHS=${TIR_CUDA_ARCHS:-$("$python" -c \
        'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
    echo "TIR_CUDA_ARCHS=$TIR_CUDA_ARCHS"
    "$python" setup.py build_ext --inplace
}

# Tests of the rooms that use open_clip cannot be collected without it.
without_open_clip() {
    "$python" -c 'import open_clip' 2>/dev/null && return
    echo "open_clip is missing: tests of clip, fewshot and demo are left out" >&2
    printf -- '--ignore=python_tests/%s\n' clip fewshot demo
}

gpu_tests() {
    local ignored
    mapfile -t ignored < <(without_open_clip)
    "$python" -m pytest -q -m gpu -p no:cacheprovider "${ignored[@]}" python_tests
}

operator_tests() {
    "$python" -m pytest -q -k 'cuda or triton' -p no:cacheprovider \
        python_tests/test_{api,attention,golden_operators,integration,token_weights}.py
}

# One process per tool, all at once: they do not time anything.
sanitizer() {
    local tool status=0 pids=()
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not on PATH: the kernels were NOT checked with it"
        return 1
    fi
    # PyTorch's allocator hands out parts of larger blocks, in which a wrong access goes unseen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck synccheck initcheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m bench.sanitizer_cases >"$folder/sanitizer-$tool.log" 2>&1 &
        pids+=("$!")
    done
    for tool in memcheck racecheck synccheck initcheck; do
        if wait "${pids[0]}"; then
            echo "$tool: clean"
        else
            echo "$tool: FAILED, see $folder/sanitizer-$tool.log"
            tail -n 5 "$folder/sanitizer-$tool.log"
            status=1
        fi
        pids=("${pids[@]:1}")
    done
    return $status
}

benchmarks() {
    "$python" -m bench attention relevance operator step memory savings --device cuda --budget "$1" \
        --json "$records"
}

whole_runs() {
    "$python" -m bench episodes --device cuda --model ViT-B-16 --episodes 8 \
        --published-episodes 1 --budget "$1" --json "$records"
}

results() {
    [[ -s $records ]] || { echo "there are no records"; return 1; }
    local name
    name=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' |
        tr '[:upper:] ' '[:lower:]-' | tr -cd 'a-z0-9-')-$(date +%Y-%m-%d)
    "$python" -m bench.report "$records" --output "$folder/$name.md" --plot "$folder/$name.png" ||
        return
    cp "$records" "$folder/$name.json"
    cp "$folder/$name.json" "$folder/$name.md" bench/results/
    echo "bench/results/$name.json and .md"
}

# Stages are functions of this script: timeout starts commands, so it starts the script's bash.
export -f environment_report build without_open_clip gpu_tests operator_tests sanitizer \
    benchmarks whole_runs results
export python folder records

stage environment 60 bash -c environment_report
stage build 200 bash -c build
stage gpu-tests 120 bash -c gpu_tests
stage operator-tests 120 bash -c operator_tests
stage sanitizer 120 bash -c sanitizer
# A budget ends before its stage does: a shape that was begun is finished.
budgeted() {
    local name=$1 seconds=$2 rest=$3 command=$4 left
    left=$(($(remaining) - rest))
    ((seconds > left)) && seconds=$((left > 0 ? left : 0))
    stage "$name" $((seconds + rest)) bash -c "$command $seconds"
}
budgeted benchmarks "$budget" 30 benchmarks
budgeted whole-runs "$episodes" 60 whole_runs
rm -f "$folder/results.done"
reserve=0
stage results 30 bash -c results

echo "== $SECONDS s"
echo "passed: ${passed[*]:-none}"
echo "unfinished: ${unfinished[*]:-none}"
echo "failed: ${failed[*]:-none}"
((${#failed[@]} == 0))
