"""Float64 references of the losses: loops in numpy, written from the papers' formulas.

Each takes the students' arrays, the teachers' arrays and the targets. Analytic references also work on complex numbers,
which gives their exact derivative: the imaginary part of ``f(x + i h d) / h``.
"""

import itertools

import numpy as np


def derivative(function, at, direction, analytic):
    """Derivative along a direction: exact for analytic functions, else by central differences."""

    def moved(h):
        return function([x + h * d for x, d in zip(at, direction, strict=True)])

    if analytic:
        return moved(1e-30j).imag / 1e-30
    return (moved(1e-6) - moved(-1e-6)) / 2e-6


def over_samples(loss):
    """Average a loss of one sample's logits and class over the batch (decorator)."""

    def mean(students, teachers, targets, **settings):
        samples = zip(students[0], teachers[0], targets, strict=True)
        return sum(loss(*sample, **settings) for sample in samples) / len(targets)

    return mean


def log_sum_exp(z):
    peak = z.real.max()
    return peak + np.log(np.exp(z - peak).sum())


def log_softmax(z):
    return z - log_sum_exp(z)


def kl(log_p, log_q):
    """KL(p || q); NormKD, Eq. 2 in the direction of the published code."""
    return (np.exp(log_p) * (log_p - log_q)).sum()


def kd(z_s, z_t):
    return kl(log_softmax(z_t), log_softmax(z_s))


def statistic(z, name):
    """NormKD, Eq. 6 (the standard deviation with C - 1) and Table 8; 0 for a row without a scale."""
    top, bottom = z[z.real.argmax()], z[z.real.argmin()]
    if name == "std" and top.real > bottom.real:
        value = np.sqrt(((z - z.mean()) ** 2).sum() / (len(z) - 1))
    else:
        value = {"constant": 1.0, "max": top, "range": top - bottom, "std": 0.0}[name]
    return value if np.real(value) > 1e-6 else 0.0


def log_mean_softmax(unit, scales):
    """NormKD, Eq. 3: the probabilities are averaged over the temperatures."""
    each = np.stack([log_softmax(unit / t) for t in scales])
    return np.array([log_sum_exp(column) for column in each.T]) - np.log(len(scales))


def binary(z, y):
    """Logarithms of the probabilities of class y and of the rest."""
    return np.array([z[y], log_sum_exp(np.delete(z, y))]) - log_sum_exp(z)


def decoupled(u_s, u_t, y, alpha, beta):
    """DKD, Eq. 6-7: KL over {target, rest} and KL over the rest."""
    rest = kd(np.delete(u_s, y), np.delete(u_t, y))
    return alpha * kl(binary(u_t, y), binary(u_s, y)) + beta * rest


@over_samples
def softened(z_s, z_t, y, stat="constant", scales=(4.0,), weighting="teacher", dkd=None):
    """KD, NormKD, DKD and logit standardization: ``(max T * statistic_t)^2 * divergence``."""
    tau_s, tau_t = statistic(z_s, stat), statistic(z_t, stat)
    u_s, u_t = (z / tau if tau != 0 else 0 * z for z, tau in ((z_s, tau_s), (z_t, tau_t)))
    if dkd is None:
        divergence = kl(log_mean_softmax(u_t, scales), log_mean_softmax(u_s, scales))
    else:
        divergence = decoupled(u_s / scales[0], u_t / scales[0], y, *dkd)
    # The weight has no gradient.
    weights = {"teacher": tau_t**2, "student_teacher": np.real(tau_s) * tau_t, "none": 1.0}
    return max(scales) ** 2 * weights[weighting] * divergence


def dist(students, teachers, targets, beta, gamma, t):
    p_s, p_t = (np.exp([log_softmax(z / t) for z in side]) for side in (students[0], teachers[0]))

    def distance(a, b):
        total = 0.0
        for x, y in zip(a, b, strict=True):
            x, y = x - x.mean(), y - y.mean()
            total = total + 1 - (x @ y) / (np.sqrt((x**2).sum()) * np.sqrt((y**2).sum()) + 1e-8)
        return total / len(a)

    return t**2 * (beta * distance(p_s, p_t) + gamma * distance(p_s.T, p_t.T))


