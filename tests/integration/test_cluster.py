"""cluster/: the pods of Kubernetes, with stand-ins for the run, and the image, read but not built."""

import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.checkout import ENDS_AT_SIGNAL, ROOT, make_checkout, read_environment, until

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


@pytest.fixture(scope="module")
def job():
    yaml = pytest.importorskip("yaml", reason="no parser of YAML is installed")
    return yaml.safe_load((ROOT / "cluster" / "pytorchjob.yaml").read_text())


@pytest.fixture
def pods(job):
    return {name: replica["template"]["spec"] for name, replica in job["spec"]["pytorchReplicaSpecs"].items()}


def environment(pod) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}


def test_the_job_is_one_that_the_operator_takes(job, pods):
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert {replica["restartPolicy"] for replica in replicas.values()} == {"ExitCode"}
    for pod in pods.values():
        (container,) = pod["containers"]
        assert container["name"] == "pytorch" and re.search(r":\d", container["image"])
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
        assert pod["securityContext"]["runAsNonRoot"] and not SECRET.search(str(container["env"]))


def test_the_kill_comes_after_the_save(pods):
    for pod in pods.values():
        assert pod["terminationGracePeriodSeconds"] >= int(environment(pod)["FLUX_GRACE_SECONDS"]) + 30


class Pod:
    """Runs a pod's script in a checkout, as the operator would."""

    def __init__(self, spec, folder: Path):
        make_checkout(folder)
        self.folder = folder
        (container,) = spec["containers"]
        (script,) = container["args"]
        self.command = [*container["command"], script.replace("/shared", str(folder.parent / "volume"))]
        self.environment = environment(spec) | {
            "PATH": f"{folder / 'programs'}:/usr/bin:/bin",
            "CONFIG_FILE": "run.toml",
        }
        self.environment |= {"PET_NPROC_PER_NODE": "8", "PET_NNODES": "2", "PET_NODE_RANK": "1"}
        with open(folder / "run.toml", "a") as file:
            file.write("\n[checkpoint]\nenable = true\n")

    def start(self, launch: str) -> subprocess.Popen:
        (self.folder / "launch").write_text(launch)
        return subprocess.Popen(
            self.command, cwd=self.folder, env=self.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )

    def run(self, launch: str) -> int:
        process = self.start(launch)
        process.communicate(timeout=60)
        return process.returncode


@pytest.fixture
def pod(pods, tmp_path):
    return Pod(pods["Worker"], tmp_path / "a checkout")


SAVES = 'mkdir -p "../volume/outputs/dev/checkpoint/step-9"\n'


@pytest.mark.parametrize(
    ("launch", "code"),
    [("exit 0", 0), ("exit 2", 2), ("exit 6", 6), (SAVES + "exit 6", 138), ("exit 75", 138), ("exit 143", 1)],
)
def test_only_what_may_go_on_gets_a_code_that_is_started_again(pod, launch, code):
    assert pod.run(launch) == code


def test_a_pod_knows_its_place_and_its_run(pod):
    assert pod.run("exit 0") == 0
    seen = read_environment(pod.folder / "environment-1")
    expected = {"NGPU": "8", "NNODES": "2", "NODE_RANK": "1", "FLUX_GRACE_SECONDS": "210"}
    assert {name: seen[name] for name in expected} == expected
    words = (pod.folder / "arguments-1").read_text().split("|")
    assert words[2:5] == ["--job.config_file", "run.toml", "--job.dump_folder"] and "--training.dataset_path" in words


def test_a_wrong_configuration_ends_the_job(pod):
    (pod.folder / "run.toml").write_text("[training]\nstepz = 5\n")
    assert pod.run("exit 0") == 2 and not (pod.folder / "environment-1").exists()


def test_an_evicted_pod_hands_the_signal_on_and_waits_for_the_save(pod):
    process = pod.start(ENDS_AT_SIGNAL.replace("exit'", "exit 75'").replace('"$FLUX_EXIT_RECORD"', "record"))
    until((pod.folder / "ready-1").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 138 and (pod.folder / "record").exists()


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and arguments of each instruction of a Dockerfile."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name.upper(), rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def faults(dockerfile: str) -> set[str]:
    """What must not be in an image's recipe."""
    found = set()
    steps = instructions(dockerfile)
    if any(name == "FROM" and not re.search(r":\d+\.\d+", rest) for name, rest in steps):
        found.add("the base is not pinned")
    users = [rest for name, rest in steps if name == "USER"]
    if not users or not users[-1].isdecimal() or users[-1] == "0":
        found.add("it runs as root, or as a user without a number")
    if any(name in ("ENV", "ARG") and SECRET.search(rest) for name, rest in steps):
        found.add("a secret stays in it")
    if any(name == "ADD" for name, _ in steps):
        found.add("it fetches what nobody checks")
    return found


def test_the_image_is_pinned_and_holds_no_secret():
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    assert faults(text) == set()
    known = {"FROM", "RUN", "ENV", "COPY", "WORKDIR", "USER", "CMD"}
    assert {name for name, _ in instructions(text)} == known and "--requirement /opt/requirements.txt" in text
    ignored = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {"**/.git", "**/.env*", "**/.netrc", "**/.venv*", "outputs", "wandb", "assets/hf"} <= set(ignored)


@pytest.mark.parametrize(
    "line",
    ["FROM nvidia/cuda", "FROM nvidia/cuda:latest", "USER root", "USER 0", "ENV HF_TOKEN=x", "ARG api_key", "ADD a b"],
)
def test_a_fault_in_the_image_is_seen(line):
    assert faults(f"FROM base:1.0\nUSER 10001\n{line}\n") != set()
    assert faults("FROM base:1.0\nUSER 10001\n") == set()
