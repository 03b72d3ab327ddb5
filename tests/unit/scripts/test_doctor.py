"""What the doctor says of machines with something wrong, each made up of this one."""

import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import scripts.doctor as doctor
from config.parse import parse
from runtime.requirements import Requirement
from scripts.doctor import GIB, Case, Finding, examine, main

ROOT = Path(__file__).parents[3]
Usage = namedtuple("Usage", "total used free")


def case(*options: str, world_size: int | None = None) -> Case:
    argv = ["--job.config_file", str(ROOT / "train_configs" / "flux_tiny.toml"), *options]
    return Case(parse(argv, world_size)[0], world_size)


def only(findings) -> Finding:
    (finding,) = findings
    return finding


def test_nothing_stands_in_the_way_of_the_tiny_run_here(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("NGPU", raising=False)
    assert main(["--job.dump_folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[-1].startswith("0 errors, ")
    names = {line.split()[1] for line in lines[:-1] if not line.lstrip().startswith("->")}
    assert {"Python", "torch", "diffusers", "torchao", "GPU", "attention", "compiler", "encoders", "disk"} <= names


def test_a_wrong_configuration_is_told_as_ever(capsys):
    assert main(["--training.steps=-1"]) == 2
    assert "training.steps=-1" in capsys.readouterr().err


def test_a_missing_package_has_its_command(monkeypatch):
    lacking = [Requirement("no-such-package", (1,), (1, 2))]
    monkeypatch.setattr(doctor, "read_requirements", lambda path: lacking)
    finding = only(doctor.find_packages(case()))
    assert (finding.level, finding.found) == ("error", "no-such-package is missing")
    assert finding.fix.endswith("-m pip install no-such-package==1.2")


@pytest.mark.parametrize(
    ("installed", "level", "text"),
    [
        ("0.29.2", "warning", "cannot open FLUX.1 pipelines"),
        ("0.30.0", "ok", "FLUX.1; Qwen-Image needs 0.35.0, FLUX.2 needs 0.36.0, FLUX.2 klein needs 0.37.0"),
        ("0.36.1", "ok", "FLUX.1, Qwen-Image, FLUX.2; FLUX.2 klein needs 0.37.0"),
        ("0.42.1", "ok", "0.42.1 opens pipelines of FLUX.1, Qwen-Image, FLUX.2, FLUX.2 klein"),
    ],
)
def test_which_pipelines_a_diffusers_opens(monkeypatch, installed, level, text):
    monkeypatch.setattr(doctor, "version", lambda name: installed)
    finding = only(doctor.find_diffusers(case()))
    assert finding.level == level and text in finding.found


def test_the_claims_about_diffusers_hold_for_the_installed_one():
    diffusers = pytest.importorskip("diffusers")
    for name in ("FluxPipeline", "QwenImagePipeline", "Flux2Pipeline", "Flux2KleinPipeline"):
        assert hasattr(diffusers, name)
    assert all(doctor.release(diffusers.__version__) >= doctor.release(oldest) for oldest in doctor.PIPELINES.values())


def test_converters_without_their_hardware_are_an_error():
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    run = case("--model.converters=quantize.linear.float8", "--quantize.linear.float8.emulate=false")
    finding = only(doctor.find_torchao(run))
    assert finding.level == "error" and "emulate=true" in finding.fix


def test_a_gpu_that_this_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(doctor, "_ask_nvidia", lambda field: ["470.1"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert only(doctor.find_accelerator(case())).fix == "install the CUDA build of the same version of torch"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    finding = only(doctor.find_accelerator(case()))
    assert finding.level == "error" and finding.fix == "CUDA 13.0 needs driver 580.65 or newer"


def test_a_compiler_that_is_missing_is_an_error_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("parallel.compile._missing_for_cpu", lambda: "a C++ compiler: install g++")
    monkeypatch.setattr("parallel.compile._missing_for_cuda", lambda: "a C compiler: install gcc")
    assert only(doctor.find_compiler(case("--compile.enable=false"))).level == "warning"
    finding = only(doctor.find_compiler(case("--compile.enable=true")))
    assert finding.level == "error" and "install g" in finding.fix


def test_what_a_run_looks_at_is_looked_at_here():
    run = case("--encoder.t5_encoder=google/t5-v1_1-xxl", "--encoder.autoencoder_path=no/ae.safetensors")
    levels = {(finding.name, finding.level) for finding in doctor.find_for_run(run)}
    assert {("run folder", "ok"), ("disk", "ok"), ("encoders", "ok"), ("encoders", "error")} == levels


def test_little_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(GIB, GIB, 2**26))  # Docker's 64 MiB
    finding = only(doctor.find_shared_memory(case("--training.dataloader.num_workers=8")))
    assert finding.level == "warning" and "--shm-size" in finding.fix
    assert only(doctor.find_shared_memory(case("--training.dataloader.num_workers=0"))).level == "ok"


def test_few_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 1 << 20))
    assert only(doctor.find_file_limit(case()))[::3] == ("warning", "ulimit -n 65536")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 1024))
    assert "limits.conf" in only(doctor.find_file_limit(case())).fix


MOUNTS = "/dev/sda / ext4 rw 0 0\nserver:/x {0} nfs4 rw 0 0\n/dev/sdb {0}/own\\040disk xfs rw 0 0\n"


@pytest.mark.parametrize(
    ("folder", "kind"), [("", "nfs4"), ("deep/er", "nfs4"), ("own disk/run", "xfs"), ("../x", "ext4")]
)
def test_on_which_file_system_a_run_writes(monkeypatch, tmp_path, folder, kind):
    shared = tmp_path / "shared"
    (shared / "own disk").mkdir(parents=True)
    (tmp_path / "mounts").write_text(MOUNTS.format(shared))
    monkeypatch.setattr(doctor, "MOUNTS", tmp_path / "mounts")
    finding = only(doctor.find_file_system(case(f"--job.dump_folder={shared / folder}")))
    assert finding.level == "ok" and f"is on {kind}" in finding.found
    assert ("other machines can see" in finding.found) == (kind == "nfs4")


def test_several_machines_need_a_shared_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_gpu_count", lambda: 8)
    monkeypatch.setattr(doctor, "_file_system", lambda place: "xfs")
    options = (f"--job.dump_folder={tmp_path}", "--training.global_batch_size=-1")
    assert only(doctor.find_file_system(case(*options, world_size=8))).level == "ok"
    finding = only(doctor.find_file_system(case(*options, world_size=16)))
    assert finding.level == "warning" and "all machines share" in finding.fix


def test_a_check_that_fails_itself_ends_nothing(monkeypatch):
    def find_trouble(case):
        raise OSError("no such\ndevice")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (find_trouble, doctor.find_python))
    trouble, python = examine(case())
    assert trouble == Finding("warning", "trouble", "cannot be told (OSError: no such device)")
    assert python.level == "ok"
