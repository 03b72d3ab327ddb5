"""Every command that the documents show can be given as it is shown."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from config.parse import ConfigError, parse

ROOT = Path(__file__).parents[2]
PAGES = [
    f"docs/{name}.md"
    for name in (
        "parallelism",
        "checkpoints",
        "data",
        "metrics",
        "convergence",
        "profiling",
        "performance",
        "reliability",
        "clusters",
    )
]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES, "benchmarks/README.md"]
SHELL_BLOCK = re.compile(r"^```(?:bash|sh|console)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Their other options are the configuration's.
WITH_SETTINGS = (
    *("scripts.plan", "scripts.replay_step", "scripts.validate"),
    *("benchmarks.train_step", "benchmarks.loss_curves"),
)
SETTING = re.compile(r"[A-Z_]+=\S*$")


def commands(text: str) -> list[list[str]]:
    """The words of each command in the shell blocks of a document, without comments, prompts and `\\` line ends."""
    lines = [line for block in SHELL_BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if is_command(line)]
    return [command for command in words if command]


def is_command(line: str) -> bool:
    """Whether a line starts one of the project's own commands; a block may show output too."""
    own = r"(\$ )?([A-Z_]+=\S* )*(\./|\S*python3? |torchrun |\.venv/|\.ci/|sbatch |ssh \S+ \")"
    return re.match(own, line) is not None


def problem(command: list[str]) -> str | None:
    """Why a command could not be given as it is shown, or None."""
    settings = dict(word.split("=", 1) for word in command if SETTING.match(word))
    program, *arguments = [word for word in command if not SETTING.match(word)]
    if program == "ssh":  # the last of what is done there
        return problem(shlex.split(arguments[1].rpartition("&&")[2]))
    if program == "sbatch":
        return config_problem(["--job.config_file", *arguments[arguments.index("run_slurm.sh") + 1 :]])
    program = program.removeprefix(".venv/bin/")
    if program == "./run_train.sh":
        file = settings.get("CONFIG_FILE", "train_configs/flux_tiny.toml")
        return config_problem(["--job.config_file", file, *arguments])
    if program in ("./run_tests.sh", ".ci/run"):
        return None if (ROOT / program).is_file() else f"{program} does not exist"
    if program == "torchrun" and "-m" in arguments:
        program, arguments = "python", arguments[arguments.index("-m") :]
    if program == "torchrun":
        return config_problem(arguments[arguments.index("train.py") + 1 :])
    if not re.search(r"python3?$", program):
        return None  # a tool
    if arguments[:1] == ["train.py"]:
        return config_problem(arguments[1:])
    if arguments[:1] == ["-m"] and arguments[1].split(".")[0] in ("scripts", "benchmarks"):
        return module_problem(arguments[1], arguments[2:])
    return None  # Python's own modules


def config_problem(arguments: list[str]) -> str | None:
    try:
        parse(arguments)
    except ConfigError as error:
        return str(error)
    return None


def module_problem(module: str, arguments: list[str]) -> str | None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        return f"{module} does not exist"
    if module == "scripts.check_config":
        return config_problem(["--job.config_file", *arguments])
    if module == "scripts.doctor":
        return config_problem(arguments)
    if module in WITH_SETTINGS:
        if problem := config_problem(settings_in(arguments)):
            return problem
        arguments = [word for word in arguments if word not in settings_in(arguments)]
    unknown = {word.split("=")[0] for word in arguments if word.startswith("--")} - {"--help"} - options(path)
    return f"{module} does not know {', '.join(sorted(unknown))}" if unknown else None


def settings_in(arguments: list[str]) -> list[str]:
    """The `--section.key value` pairs, and keys without a value, among a script's arguments."""
    found, takes_value = [], False
    for word in arguments:
        is_key = re.match(r"--\w+\.", word) is not None
        if is_key or (takes_value and not word.startswith("--")):
            found.append(word)
        takes_value = is_key and "=" not in word
    return found


def options(path: Path) -> set[str]:
    """The options that a script defines: `--names` that it hands to a call, whatever add_argument is called there."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    words = [word.value for call in calls for word in call.args if isinstance(word, ast.Constant)]
    return {word for word in words if isinstance(word, str) and word.startswith("--")}


def documented() -> list[tuple[str, str]]:
    texts = {name: (ROOT / name).read_text() for name in DOCUMENTS if (ROOT / name).is_file()}
    return [(name, shlex.join(command)) for name, text in texts.items() for command in commands(text)]


@pytest.mark.parametrize(("document", "command"), documented())
def test_a_documented_command_parses(document, command):
    assert problem(shlex.split(command)) is None


def documented_modules() -> list[str]:
    words = [shlex.split(command) for _, command in documented()]
    modules = {command[command.index("-m") + 1] for command in words if "-m" in command}
    return sorted(module for module in modules if module.startswith(("scripts.", "benchmarks.")))


# Starts each module as `python -m MODULE --help`, in a fork of a process that has imported what takes longest: other
# people's libraries, and nothing of ours but the door to them.
EXPLAIN = """
import json, os, runpy, sys
import torch.distributed.checkpoint, torch.distributed.fsdp
import flux.huggingface

for module in sys.argv[1:]:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(write, 1)
        sys.argv = [module, "--help"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit()
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]), flush=True)
"""


@pytest.fixture(scope="module")
def explained() -> dict[str, list]:
    """Of each documented module, the exit code of --help and what it said."""
    modules = documented_modules()
    done = subprocess.run(
        [sys.executable, "-c", EXPLAIN, *modules], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300
    )
    return dict(zip(modules, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("module", documented_modules())
def test_a_documented_module_explains_itself(explained, module):
    code, said = explained[module]
    assert code == 0
    assert "usage" in said


def test_the_reader_finds_commands_and_only_them():
    text = (
        "```bash\n$ NGPU=1 ./run_train.sh --training.steps 5 \\\n    --training.local_batch_size 2  # short\n"
        "step 1/5 loss 1\n.venv/bin/python -m scripts.x\n```\n```python\nimport torch\n```\n"
    )
    assert commands(text) == [
        ["NGPU=1", "./run_train.sh", "--training.steps", "5", "--training.local_batch_size", "2"],
        [".venv/bin/python", "-m", "scripts.x"],
    ]


@pytest.mark.parametrize(
    "command",
    [
        "./run_train.sh --training.stepz 5",
        "./run_train.sh --training.steps many",
        "CONFIG_FILE=train_configs/none.toml ./run_train.sh",
        "python train.py --job.config_file train_configs/none.toml",
        "torchrun --nproc_per_node=8 train.py --training.stepz 5",
        "python -m scripts.no_such_script",
        "python -m scripts.check_config train_configs/none.toml",
        ".venv/bin/python -m scripts.sample --no-such-flag 1",
        "sbatch --nodes=2 run_slurm.sh train_configs/none.toml",
        "sbatch run_slurm.sh train_configs/flux_tiny.toml --training.stepz 5",
        "ssh node2 'cd there && NODE_RANK=1 ./run_train.sh --training.stepz 5' &",
        "ssh node2 'cd there && .venv/bin/torchrun --nproc_per_node=8 train.py --training.stepz 5' &",
    ],
)
def test_a_wrong_command_is_found(command):
    assert problem(shlex.split(command)) is not None


@pytest.mark.parametrize("page", [*DOCUMENTS, "docs/data_flow.md"])
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    missing = [target for target in targets if "://" not in target and not ((ROOT / page).parent / target).exists()]
    assert missing == []
