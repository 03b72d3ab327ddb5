"""Does the Python that runs this serve a requirements file?

    python -m scripts.check_environment requirements.txt

Exit code 0: yes. 1: no; what is missing or out of range is printed when torch is there, because an environment with
torch was probably meant to be used. Only the versions in the installed metadata are read, so the answer takes a moment
and not the seconds that importing torch does.
"""

import sys
from pathlib import Path

from runtime.requirements import OLDEST_PYTHON, check_requirement, read_requirements


def main(path: str) -> int:
    faults = [fault for requirement in read_requirements(Path(path)) if (fault := check_requirement(requirement))]
    if sys.version_info < OLDEST_PYTHON:
        faults.append(f"Python {sys.version.split()[0]} is older than {'.'.join(map(str, OLDEST_PYTHON))}")
    if faults and "torch is missing" not in faults:
        print(f"{sys.executable} does not serve {path}: {'; '.join(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.check_environment requirements.txt")
    sys.exit(main(sys.argv[1]))
