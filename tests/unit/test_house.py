"""What holds the house together: who imports whom, and which words stay in which room."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from config.parse import parse
from flux.model import FluxTransformer
from flux.spec import SPECS

ROOT = Path(__file__).parents[2]
ROOMS = {"flux", "parallel", "checkpoint", "training", "runtime"}
SERVES_ALL = {"redact"}  # and imports nothing of the house
MAY_IMPORT = {room: {room} for room in ROOMS} | {module: set() for module in SERVES_ALL}
MAY_IMPORT["config"] = {"config"} | ROOMS
MAY_IMPORT["build"] = {"config"} | ROOMS
MAY_IMPORT["estimate"] = MAY_IMPORT["run_state"] = {"build", "config"} | ROOMS
MAY_IMPORT["evaluate"] = MAY_IMPORT["trained"] = {"build", "config"} | ROOMS
MAY_IMPORT["step_guard"] = MAY_IMPORT["step_report"] = {"config"} | ROOMS
MAY_IMPORT["step_records"] = {"config", "step_guard"} | ROOMS
MAY_IMPORT["memory_advice"] = {"config", "estimate"} | ROOMS
MAY_IMPORT["preflight"] = {"build", "config", "estimate", "memory_advice"} | ROOMS
MAY_IMPORT["train"] = {"build", "config", "evaluate", "memory_advice", "preflight", "run_state"} | ROOMS
MAY_IMPORT["train"] |= {"step_guard", "step_report"}
MAY_IMPORT["scripts"] = {"build", "config", "estimate", "preflight", "step_guard", "step_records", "train", "trained"}
MAY_IMPORT["scripts"] |= ROOMS
MAY_IMPORT["benchmarks"] = {"benchmarks"} | MAY_IMPORT["scripts"]
PRODUCT = set(MAY_IMPORT)

# Libraries that only some files may know.
LIBRARY_USERS = {
    "transformers": {"flux/huggingface.py", "scripts/make_tiny_text_encoders.py"},
    "diffusers": {"benchmarks/diffusers_peer.py"},
}
DATASET_LIBRARIES = {"datasets", "fsspec", "litdata", "pyarrow", "streaming", "torchdata", "webdataset"}
DATASET_BENCHMARK = "benchmarks/data.py"  # compares with them

# Answered before torch is imported: a configuration, an environment.
TORCH_FREE = ["*/config.py", "config/*.py", "flux/spec.py", "flux/rules.py", "runtime/*.py", "scripts/check_*.py"]
TORCH_FREE += ["scripts/requeue.py", *(f"{module}.py" for module in SERVES_ALL)]
LIGHT_LIBRARIES = {"tqdm"}

# The only room that knows DCP, whose own reader unpickles whatever it is given.
DCP, DCP_ROOM = "torch.distributed.checkpoint", "checkpoint"
DCP_NOTIONS = {f"{DCP}.CheckpointException", f"{DCP}.Metadata"}  # which read nothing


def product_files() -> list[str]:
    files = [path for room in PRODUCT for path in (ROOT / room).rglob("*.py")] + sorted(ROOT.glob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in files)


def read(file: str) -> str:
    return (ROOT / file).read_text()


def owner(name: str) -> str:
    """The room of a file or module: `flux/data/loader.py` and `flux.data.loader` are flux's."""
    return re.split(r"[/.]", name)[0]


def imported_modules(file: str, source: str, lazy: bool = True) -> Iterator[str]:
    """Dotted names of what a file imports; `from a import b` gives a.b. Without `lazy` only what importing it runs."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
                yield from walk(child)

    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.split("/")[: -node.level] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def forbidden_imports(file: str, source: str) -> list[str]:
    found = []
    for module in imported_modules(file, source):
        library = owner(module)
        if library in PRODUCT and library not in MAY_IMPORT[owner(file)] | SERVES_ALL:
            found.append(module)
        if owner(file) == "flux" and module.startswith("torch.distributed"):
            found.append(module)
        if module.startswith(DCP) and owner(file) != DCP_ROOM and module not in DCP_NOTIONS:
            found.append(module)
        if file not in LIBRARY_USERS.get(library, {file}):
            found.append(module)
        if library in DATASET_LIBRARIES and not file.startswith("flux/data/") and file != DATASET_BENCHMARK:
            found.append(module)
    return found


def third_party_closure(file: str, seen: set[str]) -> set[str]:
    """Libraries that importing a file brings in, through all of the project's own modules."""
    libraries = set()
    for module in imported_modules(file, read(file), lazy=False):
        if owner(module) in PRODUCT:
            path = module.replace(".", "/")
            candidates = [f"{path}.py", f"{path.rpartition('/')[0]}.py"]  # a module, or a name in a module
            for inner in (name for name in candidates if (ROOT / name).is_file() and name not in seen):
                seen.add(inner)
                libraries |= third_party_closure(inner, seen)
        elif owner(module) not in sys.stdlib_module_names:
            libraries.add(owner(module))
    return libraries


