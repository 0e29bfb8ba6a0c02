"""Packaging: every fact stands in settings.ini; this file only reads it."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="], interpolation=None)
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

extras = {key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="BSD-3-Clause",
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    packages=[*find_packages(include=["batt_nb", "batt_nb.*"]), "batt_nb.reports"],
    package_dir={"batt_nb.reports": "nbs/reports"},
    package_data={"batt_nb.reports": ["*.ipynb"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={**extras, "all": [r for v in extras.values() for r in v]},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
