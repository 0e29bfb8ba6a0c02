#!/usr/bin/env bash
# Set up the virtual environment from the tested pins.   setup.sh PYTHON VENV [dev] [more options for pip]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 venv=$2 extra=${3:-} more=${4:-}
may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
command -v "$python" >/dev/null || python=python3
command -v "$python" >/dev/null || { echo "Python 3.11 or later is needed (make PYTHON=/path/to/python3.11)" >&2; exit 1; }
if ! [ -x "$venv/bin/pip" ]; then
  echo "setting up $venv"
  rm -rf "$venv"
  if ! "$python" -m venv "$venv" 2>/dev/null; then
    may_install || { echo "the venv module is missing: install Debian's package python3-venv" >&2; exit 1; }
    apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
    rm -rf "$venv"; "$python" -m venv "$venv"
  fi
fi
"$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed, $venv has an older one" >&2; exit 1; }
echo "installing the tested versions (one to four minutes)"
# shellcheck disable=SC2086
"$venv/bin/pip" install -q --disable-pip-version-check -c environments/constraints.txt $more -e ".[biologic,twin${extra:+,$extra}]" 2> >(grep -v '^WARNING: Location' >&2)
if [ "$extra" = dev ] && ! command -v chromium >/dev/null; then
  if may_install; then
    echo "installing Chromium for the browser tests"
    (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core) >/dev/null || echo "Chromium could not be installed: the browser tests will be skipped" >&2
  else
    echo "Chromium is missing and may not be installed here: the browser tests will be skipped" >&2
  fi
fi
