"""CRD: the student's embedding of a sample must tell the teacher's of the same sample from those of other classes.

Source: Tian et al., "Contrastive Representation Distillation" (ICLR 2020), Eq. 17-19 (the NCE objective) and section
3.4 (memory bank, momentum, embeddings).

The memory holds two embeddings a training sample: ``2 * N * DIM`` floats, 49 MiB for CIFAR-100 and 1.22 GiB for
ImageNet with the default 128 dimensions. It is saved with the run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from mdistiller_norm.distillers.base import Distiller, Need, Pair, at_least_float32, register
from mdistiller_norm.distillers.keyed import keyed_below, keyed_permutation
from mdistiller_norm.distillers.maps import check_typed
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs

# Up to this many samples an anchor meets the whole memory, which is faster than gathering a third of its rows.
DENSE_SAMPLES = 1 << 17
# Beyond, rows are gathered for a few anchors at a time, at most so many numbers (256 MiB).
CHUNK = 1 << 26
EPS = 1e-7


def nce_logits(scores: Tensor, log_z: Tensor, samples: int) -> Tensor:
    """Log odds that a pair comes from the data and not from the noise.

    With ``P = exp(score) / Z`` and ``c = K / samples + 1e-7`` the posterior of Eq. 17 is ``P / (P + c)``, the sigmoid
    of ``log P - log c``: neither the exponential nor a quotient of it is ever formed.

    Args:
        scores: ``[B, 1 + K]``, similarity over temperature, the positive first.
        log_z: scalar, logarithm of the normaliser Z.
        samples: number of training samples N; the noise is uniform over them.
    """
    return at_least_float32(scores) - log_z - math.log((scores.shape[1] - 1) / samples + EPS)


def nce_loss(scores: Tensor, log_z: Tensor, samples: int) -> Tensor:
    """Noise contrastive loss of one side's anchors (Eq. 18): sum over the pairs, mean over the anchors; a scalar.

    See :func:`nce_logits` for the arguments.
    """
    negatives = scores.shape[1] - 1
    logits = nce_logits(scores, log_z, samples)
    # The reference has its epsilon below the fraction bar only; it adds this constant.
    constant = negatives * math.log1p(EPS * samples / negatives)
    return constant - (F.logsigmoid(logits[:, 0]) + F.logsigmoid(-logits[:, 1:]).sum(1)).mean()


def nce_slope(scores: Tensor, log_z: Tensor, samples: int) -> Tensor:
    """Derivative of :func:`nce_loss` by the scores, ``[B, 1 + K]``."""
    chance = nce_logits(scores, log_z, samples).sigmoid()
    return torch.cat([chance[:, :1] - 1, chance[:, 1:]], 1) / len(scores)


def similarities(anchors: Tensor, memory: Tensor, chosen: Tensor, dense: bool) -> Tensor:
    """Inner products of each anchor ``[B, D]`` with its chosen rows ``[B, M]`` of the memory ``[N, D]``: ``[B, M]``."""
    if dense:
        return (anchors @ memory.T).gather(1, chosen)
    chunks = _chunks(memory, chosen)
    parts = zip(anchors.chunk(chunks), chosen.chunk(chunks), strict=True)
    return torch.cat([torch.bmm(memory[rows], some[:, :, None]).squeeze(2) for some, rows in parts])


def weighted_rows(weights: Tensor, memory: Tensor, chosen: Tensor, dense: bool) -> Tensor:
    """Sum of each anchor's chosen rows, times ``weights`` ``[B, M]``: ``[B, D]``. Rows of one anchor are distinct."""
    if dense:
        everywhere = torch.zeros(len(chosen), len(memory), dtype=weights.dtype, device=weights.device)
        return everywhere.scatter_(1, chosen, weights) @ memory
    chunks = _chunks(memory, chosen)
    parts = zip(weights.chunk(chunks), chosen.chunk(chunks), strict=True)
    return torch.cat([torch.bmm(some[:, None], memory[rows]).squeeze(1) for some, rows in parts])


def _chunks(memory: Tensor, chosen: Tensor) -> int:
    """Into how many parts the anchors are split so that one part's rows have at most ``CHUNK`` numbers."""
    return min(len(chosen), math.ceil(chosen.numel() * memory.shape[1] / CHUNK))


