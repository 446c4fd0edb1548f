"""Fixtures and helpers of the tests."""

import fcntl
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

# One thread: the networks of the tests are too small for two.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from short_runs import config

from mdistiller_norm.data import DATASETS
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.models import CIFAR_MODELS, IMAGENET_MODELS
from mdistiller_norm.run import train

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
Once = Callable[[str, Callable[[Path], object]], Path]


def pytest_configure(config):
    """Hide GPUs unless ``-m cuda`` selects the tests that need one."""
    if not config.getoption("-m").startswith("cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem != "test_trust")  # the longest tests, begun first


def unpacked(name, marker):
    """Return the data folder with a data set, unpacked if necessary; skip the test if it is missing."""
    root = Path(os.environ.get("MDISTILLER_NORM_DATA", ROOT / "data"))
    unpack = SHARED / "data" / "unpack.py"
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".unpacking").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / marker).exists() and unpack.is_file():
            command = [sys.executable, str(unpack), str(root), name]
            subprocess.run(command, check=True, capture_output=True)
    if not (root / marker).exists():
        pytest.skip(f"{name} is not in {root}: download it, or set MDISTILLER_NORM_DATA")
    return root


@pytest.fixture(scope="session")
def cifar_root():
    return unpacked("cifar100", "cifar-100-python/meta")


@pytest.fixture(scope="session")
def facts():
    if not (SHARED / "facts").is_dir():
        pytest.skip("the facts about the reference implementation are missing")
    return SHARED / "facts"


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """Return a folder with three classes of twelve training and four test images of Tiny ImageNet."""
    source = unpacked("tiny_imagenet_20", "tiny_imagenet_20/val") / "tiny_imagenet_20"
    root = tmp_path_factory.mktemp("tree") / "tiny"
    for split, count in (("train", 12), ("val", 4)):
        for folder in sorted((source / split).iterdir())[:3]:
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.glob("*.JPEG"))[:count]:
                shutil.copy(file, root / split / folder.name)
    return root


@pytest.fixture
def limited_files():
    """Limit the size of files and of shared memory, as a full disk does; -1 removes the limit."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Return a function that fills a folder once for all test processes. Tests must not change its content."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def filled(name, fill):
        folder, done = base / f"once_{name}", base / f"once_{name}.done"
        with (base / f"once_{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return filled


@pytest.fixture(scope="session")
def teacher(once):
    """Return the override with the weights of a teacher that was trained for an epoch, to a top-1 near 80."""
    settings = ("DISTILLER.STUDENT=resnet14", "SOLVER.BATCH_SIZE=16")
    folder = once("teacher", lambda folder: train(config(folder, "teacher", *settings, epochs=1)))
    return f"DISTILLER.TEACHER_WEIGHTS={folder / 'distill' / 'teacher' / 'student_best.pt'}"


@pytest.fixture(scope="session")
def run(once):
    """Return the folder of a finished run: a plain resnet8, one epoch on digits."""
    return once("run", lambda folder: train(config(folder, "run", epochs=1))) / "distill" / "run"


def tool(name, *arguments, check=True):
    """Run ``tools/<name>.py`` in another process."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    more = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 600, "check": check}
    return subprocess.run(command, **more)


def assert_user_error(done, *words):
    """Check for exit code 2 and one error line with all words."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (done.returncode, len(errors)) == (2, 1), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in errors[0]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@contextmanager
def registries_as_before():
    """Restore the registries, to which plugins add, on exit."""
    registries = (CIFAR_MODELS, IMAGENET_MODELS, DATASETS, DISTILLERS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture(scope="module", autouse=True)
def _registries_and_path_of_each_file():
    with registries_as_before(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        yield
