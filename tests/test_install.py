"""The package as it is installed: its data, its extras and a wheel in another folder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mdistiller_norm.cli import main
from mdistiller_norm.data import digits


def test_digits_equal_those_of_scikit_learn() -> None:
    source, data = load_digits(), digits()
    numbers = np.arange(len(source.target))
    for part, indices in zip(
        (data.train, data.test),
        train_test_split(numbers, test_size=360, stratify=source.target, random_state=0),
        strict=True,
    ):
        grey = np.round(source.images[indices] * (255 / 16)).astype(np.uint8)
        assert (part.images.numpy() == grey.repeat(4, 1).repeat(4, 2)[..., None]).all()
        assert (part.targets.numpy() == source.target[indices]).all()


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("jinja2", "report --results ."),
        ("matplotlib", "report --results ."),
        ("sklearn.manifold", "visualize tsne -c x.pt"),
    ],
)
def test_missing_extra_is_named(
    package: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in [
        name
        for name in sys.modules
        if name.startswith(("mdistiller_norm.analysis.", "mdistiller_norm.reproduce.charts"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert f'needs the extra "report": pip install "mdistiller_norm[report]" ({package} is missing)' in error
