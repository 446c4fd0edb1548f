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

refuse() {
  echo "error: $1" >&2
  exit 2
}

[[ ${1:-} =~ ^(r34_r18|r50_mv1)$ ]] || refuse "which pair? r34_r18 or r50_mv1"
[[ -n ${2:-} ]] || refuse "which method? one of: $(cd "configs/imagenet/$1" && echo *.yaml)"
config=configs/imagenet/$1/$2.yaml
[[ -f $config ]] || refuse "there is no $config"
shift 2
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  gpus=$1
  [[ $gpus =~ [1-9] ]] || refuse "GPUS is $gpus: at least 1, or leave it out for all GPUs"
  shift
else
  gpus=$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')
fi

exec torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 tools/train.py --cfg "$config" --resume "$@"
