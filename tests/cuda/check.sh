#!/usr/bin/env bash
# Runs the CUDA kernels on the CPU emulator against a reference, and then with planted bugs, which must be found.
#
#   tests/cuda/check.sh [--quick | --if-changed] [CXX_FLAG...]
#
# Needs g++, no GPU. --quick checks one configuration per element type and plants no bugs: seconds instead of minutes.
# A full run that passes writes a digest of the kernels, the emulator, the checks and the bugs to checked.txt, which is
# committed. --if-changed is a full run if the digest differs from checked.txt, else --quick.
# Exits 0 if every kernel is correct and every planted bug was found, or if there is no g++; else 1.
set -uo pipefail
if ! command -v g++ >/dev/null; then
    echo "SKIPPED: no g++"
    exit 0
fi
here=$(cd "$(dirname "$0")" && pwd)
kernels=$here/../../src/backend/cuda/kernels

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
# digest: of the kernels, the emulator, the checks and the bugs
digest() (
    LC_ALL=C # the order of the files
    cat "$kernels"/* "$here"/emulator.h "$here"/kernels.cpp "$here"/mutations.txt | sha256sum | cut -d' ' -f1
)
checked=$here/checked.txt

quick=
case ${1:-} in
    --quick)
        quick=yes
        shift ;;
    --if-changed)
        shift
        if [ "$(digest)" = "$(cat "$checked" 2>/dev/null)" ]; then
            echo "unchanged since a full run passed (checked.txt)"
            quick=yes
        fi ;;
esac
limit=()
if command -v timeout >/dev/null; then limit=(timeout 120); fi

# build FOLDER ELEMENT C D [CXX_FLAG...]: compiles kernels.cpp with FOLDER/kernels.cu to $work/kernels
build() {
    g++ -std=c++17 -O2 -Wall -Wextra -Wno-unknown-pragmas -DEMULATED "-DKERNELS_CU=\"$1/kernels.cu\"" \
        "-DELEMENT_$2" "-DHIDDEN_SIZE=$3" "-DHEAD_SIZE=$4" "${@:5}" "$here/kernels.cpp" -o "$work/kernels" 2>"$work/errors"
}

# run MODE: sets `status`, and `outcome` to a short description
run() {
    # The braces suppress the shell's own message about an aborted process.
    { EMULATED_COPIES=$1 ${limit[@]+"${limit[@]}"} "$work/kernels" >"$work/$1" 2>&1; } 2>/dev/null
    status=$?
    case $status in
        0) outcome=passed ;;
        1) outcome="$(grep -c '^FAILED' "$work/$1") failed" ;;
        3) outcome="bad access" ;;
        124) outcome="timeout" ;;
        134) outcome=$(grep -q deadlock "$work/$1" && echo deadlock || echo aborted) ;;
        *) outcome="status $status" ;;
    esac
}

# Jobs run in the background, one per CPU, each in its own folder $work/N. start FUNCTION: starts one, with a copy of
# the shell's variables.
# Its output goes to $work/N.out and its number of failures to $work/N/failures.
parallel=$(nproc 2>/dev/null || echo 2)
jobs_started=0
start() {
    while [ "$(jobs -rp | wc -l)" -ge "$parallel" ]; do wait -n; done
    jobs_started=$((jobs_started + 1))
    mkdir "$work/$jobs_started"
    (
        work=$work/$jobs_started failures=0
        echo 1 >"$work/failures" # counts if the job dies
        "$1"
        echo $failures >"$work/failures"
    ) >"$work/$jobs_started.out" 2>&1 &
}

# finish: waits for all jobs, prints their outputs in order, and adds up their failures
finish() {
    wait
    local i
    for ((i = 1; i <= jobs_started; i++)); do
        cat "$work/$i.out"
        failures=$((failures + $(cat "$work/$i/failures")))
        rm -rf "${work:?}/$i"
    done
    jobs_started=0
}

# check_configuration: builds and runs the kernels for $element, $hidden and $head
check_configuration() {
    local details='' mode started
    printf '%-5s C=%-5s D=%-3s' "$element" "$hidden" "$head"
    if ! build "$kernels" "$element" "$hidden" "$head" ${flags[@]+"${flags[@]}"}; then
        echo " does not compile"
        cat "$work/errors"
        failures=$((failures + 1))
        return
    fi
    for mode in late early; do
        started=$(date +%s%N)
        run $mode
        printf '  %s: %s, %s checks, %d ms' $mode "$outcome" "$(grep -c '^ok' "$work/$mode")" \
            $((($(date +%s%N) - started) / 1000000))
        if [ $status -ne 0 ]; then
            failures=$((failures + 1))
            details+=$(grep -v '^ok' "$work/$mode")$'\n'
        fi
    done
    printf '\n%s' "$details"
}

flags=("$@")
echo "Kernels: element, C, D; checks passed and time, with asynchronous copies completing late and early"
while read -r element hidden head rest; do
    if [ -n "$quick" ] && [ -z "$rest" ]; then continue; fi
    start check_configuration
done <<'CONFIGURATIONS'
F16 256 64 quick
F16 256 32
BF16 256 64
BF16 256 32 quick
F32 256 64 quick
F32 256 32
F16 384 64
BF16 384 32
F32 384 64
F16 1024 64
F16 72 32
F32 72 32
FP8 256 64 quick
FP8 384 32
CONFIGURATIONS
finish

if [ -n "$quick" ]; then
    [ $failures -eq 0 ] || exit 1
    exit 0
fi

echo
echo "Planted bugs: what finds them, with asynchronous copies completing late or early; each run ends at the first failed check"
declare -A sources
for file in "$kernels"/*; do sources[${file##*/}]=$(<"$file"); done

