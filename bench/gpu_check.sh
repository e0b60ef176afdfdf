#!/usr/bin/env bash
# Everything that needs a GPU, in calls of under nine minutes that continue each other: report,
# build, tests, compute-sanitizer, benchmarks, results. No network is needed.
#
#   bench/gpu_check.sh [--fresh] [--from ARCHIVE] [--to ARCHIVE] [--most-mib N]
#                      [--budget SECONDS] [FOLDER]
#
# FOLDER (bench/results/work) keeps logs, records, finished stages and compilers' caches: the next
# call goes on with what is not finished. --fresh starts again, and so do changed sources and
# another kind of GPU. At the end all of it is packed into one archive (--to, FOLDER.tar.gz), from
# which a call on another machine goes on (--from); if it would be larger than --most-mib, without
# the caches. They serve where FOLDER has the same path. Results land in bench/results and FOLDER.
# PYTHON names the interpreter (python3), WHEELS a folder of wheels to install first (wheels),
# TIR_CUDA_ARCHS the architectures that are built (the GPU's), TIR_COMMIT or a file COMMIT the
# commit where .git did not come along. Benchmarks take the time that is left, or --budget.
# Exit status: 0 if all is done and passed, 1 if a stage failed, 75 if none failed but there is more
# to do (call again), 2 if it cannot start.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

usage() { sed -n '2,19s/^# \{0,1\}//p' "$0"; }
refuse() { printf 'gpu_check: %s\n' "$@" >&2; exit 2; }

python=${PYTHON:-python3}
wheels=${WHEELS:-wheels}
time_limit=525 # seconds for everything
reserve=45     # of these for the results and the archive
episodes=80    # for benchmarks of whole few-shot runs
budget=$time_limit
fresh=false from='' to='' most_mib='' folder=bench/results/work
while (($#)); do
    case $1 in
        --fresh) fresh=true ;;
        --from | --to)
            [[ -n ${2:-} ]] || refuse "$1 needs the name of an archive"
            if [[ $1 == --from ]]; then from=$2; else to=$2; fi
            shift
            ;;
        --budget | --most-mib)
            [[ ${2:-} =~ ^[0-9]{1,6}$ ]] || refuse "$1 needs a whole number"
            if [[ $1 == --budget ]]; then budget=$2; else most_mib=$2; fi
            shift
            ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "gpu_check: unknown option $1" >&2; usage >&2; exit 2 ;;
        *) folder=$1 ;;
    esac
    shift
done

# Where the toolkit is not on PATH, it may be where its installer puts it.
[[ -d /usr/local/cuda/bin ]] && PATH=$PATH:/usr/local/cuda/bin

