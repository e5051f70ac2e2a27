#!/bin/sh
# Everything that needs a GPU, in less than nine minutes (scripts/gpu_check.py says what).
#
#     scripts/gpu_check.sh [CHECK ...]          needs a GPU, torch, transformers, accelerate, peft
#     scripts/gpu_check.sh --dry-run            the same on the CPU, with tiny shapes
#
# OUT: where the record goes (gpu_check/); PYTHON: the interpreter; DRY=1: as --dry-run.
set -eu
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# The parent of the checks must not speak to the driver itself.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
[ "${DRY:-0}" = 1 ] && set -- --dry-run "$@"
exec timeout --kill-after=5 540 "${PYTHON:-python3}" scripts/gpu_check.py --out "${OUT:-gpu_check}" "$@"
