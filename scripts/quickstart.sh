#!/usr/bin/env bash
# The main job on real data, from nothing: trains a teacher on handwritten digits, distils a student from it by NormKD,
# trains the same student without a teacher, and compares them. Needs Python >= 3.11 and a package index, nothing else.
# Stopped half-way, the same command goes on. Run folders: output/digits (LOG.PREFIX can be set by OUTPUT).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh ""
out=${OUTPUT:-output}
# The students share SEED, so both start from the same weights and see the same batches.
python tools/train.py --cfg configs/digits/vanilla_resnet20.yaml --resume LOG.PREFIX "$out" EXPERIMENT.NAME teacher
teacher=$out/digits/teacher/student_last.pt
python tools/train.py --cfg configs/digits/vanilla_resnet8.yaml --resume LOG.PREFIX "$out" EXPERIMENT.NAME student_plain
python tools/train.py --cfg configs/digits/normkd.yaml --resume LOG.PREFIX "$out" EXPERIMENT.NAME student_normkd \
  DISTILLER.TEACHER_WEIGHTS "$teacher"
echo
echo "Test split of the digits (360 images), weights of the last epoch:"
python tools/eval.py -c "$teacher" "$out"/digits/student_{plain,normkd}/student_last.pt
echo
echo "weights:     $out/digits/{teacher,student_plain,student_normkd}/student_{last,best}.pt"
echo "TensorBoard: .venv/bin/tensorboard --logdir $out/digits"
