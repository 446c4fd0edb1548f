"""One training step: a function of tensors without host-device synchronisation."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from mdistiller_norm.data import TrainLoader
from mdistiller_norm.data.base import Tensors
from mdistiller_norm.data.plan import Part
from mdistiller_norm.engine.meters import TrainMeters
from mdistiller_norm.engine.optim import DOT
from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.types import Batch


class TrainStep:
    """Augmentation, teacher, student, backward pass, optimizer and metrics.

    The inputs of a step are tensors (``raw``). Values that change between epochs are tensors that are written in place:
    the loss weights and, on CUDA, the learning rate. A step can therefore be captured as a CUDA graph.

    Args:
        loader: prepares a batch from ``raw``.
        teacher: None for plain training.
        scaler: of fp16 gradients; None to not scale.
        forward: ``trainable`` (default) or a DistributedDataParallel around it.
        accumulate: micro-batches of a batch, whose gradients are summed.
        clip_grad: largest norm of the gradient; 0 to not clip.

    Attributes:
        part: rows of the next batch that this process trains on; defaults to all.
    """

    def __init__(
        self,
        loader: TrainLoader,
        teacher: Teacher | None,
        trainable: Trainable,
        optimizer: torch.optim.Optimizer | DOT,
        meters: TrainMeters,
        scaler: torch.amp.GradScaler | None = None,
        forward: nn.Module | None = None,
        accumulate: int = 1,
        clip_grad: float = 0.0,
    ) -> None:
        device = next(trainable.parameters()).device
        self.loader, self.teacher, self.trainable = loader, teacher, trainable
        self.optimizer, self.meters, self.forward = optimizer, meters, forward or trainable
        self.scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
        self.accumulate, self.clip_grad = accumulate, clip_grad
        self.part = Part(slice(None), 1.0, accumulate)
        self.loss_weights = torch.tensor(trainable.loss_weights(1), device=device)
        self.scaler.scale(torch.zeros((), device=device))  # creates its tensors

    def begin_epoch(self, epoch: int, seed: int) -> None:
        self.loss_weights.copy_(torch.tensor(self.trainable.loss_weights(epoch)))
        for method in self.trainable.methods:
            method.begin_epoch(epoch, seed)

    def with_teacher_outputs(self, batches: Iterator[Tensors]) -> Iterator[Tensors]:
        return self.teacher.with_teacher_outputs(batches) if self.teacher else batches

    def __call__(self, *raw: Tensor) -> None:
        """Train on one batch, given its tensors from :meth:`with_teacher_outputs`."""
        batch, extra = self._prepare(raw)
        rows = len(batch.targets)
        count = min(self.accumulate, self.part.smallest)
        parallel = self.forward if isinstance(self.forward, DistributedDataParallel) else None
        self.trainable.zero_grad()
        for number, (micro_batch, its_extra) in enumerate(_split(batch, extra, count), 1):
            teacher_outputs = self.teacher(micro_batch, *its_extra) if self.teacher else None
            # Gradients are exchanged after the last micro-batch.
            with parallel.no_sync() if parallel and number < count else nullcontext():
                losses = self.forward(micro_batch, teacher_outputs, self.loss_weights)
                if isinstance(self.optimizer, DOT):
                    self.optimizer.backward(losses.parts)
                else:
                    loss = losses.total * (self.part.weight * len(micro_batch.targets) / rows)
                    self.scaler.scale(loss).backward()
            self.meters.update(losses, micro_batch.targets, number == 1, self.part.weight > 0)
        if self.clip_grad and not isinstance(self.optimizer, DOT):
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trainable.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)  # type: ignore[arg-type]
        self.scaler.update()
        self.trainable.update_average()

    def gradient_norms(self, *raw: Tensor) -> dict[str, float]:
        """Return the norms of the student's gradients of the cross entropy and of the methods' losses, as weighted.

        The state does not change: a copy of the student runs.
        """
        batch, extra = self._prepare(raw)
        trial = copy.deepcopy(self.trainable)
        trial.forward_student = trial.student.outputs
        parameters = [p for p in trial.student.parameters() if p.requires_grad]
        device = self.loss_weights.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            outputs = self.teacher(batch, *extra) if self.teacher else None
            parts = trial(batch, outputs, self.loss_weights).parts
        norms = {}
        for name, loss in (("ce", parts[0]), ("distill", parts[1:].sum())):
            grads = torch.autograd.grad(
                loss, parameters, retain_graph=True, materialize_grads=True
            )
            norms[f"grad_norm_{name}"] = float(nn.utils.get_total_norm(grads))
        return norms

    def _prepare(self, raw: Tensors) -> tuple[Batch, Tensors]:
        split = len(raw) - (self.teacher.extra if self.teacher else 0)
        return self.loader.prepare(*raw[:split]), raw[split:]

    def state_tensors(self) -> list[Tensor]:
        """Return all tensors that a step writes: weights, statistics, momenta, metrics, the scale of fp16 gradients."""
        modules = (self.trainable, self.meters, self.optimizer)
        states = [module.state_dict() for module in modules] + [vars(self.scaler)]
        return [leaf.detach() for leaf in tree_leaves(states) if isinstance(leaf, Tensor)]


def _split(batch: Batch, extra: Tensors, count: int) -> list[tuple[Batch, Tensors]]:
    *tensors, key = batch
    parts = zip(*(tensor.tensor_split(count) for tensor in (*tensors, *extra)), strict=True)
    return [(Batch._make((*part[:4], key)), part[4:]) for part in parts]
