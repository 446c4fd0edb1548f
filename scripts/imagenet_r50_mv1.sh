#!/usr/bin/env bash
# Train ResNet50 -> MobileNetV1 on ImageNet (Table 5) with scripts/imagenet.sh.
#
# Usage: scripts/imagenet_r50_mv1.sh METHOD [GPUS] [KEY VALUE ...]
exec "$(dirname "$0")/imagenet.sh" r50_mv1 "$@"
