#!/bin/sh
# The runtime install on its own: small, without training libraries, and able to verify, serve and answer.
#   scripts/check-bare-install.sh PYTHON VENV
set -eu
python=$1
venv=$2
limit_mb=210
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt .

for package in torch sklearn pandas scipy onnx lightgbm pyarrow; do
    if "$venv/bin/python" -c "import $package" 2>/dev/null; then
        echo "the bare install brings $package, which serving must not need" >&2
        exit 1
    fi
done
size_mb=$(du -sm "$venv" | cut -f1)
echo "bare install: $size_mb MB (at most $limit_mb)"
[ "$size_mb" -le "$limit_mb" ]

store=$(mktemp -d)
"$venv/bin/modelyard" store publish "$store" tests/fixtures/bundle-v1
"$venv/bin/modelyard" bundle verify "$store"/*/1
"$venv/bin/python" scripts/ask_once.py "$venv/bin/modelyard" "$store"
rm -rf "$store"
