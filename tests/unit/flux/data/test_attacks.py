"""Data sets made to run code or to lead elsewhere; each is shown to be dangerous where data are read in other ways."""

import io
import os
import pickle
import tarfile
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flux.config import Data
from flux.data.errors import DataError
from flux.data.parquet import ParquetSource
from flux.data.tars import WebDatasetSource


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def proof(tmp_path):
    """Where an attack that ran leaves its trace."""
    return tmp_path / "it-ran"


@pytest.fixture
def data(tmp_path):
    return Data(index_folder=str(tmp_path / "index"), index_workers=0)


def check_control(proof) -> None:
    assert proof.exists(), "the fixture is harmless"
    proof.rmdir()


def make_picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth", "npy", "txt", "json", "png"])
def test_members_that_would_run(tmp_path, data, proof, extension):
    """Under the name that other readers unpickle by, or in place of a picture or a caption."""
    payload = pickle.dumps(Trap(proof))
    pickle.loads(payload)
    check_control(proof)
    write_tar(tmp_path / "a.tar", {"a.png": make_picture(), "a.txt": b"red", f"b.{extension}": payload, "b.txt": b"b"})
    source = WebDatasetSource(str(tmp_path / "a.tar"), data)
    assert source[0].captions == ("red",)
    for number in range(len(source)):
        sample = source[number]
        assert (sample.key, sample.image == make_picture()) in (("a", True), ("b", False))
    assert len(source) == (2 if extension == "png" else 1) and not proof.exists()


@pytest.mark.parametrize("url", ["pipe:mkdir {}", " pipe:mkdir {}", "pipe://mkdir {}", "|mkdir {}", "$(mkdir {})"])
def test_urls_that_would_run_a_command(data, proof, url):
    webdataset = pytest.importorskip("webdataset", reason="whose own reader is the control")
    if url.startswith("pipe:m"):
        webdataset.gopen(url.format(proof)).read()
        check_control(proof)
    with pytest.raises(ValueError) as error:
        WebDatasetSource(url.format(proof), data)
    assert "\n" not in str(error.value) and not proof.exists()


def test_members_that_lead_out_of_a_folder(tmp_path, data):
    names = ["../escaped", str(tmp_path / "absolute")]
    write_tar(tmp_path / "a.tar", {f"{name}.{end}": make_picture() for name in names for end in ("png", "txt")})
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "a.tar") as tar:  # control
        tar.extract("../escaped.png", tmp_path / "folder", filter="fully_trusted")
    (tmp_path / "escaped.png").rename(tmp_path / "control.png")
    source = WebDatasetSource(str(tmp_path / "a.tar"), data)
    for number, name in enumerate(names):
        with pytest.raises(DataError, match="not UTF-8") as error:  # a picture in place of a caption
            source[number]
        assert error.value.key == name
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "control.png", "folder", "index"}


def test_types_of_columns_that_would_run(tmp_path, data, proof):
    """pyarrow until 14.0 unpickled them: CVE-2023-47248."""
    payload = pickle.dumps(Trap(proof))
    pickle.loads(payload)
    check_control(proof)
    evil = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    fields = [pa.field("image", pa.binary(), metadata=evil), pa.field("text", pa.string(), metadata=evil)]
    pq.write_table(pa.table([[make_picture()], ["red"]], schema=pa.schema(fields)), tmp_path / "a.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyarrow's, that it does not do so any more
        try:
            ParquetSource(str(tmp_path / "a.parquet"), data)[0]
        except DataError as error:
            assert "\n" not in str(error)
    assert not proof.exists()
