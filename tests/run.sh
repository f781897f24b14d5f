#!/usr/bin/env bash
# Lint, types, tests, on any machine with Python and bash. Arguments go to pytest.
#   bash tests/run.sh            all but what is marked slow
#   bash tests/run.sh -m slow    the rest
# The whole suite runs in two processes, a test file in one of them; tests that are named run in one, so that -s works.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=tests/requirements.txt
[[ " $* " != *slow* ]] || requirements=tests/requirements-slow.txt # what only slow tests need
. launch/environment.sh "$requirements"
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

echo "== ruff" && ruff check . && ruff format --check .
echo "== pyright" && pyright
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile
echo "== pytest" && python -m pytest "$@"
