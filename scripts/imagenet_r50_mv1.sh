#!/usr/bin/env bash
# ResNet50 -> MobileNetV1 on ImageNet (Table 5), on the GPUs of one machine.
#
# Usage: scripts/imagenet_r50_mv1.sh METHOD [GPUS] [KEY VALUE ...]
#   METHOD  a file of configs/imagenet/r50_mv1: vanilla at ofd crd reviewkd kd dkd normkd dkd_normkd
#   GPUS    processes, one for each GPU; all GPUs when not given
# A run that was stopped goes on when the same command is given again.
# Example: scripts/imagenet_r50_mv1.sh normkd 4 DATASET.ROOT /data/imagenet SOLVER.PRECISION bf16
set -euo pipefail
cd "$(dirname "$0")/.."

method=${1:?"which method? one of: $(cd configs/imagenet/r50_mv1 && echo *.yaml)"}
config=configs/imagenet/r50_mv1/${method}.yaml
if [[ ! -f $config ]]; then
  echo "there is no $config" >&2
  exit 2
fi
shift
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  gpus=$1
  shift
else
  gpus=$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')
fi

exec torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 tools/train.py --cfg "$config" --resume "$@"
