#!/usr/bin/env bash
# Run every benchmark notebook in place; each prints its table.   run.sh BIN
set -euo pipefail
cd "$(dirname "$0")"
bin=$(cd ../.. && cd "$1" && pwd)
for nb in *.ipynb; do
  echo "== $nb"
  "$bin/papermill" --log-output --no-progress-bar "$nb" "$nb" 2>/dev/null
done
"$bin/nbdev_clean" --fname .
