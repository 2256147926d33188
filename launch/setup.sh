#!/usr/bin/env bash
# Makes a virtual environment with the locked packages and builds csrc:  launch/setup.sh .venv
# Needs Python 3.11, pip, a C++ compiler. A second run reuses what is there.
set -euo pipefail
venv=${1:?usage: launch/setup.sh VENV}
cd "$(dirname "$0")/.."
[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
py=$venv/bin/python
"$py" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "setup: the lock is for Python 3.11, $py is $("$py" -V). Mend: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
if ! "$py" -c 'import torch, sys; sys.exit(torch.__version__ != "2.13.0+cpu")' 2>/dev/null; then
    # The local version label asks for the CPU build alone: PyPI's own 2.13.0 is the CUDA build.
    "$py" -m pip install -q "torch==2.13.0+cpu" 2>/dev/null ||
        "$py" -m pip install -q "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
fi
"$py" -m pip install -q --no-deps -r requirements-cpu.lock
"$py" -m pip install -q --no-deps --no-build-isolation -e .
"$py" - <<'PY'
import hybridrl, megatron.core, ray, torch, vllm
print(f"hybridrl {hybridrl.__version__}: torch {torch.__version__}, megatron-core {megatron.core.__version__}, "
      f"vLLM {vllm.__version__}, Ray {ray.__version__}")
PY
