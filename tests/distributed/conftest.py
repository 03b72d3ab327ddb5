"""What several tests of this folder share."""

import pytest

from tests.distributed.legs import save_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> str:
    """The option that names a data set of a few small pictures."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    save_pictures(folder)
    return f"--training.dataset_path={folder}"
