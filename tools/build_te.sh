#!/usr/bin/env bash
# Build the wheel of Transformer Engine's PyTorch extension once, for machines with the same Python and torch:
#     tools/build_te.sh PYTHON OUT
# PYTHON: interpreter of an environment that has that torch already, its CUDA build. No GPU and no nvcc are needed, but a C++
# compiler and CUDA's headers; they are looked for in CUDA_HOME (default: /usr/local/cuda). Some minutes on 16 cores.
#
# The extension is published as source only. pip would build it in an environment of its own, with the newest torch there
# is, and the result cannot be loaded beside another: hence --no-build-isolation.
set -euo pipefail

python=$1
out=$2
te="transformer-engine-torch==2.20.2"
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export NVTE_FRAMEWORK=pytorch
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

fail() {
    echo "build_te: $*" >&2
    exit 1
}
[[ -f $CUDA_HOME/include/cuda.h ]] || fail "no include/cuda.h in CUDA_HOME=$CUDA_HOME; install CUDA's headers or name their place"
"$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
    fail "$python has no CUDA build of torch; install torch first"
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler"

# What builds it, beside the environment and not in it; cuDNN's and NCCL's headers come with torch.
beside=$(mktemp -d)
trap 'rm -rf "$beside"' EXIT
"$python" -m pip --disable-pip-version-check --quiet install --target "$beside" setuptools wheel pybind11 packaging
headers=$("$python" -c 'import glob, sysconfig; print(":".join(glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/include")))')
export PYTHONPATH=$beside${PYTHONPATH:+:$PYTHONPATH} CPATH=$headers${CPATH:+:$CPATH}
# --no-cache-dir: pip would hand out a wheel that it has built before, for another torch.
"$python" -m pip --disable-pip-version-check --no-cache-dir wheel --no-deps --no-build-isolation --wheel-dir "$out" "$te"
