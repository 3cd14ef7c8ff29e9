#!/usr/bin/env bash
# Build wheel and sdist into dist/, check them, and run the demo where the wheel alone is installed: scripts/package.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh

check_python "$PYTHON"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/tools"
pip_install "$work/tools" build twine
rm -rf dist
"$work/tools/bin/python" -m build --outdir dist . >"$work/log" 2>&1 || die "$(tail -n 20 "$work/log")"
"$work/tools/bin/python" -m twine check --strict dist/*

"$PYTHON" -m venv "$work/bare"
pip_install "$work/bare" dist/*.whl
demo=$PWD/scripts/demo.py
cd "$work" # where there is no jkv but the installed one
export HF_HUB_OFFLINE=1
bare/bin/jkv --version
bare/bin/python "$demo" --tokens 16
