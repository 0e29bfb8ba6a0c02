#!/usr/bin/env bash
# README.md from nbs/index.ipynb.   make_readme.sh BIN [check]
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 mode=${2:-write}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
"$bin/jupyter" nbconvert --log-level=ERROR --to markdown --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags hide --output-dir "$work" --output README nbs/index.ipynb
if [ "$mode" = check ]; then
  diff -u README.md "$work/README.md" || { echo "FAILED: README.md differs from nbs/index.ipynb: run make readme" >&2; exit 1; }
else
  cp "$work/README.md" README.md
fi