class ContrastSampler(nn.Module):
    """Draws each sample's positive and its negatives, on the device, without a data-dependent shape.

    The negatives of a sample are K distinct samples of other classes. All samples are put in one random order a step;
    a sample's negatives are K neighbours in it, its own class left out, from a random place on and around the end. So
    they are a uniformly random subset for each sample, and the subsets of one step overlap.

    Args:
        targets: ``[N]``, the class of every training sample.
        num_classes: number of classes; they may differ in size.
        negatives: K.
        relaxed: the positive is any sample of the same class, not the sample itself.

    Raises:
        ConfigError: a class has fewer than K samples of other classes.
    """

    order: Tensor
    starts: Tensor
    counts: Tensor

    def __init__(self, targets: Tensor, num_classes: int, negatives: int, relaxed: bool = False) -> None:
        super().__init__()
        targets = targets.detach().cpu()
        counts = torch.bincount(targets, minlength=num_classes)
        self.samples, self.largest = len(targets), int(counts.max())
        self.negatives, self.relaxed = negatives, relaxed
        if negatives > self.samples - self.largest:
            raise ConfigError(
                f"CRD.NCE.K is {negatives}, but the largest class leaves {self.samples - self.largest} training "
                "samples of other classes: set it to that number or less"
            )
        # A function of the data set: not part of what is saved.
        self.register_buffer("order", targets.argsort(stable=True), persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, targets: Tensor, indices: Tensor, key: Tensor) -> Tensor:
        """Draw.

        Args:
            targets: ``[B]``, classes of the batch.
            indices: ``[B]``, its positions in the training set.
            key: int64 scalar.

        Returns:
            ``[B, 1 + K]`` positions in the training set, the positive first.
        """
        shuffled = keyed_permutation(key, self.samples)
        places = torch.empty_like(shuffled).scatter_(0, shuffled, torch.arange(self.samples, device=key.device))
        starts, counts = self.starts[targets][:, None], self.counts[targets][:, None]
        members = torch.arange(self.largest, device=key.device)
        exists = members < counts
        own = places[self.order[(starts + members).clamp_max(self.samples - 1)]]
        own = own.where(exists, self.samples).sort(1).values
        # Other number r stands at r plus the own ones in front of it: those with at most r others before them.
        others_before = (own - members).where(exists, self.samples)
        others = self.samples - counts
        start = keyed_below(key, self.samples + indices[:, None], others)
        rank = (start + torch.arange(self.negatives, device=key.device)) % others
        negatives = shuffled[rank + torch.searchsorted(others_before, rank, right=True)]
        positive = indices[:, None]
        if self.relaxed:
            positive = self.order[starts + keyed_below(key, 2 * self.samples + positive, counts)]
        return torch.cat([positive, negatives], 1)


class Embedding(nn.Linear):
    """A linear map to the unit sphere: ``[B, D]`` to ``[B, DIM]``."""

    def forward(self, pooled: Tensor) -> Tensor:
        """See the class."""
        return F.normalize(at_least_float32(super().forward(pooled)), dim=1)