@over_samples
def ttm(z_s, z_t, y, gamma, weighted):
    """Algorithm 1, by the logarithms of the powers of probabilities."""
    log_powers = gamma * log_softmax(z_t)
    log_sum = log_sum_exp(log_powers)
    weight = np.exp(log_sum) if weighted else 1.0
    return weight * kl(log_powers - log_sum, log_softmax(z_s))


@over_samples
def nkd(z_s, z_t, y, gamma, t):
    p_t, rest_t = np.exp(log_softmax(z_t)), np.exp(log_softmax(np.delete(z_t, y) / t))
    rest = rest_t * log_softmax(np.delete(z_s, y) / t)
    return -p_t[y] * log_softmax(z_s)[y] - gamma * t**2 * rest.sum()


@over_samples
def dtkd(z_s, z_t, y, alpha, beta, t):
    top_s, top_t = z_s[z_s.real.argmax()], z_t[z_t.real.argmax()]
    t_s, t_t = 2 * t * top_s / (top_s + top_t), 2 * t * top_t / (top_s + top_t)
    return alpha * t_s * t_t * kd(z_s / t_s, z_t / t_t) + beta * t**2 * kd(z_s / t, z_t / t)


@over_samples
def rld(z_s, z_t, y, alpha, beta, t, t_sure):
    sure = alpha * t_sure**2 * kl(binary(z_t / t_sure, z_t.argmax()), binary(z_s / t_sure, y))
    below = [c for c in range(len(z_t)) if z_t[c] < z_t[y]]
    return sure + (beta * t**2 * kd(z_s[below] / t, z_t[below] / t) if below else 0.0)


def block_mean(maps, rows, columns):
    """Adaptive average pooling: window i of n covers [floor(i H / n), ceil((i + 1) H / n))."""
    height, width = maps.shape[-2:]
    out = np.empty((*maps.shape[:-2], rows, columns), maps.dtype)
    for i, j in itertools.product(range(rows), range(columns)):
        top, bottom = i * height // rows, -(-(i + 1) * height // rows)
        left, right = j * width // columns, -(-(j + 1) * width // columns)
        out[..., i, j] = maps[..., top:bottom, left:right].mean((-2, -1))
    return out


def same_size(students, teachers):
    pairs = []
    for s, t in zip(students, teachers, strict=True):
        size = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
        pairs.append((block_mean(s, *size), block_mean(t, *size)))
    return pairs


def unit(x):
    return x / np.sqrt((x**2).sum())


def at(students, teachers, targets, p):
    total = 0.0
    for pair in same_size(students, teachers):
        energy = [(np.abs(maps) ** p).mean(1).reshape(len(maps), -1) for maps in pair]
        total = total + np.mean([(unit(s) - unit(t)) ** 2 for s, t in zip(*energy, strict=True)])
    return total


def nst(students, teachers, targets):
    def mean_kernel(a, b):
        return sum((x @ y) ** 2 for x in a for y in b) / (len(a) * len(b))

    total = 0.0
    for pair in same_size(students, teachers):
        for one_s, one_t in zip(*pair, strict=True):
            s, t = ([unit(channel.ravel()) for channel in one] for one in (one_s, one_t))
            distance = mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)
            total = total + distance / len(pair[0])
    return total


def pkt(students, teachers, targets, eps=1e-7):
    tables = []
    for features in (students[0], teachers[0]):
        rows = [unit(row) for row in features]
        table = np.array([[(a @ b + 1) / 2 for b in rows] for a in rows])
        tables.append(np.array([row / row.sum() for row in table]))
    s, t = tables
    return (t * np.log((t + eps) / (s + eps))).mean()