gpu=$("$python" -c 'import torch
if torch.cuda.is_available(): print(torch.cuda.get_device_name())' 2>/dev/null)
[[ -n $gpu ]] || refuse "$python sees no CUDA GPU through PyTorch; this script needs one." \
    "Without a GPU run: pytest, and python -m bench --device cpu"

mkdir -p "$folder" bench/results || exit 2
folder=$(cd "$folder" && pwd)
to=${to:-$folder.tar.gz}
records=$folder/records.json
if [[ -n $from && -e $folder/state ]]; then
    echo "$folder has work of its own: $from is not unpacked"
elif [[ -n $from ]]; then
    tar -xzf "$from" -C "$folder" && [[ -e $folder/state ]] ||
        refuse "$from cannot be unpacked: pass an archive that this script packed"
fi

# What other sources or another GPU passed says nothing about these.
state="$gpu $(find setup.py bench csrc python_tests tir_kernels -type f \
    \( -name '*.py' -o -name '*.sh' -o -name '*.cu*' -o -name '*.cpp' -o -name '*.h' \) \
    -print0 2>/dev/null | sort -z | xargs -0 sha256sum | sha256sum)"
if [[ -e $folder/state && $(<"$folder/state") != "$state" ]]; then
    echo "the sources or the GPU have changed since the last call: starting again"
    fresh=true
fi
$fresh && rm -f "$folder"/*.done "$folder"/*.log "$folder"/_C.*.so "$folder/name" "$records"
echo "$state" >"$folder/state"

# A second run of a day has a name of its own; the calls of one run share theirs.
if [[ ! -e $folder/name ]]; then
    name=$(tr '[:upper:] ' '[:lower:]-' <<<"$gpu" | tr -cd 'a-z0-9-')-$(date +%Y-%m-%d)
    suffix=
    for ((number = 2; ; ++number)); do
        [[ -e bench/results/$name$suffix.json || -e bench/results/$name$suffix.md ]] || break
        suffix=-$number
    done
    echo "$name$suffix" >"$folder/name"
fi

export TRITON_CACHE_DIR=$folder/cache/triton TORCHINDUCTOR_CACHE_DIR=$folder/cache/inductor
export CUDA_CACHE_PATH=$folder/cache/cuda

failed=() unfinished=() passed=()
child=

pack() {
    local left_out='' part=$to.part
    tar -czf "$part" -C "$folder" . || return
    if [[ -n $most_mib ]] && (($(stat -c %s "$part") > most_mib << 20)); then
        tar -czf "$part" --exclude=./cache -C "$folder" . || return
        left_out=', without the caches'
    fi
    mv "$part" "$to" || return
    echo "packed into $to$left_out, $(($(stat -c %s "$to") >> 10)) KiB"
}

# timeout moves its command to a process group of its own, where Ctrl-C does not reach it.
trap '[[ -n $child ]] && kill -TERM "$child" 2>/dev/null
      pack; echo "gpu_check: interrupted; call again to go on" >&2; exit 130' INT TERM

remaining() { echo $((time_limit - reserve - SECONDS)); }

# stage NAME SECONDS COMMAND...: run it once, under a time limit, with a log of its own. Status 75
# means that it has more to do: the next call goes on with it.
stage() {
    local name=$1 limit=$2 wanted=${most:-$2} status
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
    tail -n 4 "$folder/$name.log" | sed 's/^/   /'
    # It was the time of this call that ended, not the stage's own.
    if ((status == 124 || status == 137)) && ((limit < wanted)); then status=75; fi
    case $status in
        0) touch "$folder/$name.done"; passed+=("$name") ;;
        75) echo "   has more to do: call again"; unfinished+=("$name") ;;
        124 | 137) echo "   FAILED: longer than $limit s"; failed+=("$name") ;;
        *) echo "   FAILED with status $status: $folder/$name.log"; failed+=("$name") ;;
    esac
}

environment_report() {
    "$python" -m pip list 2>/dev/null | grep -iE '^(setuptools|ninja|pybind11|pytest|pytest-xdist) '
    nvidia-smi
    nvcc --version
    "$python" -m tir_kernels
}

build() {
    export TIR_CUDA_ARCHS=${TIR_CUDA_ARCHS:-$("$python" -c \
        'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
    echo "TIR_CUDA_ARCHS=$TIR_CUDA_ARCHS"
    "$python" setup.py build_ext --inplace && cp tir_kernels/_C.*.so "$folder"
}

# Tests of a backend that does not run are left out, and all that is left passes.
backends_run() {
    "$python" -c 'import sys, tir_kernels
reasons = tir_kernels.available_backends()
for name in ("cuda", "triton"): print(f"{name}: {reasons[name] or str("runs")}")
sys.exit(any(reasons[name] for name in ("cuda", "triton")))'
}

# Tests in several processes where pytest-xdist is there: most of their time compiles kernels.
run_tests() {
    local processes=()
    "$python" -c 'import xdist' 2>/dev/null && processes=(-n 8)
    "$python" -m pytest -q -p no:cacheprovider "${processes[@]}" "$@"
}

# Tests of the rooms that use open_clip cannot be collected without it.
gpu_tests() {
    local ignored=() note='' status
    if ! "$python" -c 'import open_clip'; then
        ignored=(--ignore=python_tests/{adapters,analysis,demo,fewshot,towers,test_extending.py})
        note="open_clip is missing: tests of towers, adapters, fewshot and demo are left out"
    fi
    run_tests -m gpu "${ignored[@]}" python_tests
    status=$?
    [[ -z $note ]] || echo "$note"
    return $status
}

# On a machine with a GPU, nobody waits for emulated ones.
operator_tests() {
    run_tests -k '(cuda or triton) and not emulated' \
        python_tests/test_{api,attention,attention_statistics,golden_operators,integration}.py \
        python_tests/test_token_weights.py
}

# The tools run at once, for they do not time anything; the next call goes on with those that were
# not clean. Backend cuda alone: what Triton's compiler makes is not ours to mend.
sanitizer() {
    local tool status=0 pids=() tools=()
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not on PATH: the kernels were NOT checked with it"
        return 1
    fi
    # PyTorch's allocator hands out parts of larger blocks, in which a wrong access goes unseen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck synccheck initcheck; do
        [[ -e $folder/sanitizer-$tool.done ]] && continue
        (compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m bench.sanitizer_cases cuda >"$folder/sanitizer-$tool.log" 2>&1 &&
            touch "$folder/sanitizer-$tool.done") &
        pids+=("$!") tools+=("$tool")
    done
    for tool in "${tools[@]}"; do
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

# Compiling PyTorch's peers for every shape takes most of the time: first all shapes without them.
all_benchmarks() {
    "$python" -m bench attention relevance operator step memory savings --device cuda \
        --budget "$1" --json "$records" "${@:2}"
}
benchmarks() { all_benchmarks "$1" --no-compile; }

whole_runs() {
    "$python" -m bench episodes --device cuda --model ViT-B-16 --episodes 8 \
        --published-episodes 1 --budget "$1" --json "$records"
}

results() {
    [[ -s $records ]] || { echo "there are no records yet"; return 75; }
    local name
    name=$(<"$folder/name")
    "$python" -m bench.report "$records" --output "$folder/$name.md" --plot "$folder/$name.png" ||
        return
    cp "$records" "$folder/$name.json"
    cp "$folder/$name.json" "$folder/$name.md" bench/results/
    echo "bench/results/$name.json and .md"
}

if compgen -G "$wheels/*.whl" >/dev/null; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    if "$python" -m pip install --quiet --no-index --no-deps --target "$packages" \
        "$wheels"/*.whl >"$folder/wheels.log" 2>&1; then
        export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
    else
        echo "wheels FAILED: $folder/wheels.log"
        failed+=(wheels)
    fi
fi
# A fresh machine gets what another one built.
if [[ -e $folder/build.done ]]; then
    cp "$folder"/_C.*.so tir_kernels/ || rm "$folder/build.done"
fi

# Stages are functions of this script: timeout starts commands, so it starts the script's bash.
export -f environment_report build backends_run run_tests gpu_tests operator_tests sanitizer \
    benchmarks all_benchmarks whole_runs results
export python folder records

rm -f "$folder"/{environment,backends,results}.done # of this machine, and of all records
stage environment 60 bash -c environment_report
stage build 200 bash -c build
stage backends 30 bash -c backends_run
stage gpu-tests 150 bash -c gpu_tests
stage operator-tests 120 bash -c operator_tests
stage sanitizer 150 bash -c sanitizer

# budgeted NAME SECONDS REST COMMAND: the budget, SECONDS at most, ends REST seconds before the
# stage does, since a shape that was begun is finished.
budgeted() {
    local name=$1 seconds=$2 rest=$3 command=$4 left most=$time_limit
    left=$(($(remaining) - rest))
    ((seconds > left)) && seconds=$left
    stage "$name" $((seconds < 1 ? 0 : seconds + rest)) bash -c "$command $seconds"
}
for_whole_runs=$((episodes + 60))
[[ -e $folder/whole-runs.done ]] && for_whole_runs=0
left=$(($(remaining) - for_whole_runs - 30))
budgeted benchmarks $((budget < left ? budget : left)) 30 benchmarks
budgeted whole-runs "$episodes" 60 whole_runs
budgeted compiled-peers "$budget" 30 all_benchmarks
reserve=15
stage results 30 bash -c results
pack || { echo "gpu_check: cannot pack $folder into $to" >&2; failed+=(archive); }

echo "== $SECONDS s"
echo "passed: ${passed[*]:-none}"
echo "unfinished: ${unfinished[*]:-none}"
echo "failed: ${failed[*]:-none}"
((${#failed[@]} == 0)) || exit 1
((${#unfinished[@]} == 0)) || exit 75
