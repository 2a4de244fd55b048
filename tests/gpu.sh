#!/usr/bin/env bash
# What only a GPU can answer, in one run of eight minutes: results as soon as they are known.
#
#     tests/gpu.sh OUT_FOLDER [--tiny] [CORRECTNESS SPEED LEARNING]
#
# The numbers are the parts' limits in seconds (140 150 190; 0 leaves a part out). Their sum is the
# limit of the whole, set-up included; learning takes what the other parts leave. --tiny is a
# rehearsal at the smallest sizes, on any machine. PYTHON names the Python (python3).
#
# OUT_FOLDER gets results.json (rewritten after each result), log.txt, bench_gpu.json and the
# trained weights. Ends with status 0 if every part was done and everything was right.
#
# Packages that the machine lacks are taken as wheels from .whl/ in the repository's root.
set -uo pipefail

if [ $# -lt 1 ]; then
    sed -n '4s/^# *//p' "$0" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

{
    if [ -d .whl ]; then
        wheels=$(mktemp -d)
        trap 'rm -rf "$wheels"' EXIT
        "$python" -m pip install -q --no-index --no-deps --target "$wheels" .whl/*.whl
        export PYTHONPATH="$PYTHONPATH:$wheels"
    fi
    "$python" tests/gpu.py "$out" --spent "$SECONDS" "$@"
} 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
