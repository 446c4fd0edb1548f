#!/usr/bin/env bash
# A pair of Table 4 or 5 on ImageNet, on the GPUs of one machine.
#
# Usage: scripts/imagenet.sh PAIR METHOD [GPUS] [KEY VALUE ...]
#   PAIR    a folder of configs/imagenet: r34_r18 (ResNet34 -> ResNet18) or r50_mv1 (ResNet50 -> MobileNetV1)
#   METHOD  a file of that folder: vanilla at ofd crd reviewkd kd dkd normkd dkd_normkd
#   GPUS    processes, one for each GPU; all GPUs when not given
# A run that was stopped goes on when the same command is given again.
# Example: scripts/imagenet.sh r34_r18 normkd 4 DATASET.ROOT /data/imagenet SOLVER.PRECISION bf16
set -euo pipefail
cd "$(dirname "$0")/.."

pair=${1:?"which pair? r34_r18 or r50_mv1"}
method=${2:?"which method? one of: $(cd configs/imagenet/"$pair" && echo *.yaml)"}
config=configs/imagenet/$pair/$method.yaml
if [[ ! -f $config ]]; then
  echo "there is no $config" >&2
  exit 2
fi
shift 2
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  gpus=$1
  shift
else
  gpus=$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')
fi

exec torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 tools/train.py --cfg "$config" --resume "$@"
