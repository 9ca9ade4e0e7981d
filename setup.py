"""Builds the CUDA extensions with CMake; the project's metadata lives in pyproject.toml.

    dit_kernels._C           the kernels for GPUs, by nvcc
    dit_kernels._C_emulated  the same kernels for the CPU, by the C++ compiler (csrc/emulator)

DIT_KERNELS_CUDA        1: both must be built; without an nvcc the compiler comes from its PyPI packages
                        0: neither; unset: what this machine has the compilers for
DIT_KERNELS_CUDA_ARCHS  as CMAKE_CUDA_ARCHITECTURES: "90a-real;90-virtual" is machine code for sm_90a and
                        PTX for later ones; by default the GPUs of this machine, or ARCHS where it has none
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ARCHS = "80-real;89-real;90a-real;100"
ROOT = Path(__file__).parent.resolve()
# A newer compiler's PTX is refused by a 13.0 driver.
NVCC_PACKAGES = [
    f"nvidia-{name}==13.0.*"
    for name in ("cuda-nvcc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")
]


def wanted() -> str:
    value = os.environ.get("DIT_KERNELS_CUDA", "")
    if value not in ("", "0", "1"):
        sys.exit(f"DIT_KERNELS_CUDA must be 1, 0 or unset; got {value!r}")
    return value


def cxx() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


def toolkit_nvcc() -> Path | None:
    """nvcc of a CUDA toolkit, from 12.8 on: the first that knows sm_100."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for candidate in ("nvcc", *(f"{home}/bin/nvcc" for home in homes if home)):
        if nvcc := shutil.which(candidate):
            run = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
            version = re.search(r"release (\d+)\.(\d+)", run.stdout)
            if version and (int(version[1]), int(version[2])) >= (12, 8):
                return Path(nvcc)
    return None


def packaged_nvcc() -> Path | None:
    """nvcc of the PyPI packages, which share one folder."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (nvcc := Path(folder) / "cu13" / "bin" / "nvcc").exists():
            return nvcc
    return None


def cuda_folders(nvcc: Path) -> tuple[Path, Path]:
    """(include folder, libcudart_static.a) of the toolkit that nvcc itself names."""
    run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", run.stderr, re.MULTILINE)
    home = Path(top[1]) if top else nvcc.resolve().parent.parent
    for library in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (runtime := home / library / "libcudart_static.a").exists():
            return home / "include", runtime
    sys.exit(f"no libcudart_static.a under {home}, the CUDA toolkit of {nvcc}")


def gpus() -> list[str]:
    """Compute capabilities of this machine's GPUs that the kernels run on, as "90"."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = set(run.stdout.replace(".", "").split())
    return sorted(arch for arch in found if arch.isdigit() and int(arch) >= 80)


def architectures() -> str:
    if asked := os.environ.get("DIT_KERNELS_CUDA_ARCHS"):
        return asked
    # wgmma and TMA are in sm_90a only
    return ";".join("90a-real" if arch == "90" else f"{arch}-real" for arch in gpus()) or ARCHS


def gencode(archs: str) -> list[str]:
    """nvcc's flags: "80" is machine code and PTX, "80-real" and "80-virtual" one of them."""
    flags = []
    for arch in re.split(r"[;,\s]+", archs.strip(";, ")):
        if not (match := re.fullmatch(r"(\d+[af]?)(-real|-virtual)?", arch)):
            sys.exit(f'DIT_KERNELS_CUDA_ARCHS must be like "80-real;90a-real;100"; got {arch!r}')
        name, kind = match.groups()
        codes = {"-real": f"sm_{name}", "-virtual": f"compute_{name}"}
        code = codes[kind] if kind else "[" + ",".join(codes.values()) + "]"
        flags.append(f"-gencode=arch=compute_{name},code={code}")
    return flags


class CMakeBuild(build_ext):
    """Each extension is configured and built by CMake in build/<name>, so that a second build is short."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        name = ext.name.rpartition(".")[2]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        folder = ROOT / "build" / (name + suffix.removesuffix(".so"))
        folder.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_CXX_COMPILER": cxx(), "CMAKE_BUILD_TYPE": "Release", "DK_SUFFIX": suffix,
            "DK_INCLUDES": f"{sysconfig.get_path('include')};{pybind11.get_include()}",
            "DK_EMULATED": "ON" if name == "_C_emulated" else "OFF",
        }  # fmt: skip
        if name == "_C":
            options |= self.cuda_options()
        if ninja := shutil.which("ninja"):
            options["CMAKE_MAKE_PROGRAM"] = ninja
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another build of this tree
            configure = ["cmake", "-S", ROOT, "-B", folder, *(["-G", "Ninja"] if ninja else [])]
            subprocess.run([*configure, *(f"-D{k}={v}" for k, v in options.items())], check=True)
            subprocess.run(["cmake", "--build", folder, "-j", jobs], check=True)
            # a new file, not new bytes in one that a running Python has mapped
            shutil.copy2(folder / f"{name}{suffix}", f"{target}.new")
            os.replace(f"{target}.new", target)

    def cuda_options(self) -> dict[str, object]:
        nvcc = toolkit_nvcc() or packaged_nvcc()
        if nvcc is None:
            packages = " ".join(f'"{package}"' for package in NVCC_PACKAGES)
            sys.exit(f"no nvcc from CUDA 12.8 on: pip install {packages}, or build in isolation")
        include, runtime = cuda_folders(nvcc)
        archs = architectures()
        print(f"dit_kernels._C: {nvcc}, for {archs}", flush=True)
        return {
            "DK_NVCC": nvcc, "DK_CUDA_INCLUDE": include, "DK_CUDART": runtime,
            "DK_NVCC_FLAGS": " ".join(gencode(archs)),
        }  # fmt: skip


def extensions() -> tuple[list[str], str]:
    """The modules that DIT_KERNELS_CUDA and the compilers of this machine lead to; why there is no _C."""
    if wanted() == "0":
        return [], ""
    if cxx() is None:
        missing = "no C++ compiler: apt-get install g++"
        if wanted() == "1":
            sys.exit(f"DIT_KERNELS_CUDA=1, and there is {missing}")
        return [], missing
    if wanted() == "1" or toolkit_nvcc() or packaged_nvcc():
        return ["_C", "_C_emulated"], ""
    return ["_C_emulated"], "no nvcc from CUDA 12.8 on; DIT_KERNELS_CUDA=1 takes it from PyPI"


def build_requirements(modules: list[str]) -> list[str]:
    """What pip adds to an isolated build: the tools that this machine lacks."""
    if not modules:
        return []
    needed = ["pybind11>=2.13"]
    needed += [] if shutil.which("cmake") else ["cmake>=3.21"]
    needed += [] if shutil.which("ninja") else ["ninja"]
    return needed + (NVCC_PACKAGES if "_C" in modules and toolkit_nvcc() is None else [])


def main() -> None:
    modules, missing = extensions()
    # of the several times that pip runs this file, the one that builds
    if missing and {"bdist_wheel", "editable_wheel", "build_ext"}.intersection(sys.argv[1:]):
        print(f"CUDA kernels are skipped: {missing}", file=sys.stderr)
    setup(
        ext_modules=[Extension(f"dit_kernels.{name}", []) for name in modules],
        cmdclass={"build_ext": CMakeBuild},
        setup_requires=build_requirements(modules),
    )


if __name__ == "__main__":
    main()
