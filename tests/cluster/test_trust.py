"""A run directory is data: nothing in it may run when it is read."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.lan import CHECKOUT
from tunebench.engine.checkpoints import load_checkpoint

UNPICKLERS = {"cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# Models that the user names, which NequIP pickles whole, and the one that a command has just trained.
READS_TRUSTED_MODELS = {"workloads/trained_model.py", "pretraining.py"}
# Python tells an audit hook of every class or function that a pickle names.
REPORT = """
import sys
def refuse(event, arguments):
    if event == "pickle.find_class":
        print("UNPICKLED", *arguments, flush=True)
sys.addaudithook(refuse)
from analysis.report import write_report
from pathlib import Path
write_report(Path(sys.argv[1]))
"""


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.place),)


def syntax_trees(package: str) -> Iterator[tuple[Path, ast.AST]]:
    for file in sorted((CHECKOUT / package).rglob("*.py")):
        yield file, ast.parse(file.read_text())


def calls_of(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == name:
            yield node


def test_the_report_of_a_run_unpickles_nothing(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    done = subprocess.run([sys.executable, "-c", REPORT, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "UNPICKLED" not in done.stdout


@pytest.mark.parametrize("package", ["analysis", "tunebench"])
def test_no_module_knows_how_to_unpickle(package: str) -> None:
    for file, tree in syntax_trees(package):
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not UNPICKLERS & {name.partition(".")[0] for name in names}, file
            assert not (isinstance(node, ast.Attribute) and node.attr in ("read_pickle", "allow_pickle")), file
            assert not (isinstance(node, ast.ImportFrom) and node.module == "pickle"), file
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr == "UnpicklingError", file
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), file


def test_every_file_of_weights_is_read_as_weights_only() -> None:
    seen = 0
    for file, tree in syntax_trees("tunebench"):
        for call in calls_of(tree, "torch.load"):
            seen += 1
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            trusted = file.relative_to(CHECKOUT / "tunebench").as_posix() in READS_TRUSTED_MODELS
            assert given.get("weights_only") == "True" or trusted, file
    assert seen > 0


def test_a_checkpoint_that_would_run_something_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(pickle.dumps(Canary(tmp_path / "it-ran"), protocol=2))
    with suppress(Exception):  # whichever way it refuses
        load_checkpoint(tmp_path)
    assert not (tmp_path / "it-ran").exists()
