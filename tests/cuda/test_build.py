"""setup.py's choices, and what it builds: both extensions, the source package and the wheel."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from dit_kernels.ops import cuda_extension

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, on a machine with a C++ compiler and nothing else."""
    spec = importlib.util.spec_from_file_location("build_of_the_project", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("DIT_KERNELS_CUDA", raising=False)
    monkeypatch.delenv("DIT_KERNELS_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(module, "cxx", lambda: "/usr/bin/g++")
    monkeypatch.setattr(module, "toolkit_nvcc", lambda: None)
    monkeypatch.setattr(module, "packaged_nvcc", lambda: None)
    monkeypatch.setattr(module, "gpus", list)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    return module


def run_setup(build, monkeypatch, command):
    """Keywords of setup() under one of pip's commands."""
    given = {}
    monkeypatch.setattr(build, "setup", lambda **keywords: given.update(keywords))
    monkeypatch.setattr(sys, "argv", ["setup.py", command])
    build.main()
    return given


def test_without_nvcc_the_kernels_for_gpus_are_skipped_in_one_line(build, monkeypatch, capsys):
    for command in ("egg_info", "dist_info", "bdist_wheel"):
        given = run_setup(build, monkeypatch, command)
        assert [extension.name for extension in given["ext_modules"]] == ["dit_kernels._C_emulated"]
        assert given["setup_requires"] == ["pybind11>=2.13", "cmake>=3.21", "ninja"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "CUDA kernels are skipped: no nvcc" in line
    assert "DIT_KERNELS_CUDA=1 takes it from PyPI" in line


def test_required_nvcc_comes_from_its_packages(build, monkeypatch, capsys):
    monkeypatch.setenv("DIT_KERNELS_CUDA", "1")
    given = run_setup(build, monkeypatch, "bdist_wheel")
    assert len(given["ext_modules"]) == 2
    needed = given["setup_requires"]
    assert "nvidia-cuda-nvcc==13.0.*" in needed
    assert "nvidia-nvvm==13.0.*" in needed
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(build, "toolkit_nvcc", lambda: Path("/usr/local/cuda/bin/nvcc"))
    needed = run_setup(build, monkeypatch, "bdist_wheel")["setup_requires"]
    assert not [name for name in needed if name.startswith("nvidia")]


def test_a_machine_without_a_compiler(build, monkeypatch, capsys):
    monkeypatch.setattr(build, "cxx", lambda: None)
    given = run_setup(build, monkeypatch, "editable_wheel")
    assert given["ext_modules"] == given["setup_requires"] == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "CUDA kernels are skipped: no C++ compiler: apt-get install g++" in line
    monkeypatch.setenv("DIT_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="apt-get install"):
        build.main()


def test_asked_for_none(build, monkeypatch, capsys):
    monkeypatch.setenv("DIT_KERNELS_CUDA", "0")
    monkeypatch.setattr(build, "toolkit_nvcc", lambda: Path("nvcc"))
    given = run_setup(build, monkeypatch, "bdist_wheel")
    assert given["ext_modules"] == given["setup_requires"] == []
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("DIT_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 1, 0 or unset; got 'yes'"):
        build.main()


def test_architectures(build, monkeypatch):
    assert build.architectures() == "80-real;89-real;90a-real;100"
    monkeypatch.setattr(build, "gpus", lambda: ["80", "90"])
    assert build.architectures() == "80-real;90a-real"
    monkeypatch.setenv("DIT_KERNELS_CUDA_ARCHS", "75")
    assert build.architectures() == "75"


def test_compiler_flags(build):
    assert build.gencode("90a-real;90-virtual, 100") == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_100,code=[sm_100,compute_100]",
    ]
    with pytest.raises(SystemExit, match=r"must be like .* got 'sm_90'"):
        build.gencode("sm_90")


def test_both_extensions_have_the_same_launchers():
    """nvcc's module loads without a GPU and without a driver."""
    real = importlib.import_module("dit_kernels._C")
    emulated = importlib.import_module("dit_kernels._C_emulated")
    names = {name for name in dir(real) if not name.startswith("_")}
    assert "feed_forward_fwd" in names
    assert names == {name for name in dir(emulated) if not name.startswith("_")} - EMULATOR_ONLY


EMULATOR_ONLY = {"set_seed", "set_most_blocks", "written", "record", "recorded"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_a_launch_without_a_gpu_is_an_exception():
    real = importlib.import_module("dit_kernels._C")
    x = torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match=r"feed_forward_fwd: cuda\w+: .*torch.float32 \[2, 8\]"):
        real.feed_forward_fwd(0, 0, x, None, torch.empty(2, 8), 2, 2, 8, 0, 8, 1, 0)


@pytest.mark.parametrize("emulate", ["0", "1"])
def test_a_missing_extension_says_what_to_type(emulate):
    code = (
        "from dit_kernels import backends; from dit_kernels.ops import cuda_extension as c;"
        "c.importlib.util.find_spec = lambda name: None;"
        "(line,) = [b for b in backends.report() if b.name == 'cuda']; print(line.reason, '|', line.fix)"
    )
    environment = {**os.environ, "DIT_KERNELS_EMULATE": emulate}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    reason, fix = run.stdout.strip().split(" | ")
    name = "_C_emulated" if emulate == "1" else "_C"
    assert reason == f"dit_kernels.{name} is not built"
    assert "DIT_KERNELS_CUDA=1 pip install ." in fix


def test_unsupported_devices():
    assert cuda_extension.unsupported(None, torch.zeros(2)) is None
    assert "a tensor is on meta" in cuda_extension.unsupported(torch.zeros(2, device="meta"))


def command(*args: object, **options) -> str:
    run = subprocess.run(
        [str(arg) for arg in args], capture_output=True, text=True, timeout=1800, **options
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    return set(command("git", "-C", ROOT, "ls-files").split("\n")) - {""}


def test_the_source_package_has_every_source(tmp_path, tracked):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    command(sys.executable, "-c", code, cwd=ROOT, env={**os.environ, "DIT_KERNELS_CUDA": "0"})
    (package,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(package) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        name
        for name in tracked
        if name.startswith(("csrc/", "dit_kernels/")) or name in ("setup.py", "CMakeLists.txt")
    }
    assert sources - names == set()


def needed_by(name: str) -> dict[str, importlib.metadata.Distribution]:
    """What pip would install for it: the distributions that it requires, and those that they require."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = [name]
    while wanted:
        distribution = importlib.metadata.distribution(wanted.pop())
        for requirement in map(Requirement, distribution.requires or ()):
            asked = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if asked and requirement.name not in found:
                found[requirement.name] = importlib.metadata.distribution(requirement.name)
                wanted.append(requirement.name)
    return found


def test_the_wheel_works_where_nothing_else_is(tmp_path, tracked):
    """Installed into a new environment that has its requirements alone, linked to this one's."""
    archs = os.environ.get("DIT_KERNELS_CUDA_ARCHS", "90a-real;90-virtual")
    environment = {**os.environ, "DIT_KERNELS_CUDA": "1", "DIT_KERNELS_CUDA_ARCHS": archs}
    command(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--disable-pip-version-check",
        "-w", tmp_path, ROOT, env=environment, cwd=tmp_path,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in tracked if name.startswith("dit_kernels/")} - names == set()
    for module in ("_C.", "_C_emulated."):
        assert any(name.startswith(f"dit_kernels/{module}") for name in names)

    command(sys.executable, "-m", "venv", "--without-pip", tmp_path / "new")
    python = tmp_path / "new" / "bin" / "python"
    command(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    (packages,) = (tmp_path / "new").glob("lib/python*/site-packages")
    for distribution in needed_by("dit-kernels").values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    with pytest.raises(AssertionError, match="No module named 'pytest'"):
        command(python, "-c", "import pytest", cwd=tmp_path)
    smoke = """
import torch, dit_kernels, sys
from dit_kernels import ops, models
assert dit_kernels.__file__.startswith(sys.prefix), dit_kernels.__file__
x = torch.randn(2, 3, 32, requires_grad=True)
y = ops.gelu_bias(x, backend="cuda")
torch.testing.assert_close(y, torch.nn.functional.gelu(x, approximate="tanh"))
y.sum().backward()
assert x.grad.isfinite().all()
model = models.DiT(input_size=(1, 8, 8), hidden_size=32, depth=1, num_heads=2, num_classes=3)
print(model(torch.randn(1, 4, 8, 8), torch.tensor([5.0]), y=torch.tensor([1])).shape)
"""
    out = command(python, "-c", smoke, cwd=tmp_path)
    assert "[1, 8, 8, 8]" in out
    assert "cuda" in command(tmp_path / "new" / "bin" / "dit-kernels", "info", cwd=tmp_path)