def module_names() -> set[str]:
    """Names of the transformer's parts that could not mean anything else (`img_attn`, not `norm`)."""
    with torch.device("meta"):
        models = [FluxTransformer(spec.transformer) for spec in SPECS.values()]
    return {part for model in models for name, _ in model.named_modules() for part in name.split(".") if "_" in part}


@pytest.mark.parametrize("file", product_files())
def test_imports_follow_the_plan(file):
    assert forbidden_imports(file, read(file)) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("flux/x.py", "from parallel.mesh import build_mesh"),
        ("flux/x.py", "import torch.distributed as dist"),
        ("flux/x.py", "from torch import distributed"),
        ("flux/data/x.py", "from ...training import optimizer"),
        ("parallel/x.py", "import flux.model"),
        ("runtime/x.py", "def late():\n    from flux.spec import SPECS"),
        ("config/x.py", "import train"),
        ("redact.py", "from config.keys import show"),
        ("checkpoint/x.py", "from build import build_model"),
        ("flux/x.py", "import trained"),
        ("build.py", "from train import FluxTrainer"),
        ("build.py", "from run_state import take_over"),
        ("train.py", "from trained import load_run"),
        ("trained.py", "from train import FluxTrainer"),
        ("scripts/x.py", "import torch.distributed.checkpoint as dcp"),
        ("parallel/x.py", "from torch.distributed import checkpoint"),
        ("train.py", "from scripts.sample import main"),
        ("scripts/x.py", "from benchmarks.train_step import measure"),
        ("scripts/x.py", "from scripts.sample import main"),
        ("training/x.py", "from transformers import AutoModel"),
        ("flux/model.py", "from diffusers import FluxTransformer2DModel"),
        ("train.py", "import pyarrow.parquet"),
    ],
)
def test_the_import_test_sees_a_wrong_import(file, line):
    assert forbidden_imports(file, line) != []


def test_the_import_test_lets_right_imports_pass():
    for file, line in [
        ("flux/data/x.py", "from torchdata.stateful_dataloader import StatefulDataLoader\nfrom .. import rng"),
        ("train.py", "from flux.model import FluxTransformer\nimport torch.distributed"),
        ("scripts/x.py", "from train import EXIT_CODES\nfrom build import build_model\nfrom trained import load_run"),
        ("train.py", "from build import build_model"),
        ("checkpoint/x.py", "import torch.distributed.checkpoint as dcp"),
        ("config/x.py", "from training.config import Metrics"),
        ("runtime/x.py", "from redact import redact"),
    ]:
        assert forbidden_imports(file, line) == []


def torch_free_files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in TORCH_FREE for path in ROOT.glob(pattern))


@pytest.mark.parametrize("file", torch_free_files())
def test_what_is_answered_early_imports_nothing_heavy(file):
    assert third_party_closure(file, {file}) <= LIGHT_LIBRARIES


def test_the_closure_sees_torch_through_other_modules():
    assert {"torch", "transformers"} <= third_party_closure("train.py", {"train.py"})


def test_checking_a_configuration_imports_no_torch():
    body = "import sys, scripts.check_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", body], cwd=ROOT, timeout=60).returncode == 0


def foreign_words(source: str, words: set[str]) -> set[str]:
    return {word for word in words if re.search(rf"\b{word}\b", source)}


def test_only_flux_knows_the_transformers_parts():
    words = module_names()
    assert {"double_blocks", "single_blocks", "img_attn", "vector_in"} <= words
    assert foreign_words('plan = {"double_blocks.*.qkv": 1}', words) == {"double_blocks"}
    for file in product_files():
        if owner(file) in {"parallel", "checkpoint", "training", "runtime"}:
            assert foreign_words(read(file), words) == set(), file


def test_every_file_has_a_name_that_says_what_is_in_it():
    empty_names = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [file for file in product_files() if Path(file).name in empty_names] == []
    packages = [file for file in product_files() if file.endswith("__init__.py")]
    assert packages and [file for file in packages if read(file)] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_configs/*.toml")), ids=lambda path: path.name)
def test_every_run_of_the_repository_loads(path):
    config, _ = parse(["--job.config_file", str(path)])
    assert config.model.flavor in SPECS