# plant: applies the mutation in the variables below to a copy of the kernels in $work/mutated; builds, runs and judges it
plant() {
    text=${text%$'\n'} replacement=${replacement%$'\n'}
    printf '%-42s %-12s' "$name" "$configuration"
    local file source before after found_in='' times=0
    for file in "${!sources[@]}"; do
        source=${sources[$file]}
        before=${source%%"$text"*}
        [ "$before" != "$source" ] || continue
        found_in=$file times=$((times + 1))
        after=${source#*"$text"}
        [ "${after%%"$text"*}" = "$after" ] || times=$((times + 1))
    done
    if [ $times -ne 1 ]; then
        echo " its text must occur exactly once in the kernels"
        failures=$((failures + 1))
        return
    fi
    cp -r "$kernels" "$work/mutated"
    source=${sources[$found_in]}
    printf '%s%s%s\n' "${source%%"$text"*}" "$replacement" "${source#*"$text"}" >"$work/mutated/$found_in"
    # shellcheck disable=SC2086 # three words
    if ! build "$work/mutated" $configuration ${flags[@]+"${flags[@]}"}; then
        echo " does not compile"
        cat "$work/errors"
        failures=$((failures + 1))
        return
    fi
    local mode verdict=found
    for mode in $found; do
        EMULATED_STOP_AT_FAILURE=1 run "$mode"
        if [ $status -eq 0 ]; then
            verdict=MISSED
            failures=$((failures + 1))
        fi
        printf '  %s: %-12s' "$mode" "$outcome"
    done
    echo " $verdict"
}

plant_next() { if [ -n "$name" ]; then start plant; fi; }

name='' part=''
while IFS= read -r line; do
    case $line in
        '=== '*) plant_next; name=${line#=== } configuration='' found='' text='' replacement='' part=head ;;
        '---') part=text ;;
        '+++') part=replacement ;;
        *)
            case $part in
                head)
                    case $line in
                        'in: '*) configuration=${line#in: } ;;
                        'found: '*) found=${line#found: } ;;
                    esac ;;
                text) text+=$line$'\n' ;;
                replacement) replacement+=$line$'\n' ;;
            esac ;;
    esac
done <"$here/mutations.txt"
plant_next
finish

echo
if [ $failures -eq 0 ]; then
    echo "all kernels correct, all bugs found"
    [ $# -gt 0 ] || digest >"$checked" # with other compiler flags it is another check
else
    echo "$failures failures"
    exit 1
fi
