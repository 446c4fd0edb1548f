"""CRD and its keyed random numbers: sampling, steps against a plain reference, memory, several processes."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from yacs.config import CfgNode

from mdistiller_norm.distillers import Pair, crd
from mdistiller_norm.distillers.common import keyed_integers
from mdistiller_norm.distillers.crd import CRD, ContrastSampler
from mdistiller_norm.types import Batch, Outputs

# Classes of different sizes, none of class 3.
UNEQUAL = torch.tensor([0] * 3 + [1] * 9 + [2] * 20 + [4])
UNEQUAL = UNEQUAL[torch.randperm(33, generator=torch.Generator().manual_seed(5))]


def splitmix64(state: int, count: int) -> list[int]:
    numbers, low = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & low
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & low
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & low
        numbers.append(z ^ (z >> 31))
    return numbers


def test_keyed_integers_are_splitmix64() -> None:
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # test vector of the authors
    gamma = 0x9E3779B97F4A7C15
    for key in (0, 1, -7, 2**62 - 1):
        (start,) = splitmix64((key - gamma) % 2**64, 1)
        drawn = keyed_integers(torch.tensor(key), torch.arange(1, 6)).tolist()
        assert [number % 2**64 for number in drawn] == splitmix64(start, 5)


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("negatives", [1, 5, 13])
def test_negatives_are_distinct_and_of_other_classes(negatives: int, relaxed: bool) -> None:
    sampler = ContrastSampler(UNEQUAL, 5, negatives, relaxed)
    everyone = torch.arange(33)
    for key in range(200):
        chosen = sampler(UNEQUAL, everyone, torch.tensor(key))
        assert chosen.shape == (33, 1 + negatives)
        assert (UNEQUAL[chosen[:, 0]] == UNEQUAL).all()
        assert relaxed or chosen[:, 0].equal(everyone)
        assert (UNEQUAL[chosen[:, 1:]] != UNEQUAL[:, None]).all()
        assert all(len(set(row)) == 1 + negatives for row in chosen.tolist())
        assert chosen.equal(sampler(UNEQUAL, everyone, torch.tensor(key)))
    assert not chosen.equal(sampler(UNEQUAL, everyone, torch.tensor(1000)))


def test_negatives_and_relaxed_positives_are_uniform() -> None:
    sampler, draws = ContrastSampler(UNEQUAL, 5, 5, relaxed=True), 4000
    same, others = torch.nonzero(UNEQUAL == 1).flatten(), torch.nonzero(UNEQUAL != 1).flatten()
    index = same[:1]
    chosen = torch.cat([sampler(UNEQUAL[index], index, torch.tensor(key)) for key in range(draws)])
    for counts, members, rate in (
        (chosen[:, 0].bincount(minlength=33), same, 1 / 9),
        (chosen[:, 1:].flatten().bincount(minlength=33), others, 5 / 24),
    ):
        allowed = 5 * math.sqrt(draws * rate * (1 - rate))
        assert ((counts[members] - draws * rate).abs() < allowed).all()
        assert counts.sum() == counts[members].sum()


def make_crd(relaxed: bool = False, momentum: float = 0.5, temperature: float = 0.07) -> CRD:
    sampler = ContrastSampler(UNEQUAL, 5, 7, relaxed)
    return CRD([6, 10], sampler, dim=8, momentum=momentum, temperature=temperature).double()


def crd_batch(indices: list[int], key: int, seed: int = 0) -> tuple[Outputs, Outputs, Batch]:
    index, count = torch.tensor(indices), len(indices)
    rng = np.random.default_rng(seed)
    student = torch.tensor(rng.standard_normal((count, 6)), requires_grad=True)
    teacher = torch.tensor(rng.standard_normal((count, 10)))
    batch = Batch(torch.empty(count), UNEQUAL[index], index, torch.full((count,), -1), torch.tensor(key))
    empty = torch.empty(0)
    return Outputs(empty, (), (), student), Outputs(empty, (), (), teacher), batch


class ReferenceCRD:
    """CRD with gathered rows, exponentials and autograd (section 3 of the paper), in RepDistiller's order."""

    def __init__(self, method: CRD, momentum: float, temperature: float) -> None:
        self.memory_s, self.memory_t = method.student_memory.clone(), method.teacher_memory.clone()
        self.momentum, self.temperature = momentum, temperature
        self.z: list[Tensor] = []
        self.method = copy.deepcopy(method)

    def __call__(self, student: Tensor, teacher: Tensor, chosen: Tensor, indices: Tensor) -> Tensor:
        samples, total = len(self.memory_s), torch.zeros((), dtype=torch.float64)
        embedded = []
        for linear, pooled in ((self.method.embed_student, student), (self.method.embed_teacher, teacher)):
            v = pooled @ linear.weight.T + linear.bias
            embedded.append(v / v.square().sum(1, keepdim=True).sqrt())
        exponentials = [
            torch.exp(torch.einsum("bd,bkd->bk", v, memory[chosen]) / self.temperature)
            for v, memory in zip(embedded, (self.memory_t, self.memory_s), strict=True)
        ]
        self.z = self.z or [e.detach().mean() * samples for e in exponentials]
        for e, z in zip(exponentials, self.z, strict=True):
            p, noise = e / z, (chosen.shape[1] - 1) / samples
            posterior = p / (p + noise + 1e-7)
            rejected = noise / (p + noise + 1e-7)
            total = total - (posterior[:, 0].log().sum() + rejected[:, 1:].log().sum()) / len(p)
        with torch.no_grad():
            for v, memory in zip(embedded, (self.memory_s, self.memory_t), strict=True):
                for row, index in zip(v, indices.tolist(), strict=True):
                    new = self.momentum * memory[index] + (1 - self.momentum) * row
                    memory[index] = new / new.square().sum().sqrt()
        return total


