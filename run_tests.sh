#!/usr/bin/env bash
# ./run_tests.sh       the fast tests
# ./run_tests.sh full  all tests, then lint: what CI runs
# ./run_tests.sh lint  ruff and mypy only
# Further arguments go to pytest: ./run_tests.sh full -k sampling; with -n 0 one test runs at a time, as --pdb wants it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

mode=fast
case ${1:-} in full | lint) mode=$1 && shift ;; esac

source setup_env.sh
setup_env requirements-dev.txt

# The tensors of the tests are small: one thread is fastest, and leaves the other cores to the tests' own processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# What a test would fetch is missing on other machines too.
export HF_HUB_OFFLINE=1

# Two tests at a time, whatever the machine: they start up to eight processes of their own. Who is done takes tests from
# the other, in their order, so that few of the fixtures of a module are made twice.
parallel=(-n 2 --dist worksteal)

case $mode in
fast) exec "$PYTHON" -m pytest "${parallel[@]}" -m "not slow" "$@" ;;
full) "$PYTHON" -m pytest "${parallel[@]}" "$@" ;;
esac
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
