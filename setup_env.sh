# Sourced by run_train.sh and run_tests.sh: `setup_env FILE` sets PYTHON to an interpreter that serves requirements FILE.
# The active environment is used as it is when its versions serve; otherwise .venv is made once and kept at the pins.

# Python versions the pins can be installed on.
supported_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

setup_env() {
    local file=$1 candidate included

    # Our own .venv, activated, follows the pins like any .venv of ours: it is not judged by ranges.
    if ! [ "${VIRTUAL_ENV:-/}" -ef .venv ]; then
        for candidate in python python3; do
            "$candidate" -c "" 2>/dev/null || continue # not there, or a version manager's empty shim
            if "$candidate" -m scripts.check_environment "$file" >&2 2>/dev/null; then
                PYTHON=$candidate
                return
            fi
            break
        done
    fi

    PYTHON=$PWD/.venv/bin/python
    # A finished installation leaves copies of the files it installed; an interrupted one leaves none.
    if "$PYTHON" -c "" 2>/dev/null && cmp -s requirements.txt .venv/requirements.txt && cmp -s "$file" ".venv/$file"; then
        return
    fi
    rm -f .venv/requirements*.txt

    # What is in a .venv that works stays: pip keeps a torch of the pinned version, whichever build it is.
    if ! supported_python "$PYTHON" || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        for candidate in python3 python3.13 python3.12 python3.11 python ""; do
            supported_python "$candidate" && break
        done
        if [ -z "$candidate" ]; then
            echo "Python 3.11, 3.12 or 3.13 is needed to set up .venv, and none is on the PATH: install one of them" >&2
            exit 2
        fi
        "$candidate" -m venv --clear .venv
    fi
    echo "setting up .venv from $file, once (on Linux torch brings the CUDA libraries, some gigabytes) ..." >&2
    "$PYTHON" -m pip install --disable-pip-version-check $([ -t 2 ] || echo --quiet) -r "$file" >&2
    for included in requirements.txt "$file"; do
        cp "$included" .venv/
    done
}
