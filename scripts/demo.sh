#!/usr/bin/env bash
# Generate text with the built-in model, without a cache and with one: scripts/demo.sh [--prompt TEXT] [--tokens N]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh

make_venv .venv ""
export HF_HUB_OFFLINE=1 # everything is here
exec .venv/bin/python scripts/demo.py "$@"
