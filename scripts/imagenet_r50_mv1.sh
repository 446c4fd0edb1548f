#!/usr/bin/env bash
# ResNet50 -> MobileNetV1 on ImageNet (Table 5): scripts/imagenet.sh, which says more, with the pair given.
#
# Usage: scripts/imagenet_r50_mv1.sh METHOD [GPUS] [KEY VALUE ...]
# Example: scripts/imagenet_r50_mv1.sh normkd 4 DATASET.ROOT /data/imagenet SOLVER.PRECISION bf16
exec "$(dirname "$0")/imagenet.sh" r50_mv1 "$@"
