"""Float64 references of the losses: loops in numpy, written from the papers' formulas.

Each takes the students' arrays, the teachers' arrays and the targets. Analytic references also work on complex numbers,
which gives their exact derivative: the imaginary part of ``f(x + i h d) / h``.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Arrays = Sequence[np.ndarray]
Reference = Callable[[Arrays, Arrays, np.ndarray], Any]


def derivative(
    function: Callable[[Arrays], Any], at: Arrays, direction: Arrays, analytic: bool
) -> float:
    """Derivative along a direction: exact for analytic functions, else by central differences."""
    if analytic:
        return float(
            function([x + 1e-30j * d for x, d in zip(at, direction, strict=True)]).imag / 1e-30
        )
    ahead, behind = (
        function([x + h * d for x, d in zip(at, direction, strict=True)]) for h in (1e-6, -1e-6)
    )
    return float(ahead - behind) / 2e-6


def log_sum_exp(z: np.ndarray) -> Any:
    peak = z.real.max()
    return peak + np.log(np.exp(z - peak).sum())


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - log_sum_exp(z)


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(z))


def kl(log_p: np.ndarray, log_q: np.ndarray) -> Any:
    """KL(p || q); NormKD, Eq. 2 in the direction of the published code."""
    return (np.exp(log_p) * (log_p - log_q)).sum()


def kd(z_s: np.ndarray, z_t: np.ndarray) -> Any:
    return kl(log_softmax(z_t), log_softmax(z_s))


def statistic(z: np.ndarray, name: str) -> Any:
    """NormKD, Eq. 6 (the standard deviation with C - 1) and Table 8; 0 for a row without a scale."""
    top, bottom = z[z.real.argmax()], z[z.real.argmin()]
    if name == "std" and top.real > bottom.real:
        value = np.sqrt(((z - z.mean()) ** 2).sum() / (len(z) - 1))
    else:
        value = {"constant": 1.0, "max": top, "range": top - bottom, "std": 0.0}[name]
    return value if np.real(value) > 1e-6 else 0.0


def log_mean_softmax(unit: np.ndarray, scales: Sequence[float]) -> np.ndarray:
    """NormKD, Eq. 3: the probabilities are averaged over the temperatures."""
    each = np.stack([log_softmax(unit / t) for t in scales])
    return np.array([log_sum_exp(column) for column in each.T]) - np.log(len(scales))


def decoupled(u_s: np.ndarray, u_t: np.ndarray, y: int, alpha: float, beta: float) -> Any:
    """DKD, Eq. 6-7: KL over {target, rest} and KL over the rest."""
    parts = []
    for u in (u_t, u_s):
        rest = np.delete(u, y)
        parts.append((np.array([u[y], log_sum_exp(rest)]) - log_sum_exp(u), log_softmax(rest)))
    (binary_t, rest_t), (binary_s, rest_s) = parts
    return alpha * kl(binary_t, binary_s) + beta * kl(rest_t, rest_s)


def softened(
    stat: str = "constant",
    scales: Sequence[float] = (4.0,),
    weighting: str = "teacher",
    dkd: tuple[float, float] | None = None,
) -> Reference:
    """KD, NormKD, DKD and logit standardization: mean of ``(max T * statistic_t)^2 * divergence``."""

    def loss(students: Arrays, teachers: Arrays, targets: np.ndarray) -> Any:
        total: Any = 0.0
        for z_s, z_t, y in zip(students[0], teachers[0], targets, strict=True):
            tau_s, tau_t = statistic(z_s, stat), statistic(z_t, stat)
            u_s, u_t = (z / tau if tau != 0 else 0 * z for z, tau in ((z_s, tau_s), (z_t, tau_t)))
            if dkd is None:
                divergence = kl(log_mean_softmax(u_t, scales), log_mean_softmax(u_s, scales))
            else:
                divergence = decoupled(u_s / scales[0], u_t / scales[0], y, *dkd)
            weight = {
                "teacher": tau_t**2,
                "student_teacher": np.real(tau_s) * tau_t,
                "none": 1.0,
            }[weighting]
            total = total + max(scales) ** 2 * weight * divergence  # the weight has no gradient
        return total / len(targets)

    return loss


def dist(
    students: Arrays, teachers: Arrays, targets: np.ndarray, beta: float, gamma: float, t: float
) -> Any:
    p_s, p_t = (np.array([softmax(z / t) for z in side]) for side in (students[0], teachers[0]))

    def distance(a: np.ndarray, b: np.ndarray) -> Any:
        total: Any = 0.0
        for x, y in zip(a, b, strict=True):
            x, y = x - x.mean(), y - y.mean()
            total = total + 1 - (x @ y) / (np.sqrt((x**2).sum()) * np.sqrt((y**2).sum()) + 1e-8)
        return total / len(a)

    return t**2 * (beta * distance(p_s, p_t) + gamma * distance(p_s.T, p_t.T))


def ttm(
    students: Arrays, teachers: Arrays, targets: np.ndarray, gamma: float, weighted: bool
) -> Any:
    """Algorithm 1, by the logarithms of the powers of probabilities."""
    total: Any = 0.0
    for z_s, z_t in zip(students[0], teachers[0], strict=True):
        log_powers = gamma * log_softmax(z_t)
        log_sum = log_sum_exp(log_powers)
        total = total + (np.exp(log_sum) if weighted else 1.0) * kl(
            log_powers - log_sum, log_softmax(z_s)
        )
    return total / len(targets)


def nkd(students: Arrays, teachers: Arrays, targets: np.ndarray, gamma: float, t: float) -> Any:
    total: Any = 0.0
    for z_s, z_t, y in zip(students[0], teachers[0], targets, strict=True):
        rest = softmax(np.delete(z_t, y) / t) * log_softmax(np.delete(z_s, y) / t)
        total = total - softmax(z_t)[y] * log_softmax(z_s)[y] - gamma * t**2 * rest.sum()
    return total / len(targets)


def dtkd(
    students: Arrays, teachers: Arrays, targets: np.ndarray, alpha: float, beta: float, t: float
) -> Any:
    total: Any = 0.0
    for z_s, z_t in zip(students[0], teachers[0], strict=True):
        top_s, top_t = z_s[z_s.real.argmax()], z_t[z_t.real.argmax()]
        t_s, t_t = 2 * t * top_s / (top_s + top_t), 2 * t * top_t / (top_s + top_t)
        total = (
            total
            + alpha * t_s * t_t * kd(z_s / t_s, z_t / t_t)
            + beta * t**2 * kd(z_s / t, z_t / t)
        )
    return total / len(targets)


def rld(
    students: Arrays,
    teachers: Arrays,
    targets: np.ndarray,
    alpha: float,
    beta: float,
    t: float,
    t_sure: float,
) -> Any:
    total: Any = 0.0
    for z_s, z_t, y in zip(students[0], teachers[0], targets, strict=True):
        halves = []
        for z, top in ((z_t / t_sure, z_t.argmax()), (z_s / t_sure, y)):
            halves.append(np.array([z[top], log_sum_exp(np.delete(z, top))]) - log_sum_exp(z))
        below = [c for c in range(len(z_t)) if z_t[c] < z_t[y]]
        total = total + alpha * t_sure**2 * kl(*halves)
        total = total + (beta * t**2 * kd(z_s[below] / t, z_t[below] / t) if below else 0.0)
    return total / len(targets)


def block_mean(maps: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Adaptive average pooling: window i of n covers [floor(i H / n), ceil((i + 1) H / n))."""
    height, width = maps.shape[-2:]
    out = np.empty((*maps.shape[:-2], rows, columns), maps.dtype)
    for i, j in itertools.product(range(rows), range(columns)):
        top, bottom = i * height // rows, -(-(i + 1) * height // rows)
        left, right = j * width // columns, -(-(j + 1) * width // columns)
        out[..., i, j] = maps[..., top:bottom, left:right].mean((-2, -1))
    return out


