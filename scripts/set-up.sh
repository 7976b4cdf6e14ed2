#!/bin/sh
# Make a virtual environment and install everything pinned in constraints.txt, saying every few seconds that it goes on.
#   scripts/set-up.sh PYTHON VENV [TORCH_INDEX]
set -eu
python=$1
venv=$2
torch_index=${3:-}

# Run a command in the background; print the seconds while it is silent.
told() {
    title=$1
    shift
    echo "$title"
    "$@" &
    pid=$!
    waited=0
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        waited=$((waited + 1))
        [ $((waited % 4)) -ne 0 ] || echo "  … $waited s"
    done
    wait "$pid"
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "modelyard needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
"$python" -m venv "$venv"
# torch first: the local or CPU build that the pins admit is taken before anything else can ask for another.
told "installing torch into $venv" "$venv/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt \
    ${torch_index:+--extra-index-url "$torch_index"} torch
told "installing modelyard and the rest" "$venv/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt \
    --editable '.[train,torch,compress,fsspec,grpc,otel,dev]'
touch "$venv/.installed"
