#!/usr/bin/env bash
# Build the site from docstrings, guides and notebooks, into build/site: scripts/docs.sh [DIRECTORY]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh

make_venv .venv docs
export PYTHONPATH=scripts JAX_PLATFORMS=cpu
exec .venv/bin/python -m docs "$@"
