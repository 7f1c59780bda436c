#!/usr/bin/env bash
# Makes .venv and runs every check: lint, format, types, tests. Arguments go to pytest: bash scripts/test.sh -k recipe
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh" dev

failed=""
check() {
    echo "== $*"
    "$@" || failed="$failed '$*'"
}

check python -m ruff check .
check python -m ruff format --check .
check python -m mypy
# A process for each core; `-n 0` among the arguments, which comes later and wins, runs all in one.
set -- -n logical --maxprocesses 8 "$@"
echo "== pytest $*"
status=0
python -m pytest "$@" || status=$?
if [ -n "$failed" ]; then
    echo "error: failed before the tests:$failed (see above)" >&2
    exit 1
fi
exit "$status"
