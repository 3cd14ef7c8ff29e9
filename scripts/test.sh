#!/usr/bin/env bash
# Run the test suite in .venv, which is made first where there is none: scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh

make_venv .venv test
# The whole suite is shared among the cores, in stretches: neighbours use the same compiled programs.
[ $# -gt 0 ] || set -- -n auto --maxprocesses 4 --dist worksteal
# A later -m among the arguments takes the place of this one.
exec .venv/bin/python -m pytest -m "not compare and not tpu_compile and not colab" "$@"
