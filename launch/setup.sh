#!/usr/bin/env bash
# Makes a virtual environment with the locked packages and builds csrc:  launch/setup.sh .venv
# Needs Python 3.11 with pip, and a C++ compiler. A second run reuses what is there. PYTHON names the interpreter;
# without it python3.11, python3 and python are tried.
set -euo pipefail
venv=${1:?usage: launch/setup.sh VENV}
cd "$(dirname "$0")/.."
# What a shell may carry that would mix another Python's packages into this one, or install them elsewhere.
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
py=$venv/bin/python

is_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python}; do
        if is_311 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: the lock is for Python 3.11; tried: ${PYTHON:-python3.11 python3 python}. Mend: install it, or" \
        "make PYTHON=/path/to/python3.11 ..." >&2
    return 1
}

if ! { is_311 "$py" && "$py" -m pip --version >/dev/null 2>&1; }; then
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
        echo "setup: $venv is there and is no virtual environment. Mend: remove it, or make VENV=another ..." >&2
        exit 1
    fi
    python=$(find_python)
    # Some distributions split ensurepip off; a pip of the interpreter itself can then put one into the environment.
    "$python" -m venv --clear "$venv" >/dev/null 2>&1 || {
        "$python" -m venv --clear --without-pip "$venv"
        "$python" -m pip --python "$py" install -q pip
    }
fi
if ! command -v "${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
    echo "setup: no C++ compiler (c++, g++ or clang++), which csrc needs. Mend: install one, or set CXX" >&2
    exit 1
fi
if ! "$py" -c 'import torch, sys; sys.exit(torch.__version__ != "2.13.0+cpu")' 2>/dev/null; then
    # The local version label asks for the CPU build alone: PyPI's own 2.13.0 is the CUDA build.
    "$py" -m pip install -q "torch==2.13.0+cpu" 2>/dev/null ||
        "$py" -m pip install -q "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
fi
"$py" -m pip install -q --no-deps -r requirements-cpu.lock
"$py" -m pip install -q --no-deps --no-build-isolation -e .
"$py" - <<'PY'
import hybridrl, megatron.core, ray, torch, vllm
from hybridrl import _C
print(f"hybridrl {hybridrl.__version__}: torch {torch.__version__}, megatron-core {megatron.core.__version__}, "
      f"vLLM {vllm.__version__}, Ray {ray.__version__}")
PY
