"""The recipes of an environment (conda, Docker, binder) install the project with its tested versions and with extras that it has."""
import re
import subprocess
from configparser import ConfigParser

import pytest
import yaml

from conftest import ROOT

CONDA = sorted((ROOT/"environments").glob("conda-*.yml"))
BINDER, DOCKER = ROOT/"binder"/"requirements.txt", ROOT/"environments"/"Dockerfile"


def conda_pip(recipe): return next(d["pip"] for d in yaml.safe_load(recipe.read_text(encoding="utf-8"))["dependencies"] if isinstance(d, dict))


def install_lines():
    """Every line that pip is given, with the folders its constraints and its project are relative to."""
    for recipe in CONDA: yield pytest.param(" ".join(conda_pip(recipe)), recipe.parent, recipe.parent, id=recipe.stem)
    yield pytest.param(BINDER.read_text(encoding="utf-8"), BINDER.parent, ROOT, id="binder")
    yield pytest.param(next(line for line in DOCKER.read_text(encoding="utf-8").splitlines() if "pip install" in line), ROOT, ROOT, id="Docker")


@pytest.mark.parametrize("line, constraints_from, project_from", list(install_lines()))
def test_the_project_is_installed_with_tested_versions_and_extras_that_it_has(line, constraints_from, project_from):
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    constraints, (project, extras) = re.search(r"-c (\S+)", line)[1], re.search(r'-e "?(\.+)\[([\w,]+)\]', line).groups()
    assert (constraints_from/constraints).resolve() == ROOT/"environments"/"constraints.txt" and (project_from/project).resolve() == ROOT
    assert {f"{e}_requirements" for e in extras.split(",")} <= settings["DEFAULT"].keys()


@pytest.mark.parametrize("recipe", CONDA, ids=lambda p: p.stem)
def test_conda_brings_python_and_the_pinned_torch(recipe):
    given = dict(d.split("=") for d in yaml.safe_load(recipe.read_text(encoding="utf-8"))["dependencies"] if isinstance(d, str) and "=" in d)
    pinned = re.search(r"^torch==(\S+)", (ROOT/"environments"/"constraints.txt").read_text(encoding="utf-8"), re.M)[1]
    assert given.pop("python") == "3.11" and len(given) == 1
    (package, version), = given.items()
    assert package == recipe.stem.replace("conda", "pytorch") and f"{pinned}.".startswith(f"{version}.")


def test_docker_runs_as_a_plain_user():
    steps = [line.split(None, 1) for line in DOCKER.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert steps[0] == ["FROM", "python:3.11-slim"] and ["EXPOSE", "8888"] in steps
    assert [step for step, _ in steps].index("USER") > max(i for i, (step, _) in enumerate(steps) if step == "RUN")


def test_binder_prepares_the_sample():
    after = ROOT/"binder"/"postBuild"
    assert after.stat().st_mode & 0o111 and subprocess.run(["bash", "-n", after]).returncode == 0
    for campaign in re.findall(r"report (\S+)", after.read_text(encoding="utf-8")): assert (ROOT/campaign/"campaign.toml").is_file()
    assert (ROOT/"binder"/"runtime.txt").read_text(encoding="utf-8").strip() == "python-3.11"
