"""The benchmark program: the numbers that it reports, not the speed of this machine."""

import importlib
import json

import pytest
from conftest import ROOT

from mdistiller_norm.errors import UserError

QUICK = "--blocks 2 --steps 1 --warmup 1 ENGINE.COMPILE=none"


@pytest.fixture
def measure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    main, file = importlib.import_module("benchmark").main, tmp_path / "record.json"
    return lambda words: main(f"{words} --json {file}".split()) or json.loads(file.read_text())


@pytest.mark.slow
def test_time_memory_and_parameters_of_a_method(measure):
    words = f"--table9 --cfg digits/kd --methods FITNET --batch-size 32 {QUICK}"
    row = measure(words)["table9"]["FITNET"]
    assert row["extra_parameters"] == 32 * 32 + 3 * 32  # a convolution with bias, a batch norm
    assert 100 < row["memory_mb"] < 5000


@pytest.mark.slow
def test_loading_of_images(measure, tree):
    images = f"--loader {tree}/train DATASET.NUM_WORKERS=1 DATASET.IMAGE_SIZE=32"
    found = measure(f"{images} {QUICK}")["loader"]
    assert (found["images"], found["workers"]) == (36, 1)


def test_bad_options(measure):
    for words, message in (
        ("--against no", "no must have mdistiller's layout"),
        ("", "nothing to measure: add --table9"),
        ("--evaluate --synthetic 200 --batch-size 300", "BATCH_SIZE must be <= 200"),
    ):
        with pytest.raises(UserError, match=message):
            measure(words)
