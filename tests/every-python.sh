#!/bin/sh
# Run the tests with every Python from 3.9 to 3.14 that is found: in PATH,
# or in ~/.pyenv/versions. Usage: every-python.sh PYTHON TESTS
set -u
fallback=$1 tests=$2 status=0 tried=0
for minor in 9 10 11 12 13 14; do
    python=$(command -v "python3.$minor" 2>/dev/null)
    "${python:-false}" -c '' 2>/dev/null || python=
    for pyenv in "$HOME"/.pyenv/versions/3."$minor".*/bin/python3; do
        [ -z "$python" ] && [ -x "$pyenv" ] && python=$pyenv
    done
    [ -n "$python" ] || continue
    tried=$((tried + 1))
    folder=
    if ! "$python" -c 'import pytest' 2>/dev/null; then
        folder=$(mktemp -d)
        "$python" -m venv "$folder" &&
            "$folder/bin/pip" install -q pytest || { status=1; continue; }
        python=$folder/bin/python3
    fi
    echo "--- $("$python" --version)"
    "$python" -B -m pytest -q -p no:cacheprovider -c tests/pytest.ini \
        "$tests" || status=1
    [ -z "$folder" ] || rm -rf "$folder"
done
[ "$tried" -gt 0 ] || exec "$fallback" -B -m pytest -q -p no:cacheprovider \
    -c tests/pytest.ini "$tests"
exit $status
