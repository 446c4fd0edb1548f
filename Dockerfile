# Training on a machine with NVIDIA GPUs:
#   docker build --tag mdistiller_norm .
#   docker run --rm --gpus all --ipc=host -v "$PWD/data:/mdistiller_norm/data" -v "$PWD/output:/mdistiller_norm/output" mdistiller_norm \
#     python tools/train.py --cfg configs/cifar100/normkd/res32x4_res8x4.yaml
# The devel image has the C compiler that torch.compile needs.
FROM pytorch/pytorch:2.8.0-cuda12.8-cudnn9-devel
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /mdistiller_norm
COPY . .
RUN python -m pip install --editable ".[imagenet]"
CMD ["python", "tools/train.py", "--help"]
