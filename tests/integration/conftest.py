"""Short real runs of train.py, in this process."""

import pytest

from tests.integration.short_runs import TINY, Run


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """train("--section.key=value", ...) trains flux-tiny for a few steps and returns the Run."""

    from train import main  # not above: the process that only hands out the tests reads this file too

    def run(*overrides: str) -> Run:
        folder = tmp_path_factory.mktemp("run")
        main([*TINY, f"--job.dump_folder={folder}", *overrides])
        return Run(folder)

    return run


@pytest.fixture(scope="session")
def plain_run(train) -> Run:
    return train()
