"""Random overrides and config files: a config, or an error of one line; no traceback and nothing on disk."""

import contextlib
import io
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mdistiller_norm.cli import main
from mdistiller_norm.config import default_config, dump, leaves, load_config
from mdistiller_norm.errors import ConfigError

# Derandomized: the same examples in every run.
fuzz = settings(
    max_examples=60, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
KEYS = [key for key, _ in leaves(default_config(), sections=True)]
WORDS = ["", "0", "-1", "1e400", "nan", "007", "true", "KD", "[1, 2]", "(a, b", "[", "~", "x: y"]
SIGNS = "[](){}&*#'\"\\<>:,|-~\n\t\0\x85\u2028\ud800\udce9"
TEXT = st.one_of(st.sampled_from(WORDS), st.text(max_size=12), st.text(SIGNS, max_size=8))
NAMES = st.one_of(st.sampled_from(KEYS), TEXT)
TREES = st.recursive(
    st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.floats()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def check(content, *overrides):
    """Check that a run without a data set is one line of an error, with a config file or with the defaults."""
    Path("run.yaml").write_bytes(b"DISTILLER: {TYPE: NONE}" if content is None else content)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        command = ["train", "--no-plugins", "--cfg", "run.yaml", "--", "DATASET.TYPE", "none"]
        assert main([*command, *overrides]) == 2
    assert errors.getvalue().startswith("error: ")
    assert errors.getvalue().count("\n") == 1
    assert os.listdir() == ["run.yaml"]


@fuzz
@given(st.lists(st.tuples(NAMES, TEXT), max_size=3))
@example([("SOLVER.LR_DECAY_STAGES", "[" * 2000)])
def test_overrides(pairs):
    check(None, *(word for key, value in pairs if key != "DATASET.TYPE" for word in (key, value)))


@fuzz
@given(st.one_of(TREES, st.dictionaries(NAMES, TREES, max_size=4)), st.booleans())
@example({"_BASE_": ["a\0", 1]}, False)
def test_yaml_trees(tree, flow):
    check(yaml.dump(tree, default_flow_style=flow).encode())


@fuzz
@given(st.binary() | st.text("aK:{}[]&*<!|>-'\"%@`#?, \n\t0", max_size=60).map(str.encode))
@example(b'"\\UFFFFFFFF"')
def test_files_that_may_not_be_yaml(content):
    check(content)


@fuzz
@given(st.sampled_from([key for key in KEYS if key != "EXPERIMENT.PLUGINS"]), TEXT)
@example("EXPERIMENT.NAME", "5e-4: # [x]")
@example("EXPERIMENT.TAG", "\u00fc" * 200)
@example("DATASET.ROOT", "true")
def test_a_loaded_config_is_dumped_and_loaded_unchanged(key, value):
    with contextlib.suppress(ConfigError):
        node = load_config(None, [key, value]).node
        Path("dump.yaml").write_text(dump(node), encoding="utf-8")
        assert load_config("dump.yaml").node == node
