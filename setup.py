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
    f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")
]  # fmt: skip
WANTED = os.environ.get("DIT_KERNELS_CUDA", "")
if WANTED not in ("", "0", "1"):
    sys.exit(f"DIT_KERNELS_CUDA must be 1, 0 or unset; got {WANTED!r}")


def cxx() -> str | None:
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("c++")


def toolkit_nvcc() -> Path | None:
    """nvcc of a CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    return next((Path(p) for p in (shutil.which(c) for c in ("nvcc", *found)) if p), None)


def packaged_nvcc() -> Path | None:
    """nvcc of the PyPI packages, which share one folder."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        nvcc = Path(folder) / "cu13" / "bin" / "nvcc"
        if nvcc.exists():
            return nvcc
    return None


def cuda_folders(nvcc: Path) -> tuple[Path, Path]:
    """(include folder, libcudart_static.a) of the toolkit that nvcc itself names."""
    run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, cwd=ROOT)
    top = re.search(r"^#\$ TOP=(.*)$", run.stderr, re.MULTILINE)
    home = Path(top[1]) if top else nvcc.resolve().parent.parent
    for library in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        runtime = home / library / "libcudart_static.a"
        if runtime.exists():
            return home / "include", runtime
    sys.exit(f"no libcudart_static.a under {home}, the CUDA toolkit of {nvcc}")


def gpus() -> list[str]:
    """Compute capabilities of this machine's GPUs, as "90"."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted(set(run.stdout.replace(".", "").split()))


def architectures() -> str:
    asked = os.environ.get("DIT_KERNELS_CUDA_ARCHS")
    if asked:
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
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        name = ext.name.rpartition(".")[2]
        folder = (
            ROOT / "build" / f"{name}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        import pybind11

        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        options = {
            "CMAKE_CXX_COMPILER": cxx(), "CMAKE_BUILD_TYPE": "Release",
            "DK_INCLUDES": ";".join(includes), "DK_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "DK_OUTPUT": folder, "DK_EMULATED": "ON" if name == "_C_emulated" else "OFF",
        }  # fmt: skip
        if name == "_C":
            nvcc = toolkit_nvcc() or packaged_nvcc()
            if nvcc is None:
                sys.exit("DIT_KERNELS_CUDA=1, and there is no nvcc on PATH; without build isolation, first: "
                         "pip install " + " ".join(f"'{p}'" for p in NVCC_PACKAGES))  # fmt: skip
            include, runtime = cuda_folders(nvcc)
            archs = architectures()
            print(f"{name}: {nvcc}, for {archs}", flush=True)
            options |= {
                "DK_NVCC": nvcc, "DK_CUDA_INCLUDE": include, "DK_CUDART": runtime,
                "DK_NVCC_FLAGS": " ".join(gencode(archs)),
            }  # fmt: skip
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        if generator:
            options["CMAKE_MAKE_PROGRAM"] = shutil.which("ninja")
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another build of the same tree
            run = ["cmake", "-S", ROOT, "-B", folder, *generator]
            subprocess.run([*run, *(f"-D{k}={v}" for k, v in options.items())], check=True)
            jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
            subprocess.run(["cmake", "--build", folder, "-j", jobs], check=True)
            built = folder / f"{name}{options['DK_SUFFIX']}"
            # a running Python may have the old one mapped: a new file, not new bytes in it
            shutil.copy2(built, f"{target}.new")
            os.replace(f"{target}.new", target)


def extensions() -> list[Extension]:
    if WANTED == "0":
        return []
    compiler, nvcc = cxx(), toolkit_nvcc() or packaged_nvcc()
    if WANTED == "1":
        if compiler is None:
            sys.exit("DIT_KERNELS_CUDA=1 needs a C++ compiler: apt-get install g++")
        return [Extension(f"dit_kernels.{name}", []) for name in ("_C", "_C_emulated")]
    found = ["_C_emulated"] if compiler else []
    if nvcc and compiler:
        found.append("_C")
    else:
        missing = "nvcc" if compiler else "C++ compiler"
        print(f"CUDA kernels are skipped: no {missing}. DIT_KERNELS_CUDA=1 pip install dit-kernels takes nvcc "
              "from PyPI; the C++ compiler is `apt-get install g++`", file=sys.stderr)  # fmt: skip
    return [Extension(f"dit_kernels.{name}", []) for name in found]


def build_requirements() -> list[str]:
    """What pip adds to an isolated build: tools that this machine lacks."""
    modules = extensions()
    needed = ["pybind11>=2.13"] if modules else []
    needed += ["cmake>=3.21"] if modules and not shutil.which("cmake") else []
    needed += ["ninja"] if modules and not shutil.which("ninja") else []
    if WANTED == "1" and toolkit_nvcc() is None:
        needed += NVCC_PACKAGES
    return needed


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=build_requirements(),
)