def same_size(students: Arrays, teachers: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = []
    for s, t in zip(students, teachers, strict=True):
        size = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
        pairs.append((block_mean(s, *size), block_mean(t, *size)))
    return pairs


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum())


def at(students: Arrays, teachers: Arrays, targets: np.ndarray, p: float) -> Any:
    total: Any = 0.0
    for pair in same_size(students, teachers):
        energy = ((np.abs(maps) ** p).mean(1).reshape(len(maps), -1) for maps in pair)
        s, t = (np.stack([unit(row) for row in rows]) for rows in energy)
        total = total + ((s - t) ** 2).mean()
    return total


def hint(students: Arrays, teachers: Arrays, targets: np.ndarray) -> Any:
    return ((students[0] - teachers[0]) ** 2).mean()


def nst(students: Arrays, teachers: Arrays, targets: np.ndarray) -> Any:
    def mean_kernel(a: list[np.ndarray], b: list[np.ndarray]) -> Any:
        return sum((x @ y) ** 2 for x in a for y in b) / (len(a) * len(b))

    total: Any = 0.0
    for pair in same_size(students, teachers):
        for one_s, one_t in zip(*pair, strict=True):
            s, t = ([unit(channel.ravel()) for channel in one] for one in (one_s, one_t))
            total = total + (mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)) / len(
                pair[0]
            )
    return total


def pkt(students: Arrays, teachers: Arrays, targets: np.ndarray, eps: float = 1e-7) -> Any:
    tables = []
    for features in (students[0], teachers[0]):
        rows = [unit(row) for row in features]
        table = np.array([[(a @ b + 1) / 2 for b in rows] for a in rows])
        tables.append(np.array([row / row.sum() for row in table]))
    s, t = tables
    return (t * np.log((t + eps) / (s + eps))).mean()


