"""The notebooks that are tested: all under nbs/ but those in folders with a .notest file."""
from pathlib import Path

for path in sorted(Path("nbs").rglob("*.ipynb")):
    if path.name.startswith((".", "_")) or ".ipynb_checkpoints" in path.parts: continue
    if any((folder/".notest").exists() for folder in path.parents): continue
    print(path)
