"""What the product never does, found by reading its source; and that what SECURITY.md promises has its tests.

ALLOWED is the only list of exceptions. One that is not needed any more is a fault too.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from runtime.requirements import read_requirements
from tests.unit.test_house import ROOT, owner, product_files, read

# Modules that run what they are given, load native code, start programs or talk to other machines.
RUNS_DATA = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
RUNS_TEXT = {"code", "codeop", "ctypes", "importlib", "runpy"}
STARTS_PROGRAMS = {"pexpect", "pty", "subprocess"}
NETWORK = {
    *("aiohttp", "boto3", "botocore", "fsspec", "ftplib", "gcsfs", "http", "httpx", "huggingface_hub", "imaplib"),
    *("paramiko", "poplib", "requests", "s3fs", "smtplib", "socket", "socketserver", "ssl", "telnetlib", "urllib"),
    *("urllib3", "wandb", "webbrowser", "websockets", "xmlrpc"),
}
DANGEROUS_MODULES = RUNS_DATA | RUNS_TEXT | STARTS_PROGRAMS | NETWORK
HARMLESS = ("importlib.metadata", "importlib.util", "socket.gethostname", "urllib.parse")  # which only look

DANGEROUS_CALLS = re.compile(
    r"(eval|exec|compile|__import__"
    r"|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)|multiprocessing\.(connection|managers)\..*"
    r"|torch\.(load|hub\..*|jit\.load|package\..*|ops\.load_library|classes\.load_library)"
    r"|yaml\.(load|load_all|full_load|unsafe_load)|(pd|pandas)\.read_pickle"
    r"|.*\.(extract|extractall|unpack_archive|from_pretrained)"
    r"|.*\.\w+_object(_list)?|tempfile\.mktemp)"
)
# Options that are safe with one value only.
SAFE_VALUES = {
    "allow_pickle": "False",
    "shell": "False",
    "trust_remote_code": "False",
    "use_safetensors": "True",
    "weights_only": "True",
}
# What changes how every picture of the process is decoded.
PILLOW_SWITCHES = {"LOAD_TRUNCATED_IMAGES", "MAX_IMAGE_PIXELS"}
SHARED_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # where others can put a file of a name that is known

# (file, what it uses, or how the names of that begin) -> why that is no danger.
ALLOWED = {
    ("checkpoint/safe_metadata.py", "pickle"): "gives out exact names only: test_the_one_unpickler_is_restricted",
    ("checkpoint/checkpointer.py", "dist.all_gather_object"): "ranks trust each other: SECURITY.md",
    ("flux/data/storage.py", "fsspec"): "opens the URLs of data sets, and nothing else is given to it",
    ("flux/data/tokenizers.py", "kind.from_pretrained"): "a class of the library's own, from a local folder",
    ("training/sinks.py", "wandb"): "metrics.enable_wandb asks for it",
    ("scripts/download_assets.py", "huggingface_hub"): "what the command is for",
    ("scripts/doctor.py", "huggingface_hub.get_token"): "whether there is one; opens no connection",
    ("scripts/doctor.py", "subprocess"): "nvidia-smi, without a shell",
    ("scripts/doctor.py", "'/dev/shm'"): "asks how much room there is",
    ("scripts/launch.py", "subprocess.Popen"): "the ranks, without a shell",
    ("scripts/launch.py", "os.execv"): "the dry run, without a shell",
    ("scripts/launch.py", "os.environ.items"): "handed on to the ranks",
    ("scripts/make_tiny_text_encoders.py", "T5Tokenizer.from_pretrained"): "the folder that it has just written",
    ("scripts/make_tiny_text_encoders.py", "CLIPTokenizer.from_pretrained"): "the folder that it has just written",
    ("redact.py", "os.environ.items"): "to black its secrets out",
    ("benchmarks/convert_memory.py", "subprocess.Popen"): "a command of the recipe's, without a shell",
    ("benchmarks/train_step.py", "subprocess"): "git, without a shell",
    ("benchmarks/train_step.py", "os.execve"): "itself, with other settings of malloc",
    ("benchmarks/train_step.py", "os.environ |"): "for that",
}


def find_uses(source: str) -> set[str]:
    """Everything in a file that is never or rarely right, by the names of what is used."""
    tree = ast.parse(source)
    found = {name for name in imported_names(tree) if owner(name) in DANGEROUS_MODULES}
    found = {name for name in found if not name.startswith(HARMLESS)}
    documentation = {id(text) for text in docstrings(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found |= set(calls(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            found |= {repr(node.value)} if node.value.startswith(SHARED_FOLDERS) else set()
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in PILLOW_SWITCHES:
            found.add(f"{ast.unparse(node)} = ...")
        elif isinstance(node, ast.Dict) and None in node.keys:
            spread = [ast.unparse(value) for key, value in zip(node.keys, node.values, strict=True) if key is None]
            found |= {"**os.environ"} & {f"**{value}" for value in spread}
        elif isinstance(node, ast.BinOp) and "os.environ" in (ast.unparse(node.left), ast.unparse(node.right)):
            found.add("os.environ |")
    return found


def calls(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    options = {option.arg: ast.unparse(option.value) for option in node.keywords if option.arg}
    if DANGEROUS_CALLS.fullmatch(name):
        yield name
    for option, safe in SAFE_VALUES.items():
        if options.get(option, safe) != safe:
            yield f"{option}={options[option]}"
    if name in ("Image.open", "PIL.Image.open") and "formats" not in options:
        yield f"{name} of any format"
    if re.fullmatch(r"os\.environ\.(copy|items|values)", name):
        yield name
    if name in ("dict", "str", "repr", "json.dumps") and [ast.unparse(one) for one in node.args] == ["os.environ"]:
        yield f"{name}(os.environ)"


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what is imported; of a module, what is used of it."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name
                used = {one.attr for one in attributes if ast.unparse(one.value) == bound}
                yield from (f"{alias.name}.{name}" for name in used) if used else (alias.name,)


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def is_allowed(file: str, use: str) -> bool:
    return any(place == file and f"{use}.".startswith(f"{name}.") for place, name in ALLOWED)


@pytest.mark.parametrize("file", product_files())
def test_nothing_runs_data_or_text_starts_programs_or_talks_to_the_network(file):
    assert sorted(use for use in find_uses(read(file)) if not is_allowed(file, use)) == []


@pytest.mark.parametrize(("file", "name"), ALLOWED)
def test_every_exception_is_needed(file, name):
    assert any(f"{use}.".startswith(f"{name}.") for use in find_uses(read(file)))


@pytest.mark.parametrize(
    ("lines", "use"),
    [
        ("import pickle", "pickle"),
        ("import pickle as p\np.loads(data)", "pickle.loads"),
        ("def late():\n    from pickle import loads", "pickle.loads"),
        ("import joblib", "joblib"),
        ("eval(text)", "eval"),
        ("exec(compile(text, name, 'exec'))", "compile"),
        ("__import__(section.module)", "__import__"),
        ("import importlib\nimportlib.import_module(section.module)", "importlib.import_module"),
        ("from importlib import import_module", "importlib.import_module"),
        ("import ctypes\nctypes.CDLL(path)", "ctypes.CDLL"),
        ("os.system(command)", "os.system"),
        ("os.posix_spawn(path, words, os.environ)", "os.posix_spawn"),
        ("import subprocess\nsubprocess.run(words)", "subprocess.run"),
        ("run(command, shell=True)", "shell=True"),
        ("torch.load(path, weights_only=True)", "torch.load"),
        ("load(path, weights_only=flag)", "weights_only=flag"),
        ("torch.hub.load(name, model)", "torch.hub.load"),
        ("yaml.load(file)", "yaml.load"),
        ("numpy.load(path, allow_pickle=flag)", "allow_pickle=flag"),
        ("T5EncoderModel.from_pretrained(path)", "T5EncoderModel.from_pretrained"),
        ("load(path, trust_remote_code=True)", "trust_remote_code=True"),
        ("load(path, use_safetensors=False)", "use_safetensors=False"),
        ("dist.broadcast_object_list(values)", "dist.broadcast_object_list"),
        ("tar.extractall(folder, filter='data')", "tar.extractall"),
        ("import socket\nsocket.create_connection(place)", "socket.create_connection"),
        ("from urllib.request import urlopen", "urllib.request.urlopen"),
        ("import http.server", "http.server"),
        ("import requests", "requests"),
        ("Image.open(path)", "Image.open of any format"),
        ("ImageFile.LOAD_TRUNCATED_IMAGES = True", "ImageFile.LOAD_TRUNCATED_IMAGES = ..."),
        ("Image.MAX_IMAGE_PIXELS = None", "Image.MAX_IMAGE_PIXELS = ..."),
        ("place = '/tmp/lock'", "'/tmp/lock'"),
        ("tempfile.mktemp()", "tempfile.mktemp"),
        ("log.info(dict(os.environ))", "dict(os.environ)"),
        ("state = {**os.environ}", "**os.environ"),
        ("os.environ | extra", "os.environ |"),
    ],
)
def test_control_each_danger_is_seen(lines, use):
    assert use in find_uses(lines)
    assert not is_allowed("flux/model.py", use)


def test_control_what_is_harmless_passes():
    harmless = (
        "model.eval()\nre.compile(text)\ntorch.compile(model)\nload_file(path)\nos.environ.get(name)\n"
        "import importlib.util\nimportlib.util.find_spec(name)\nImage.open(path, formats=FORMATS)\n"
        "load(path, trust_remote_code=False)\nread_ranks(os.environ)\ntempfile.mkdtemp()\n"
        "def write():\n    'Into /tmp'\n"
    )
    assert find_uses(harmless) == set()


def loose_pickle(source: str) -> list[str]:
    """What a file takes from pickle beside an Unpickler with a `find_class` of its own."""
    nodes = list(ast.walk(ast.parse(source)))
    used = [node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"]
    for node in nodes:
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["pickle.Unpickler"]:
            methods = {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
            if "find_class" in methods:
                used.remove("Unpickler")
    return [name for name in used if name != "UnpicklingError"]


def test_the_one_unpickler_is_restricted():
    assert loose_pickle(read("checkpoint/safe_metadata.py")) == []
    harmless = "class Mine(pickle.Unpickler):\n    def find_class(self, module, name): ...\n"
    assert loose_pickle(harmless) == []
    for faulty in ("pickle.load(file)", "pickle.Unpickler(file).load()", "class Mine(pickle.Unpickler):\n    pass"):
        assert loose_pickle(harmless + faulty) != []


def unpinned(text: str) -> list[str]:
    """Lines of a requirements file that leave open what is installed."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    pinned = re.compile(r"-r requirements\.txt|[\w.-]+(\[\w,]+\])?==\d+(\.\d+)+")
    return [line for line in lines if line and not pinned.fullmatch(line)]


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_every_requirement_is_pinned(path):
    assert unpinned(path.read_text()) == []
    for line in (
        "torch",
        "torch>=2.13",
        "torch==2.*",
        "git+https://example.org/torch",
        "--extra-index-url https://x.org",
    ):
        assert unpinned(f"numpy==2.4.6  # fast\n{line}\n") == [line]


