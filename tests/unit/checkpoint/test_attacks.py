"""Files that run code when they are read as their formats allow: here they are refused, in one line.

Each fixture is shown to be dangerous first: read in the ordinary way, the same bytes run.
"""

import io
import json
import os
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from checkpoint.dcp import open_checkpoint
from checkpoint.exchange import open_weights
from checkpoint.manifest import MANIFEST, FileEntry, make_entry, read_manifest, save_manifest
from checkpoint.safe_metadata import METADATA, read_metadata
from checkpoint.safetensors_file import open_indexed, open_safetensors
from flux.conditioner import load_clip, load_t5
from flux.data.tokenizers import FluxTokenizer
from flux.huggingface import CLIPTextConfig, T5Config
from flux.spec import SPECS
from flux.text_folders import TINY_CLIP, TINY_T5
from tests.unit.checkpoint.saves import build, make_zeros, save_steps, share

SHARD = "__0_0.distcp"


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"mkdir -p {self.proof}",)


@pytest.fixture
def proof(tmp_path):
    """Where an attack that ran leaves its trace."""
    return tmp_path / "it-ran"


@pytest.fixture
def step(tmp_path):
    """A checkpoint to be tampered with."""
    save_steps(tmp_path / "checkpoint", 10)
    return tmp_path / "checkpoint" / "step-10"


def check_control(proof: Path, read) -> None:
    """Reading in the ordinary way runs the code, so the fixture is what it claims to be."""
    with suppress(Exception):  # the code has run before the reader sees that it got nonsense
        read()
    assert proof.exists(), "the fixture is harmless"
    proof.rmdir()


def check_refused(proof: Path, match: str, *reads) -> None:
    for read in reads:
        with pytest.raises(ValueError, match=match) as error:
            read()
        assert "\n" not in str(error.value)
        assert not proof.exists(), "the fixture has run"


def forge_manifest(step: Path, **more: FileEntry) -> None:
    """Who can change files can also make a list of them that fits."""
    (step / MANIFEST).unlink(missing_ok=True)
    save_manifest(step, {file.name: make_entry(file) for file in step.iterdir() if file.is_file()} | more)


def tamper(step: Path, change) -> Any:
    """Changes what `.metadata` holds, and makes the manifest fit."""
    metadata = pickle.loads((step / METADATA).read_bytes())
    metadata = change(metadata) or metadata
    (step / METADATA).write_bytes(pickle.dumps(metadata))
    forge_manifest(step)
    return metadata


def load_into_run(step: Path) -> None:
    run = build(step.parent)
    found = run.find()
    assert found is not None
    run.load(found, share(make_zeros()))


def readers(step: Path) -> tuple:
    """Everything that opens a checkpoint."""
    return (
        lambda: read_metadata(step),
        lambda: open_checkpoint(step),
        lambda: open_weights(step, {}),
        lambda: load_into_run(step),
    )


def test_code_in_the_metadata(step, proof):
    tamper(step, lambda metadata: Trap(proof))
    check_control(proof, lambda: FileSystemReader(step).read_metadata())
    check_refused(proof, r"\.metadata is not read: it asks for posix\.system", *readers(step))


def test_code_beside_right_metadata(step, proof):
    """The rest of it is as it should be."""
    tamper(step, lambda metadata: setattr(metadata, "planner_data", Trap(proof)))
    check_control(proof, lambda: FileSystemReader(step).read_metadata())
    check_refused(proof, r"it asks for posix\.system", *readers(step))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("pathlib", "os.system"),
        ("torch", "os.system"),
        ("torch.serialization", "os.system"),
    ],
)
def test_code_by_a_name_that_walks_on_from_an_allowed_module(step, proof, module, name):
    """Protocol 4 looks dotted names up attribute by attribute: a module that is allowed leads to all it imports."""
    command = f"mkdir -p {proof}"
    strings = [module, name, command]
    module_code, name_code, command_code = (b"\x8c" + bytes([len(text)]) + text.encode() for text in strings)
    payload = b"\x80\x04" + module_code + name_code + b"\x93" + command_code + b"\x85R."
    (step / METADATA).write_bytes(payload)
    forge_manifest(step)
    if module not in ("torch.distributed.checkpoint.metadata",):  # it imports no os; the others do
        check_control(proof, lambda: pickle.loads(payload))
    check_refused(proof, rf"it asks for {module}\.os\.system", *readers(step))


def test_metadata_that_changes_the_classes_it_names(step, tmp_path):
    """A pickle's BUILD sets attributes of what is given out, and a class is: no link would be seen any more."""
    blind = b"\x80\x04cpathlib\nPosixPath\nN}X\x0a\x00\x00\x00is_symlinkctorch\nSize\ns\x86b0"
    (step / METADATA).write_bytes(blind + (step / METADATA).read_bytes())
    shutil.move(step / SHARD, tmp_path / "elsewhere")
    (step / SHARD).symlink_to(tmp_path / "elsewhere")
    forge_manifest(step)
    pickle.loads(blind + b"N.")
    try:
        assert not (step / SHARD).is_symlink()  # control: read in the ordinary way, it does what it is for
    finally:
        del PosixPath.is_symlink
    assert (step / SHARD).is_symlink()
    check_refused(step / "no-trace", "it changes PosixPath, which no checkpoint needs", lambda: read_metadata(step))
    check_refused(step / "no-trace", "links are not followed", lambda: open_checkpoint(step))
    assert "is_symlink" not in vars(PosixPath) and (step / SHARD).is_symlink()


