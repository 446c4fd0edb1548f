#!/usr/bin/env bash
# Train a pair of Table 4 or 5 on ImageNet with the GPUs of one machine. Run the command again to resume the training.
#
# Usage: scripts/imagenet.sh PAIR METHOD [GPUS] [KEY VALUE ...]
#   PAIR    folder of configs/imagenet: r34_r18 (ResNet34 -> ResNet18) or r50_mv1 (ResNet50 -> MobileNetV1)
#   METHOD  file in that folder: vanilla at ofd crd reviewkd kd dkd normkd dkd_normkd
#   GPUS    number of processes, one per GPU; default: all GPUs
# Example: scripts/imagenet.sh r34_r18 normkd 4 DATASET.ROOT /data/imagenet SOLVER.PRECISION bf16
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $1" >&2
  exit 2
}

[[ ${1:-} =~ ^(r34_r18|r50_mv1)$ ]] || fail "PAIR must be r34_r18 or r50_mv1, got '${1:-}'"
[[ -n ${2:-} ]] || fail "METHOD is missing: choose one of $(cd "configs/imagenet/$1" && echo *.yaml)"
config=configs/imagenet/$1/$2.yaml
[[ -f $config ]] || fail "$config does not exist"
shift 2
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  gpus=$1
  [[ $gpus =~ [1-9] ]] || fail "GPUS must be >= 1, got $gpus"
  shift
else
  gpus=$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')
fi

exec torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 tools/train.py --cfg "$config" --resume "$@"
