"""The parts of a release agree: version, changelog, citation, tag, dependencies."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from test_documents import ROOT

import spherical_optax as so

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
YAML = [*WORKFLOWS, ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def check_tag(*tag):
    command = [ROOT / ".ci" / "check_tag", *tag]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_newest_entry_of_the_changelog_is_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    (unreleased, _), (newest, date) = re.findall(r"^## (\S+)(.*)$", text, re.MULTILINE)[:2]
    assert unreleased == "Unreleased"
    assert newest == so.__version__
    assert re.fullmatch(r" - \d{4}-\d\d-\d\d", date)


def test_citation_is_of_this_version():
    found = re.findall(r"^version: \"(.*)\"$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert found == [so.__version__]


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_is_well_formed(path):
    yaml = pytest.importorskip("yaml")
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_ci_makes_targets_that_exist():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    targets = {each["target"] for each in jobs["test"]["strategy"]["matrix"]["include"]}
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets
    assert targets <= made


def test_only_the_checked_tag_is_published():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    runs = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    assert runs == ['.ci/check_tag "$GITHUB_REF_NAME"', "make build"]
    assert "build" in jobs["publish"]["needs"]


def test_tag_of_this_version_passes():
    done = check_tag(f"v{so.__version__}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("tag", [so.__version__, f"v{so.__version__}.1", "v0.0.0", ""])
def test_another_tag_fails(tag):
    done = check_tag(tag)
    assert done.returncode == 1
    assert done.stderr == f"expected the tag v{so.__version__}, found {tag or 'none'}\n"


def test_what_the_package_imports_is_declared():
    imported = set()
    for path in (ROOT / "spherical_optax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}
    assert imported - sys.stdlib_module_names - {"spherical_optax"} == declared
