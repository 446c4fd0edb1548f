#!/usr/bin/env bash
# Train a teacher on handwritten digits, distil a student with NormKD, train the same student without a teacher, and
# compare them. Creates .venv; run the script again to continue after an interruption. Needs only Python >= 3.11.
# $OUTPUT: folder of the runs (LOG.PREFIX); default: output.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh ""
out=${OUTPUT:-output}
teacher=$out/digits/teacher/student_last.pt
train() { # CONFIG NAME [KEY VALUE ...]
  python tools/train.py --cfg "configs/digits/$1.yaml" --resume LOG.PREFIX "$out" EXPERIMENT.NAME "${@:2}"
}
train vanilla_resnet20 teacher
train vanilla_resnet8 student_plain # the same SEED: the students start from the same weights and see the same batches
# The setting for small data sets and short schedules, see docs/distillers.md.
train normkd student_normkd DISTILLER.TEACHER_WEIGHTS "$teacher" NormKD.WARMUP 5 NormKD.LOSS.CE_WEIGHT 1.0
echo
echo "Accuracy on the 360 test images, weights of the last epoch:"
python tools/eval.py -c "$teacher" "$out"/digits/student_{plain,normkd}/student_last.pt
echo
echo "weights:     $out/digits/{teacher,student_plain,student_normkd}/student_{last,best}.pt"
echo "TensorBoard: .venv/bin/tensorboard --logdir $out/digits"
