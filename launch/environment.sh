# Sourced by quickstart.sh and tests/run.sh, from the repository's root:
#   . launch/environment.sh REQUIREMENTS_FILE
# Creates .venv once, installs into it when the requirements have changed, and puts it first on PATH.
# PYTHON=/path/to/python chooses the interpreter.

_python="${PYTHON:-python3}"

_lacks() {
    echo "error: this machine lacks $1" >&2
    exit 2
}

command -v "$_python" >/dev/null || _lacks "Python ($_python): install Python 3.11 or newer, or set PYTHON to one"
"$_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    _lacks "a recent Python ($_python is $("$_python" -V 2>&1)): install 3.11 or newer, or set PYTHON to one"
"$_python" -c 'import venv, ensurepip' 2>/dev/null ||
    _lacks "Python's venv module: on Debian and Ubuntu, apt install python3-venv"

_stamp=".venv/.installed-$(cat requirements.txt "$1" | cksum | tr ' ' -)"
if [ ! -e "$_stamp" ]; then
    echo "== installing $1 into .venv (once; minutes, most of it download)"
    _start=$SECONDS
    [ -x .venv/bin/python ] || "$_python" -m venv .venv
    # DeepSpeed compiles its kernels on first use, and this program needs none of them on a CPU.
    DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
    touch "$_stamp"
    echo "== installed in $((SECONDS - _start)) s"
fi
PATH="$PWD/.venv/bin:$PATH"
