#!/usr/bin/env bash
# Lint, types, tests, on any machine with Python and bash. Arguments go to pytest.
#   bash tests/run.sh            all but what is marked slow
#   bash tests/run.sh -m slow    the rest
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh tests/requirements.txt
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

echo "== ruff" && ruff check . && ruff format --check .
echo "== pyright" && pyright
echo "== pytest" && python -m pytest "$@"