@register("CRD")
class CRD(Distiller):
    """Contrastive representation distillation of the pooled features.

    Each side's anchors are compared with the other side's memory. The normalisers Z are set by the first training
    batch. After the scores of a step, and only in training, the memory of its samples moves towards their embeddings.
    With several processes it takes in the samples of all of them and so stays the same everywhere.

    Args:
        student_dim: of the student's pooled features.
        teacher_dim: of the teacher's.
        sampler: draws positives and negatives.
        dim: of the embeddings.
        momentum: share of the old memory that an update keeps.
        temperature: divides the similarities.
    """

    defaults = {
        "MODE": "exact",
        "FEAT": {"DIM": 128, "STUDENT_DIM": 256, "TEACHER_DIM": 256},
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.8},
        "NCE": {"K": 16384, "MOMENTUM": 0.5, "TEMPERATURE": 0.07},
    }
    need = Need.POOLED
    student_memory: Tensor
    teacher_memory: Tensor
    log_z: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        sampler: ContrastSampler,
        dim: int = 128,
        momentum: float = 0.5,
        temperature: float = 0.07,
        **weights: Any,
    ) -> None:
        super().__init__(**weights)
        self.momentum, self.temperature, self.sampler = momentum, temperature, sampler
        self.embed_student, self.embed_teacher = Embedding(student_dim, dim), Embedding(teacher_dim, dim)
        for name in ("student_memory", "teacher_memory"):
            # Rows of expected length 1.
            self.register_buffer(name, (2 * torch.rand(sampler.samples, dim) - 1) * math.sqrt(3 / dim))
        # Of the student's and the teacher's anchors; infinite until the first batch.
        self.register_buffer("log_z", torch.full((2,), torch.inf))

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> CRD:
        """See :class:`Distiller`."""
        if node.MODE not in ("exact", "relax"):
            raise ConfigError(f"CRD.MODE is {node.MODE!r}: it must be exact or relax")
        nce, feat = node.NCE, node.FEAT
        if nce.K < 1 or feat.DIM < 1 or nce.TEMPERATURE <= 0 or not 0 <= nce.MOMENTUM < 1:
            raise ConfigError(
                f"CRD needs NCE.K >= 1, FEAT.DIM >= 1, NCE.TEMPERATURE > 0 and 0 <= NCE.MOMENTUM < 1, not {nce.K}, "
                f"{feat.DIM}, {nce.TEMPERATURE} and {nce.MOMENTUM}"
            )
        student_dim, teacher_dim = pair.student.pooled.shape[1], pair.teacher.pooled.shape[1]
        check_typed("CRD.FEAT.STUDENT_DIM", feat.STUDENT_DIM, cls.defaults["FEAT"]["STUDENT_DIM"], student_dim)
        check_typed("CRD.FEAT.TEACHER_DIM", feat.TEACHER_DIM, cls.defaults["FEAT"]["TEACHER_DIM"], teacher_dim)
        sampler = ContrastSampler(pair.targets, pair.num_classes, nce.K, relaxed=node.MODE == "relax")
        _check_fits(sampler.samples, feat.DIM)
        return cls(
            student_dim,
            teacher_dim,
            sampler,
            feat.DIM,
            nce.MOMENTUM,
            nce.TEMPERATURE,
            ce_weight=node.LOSS.CE_WEIGHT,
            weight=node.LOSS.FEAT_WEIGHT,
        )

    def extra_parameters(self) -> int:
        """Embeddings and memory, as Table 9 counts them."""
        return super().extra_parameters() + self.student_memory.numel() + self.teacher_memory.numel()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        of_student, of_teacher = self.embed_student(student.pooled), self.embed_teacher(teacher.pooled)
        chosen = self.sampler(batch.targets, batch.indices, batch.key)
        sizes = _sizes(batch.indices)
        student_loss, student_z = self._contrast(of_student, self.teacher_memory, chosen, self.log_z[0], sizes)
        teacher_loss, teacher_z = self._contrast(of_teacher, self.student_memory, chosen, self.log_z[1], sizes)
        if self.training:
            self.log_z.copy_(torch.stack([student_z, teacher_z]))
            self._remember(of_student.detach(), of_teacher.detach(), batch.indices, sizes)
        return student_loss + teacher_loss

    def _contrast(
        self, anchors: Tensor, memory: Tensor, chosen: Tensor, log_z: Tensor, sizes: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Loss of one side's anchors against the other side's memory, and the normaliser it was taken with."""
        samples = self.sampler.samples
        dense = samples <= DENSE_SAMPLES
        with torch.no_grad():
            scores = similarities(anchors, memory, chosen, dense) / self.temperature
            everyone = _gather(scores.flatten().logsumexp(0, keepdim=True), [1] * len(sizes))
            fresh = everyone.logsumexp(0) + math.log(samples / (sum(sizes) * scores.shape[1]))
            log_z = fresh.where(log_z.isinf(), log_z.to(fresh))
            loss = nce_loss(scores, log_z, samples)
            pull = weighted_rows(nce_slope(scores, log_z, samples), memory, chosen, dense) / self.temperature
        # The gradient is taken by hand and attached as a linear term of value 0: autograd would keep every gathered
        # row, and would need the memory as it was before its update.
        return loss + ((anchors - anchors.detach()) * pull).sum(), log_z

    def _remember(self, of_student: Tensor, of_teacher: Tensor, indices: Tensor, sizes: list[int]) -> None:
        """Move the memory of the samples of this step, those of all processes."""
        indices = _gather(indices, sizes)
        # Of a sample that comes twice every writer writes the first one's embedding: their order makes no difference.
        first = (indices[:, None] == indices).byte().argmax(1)
        for embedded, memory in ((of_student, self.student_memory), (of_teacher, self.teacher_memory)):
            moved = torch.lerp(_gather(embedded, sizes)[first].to(memory), memory[indices], self.momentum)
            memory.index_copy_(0, indices, F.normalize(moved, dim=1))


def _alone() -> bool:
    return not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1


def _sizes(tensor: Tensor) -> list[int]:
    """Rows of the batches of all processes. With several it is read on the host: the last of an epoch may differ."""
    if _alone():
        return [len(tensor)]
    size = torch.tensor([len(tensor)], device=tensor.device)
    sizes = [torch.empty_like(size) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, size)
    return [int(size) for size in torch.cat(sizes).tolist()]


def _gather(tensor: Tensor, sizes: list[int]) -> Tensor:
    """``[B, ...]`` of all processes, one after the other; the tensor itself where there is only one."""
    if _alone():
        return tensor
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _check_fits(samples: int, dim: int) -> None:
    """Refuse a memory larger than the machine's, before it is allocated.

    Raises:
        ConfigError: says how much it is.
    """
    needed, free = 2 * samples * dim * 4, _free_memory()
    if needed > free:
        raise ConfigError(
            f"CRD's memory for {samples} samples of {dim} dimensions needs {needed / 2**30:.2f} GiB and "
            f"{free / 2**30:.2f} GiB are free: lower CRD.FEAT.DIM"
        )


def _free_memory() -> float:
    """Bytes of main memory that can be had; infinite on a system that does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf
