# shellcheck shell=bash
# Sourced by the scripts: where the clone is, and caches that stay inside it.

root=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cache=$root/.cache
cd -- "$root" || exit
mkdir -p "$cache"

# Settings of the caller's own Python must not reach ours.
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX
export PYTHONNOUSERSITE=1

export XDG_CACHE_HOME=$cache
export PIP_CACHE_DIR=$cache/pip
export PRE_COMMIT_HOME=$cache/pre-commit
export RUFF_CACHE_DIR=$cache/ruff
export HYPOTHESIS_STORAGE_DIRECTORY=$cache/hypothesis
export MPLCONFIGDIR=$cache/matplotlib
export FLWR_HOME=$cache/flower
export TORCH_HOME=$cache/torch
export TORCH_EXTENSIONS_DIR=$cache/torch-extensions
export TORCHINDUCTOR_CACHE_DIR=$cache/inductor
export TRITON_HOME=$cache/triton
export TRITON_CACHE_DIR=$cache/triton/cache
export CUDA_CACHE_PATH=$cache/cuda
export CCACHE_DIR=$cache/ccache

export FLWR_TELEMETRY_ENABLED=0
export FLWR_DISABLE_UPDATE_CHECK=1
export RAY_USAGE_STATS_ENABLED=0

# Ray puts Unix sockets 68 bytes below this folder, and their names may have 107. The folder
# goes when the script ends; what pytest keeps for the reader is in the cache.
scratch=$cache
((${#scratch} <= 29)) || scratch=/tmp
TMPDIR=$(mktemp -d "$scratch/uh.XXXXXX")
trap 'rm -rf -- "$TMPDIR"' EXIT
export TMPDIR RAY_TMPDIR=$TMPDIR PYTEST_DEBUG_TEMPROOT=$cache

export PATH=$root/.venv/bin:$PATH
