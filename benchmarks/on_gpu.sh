#!/usr/bin/env bash
# What only a GPU can tell, on a machine that needs no network: benchmarks/on_gpu.sh [SECTION…]
#
# Sections, in this order: correct teacher job train prune science; the default is all but science, at most eight minutes.
# Each has a time limit, prints its lines at once, and appends its figures to $OUT/figures.jsonl (OUT: on_gpu-out); one that
# fails says why, and the next goes on. At the end stands a table. It runs from the checkout, in the environment that
# `python` has. Audio: $AUDIO with speech/, noise/, rir/.
#   --device cpu    the same code on a CPU, with three times the time
#   --debug         small sizes: the whole battery in some minutes
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/platform:$PWD/tests:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export OUT=$(realpath -m "${OUT:-on_gpu-out}") PYTHON=${PYTHON:-python} HF_HUB_OFFLINE=1
declare -A limits=([correct]=90 [teacher]=80 [job]=150 [train]=100 [prune]=60 [science]=${SCIENCE_S:-7200})
options=() sections=() slower=1
while [ $# -gt 0 ]; do
    case $1 in
        --device) options+=(--device "$2"); [ "$2" = cuda ] || slower=3; shift ;;
        --debug) options+=(--debug) ;;
        -h | --help) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        *) [ -n "${limits[$1]:-}" ] || { echo "no section $1; choose from correct teacher job train prune science" >&2; exit 2; }
           sections+=("$1") ;;
    esac
    shift
done
[ ${#sections[@]} -gt 0 ] || sections=(correct teacher job train prune)
mkdir -p "$OUT"
for section in "${sections[@]}"; do
    limit=$((limits[$section] * slower))
    echo "== $section (at most $limit s)"
    began=$SECONDS
    timeout --kill-after=10 "$limit" "$PYTHON" benchmarks/on_gpu.py "$section" "${options[@]}" 2>&1 | tee "$OUT/$section.log"
    code=${PIPESTATUS[0]}
    why=""; [ "$code" = 0 ] || why=$([ "$code" = 124 ] && echo "its time was up" || grep -v '^ *$' "$OUT/$section.log" | tail -1 | cut -c1-200)
    "$PYTHON" benchmarks/on_gpu.py ended --section "$section" --seconds $((SECONDS - began)) --why "$why"
done
"$PYTHON" benchmarks/on_gpu.py table
