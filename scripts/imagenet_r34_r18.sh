#!/usr/bin/env bash
# ResNet34 -> ResNet18 on ImageNet (Table 4): scripts/imagenet.sh, which says more, with the pair given.
#
# Usage: scripts/imagenet_r34_r18.sh METHOD [GPUS] [KEY VALUE ...]
# Example: scripts/imagenet_r34_r18.sh normkd 4 DATASET.ROOT /data/imagenet SOLVER.PRECISION bf16
exec "$(dirname "$0")/imagenet.sh" r34_r18 "$@"
