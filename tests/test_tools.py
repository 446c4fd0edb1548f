"""Programs that read finished runs: their numbers against direct computation, on networks trained on the digits."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from short_runs import outputs_of, train_few
from sklearn.metrics import silhouette_score

from mdistiller_norm.cli import execute, main
from mdistiller_norm.compare import group_runs, mcnemar
from mdistiller_norm.data.digits import digits
from mdistiller_norm.errors import UserError


def read(capsys, command, *arguments, code=0):
    capsys.readouterr()
    assert execute([command, *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def top1(folder, epoch="last"):
    return json.loads((folder / "result.json").read_text())[epoch]["top1"]


@pytest.mark.slow
def test_runs_are_grouped_by_seed_and_compared(tmp_path, capsys):
    for name, lr in (("plain", 0.02), ("fast", 0.05)):
        for seed in (0, 1, 2):
            overrides = (f"SEED={seed}", f"SOLVER.LR={lr}")
            train_few(tmp_path, f"{name},SEED={seed}", *overrides, epochs=3)
    plain, fast = (sorted(tmp_path.glob(f"distill/{name}*")) for name in ("plain", "fast"))
    page = tmp_path / "page.html"
    record = read(capsys, "compare", *plain, *fast, "--html", page)
    first, second = record["networks"]
    assert (first["name"], first["n"], second["name"], second["n"]) == ("plain", 3, "fast", 3)
    others = [Path(shutil.copytree(plain[1], tmp_path / name)) for name in ("again", "moved")]
    text = (plain[1] / "result.json").read_text().replace('"seed": 1,', '"seed": 7,')
    (others[1] / "result.json").write_text(re.sub(r'"data": "\w+"', '"data": "another"', text))
    assert [len(runs) for runs in group_runs([*plain, *others]).values()] == [3, 1, 1]
    assert (first["network"], first["parameters"]) == ("resnet8", 78042)
    assert first["last"]["mean"] == pytest.approx(np.mean([top1(folder) for folder in plain]))
    best = [top1(folder, "best") for folder in plain]
    assert first["best"]["std"] == pytest.approx(np.std(best, ddof=1))
    (pair,) = record["pairs"]
    a, b = (outputs_of(path / "student_best.pt")[0].argmax(1) for path in (plain[0], fast[0]))
    assert pair["agreement"] == pytest.approx(100 * float((a == b).float().mean()), abs=0.3)
    differences = [top1(b) - top1(a) for a, b in zip(plain, fast, strict=True)]
    assert pair["difference"]["mean"] == pytest.approx(np.mean(differences))
    assert f"{abs(np.mean(differences)):.2f} [" in page.read_text()


def test_mcnemar_is_the_exact_binomial_test():
    first = torch.tensor([True] * 9 + [False] * 3 + [True] * 50)
    second = torch.tensor([False] * 9 + [True] * 3 + [True] * 50)
    expected = pytest.approx(stats.binomtest(3, 12).pvalue)
    assert mcnemar(first, second) == {"only_first": 9, "only_second": 3, "p": expected}
    assert mcnemar(first, first)["p"] == 1


def test_weights_without_a_result(run, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    torch.save(torch.load(run / "student_last.pt")["model"], weights)
    (network,) = read(capsys, "compare", weights, "-m", "resnet8", "-d", "digits")["networks"]
    assert network["last"] is None
    assert network["measured_top1"] == pytest.approx(top1(run), abs=0.3)
    assert min(network["latency_ms"], network["images_per_second"]) > 0


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with three test digits as PNG files, one in a linked folder, and files that are not images."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "nested").symlink_to(tmp_path_factory.mktemp("linked"))
    for name, pixels in zip(("a", "b", "nested/c"), digits().test.images, strict=False):
        Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
    for name in ("broken.png", "notes.txt", "._hidden.png"):
        (folder / name).write_text("text")
    return folder


@pytest.mark.parametrize("export", ["", "s.pt2 --with-normalisation", "s.onnx"])
def test_probabilities_are_those_of_the_network(run, images, tmp_path, capsys, export):
    source = run
    if export:
        pytest.importorskip("onnxruntime" if "onnx" in export else "torch")
        source = tmp_path / export.split()[0]
        execute(["export", "-c", f"{run}/student_best.pt", "-o", *f"{tmp_path}/{export}".split()])
    expected = outputs_of(run / "student_best.pt")[0][:3].softmax(1)
    files = [images / "a.png", images / "b.png", images / "nested"]
    found = read(capsys, "predict", "-c", source, *files, "-bs", 2, "--top", 20)
    assert [Path(entry["image"]).name for entry in found] == ["a.png", "b.png", "c.png"]
    for entry, row in zip(found, expected, strict=True):
        values, indices = row.sort(descending=True)
        assert [int(each["class"]) for each in entry["classes"]] == indices.tolist()
        probabilities = [each["probability"] for each in entry["classes"]]
        assert probabilities == pytest.approx(values.tolist(), abs=1e-5)


def test_unreadable_images_are_named_and_the_others_predicted(run, images, capsys):
    found = read(capsys, "predict", "-c", run, images, code=1)
    assert [Path(entry["image"]).name for entry in found if "error" in entry] == ["broken.png"]
    assert len(found) == 4
    assert execute(["predict", "-c", str(run), str(images), "--top", "2"]) == 1
    printed = capsys.readouterr()
    assert "broken.png cannot be read" in printed.err
    assert printed.out.count("%") == 6


def drawn(stem, command):
    assert execute(["visualize", *command.split(), "--data", "--out", str(stem)]) == 0
    assert stem.with_name(f"{stem.name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in stem.with_name(f"{stem.name}.svg").read_text()
    return json.loads(stem.with_name(f"{stem.name}.json").read_text())


@pytest.fixture
def networks(run, teacher):
    return teacher.split("=")[1], str(run / "student_last.pt")


def test_tsne(networks, tmp_path):
    command = f"tsne -c {' '.join(networks)} --samples 120 --classes 4 --seed 3"
    data = drawn(tmp_path / "new" / "tsne.v1", command)
    _, pooled, targets = outputs_of(networks[1])
    chosen = data["samples"]
    assert len(set(chosen)) == 120
    assert data["targets"] == targets[chosen].tolist()
    first, second = data["networks"]
    assert (first["name"], second["name"]) == ("teacher", "run")
    expected = silhouette_score(pooled[chosen], targets[chosen])
    assert second["silhouette"] == pytest.approx(expected, abs=1e-4)
    assert silhouette_score(first["points"], data["targets"]) > 0.1


def test_correlation(networks, tmp_path):
    teacher, student = networks
    data = drawn(tmp_path / "f", f"correlation -t {teacher} -c {student} {teacher} --names a b")
    panels = [f"{panel['name']} {panel['kind']}" for panel in data["panels"]]
    assert panels == ["a raw", "b raw", "a normalised", "b normalised"]
    for number, normalise in ((0, False), (2, True)):
        matrices = []
        for path in networks:
            logits = outputs_of(path)[0].double().numpy()
            logits = logits / logits.std(1, ddof=1, keepdims=True) if normalise else logits
            matrices.append(np.corrcoef(logits, rowvar=False))
        difference, panel = matrices[1] - matrices[0], data["panels"][number]
        np.testing.assert_allclose(panel["difference"], difference, atol=1e-4)
        assert panel["mean_absolute"] == pytest.approx(np.abs(difference).mean(), abs=1e-4)
        assert data["panels"][number + 1]["mean_absolute"] == 0


def test_softened_logits(networks, tmp_path):
    options = f"-c {networks[0]} --sample 5 --temperatures 1 3 --fixed 3 --t-norm 1.5"
    data = drawn(tmp_path / "logits", f"logits {options}")
    logits = outputs_of(networks[0])[0].double().numpy()
    own = 1.5 * logits.std(1, ddof=1)
    np.testing.assert_allclose(data["std"], own / 1.5, rtol=1e-4)
    assert data["over_softened"] == pytest.approx((own < 3 / 1.25).sum(), abs=1)
    assert data["under_softened"] == pytest.approx((own > 3 * 1.25).sum(), abs=1)
    for found, temperature in zip(data["entropy"].values(), (3.0, own[:, None]), strict=True):
        exponentials = np.exp(logits / temperature)
        expected = stats.entropy(exponentials / exponentials.sum(1, keepdims=True), axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    for values, temperature in zip(data["softened"].values(), (1.0, 3.0, own[5]), strict=True):
        np.testing.assert_allclose(values, logits[5] / temperature, rtol=1e-3, atol=1e-4)


def test_bad_options(run, networks, images, tmp_path, capsys):
    assert main(["visualize", "logits", "-c", networks[0], "--out", "/dev/null/a/x"]) == 2
    assert re.search("error: /dev/null.* Not a directory", capsys.readouterr().err)
    student = torch.load(networks[1])
    student["model"]["fc.bias"].fill_(torch.nan)
    torch.save(student, tmp_path / "diverged.pt")
    figure = f"visualize %s -c {networks[0]} --out {tmp_path}/x"
    for command, words in (
        (f"predict -c {run} nowhere", "nowhere does not exist"),
        (f"predict -c {run} {tmp_path}", "has no images"),
        (f"predict -c {run} {images} --top 0", "must be an integer >= 1"),
        (f"predict -c {tmp_path} {images}", "there is no checkpoint"),
        (f"{figure % 'logits'} --sample 360", "must be in 0..359"),
        (f"{figure % 'logits'} --fixed nan", "must be > 0"),
        (f"{figure % 'logits'} -c {tmp_path}/diverged.pt", "diverged gives NaN"),
        (f"{figure % 'tsne'} --classes 1", "2 classes, got 36 and 1"),
        (f"{figure % 'tsne'} --names a b", "must have a name for each of the 1 files"),
    ):
        with pytest.raises(UserError, match=words):
            execute(command.split())