def sp(students, teachers, targets):
    tables = []
    for maps in (students[0], teachers[0]):
        rows = [one.ravel() for one in maps]
        tables.append(np.array([unit(np.array([a @ b for b in rows])) for a in rows]))
    return ((tables[0] - tables[1]) ** 2).sum() / len(students[0]) ** 2


def vid(students, teachers, targets, eps=1e-5):
    """Students are the predicted mean and the raw variances."""
    mean, raw = students
    variance = (np.log(1 + np.exp(raw)) + eps)[:, None, None]
    return 0.5 * ((mean - teachers[0]) ** 2 / variance + np.log(variance)).mean()


def kdsvd(students, teachers, targets, k):
    total, pairs = 0.0, same_size(students, teachers)
    for n in range(len(targets)):
        before = []
        for s, t in ((s[n], t[n]) for s, t in pairs):
            _, sigma, v_t = np.linalg.svd(t.reshape(-1, t.shape[2]))
            _, _, v_s = np.linalg.svd(s.reshape(-1, s.shape[2]))
            now = []
            for vector, weight in zip(v_t[:k], unit(sigma[:k]), strict=True):
                vector = vector * (1 if vector.sum() >= 0 else -1)
                cosines = v_s[: k + 3] @ vector
                best = np.abs(cosines).argmax()
                now.append((weight * np.sign(cosines[best]) * v_s[best], weight * vector))
            for (s_now, t_now), (s_old, t_old) in zip(now, before, strict=False):
                rbf_s = np.exp(-((s_now[:, None] - s_old[None, :]) ** 2) / 8)
                rbf_t = np.exp(-((t_now[:, None] - t_old[None, :]) ** 2) / 8)
                total += ((rbf_s - rbf_t) ** 2).sum() / len(targets)
            before = now
    return total


def rkd(students, teachers, targets, squared, distance_weight=25.0, angle_weight=50.0):
    s, t, count = students[0], teachers[0], len(targets)

    def huber(x):
        return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5

    def distances(x):
        table = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
        table = table if squared else np.sqrt(table)
        return table / (table.sum() / (count * (count - 1)))

    def cosine(x, i, j, k):
        return 0.0 if i in (j, k) else unit(x[j] - x[i]) @ unit(x[k] - x[i])

    distance = np.mean([huber(gap) for gap in (distances(s) - distances(t)).ravel()])
    triples = itertools.product(range(count), repeat=3)
    angle = sum(huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in triples) / count**3
    return distance_weight * distance + angle_weight * angle


def ofd(students, teachers, targets, margin):
    (source,), (target,), total = students, teachers, 0.0
    for b, c, i, j in itertools.product(*map(range, source.shape)):
        s, t = source[b, c, i, j], target[b, c, i, j]
        total += (s - t) ** 2 if t > 0 else max(s - max(t, margin[c]), 0.0) ** 2
    return total / len(source)


def hcl(students, teachers, targets):
    total = 0.0
    for s, t in zip(students, teachers, strict=True):
        smaller = [n for n in (4, 2, 1) if n < s.shape[2]]
        grids = [(s, t), *((block_mean(s, n, n), block_mean(t, n, n)) for n in smaller)]
        weights = [0.5**level for level in range(len(grids))]
        terms = [w * ((a - b) ** 2).mean() for w, (a, b) in zip(weights, grids, strict=True)]
        total = total + sum(terms) / sum(weights)
    return total


def nce(students, teachers, targets, z, samples=50):
    """CRD, Eq. 17-18 with mdistiller's epsilon, as exponentials and quotients."""
    p, noise = np.exp(students[0]) / z, (students[0].shape[1] - 1) / samples
    log_d1 = np.log(p[:, 0] / (p[:, 0] + noise + 1e-7))
    log_d0 = np.log(noise / (p[:, 1:] + noise + 1e-7))
    return -(log_d1.sum() + log_d0.sum()) / len(p)
