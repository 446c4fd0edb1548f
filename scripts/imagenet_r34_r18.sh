#!/usr/bin/env bash
# Train ResNet34 -> ResNet18 on ImageNet (Table 4) with scripts/imagenet.sh.
#
# Usage: scripts/imagenet_r34_r18.sh METHOD [GPUS] [KEY VALUE ...]
exec "$(dirname "$0")/imagenet.sh" r34_r18 "$@"
