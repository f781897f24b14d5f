#!/usr/bin/env bash
# Builds the documentation into site/, in an environment of its own (.venv-docs). Arguments go to `mkdocs build`.
# To see changes while you write: .venv-docs/bin/mkdocs serve
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
stamp=.venv-docs/.installed-$(cksum <docs/requirements.txt | tr ' ' -)
if [ ! -e "$stamp" ]; then
    echo "== installing docs/requirements.txt into .venv-docs (once)"
    [ -x .venv-docs/bin/python ] || "$python" -m venv .venv-docs
    .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
    touch "$stamp"
fi
NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict "$@"
