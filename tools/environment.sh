#!/bin/sh
# Make .venv and put into it the pinned packages and this package in editable form. Does nothing when all that is
# already so: the environment remembers a checksum of what it was made from. PYTHON names another interpreter.
set -eu
cd "$(dirname "$0")/.."

made_from="$(cat constraints.txt settings.ini setup.py | cksum)"
stamp=.venv/.made-from
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$made_from" ] && exit 0

fail() {
    echo "$*" >&2
    exit 1
}

first=$(sed -n 's/^min_python = 3\.//p' settings.ini)
last=$(sed -n 's/^max_python = 3\.//p' settings.ini)
supported="import sys; sys.exit(not (3, $first) <= sys.version_info[:2] <= (3, $last))"
candidates="${PYTHON:-python3 $(seq -s ' ' -f 'python3.%g' "$last" -1 "$first")}"

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=
    for candidate in $candidates; do
        if "$candidate" -c "$supported" >/dev/null 2>&1; then python="$candidate" && break; fi
    done
    [ -n "$python" ] || fail "symbnn needs Python 3.$first to 3.$last; none of these is one: $candidates." \
        "Install one, or name it: make PYTHON=/path/to/python3.$last"
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || fail "$python lacks the modules venv and ensurepip, which" \
        "make virtual environments. On Debian or Ubuntu: apt install python3-venv. Or name another: make PYTHON=..."
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
.venv/bin/python -c "$supported" || fail ".venv holds $(.venv/bin/python --version), and symbnn needs Python 3.$first" \
    "to 3.$last. Remove the folder .venv and run make again."

# torch comes first and alone, so that the build which the package index offers by default is the one installed and
# nothing later replaces it.
echo "Installing the packages of constraints.txt into .venv (a few minutes the first time)"
export PIP_DISABLE_PIP_VERSION_CHECK=1
.venv/bin/python -m pip install --quiet --constraint constraints.txt torch
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
echo "$made_from" >"$stamp"
