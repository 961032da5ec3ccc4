#!/usr/bin/env bash
# Make the environment of `make test-te`: tools/make_te_venv.sh FOLDER. The CUDA build of torch, Megatron-Core, and
# Transformer Engine without its compiled extension, for which tests/te/standin stands in; no GPU is needed. About 7 GB.
#
# PYTHON  a Python 3.12 (default: python3.12): Megatron-Core 0.19 is for 3.12 and later
set -euo pipefail

venv=$1
python=${PYTHON:-python3.12}
"$python" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null ||
    { echo "make: PYTHON=$python is not a Python 3.12 with venv; name one" >&2; exit 1; }
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"
}
pip install "torch==2.13.0,!=2.13.0+cpu"
pip install -e . "megatron-core>=0.19,<0.20" "pytest>=8" "pytest-timeout>=2.3"
# Its packages, each from a wheel; what its Python part imports, apart from torch.
pip install --no-deps "transformer-engine==2.20.2" "transformer-engine-cu13==2.20.2"
pip install einops onnxscript onnx onnx_ir ml_dtypes nvdlfw-inspect