def dcp_item(value: object) -> bytes:
    """As DCP stores what is not a tensor."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def put_bytes(step: Path, name: str, content: bytes) -> None:
    """Makes `name` an entry of bytes, which DCP reads with torch.load(weights_only=False)."""
    start = (step / SHARD).stat().st_size
    (step / SHARD).write_bytes((step / SHARD).read_bytes() + content)

    def change(metadata):
        place = next(iter(metadata.storage_data.values()))
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        metadata.storage_data = {key: value for key, value in metadata.storage_data.items() if key.fqn != name}
        metadata.storage_data[MetadataIndex(name)] = type(place)(SHARD, start, len(content))

    tamper(step, change)


def read_with_torch(step: Path, *names: str) -> None:
    """What DCP does by itself with entries of bytes."""
    torch.distributed.checkpoint.load(dict.fromkeys(names, 0), storage_reader=FileSystemReader(step), no_dist=True)


def test_bytes_in_place_of_a_weight(step, proof):
    put_bytes(step, "layers.1.bias", dcp_item(Trap(proof)))
    check_control(proof, lambda: read_with_torch(step, "layers.1.bias"))
    check_refused(proof, r"has no layers\.1\.bias", lambda: load_into_run(step))
    assert "layers.1.bias" not in open_checkpoint(step)


def test_bytes_beside_the_weights(step, proof):
    """torchtitan keeps such entries; nothing of them is ever read."""
    put_bytes(step, "train_state", dcp_item(Trap(proof)))
    check_control(proof, lambda: read_with_torch(step, "train_state"))
    load_into_run(step)
    for tensor in open_checkpoint(step).values():
        tensor.read()
    assert not proof.exists()


def poison_shard(step: Path, proof: Path) -> None:
    """Puts a pickle with code in place of one tensor, in the zip that DCP stores each tensor as."""
    metadata = pickle.loads((step / METADATA).read_bytes())
    index, place = next((key, value) for key, value in metadata.storage_data.items() if key.fqn == "layers.0.weight")
    content = (step / SHARD).read_bytes()
    with zipfile.ZipFile(io.BytesIO(content[place.offset : place.offset + place.length])) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, entry in entries.items():
            archive.writestr(name, pickle.dumps(Trap(proof), protocol=2) if name.endswith("/data.pkl") else entry)
    (step / SHARD).write_bytes(content + stream.getvalue())

    def change(metadata):
        metadata.storage_data[index] = type(place)(SHARD, len(content), len(stream.getvalue()))

    tamper(step, change)


def test_code_in_place_of_a_tensor(step, proof):
    poison_shard(step, proof)
    metadata = read_metadata(step)
    place = next(value for key, value in metadata.storage_data.items() if key.fqn == "layers.0.weight")
    item = io.BytesIO((step / SHARD).read_bytes()[place.offset : place.offset + place.length])
    check_control(proof, lambda: torch.load(item, weights_only=False))
    check_refused(
        proof,
        "step-10 cannot be loaded: rank 0: in place of a tensor it holds what could run code",
        lambda: load_into_run(step),
        lambda: open_checkpoint(step)["layers.0.weight"].read(),
    )


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", ".", "", "/etc/hostname", "..\\outside"])
def test_a_manifest_that_leads_elsewhere(step, name):
    outside = step.parent / "outside"
    outside.write_text("not to be read")
    forge_manifest(step, **{name: make_entry(outside)})
    with pytest.raises(ValueError, match=r"manifest\.json (names|is damaged)") as error:
        read_manifest(step)
    assert "\n" not in str(error.value)
    assert not list(step.parent.glob("damaged-*"))


def test_a_shard_that_is_a_link(step, tmp_path):
    secret = tmp_path / "secret"
    shutil.move(step / SHARD, secret)
    (step / SHARD).symlink_to(secret)
    forge_manifest(step)
    assert (step / SHARD).read_bytes() == secret.read_bytes()  # control: an ordinary reader follows it
    with pytest.raises(ValueError, match=r"names the file '__0_0\.distcp', which is not in the folder itself"):
        read_metadata(step)
    with pytest.raises(ValueError, match="links are not followed"):
        open_checkpoint(step)


@pytest.mark.parametrize("name", ["../outside.distcp", "/tmp/outside.distcp", "sub/x.distcp", "..", ""])
def test_metadata_that_leads_elsewhere(step, name):
    outside = step.parent / "outside.distcp"
    shutil.copy(step / SHARD, outside)

    def change(metadata):
        for place in metadata.storage_data.values():
            place.relative_path = name

    tamper(step, change)
    if name == "../outside.distcp":  # control: torch's reader goes there
        values = {"layers.1.bias": torch.zeros(1, 7, dtype=torch.int64)}
        torch.distributed.checkpoint.load(values, storage_reader=FileSystemReader(step), no_dist=True)
        assert values["layers.1.bias"].any()
    check_refused(step / "no-trace", "which is not in the folder itself", *readers(step))


def test_metadata_that_wants_another_way_of_reading(step):
    def change(metadata):
        next(iter(metadata.storage_data.values())).transform_descriptors = ["some.codec"]

    tamper(step, change)
    check_refused(step / "no-trace", "read in another way", *readers(step))


def test_metadata_that_is_no_description_of_tensors(step):
    for change in (lambda metadata: setattr(metadata, "storage_data", None), lambda metadata: {"a": 1}):
        tamper(step, change)
        check_refused(step / "no-trace", "is not read", lambda: read_metadata(step))


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_text_encoder_in_a_format_that_runs_code(tmp_path, proof, kind):
    source, load = (TINY_T5.weights, load_t5) if kind == "t5" else (TINY_CLIP.weights, load_clip)
    folder = tmp_path / kind
    folder.mkdir()
    for file in source.iterdir():
        if "safetensors" not in file.name and file.is_file():
            shutil.copy(file, folder)
    torch.save({"shared.weight": Trap(proof)}, folder / "pytorch_model.bin")
    check_control(proof, lambda: torch.load(folder / "pytorch_model.bin", weights_only=False))
    spec = SPECS["flux-tiny"].transformer
    check_refused(proof, "safetensors", lambda: load(folder, spec, torch.float32, "cpu"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_text_encoder_that_asks_for_somebodys_attention(tmp_path, monkeypatch, kind, key):
    """The library takes such a name for a repository, and fetches and runs the code in it."""
    source, load = (TINY_T5.weights, load_t5) if kind == "t5" else (TINY_CLIP.weights, load_clip)
    folder = shutil.copytree(source, tmp_path / kind)
    values = json.loads((folder / "config.json").read_text()) | {key: "somebody/kernel"}
    (folder / "config.json").write_text(json.dumps(values))
    config_class = T5Config if kind == "t5" else CLIPTextConfig
    assert config_class.from_dict(values)._attn_implementation == "somebody/kernel"  # control
    model = load(folder, SPECS["flux-tiny"].transformer, torch.float32, "cpu")
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_text_encoder_that_brings_its_own_code(tmp_path, proof, kind):
    """Libraries run it where trust_remote_code says so, or where a name leads to it."""
    source, load = (TINY_T5.weights, load_t5) if kind == "t5" else (TINY_CLIP.weights, load_clip)
    folder = shutil.copytree(source, tmp_path / kind)
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(proof)!r})\nMine = None\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForTextEncoding", "AutoTokenizer")
    for file in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / file).read_text()) | {"trust_remote_code": True}
        values |= {"auto_map": dict.fromkeys(names, "mine.Mine") | {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
        (folder / file).write_text(json.dumps(values))
    with suppress(Exception):  # control; the code has run before the library misses a class in it
        transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=True)
    assert proof.exists(), "the fixture is harmless"
    proof.rmdir()
    load(folder, SPECS["flux-tiny"].transformer, torch.float32, "cpu")
    folders = (folder, TINY_CLIP.tokenizer) if kind == "t5" else (TINY_T5.tokenizer, folder)
    FluxTokenizer(*folders, max_t5_length=16)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["flux.pt", "flux.bin", "flux.ckpt", "flux.pth", "flux.safetensors"])
def test_weights_in_a_format_that_runs_code(tmp_path, proof, name):
    """Also under a name that promises better."""
    torch.save({"img_in.weight": Trap(proof)}, tmp_path / name)
    path = tmp_path / name
    check_control(proof, lambda: torch.load(io.BytesIO(path.read_bytes()), weights_only=False))
    check_refused(proof, "safe", lambda: open_weights(path, {}), lambda: open_safetensors([path]))


def test_a_folder_of_weights_in_a_format_that_runs_code(tmp_path, proof):
    path = tmp_path / "transformer" / "diffusion_pytorch_model.bin"
    path.parent.mkdir()
    torch.save({"img_in.weight": Trap(proof)}, path)
    check_control(proof, lambda: torch.load(path, weights_only=False))
    check_refused(proof, "only safetensors is safe", lambda: open_weights(tmp_path, {}))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/x.safetensors", "link.safetensors"])
def test_an_index_that_leads_elsewhere(tmp_path, name):
    from safetensors.torch import save_file

    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    check_refused(
        tmp_path / "no-trace",
        "plain file name|leads out of its folder",
        lambda: open_indexed(folder, "diffusion_pytorch_model"),
        lambda: open_weights(tmp_path, {}),
    )
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "here.safetensors"}}))
    (folder / "link.safetensors").unlink()
    save_file({"a": torch.ones(2)}, folder / "here.safetensors")
    assert open_indexed(folder, "diffusion_pytorch_model")["a"].read().sum() == 2  # control: a right one is read
