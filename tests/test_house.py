"""Limits of the package: files, functions and import cycles."""

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

LINES = 11_800  # of the package
FILE_LINES, FUNCTION_LINES, PARAMETERS = 330, 60, 10
FILES = sorted((ROOT / "mdistiller_norm").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}


def imports(tree):
    """Return the imported names, also those in functions, but not those for types only."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        return set()
    if isinstance(tree, ast.ImportFrom):
        return {tree.module or "", *(f"{tree.module}.{alias.name}" for alias in tree.names)}
    if isinstance(tree, ast.Import):
        return {alias.name for alias in tree.names}
    return set().union(*map(imports, ast.iter_child_nodes(tree)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_limits(path):
    assert len(path.read_text().splitlines()) <= FILE_LINES
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, node.name
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = {parameter.arg for parameter in parameters} - {"self", "cls"}
            assert len(names) <= PARAMETERS, node.name


def test_package_keeps_the_limit_and_has_no_import_cycles():
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= LINES
    # The package itself imports the library on first use, to export it.
    graph = {
        name: (imports(TREES[path]) & MODULES.keys()) - {name, "mdistiller_norm"}
        for name, path in MODULES.items()
    }
    del graph["mdistiller_norm"]
    TopologicalSorter(graph).prepare()  # raises CycleError