def test_nothing_serves_whose_reader_can_be_fooled():
    floors = {one.name: one.floor for one in read_requirements(ROOT / "requirements.txt")}
    # DCP's tensors are read with weights_only=True: CVE-2025-32434 until 2.5, CVE-2026-24747 until 2.9.
    assert floors["torch"] >= (2, 10)
    assert floors["pyarrow"] >= (14, 0, 1)  # types that were unpickled: CVE-2023-47248


def loose_actions(text: str) -> list[str]:
    """Actions of a workflow that are named by what their owner can change."""
    used = re.findall(r"uses:\s*(\S+)", text)
    return [action for action in used if not re.search(r"@[0-9a-f]{40}$", action)]


def test_actions_are_pinned_to_commits():
    workflows = sorted(ROOT.glob(".github/workflows/*.y*ml"))
    assert workflows and [action for path in workflows for action in loose_actions(path.read_text())] == []
    assert loose_actions("- uses: actions/checkout@v5\n") == ["actions/checkout@v5"]


def shown_by(text: str) -> Counter[tuple[str, str]]:
    """(file, test) that a page names as `tests/unit/test_a.py::test_b`, and how often."""
    return Counter(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text))


def missing_tests(text: str) -> list[tuple[str, str]]:
    def exists(file: str, test: str) -> bool:
        return (ROOT / file).is_file() and re.search(rf"^def {test}\(", read(file), re.MULTILINE) is not None

    return [named for named in shown_by(text) if not exists(*named)]


def test_every_test_that_the_threat_model_names_is_there():
    text = read("SECURITY.md")
    assert missing_tests(text) == []
    promises = [line for line in text.partition("| promise |")[2].splitlines() if line.startswith("| ")]
    assert len(promises) > 15 and [line for line in promises if not shown_by(line)] == []
    assert missing_tests("`tests/unit/test_house.py::test_nothing`") == [("tests/unit/test_house.py", "test_nothing")]