def sp(students: Arrays, teachers: Arrays, targets: np.ndarray) -> Any:
    tables = []
    for maps in (students[0], teachers[0]):
        rows = [one.ravel() for one in maps]
        tables.append(np.array([unit(np.array([a @ b for b in rows])) for a in rows]))
    return ((tables[0] - tables[1]) ** 2).sum() / len(students[0]) ** 2


def vid(students: Arrays, teachers: Arrays, targets: np.ndarray, eps: float = 1e-5) -> Any:
    """Students are the predicted mean and the raw variances."""
    (mean, raw), total = students, 0.0
    for channel, scale in enumerate(raw):
        variance = np.log(1 + np.exp(scale)) + eps
        error = mean[:, channel] - teachers[0][:, channel]
        total = total + 0.5 * (error**2 / variance + np.log(variance)).sum()
    return total / mean.size


def kdsvd(students: Arrays, teachers: Arrays, targets: np.ndarray, k: int) -> float:
    total, batch = 0.0, len(students[0])
    pairs = same_size(students, teachers)
    for n in range(batch):
        before: list[tuple[np.ndarray, np.ndarray]] = []
        for s, t in ((s[n], t[n]) for s, t in pairs):
            width = t.shape[-1]
            _, sigma, v_t = np.linalg.svd(t.reshape(-1, width))
            _, _, v_s = np.linalg.svd(s.reshape(-1, width))
            now = []
            for vector, weight in zip(v_t[:k], unit(sigma[:k]), strict=True):
                vector = vector * (1 if vector.sum() >= 0 else -1)
                cosines = v_s[: k + 3] @ vector
                best = np.abs(cosines).argmax()
                now.append((weight * np.sign(cosines[best]) * v_s[best], weight * vector))
            for (s_now, t_now), (s_old, t_old) in zip(now, before, strict=False):
                rbf_s = np.exp(-((s_now[:, None] - s_old[None, :]) ** 2) / 8)
                rbf_t = np.exp(-((t_now[:, None] - t_old[None, :]) ** 2) / 8)
                total += ((rbf_s - rbf_t) ** 2).sum() / batch
            before = now
    return total


def rkd(
    students: Arrays,
    teachers: Arrays,
    targets: np.ndarray,
    squared: bool,
    distance_weight: float,
    angle_weight: float,
) -> float:
    s, t = students[0], teachers[0]
    count = len(s)

    def huber(x: float) -> float:
        return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5

    def distances(x: np.ndarray) -> np.ndarray:
        table = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
        table = table if squared else np.sqrt(table)
        return table / (table.sum() / (count * (count - 1)))

    def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
        return 0.0 if i in (j, k) else float(unit(x[j] - x[i]) @ unit(x[k] - x[i]))

    gaps = distances(s) - distances(t)
    triples = itertools.product(range(count), repeat=3)
    angle = sum(huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in triples) / count**3
    return distance_weight * np.mean([huber(gap) for gap in gaps.ravel()]) + angle_weight * angle


def ofd(students: Arrays, teachers: Arrays, targets: np.ndarray, margin: np.ndarray) -> float:
    (source,), (target,), total = students, teachers, 0.0
    for b, c, i, j in itertools.product(*map(range, source.shape)):
        s, t = source[b, c, i, j], target[b, c, i, j]
        total += (s - t) ** 2 if t > 0 else max(s - max(t, margin[c]), 0.0) ** 2
    return total / len(source)


def hcl(students: Arrays, teachers: Arrays, targets: np.ndarray) -> Any:
    total: Any = 0.0
    for s, t in zip(students, teachers, strict=True):
        grids = [
            (s, t),
            *((block_mean(s, n, n), block_mean(t, n, n)) for n in (4, 2, 1) if n < s.shape[2]),
        ]
        weights = [0.5**level for level in range(len(grids))]
        terms = [
            weight * ((a - b) ** 2).mean() for weight, (a, b) in zip(weights, grids, strict=True)
        ]
        total = total + sum(terms) / sum(weights)
    return total


def nce(students: Arrays, teachers: Arrays, targets: np.ndarray, z: float, samples: int) -> Any:
    """CRD, Eq. 17-18 with mdistiller's epsilon, as exponentials and quotients."""
    scores = students[0]
    noise, eps = (scores.shape[1] - 1) / samples, 1e-7
    p = np.exp(scores) / z
    log_d1 = np.log(p[:, 0] / (p[:, 0] + noise + eps))
    log_d0 = np.log(noise / (p[:, 1:] + noise + eps))
    return -(log_d1.sum() + log_d0.sum()) / len(scores)
