"""CRD: contrastive learning of embeddings of student and teacher.

Source: Tian et al., "Contrastive Representation Distillation" (ICLR 2020), Eq. 17-19 (NCE objective) and section 3.4
(memory bank, momentum, embeddings). The memory is part of the checkpoint.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from mdistiller_norm.distillers.base import Distiller, Need, Pair, loss_weights, register
from mdistiller_norm.distillers.common import check_typed, keyed_below, keyed_integers
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs, at_least_float32

# Up to here, products with the whole memory are faster than gathering a third of its rows. Above, rows are gathered for
# some anchors at a time: at most CHUNK numbers (256 MiB).
DENSE_SAMPLES = 1 << 17
CHUNK = 1 << 26
EPS = 1e-7


def _nce_logits(scores: Tensor, log_z: Tensor, samples: int) -> Tensor:
    """Log odds of the posterior ``P / (P + c)`` (Eq. 17), with ``P = exp(score) / Z`` and ``c = K / N + 1e-7``."""
    return at_least_float32(scores) - log_z - math.log((scores.shape[1] - 1) / samples + EPS)


def nce_loss(scores: Tensor, log_z: Tensor, samples: int) -> Tensor:
    """Noise contrastive loss of one network's anchors (Eq. 18), summed over the pairs, averaged over the anchors.

    Args:
        scores: ``[B, 1 + K]``, similarities divided by the temperature, the positive first.
        log_z: scalar, logarithm of the normaliser Z.
        samples: number of training samples N; the noise is uniform over them.
    """
    negatives = scores.shape[1] - 1
    logits = _nce_logits(scores, log_z, samples)
    # The reference has its epsilon in the denominator only, which adds this constant.
    constant = negatives * math.log1p(EPS * samples / negatives)
    return constant - (F.logsigmoid(logits[:, 0]) + F.logsigmoid(-logits[:, 1:]).sum(1)).mean()


def _similarities(anchors: Tensor, memory: Tensor, chosen: Tensor) -> Tensor:
    """Inner products of each anchor ``[B, D]`` with its rows ``chosen`` ``[B, M]`` of the memory ``[N, D]``."""
    if len(memory) <= DENSE_SAMPLES:
        return (anchors @ memory.T).gather(1, chosen)
    pairs = _chunks(anchors, memory, chosen)
    return torch.cat([torch.bmm(rows, some[:, :, None]) for some, rows in pairs]).squeeze(2)


def _weighted_rows(weights: Tensor, memory: Tensor, chosen: Tensor) -> Tensor:
    """Sum of each anchor's rows, weighted by ``weights`` ``[B, M]``; the rows of one anchor are distinct."""
    if len(memory) <= DENSE_SAMPLES:
        dense = torch.zeros(len(chosen), len(memory), dtype=weights.dtype, device=weights.device)
        return dense.scatter_(1, chosen, weights) @ memory
    pairs = _chunks(weights, memory, chosen)
    return torch.cat([torch.bmm(some[:, None], rows) for some, rows in pairs]).squeeze(1)