@pytest.mark.parametrize(("momentum", "temperature"), [(0.5, 0.07), (0.8, 0.2)])
@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("dense", [True, False])
def test_steps_equal_the_reference(dense, relaxed, momentum, temperature, monkeypatch):
    if not dense:
        monkeypatch.setattr(crd, "DENSE_SAMPLES", 0)
        monkeypatch.setattr(crd, "CHUNK", 2 * 8 * 8)  # two anchors at a time
    method = make_crd(relaxed, momentum=momentum, temperature=temperature)
    reference = ReferenceCRD(method, momentum, temperature)
    for step in range(3):
        student, teacher, batch = crd_batch([4, 9, 30, 0, 17], key=11 + step, seed=10 * step)
        again = student.pooled.detach().clone().requires_grad_()
        chosen = method.sampler(batch.targets, batch.indices, batch.key)
        assert chosen[:, 0].equal(batch.indices) != relaxed
        expected = reference(again, teacher.pooled, chosen, batch.indices)
        value = method(student, teacher, batch)
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
        value.backward()
        expected.backward()
        torch.testing.assert_close(student.pooled.grad, again.grad)
        for ours, theirs in zip(method.parameters(), reference.method.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(method.student_memory, reference.memory_s)
        torch.testing.assert_close(method.teacher_memory, reference.memory_t)
        torch.testing.assert_close(method.log_z.exp(), torch.stack(reference.z))


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_config_keys_reach_their_arguments(mode: str) -> None:
    node = CfgNode(copy.deepcopy(CRD.defaults))
    node.merge_from_list(["MODE", mode, "FEAT.DIM", 11, "NCE.K", 5])
    node.merge_from_list(["NCE.MOMENTUM", 0.8, "NCE.TEMPERATURE", 0.2])
    node.merge_from_list(["LOSS.CE_WEIGHT", 0.37, "LOSS.FEAT_WEIGHT", 4.3, "WARMUP", 9])
    student, teacher, batch = crd_batch([1, 2, 3], key=0)
    pair = Pair(student, teacher, torch.nn.Identity(), UNEQUAL, 5)
    method = CRD.from_config(node, pair).double()
    assert (method.ce_weight, method.weight, method.warmup) == (0.37, 4.3, 9)
    assert method.student_memory.shape == method.teacher_memory.shape == (33, 11)
    reference = ReferenceCRD(method, momentum=0.8, temperature=0.2)
    chosen = ContrastSampler(UNEQUAL, 5, 5, relaxed=mode == "relax")(batch.targets, batch.indices, batch.key)
    expected = reference(student.pooled, teacher.pooled, chosen, batch.indices)
    torch.testing.assert_close(method(student, teacher, batch), expected)
    torch.testing.assert_close(method.student_memory, reference.memory_s)


def test_the_first_of_two_equal_samples_updates_the_memory() -> None:
    student, teacher, batch = crd_batch([8, 5, 8], key=0)
    twice, once = make_crd(), make_crd()
    once.load_state_dict(twice.state_dict())
    twice(student, teacher, batch)
    first_two = [out._replace(pooled=out.pooled[:2]) for out in (student, teacher)]
    once(*first_two, Batch(*(field[:2] if field.ndim else field for field in batch)))
    torch.testing.assert_close(twice.student_memory, once.student_memory)
    torch.testing.assert_close(twice.teacher_memory, once.teacher_memory)


def _one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    method, values = make_crd(), []
    for student, teacher, batch in _shared_batches():
        half = slice(3 * rank, 3 * rank + 3)
        parts = [out._replace(pooled=out.pooled[half]) for out in (student, teacher)]
        rows = Batch(*(field[half] if field.ndim else field for field in batch))
        values.append(method(*parts, rows).detach())
    torch.save({"values": values, **method.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _shared_batches() -> list[tuple[Outputs, Outputs, Batch]]:
    return [crd_batch([1, 4, 9, 16, 25, 30], key=5), crd_batch([30, 1, 2, 3, 5, 8], key=6, seed=7)]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    method = make_crd()
    values = [method(*batch).detach() for batch in _shared_batches()]
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, tensor in method.state_dict().items():
        assert halves[0][name].equal(halves[1][name]), name
        torch.testing.assert_close(halves[0][name], tensor)
    for whole, *parts in zip(values, halves[0]["values"], halves[1]["values"], strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(), whole)
