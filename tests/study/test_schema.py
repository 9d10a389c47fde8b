"""What is generated from the models is up to date, and the JSON-Schemas agree with the loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from tests.study.broken_studies import quickstart
from tunebench.study import document, installed
from tunebench.study.document import main, pages
from tunebench.study.installed import shipped_folder
from tunebench.study.schema import search_space_schema, study_schema
from tunebench.study.spec import Section, Study
from tunebench.study.strict_yaml import read_yaml

STUDIES = sorted(shipped_folder("studies").glob("*.yaml"))
SPACES = sorted(shipped_folder("search_spaces").glob("*.yaml"))


def test_generated_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, f"run `python -m tunebench.study.document`: {capsys.readouterr().out}"


def test_a_stale_page_is_named_and_then_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("old")
    monkeypatch.setattr(document, "pages", lambda: {page: "new"})
    assert main(["--check"]) == 1
    assert (page.read_text(), str(page) in capsys.readouterr().out) == ("old", True)
    assert main([]) == 0
    assert page.read_text() == "new"


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_every_search_space_obeys_the_schema_beside_it(file: Path) -> None:
    schema = json.loads((file.parent / "schema.json").read_text())
    assert schema == search_space_schema()
    Draft202012Validator(schema).validate(read_yaml(file))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_study_obeys_the_schema(file: Path) -> None:
    Draft202012Validator.check_schema(study_schema())
    Draft202012Validator(study_schema()).validate(read_yaml(file))


@pytest.mark.parametrize(
    ("key", "value"), [("seed", "5"), ("worklods", []), ("optimizers", []), ("optimizers", [3]), ("name", "A/B")]
)
def test_the_schema_refuses_what_the_loader_refuses(key: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        Draft202012Validator(study_schema()).validate({**quickstart(), key: value})


def test_the_page_explains_every_key_and_every_study() -> None:
    page = pages()[shipped_folder("studies") / "README.md"]
    for model in _models(Study):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            assert f"| `{name}` |" in page
            assert field.description in page
    for file in STUDIES:
        assert f"({file.name})" in page
        assert read_yaml(file)["description"] in page


def test_folders_are_found_in_a_checkout_and_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "tunebench"
    (tmp_path / "site-packages" / "studies").mkdir(parents=True)
    monkeypatch.setattr(installed, "_PACKAGE", package)
    assert shipped_folder("studies") == tmp_path / "site-packages" / "studies"
    (package / "studies").mkdir(parents=True)
    assert shipped_folder("studies") == package / "studies"
    with pytest.raises(FileNotFoundError, match="search_spaces"):
        shipped_folder("search_spaces")


def _models(root: type[Section]) -> list[type[Section]]:
    found = [root]
    for model in found:
        for field in model.model_fields.values():
            found += [
                part for part in document._models(field.annotation) if issubclass(part, Section) and part not in found
            ]
    return found
