# Sourced by quickstart.sh and test.sh: goes to the repository root, makes .venv, installs hf_quant into it.
#
#     . scripts/env.sh EXTRAS        # such as `dev`, or "" for none
#
# PYTHON names the interpreter to build .venv with; by default the first of python3, python3.13 ... that will do.

EXTRAS=$1
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT"
VENV=$ROOT/.venv
CONSTRAINTS=constraints.txt
MINIMUM=$(sed -n 's/^requires-python *= *">=\([0-9.]*\)".*/\1/p' pyproject.toml)

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] < tuple(map(int, sys.argv[1].split("."))))' "$MINIMUM" 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
        if new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
        if [ -n "${PYTHON:-}" ]; then
            break
        fi
    done
    fail "hf_quant needs Python $MINIMUM or newer; ${PYTHON:-python3} is" \
        "$("${PYTHON:-python3}" --version 2>&1 | tail -n 1 || true)." \
        "Install a newer one, or name it: PYTHON=/path/to/python3 bash $0"
}

make_venv() {
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && new_enough "$VENV/bin/python"; then
        return
    fi
    local python
    python=$(find_python)
    echo "== making .venv with $("$python" --version)"
    # --clear: what an interrupted or moved .venv has left.
    if ! "$python" -m venv --clear "$VENV"; then
        rm -rf "$VENV"
        fail "$python could not make a virtual environment (its message is above)." \
            "On Debian and Ubuntu: apt-get install python3-venv"
    fi
}

# What the installed environment depends on: these files, the interpreter, and where the repository lies.
fingerprint() {
    "$VENV/bin/python" - pyproject.toml "$CONSTRAINTS" <<'EOF'
import hashlib, pathlib, sys
content = b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])
print(hashlib.sha256(content + repr((sys.version, str(pathlib.Path.cwd()))).encode()).hexdigest())
EOF
}

install() {
    local stamp=$VENV/installed-$EXTRAS wanted
    wanted=$(fingerprint)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        echo "== .venv is up to date"
        return
    fi
    echo "== installing hf_quant${EXTRAS:+ [$EXTRAS]} into .venv; the first time this downloads torch"
    rm -f "$stamp"
    # torch by itself and first: an exact version lets a CPU build that is at hand win over the default one.
    "$VENV/bin/python" -m pip install --constraint "$CONSTRAINTS" "$(grep '^torch==' "$CONSTRAINTS")"
    "$VENV/bin/python" -m pip install --constraint "$CONSTRAINTS" --editable ".${EXTRAS:+[$EXTRAS]}"
    echo "$wanted" >"$stamp"
}

make_venv
install
export PATH="$VENV/bin:$PATH"