def _chunks(values: Tensor, memory: Tensor, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the values and the gathered rows ``[b, M, D]`` of some anchors at a time."""
    count = min(len(chosen), math.ceil(chosen.numel() * memory.shape[1] / CHUNK))
    for some, rows in zip(values.chunk(count), chosen.chunk(count), strict=True):
        yield some, memory[rows]


class ContrastSampler(nn.Module):
    """Draws positives and negatives on the device, without data-dependent shapes.

    The negatives of a sample are K distinct samples of other classes. Each step has one random order of all samples;
    the negatives are K neighbours in it (without the sample's class, wrapping around) from a random start. They are a
    uniformly random subset for each sample, but the subsets of one step overlap. The positive is the sample itself, or
    if ``relaxed`` any sample of its class.
    """

    def __init__(self, targets: Tensor, num_classes: int, negatives: int, relaxed: bool) -> None:
        super().__init__()
        targets = targets.cpu()
        counts = torch.bincount(targets, minlength=num_classes)
        self.samples, self.largest = len(targets), int(counts.max())
        self.negatives, self.relaxed = negatives, relaxed
        if negatives > (others := self.samples - self.largest):
            raise ConfigError(f"CRD.NCE.K must be <= {others} for these classes, got {negatives}")
        self.order = nn.Buffer(targets.argsort(stable=True), persistent=False)
        self.starts = nn.Buffer(counts.cumsum(0) - counts, persistent=False)
        self.counts = nn.Buffer(counts, persistent=False)

    def forward(self, targets: Tensor, indices: Tensor, key: Tensor) -> Tensor:
        """Return ``[B, 1 + K]`` positions in the training set, the positive first, for a batch and its key."""
        positions = torch.arange(self.samples, device=key.device)
        shuffled = keyed_integers(key, positions).argsort()
        places = torch.empty_like(shuffled).scatter_(0, shuffled, positions)
        starts, counts = self.starts[targets][:, None], self.counts[targets][:, None]
        members = torch.arange(self.largest, device=key.device)
        exists = members < counts
        same_class = places[self.order[(starts + members).clamp_max(self.samples - 1)]]
        same_class = same_class.where(exists, self.samples).sort(1).values
        # The place of the r-th other sample is r plus the number of same-class samples before it.
        others_before = (same_class - members).where(exists, self.samples)
        others = self.samples - counts
        start = keyed_below(key, self.samples + indices[:, None], others)
        rank = (start + torch.arange(self.negatives, device=key.device)) % others
        negatives = shuffled[rank + torch.searchsorted(others_before, rank, right=True)]
        positive = indices[:, None]
        if self.relaxed:
            positive = self.order[starts + keyed_below(key, 2 * self.samples + positive, counts)]
        return torch.cat([positive, negatives], 1)


@register("CRD")
class CRD(Distiller):
    """Contrastive representation distillation of the pooled features.

    The anchors of each network are compared with the memory of the other. The first training batch sets the normalisers
    Z. In training, each step moves the memory of its samples, of all processes, towards their embeddings.
    """

    defaults = {
        "MODE": "exact",
        "NCE": {"K": 16384, "MOMENTUM": 0.5, "TEMPERATURE": 0.07},
        "FEAT": {"DIM": 128, "STUDENT_DIM": 256, "TEACHER_DIM": 256},
        "WARMUP": 0,
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.8},
    }
    meanings = {
        "MODE": "positives: exact (the sample) or relax (any sample of its class)",
        "NCE.K": "negatives of each sample",
        "NCE.MOMENTUM": "momentum of the memory",
        "NCE.TEMPERATURE": "temperature of the similarities",
        "FEAT.DIM": "width of the embeddings",
        "FEAT.STUDENT_DIM": "probed; checked if it is set",
        "FEAT.TEACHER_DIM": "probed; checked if it is set",
    }
    need = Need.POOLED
    needs_indices = True

    def __init__(
        self,
        widths: Sequence[int],
        sampler: ContrastSampler,
        dim: int,
        momentum: float,
        temperature: float,
        **weights: Any,
    ) -> None:
        super().__init__(**weights)
        self.momentum, self.temperature, self.sampler = momentum, temperature, sampler
        self.embed_student, self.embed_teacher = (nn.Linear(width, dim) for width in widths)
        shape, bound = (sampler.samples, dim), math.sqrt(3 / dim)  # rows of expected length 1
        memories = [nn.Buffer((2 * torch.rand(shape) - 1) * bound) for _ in range(2)]
        self.student_memory, self.teacher_memory = memories
        self.log_z = nn.Buffer(torch.full((2,), torch.inf))  # infinite until the first batch

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Self:
        nce, feat = node.NCE, node.FEAT
        if node.MODE not in ("exact", "relax"):
            raise ConfigError(f"CRD.MODE must be exact or relax, got {node.MODE!r}")
        widths = [outputs.pooled.shape[1] for outputs in (pair.student, pair.teacher)]
        for key, width in zip(("STUDENT_DIM", "TEACHER_DIM"), widths, strict=True):
            check_typed(f"CRD.FEAT.{key}", feat[key], cls.defaults["FEAT"][key], width)
        sampler = ContrastSampler(pair.targets, pair.num_classes, nce.K, node.MODE == "relax")
        return cls(widths, sampler, feat.DIM, nce.MOMENTUM, nce.TEMPERATURE, **loss_weights(node))

    def extra_parameters(self) -> int:
        return super().extra_parameters() + 2 * self.student_memory.numel()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        anchors_s = F.normalize(self.embed_student(student.pooled), dim=1)
        anchors_t = F.normalize(self.embed_teacher(teacher.pooled), dim=1)
        chosen = self.sampler(batch.targets, batch.indices, batch.key)
        sizes = _batch_sizes(batch.indices)
        memory_s, memory_t = self.student_memory, self.teacher_memory
        loss_s, z_s = self._contrast(anchors_s, memory_t, chosen, self.log_z[0], sizes)
        loss_t, z_t = self._contrast(anchors_t, memory_s, chosen, self.log_z[1], sizes)
        if self.training:
            self.log_z.copy_(torch.stack([z_s, z_t]))
            indices = _gather(batch.indices, sizes)
            # Duplicate indices all write the first embedding, so the order of the writes is irrelevant.
            first = (indices[:, None] == indices).byte().argmax(1)
            for anchors, memory in ((anchors_s, memory_s), (anchors_t, memory_t)):
                new = _gather(anchors.detach(), sizes)[first].to(memory)
                moved = torch.lerp(new, memory[indices], self.momentum)
                memory.index_copy_(0, indices, F.normalize(moved, dim=1))
        return loss_s + loss_t

    def _contrast(
        self, anchors: Tensor, memory: Tensor, chosen: Tensor, log_z: Tensor, sizes: list[int]
    ) -> tuple[Tensor, Tensor]:
        samples = self.sampler.samples
        with torch.no_grad():
            scores = _similarities(anchors, memory, chosen) / self.temperature
            everyone = _gather(scores.flatten().logsumexp(0, keepdim=True), [1] * len(sizes))
            first = everyone.logsumexp(0) + math.log(samples / (sum(sizes) * scores.shape[1]))
            log_z = first.where(log_z.isinf(), log_z.to(first))
            loss = nce_loss(scores, log_z, samples)
            slope = _nce_logits(scores, log_z, samples).sigmoid()  # of the loss by the scores
            slope[:, 0] -= 1
            pull = _weighted_rows(slope / len(scores), memory, chosen) / self.temperature
        # An explicit gradient, added as a linear term of value 0: autograd would store every gathered row and need the
        # memory from before its update.
        return loss + ((anchors - anchors.detach()) * pull).sum(), log_z


def _batch_sizes(indices: Tensor) -> list[int]:
    """Batch size of every process; they can differ in the last step of an epoch. Synchronises if there are several."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [len(indices)]
    sizes = indices.new_empty(distributed.get_world_size())
    distributed.all_gather(list(sizes.split(1)), indices.new_full((1,), len(indices)))
    return [int(size) for size in sizes.tolist()]


def _gather(tensor: Tensor, sizes: list[int]) -> Tensor:
    if len(sizes) == 1:
        return tensor
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
