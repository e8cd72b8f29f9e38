"""Compiles csrc/cpu into the extension module fastres._C, where there is a C++ compiler and PyTorch's headers, and
csrc/cuda into fastres._cuda, where there is nvcc too; neither needs a GPU, nor a PyTorch with CUDA.

Otherwise the installation is pure Python: it succeeds, and `fastres doctor` shows the reason, which this file leaves in
fastres/_build_info.json. One binary serves Python >= 3.10 and every supported PyTorch (Stable ABI of each). PyTorch is
never imported here: its headers suffice, and they are found under pip's build isolation too.

Environment variables:
    FASTRES_BUILD_EXT=0    do not compile; csrc/cuda neither, unless FASTRES_CUDA says so; the wheel is
                           for every platform
    FASTRES_CUDA           0: do not compile csrc/cuda; 1: fail if it cannot be compiled
    FASTRES_CUDA_ARCHS     GPU architectures to compile for; PTX of the last serves later ones (default: "80 90a 100")
    CUDA_HOME              the CUDA toolkit, if nvcc is not on the PATH
    FASTRES_TORCH_DIR      the directory of the torch package whose headers to use
    FASTRES_SANITIZE       compile with sanitizers: "undefined", "address" or "address,undefined"
    CXX, CXXFLAGS, LDFLAGS as usual
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

MINIMUM = (2, 11)
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DPy_LIMITED_API=0x030a0000", "-DNDEBUG"]
COMPILE = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-Wno-psabi",
]  # psabi: notes about vectors passed between functions that are all inlined
# -O0: with -O1 the kernels take twice as long to compile, which is more than their tests then save.
SANITIZE = ["-g", "-O0", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
LINK = (
    ["-Wl,--no-as-needed"] if sys.platform == "linux" else []
)  # NEEDED keeps libtorch.so, which knows the CUDA libraries
LINK += ["-ltorch", "-ltorch_cpu", "-lc10"]
ARCHITECTURES = ["80", "90a", "100"]
# The runtime of CUDA is linked in, and hidden: PyTorch's may be another version.
LINK_CUDA = ["-lcudart_static", "-lrt", "-ldl", "-lpthread", "-Wl,--exclude-libs,ALL"]


#: Asked for, not what is left where something fails: that is known only after the wheel has its name.
PURE = os.environ.get("FASTRES_BUILD_EXT") == "0" and os.environ.get("FASTRES_CUDA") != "1"


class NotCompiled(Exception):
    """The reason for a pure Python installation."""


def find_torch() -> tuple[Path, str]:
    """The directory and version of the installed torch package."""
    if os.environ.get("FASTRES_TORCH_DIR"):
        found = [Path(os.environ["FASTRES_TORCH_DIR"])]
    else:
        spec = importlib.util.find_spec(
            "torch"
        )  # not found in pip's isolated environment; its sys.prefix is the real one
        paths = [
            sysconfig.get_path("platlib"),
            sysconfig.get_path("purelib"),
            *site.getsitepackages([sys.prefix, sys.base_prefix]),
        ]
        found = [Path(p) for p in (spec and spec.submodule_search_locations) or []]
        found += [Path(p) / "torch" for p in (*paths, site.getusersitepackages())]
    for torch in found:
        if (torch / "version.py").is_file():
            version = re.search(r"__version__ = ['\"]([^'\"]+)", (torch / "version.py").read_text())
            if version and tuple(map(int, version[1].split(".")[:2])) >= MINIMUM:
                return torch, version[1]
            raise NotCompiled(
                f"PyTorch {version[1] if version else 'of unknown version'} was installed; 2.11 or newer is needed"
            )
    where = f"in FASTRES_TORCH_DIR={found[0]}" if os.environ.get("FASTRES_TORCH_DIR") else "when fastres was built"
    raise NotCompiled(f"PyTorch was not found {where}; install it first, then fastres again")


def find_compiler() -> list[str]:
    """The command line of the C++ compiler."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else (["c++"], ["g++"], ["clang++"]):
        if shutil.which(command[0]):
            return command
    raise NotCompiled(
        f"the C++ compiler CXX={asked[0]} was not found" if asked else "no C++ compiler was found (c++, g++, clang++)"
    )


def find_cuda() -> tuple[Path, Path]:
    """The CUDA toolkit, and the folder of its static runtime."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += [str(Path(os.path.realpath(nvcc)).parents[1])] if nvcc else []
    for home in map(Path, filter(None, [*homes, "/usr/local/cuda"])):
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            for lib in ("lib64", "lib", f"targets/{os.uname().machine}-linux/lib"):
                if (home / lib / "libcudart_static.a").is_file():
                    return home, home / lib
            raise NotCompiled(f"libcudart_static.a is not in {home}")
    raise NotCompiled("no nvcc was found (CUDA_HOME, the PATH, /usr/local/cuda)")


def architectures(nvcc: str) -> list[str]:
    """FASTRES_CUDA_ARCHS, or of the default ones those that this nvcc knows."""
    asked = os.environ.get("FASTRES_CUDA_ARCHS", "").split()
    if asked:
        return asked
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return [arch for arch in ARCHITECTURES if f"sm_{arch.rstrip('a')}" in known]


def run(command: list[str]) -> str:
    """Runs a compiler. Its first error is the reason if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    print(shlex.join(command), done.stdout + done.stderr, sep="\n", file=sys.stderr, flush=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
        error = next(
            (line for line in lines if re.search(r"\berror\b|cannot find|undefined reference", line)), lines[-1]
        )
        raise NotCompiled(f"{Path(command[0]).name} failed: {error}")
    return done.stdout


class BuildExtension(build_ext):
    """Compiles in parallel with flags of our own, whatever Python was built with; a failure is recorded, not raised."""

    def run(self) -> None:
        (ext,) = self.extensions
        binary = Path(self.get_ext_fullpath(ext.name))  # beside the sources if the installation is editable
        binary.parent.mkdir(parents=True, exist_ok=True)
        binary.unlink(missing_ok=True)  # never leave one of other sources
        info = {"compiled": False, "error": None}
        try:
            if os.environ.get("FASTRES_BUILD_EXT") == "0":
                raise NotCompiled("fastres was built with FASTRES_BUILD_EXT=0")
            self.compile(ext.sources, binary, info)
            info["compiled"] = True
        except NotCompiled as reason:
            info["error"] = str(reason)
            print(f"fastres: pure Python installation: {reason}", file=sys.stderr, flush=True)
        info["cuda"] = self.run_cuda(ext.cuda_sources, binary.with_name("_cuda" + "".join(binary.suffixes)))
        (binary.parent / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def run_cuda(self, sources: list[str], binary: Path) -> dict:
        """Compiles fastres._cuda; returns what the build says of it."""
        binary.unlink(missing_ok=True)
        info = {"compiled": False, "error": None}
        try:
            asked = os.environ.get("FASTRES_CUDA", os.environ.get("FASTRES_BUILD_EXT"))
            if asked == "0":
                raise NotCompiled("fastres was built with FASTRES_CUDA=0 or FASTRES_BUILD_EXT=0")
            if os.environ.get("FASTRES_SANITIZE"):
                raise NotCompiled("sanitizers do not know CUDA")
            if not sources:
                raise NotCompiled("there are no sources in csrc/cuda")
            self.compile_cuda(sources, binary, info)
            info["compiled"] = True
        except NotCompiled as reason:
            info["error"] = str(reason)
            print(f"fastres: no CUDA kernels: {reason}", file=sys.stderr, flush=True)
            if os.environ.get("FASTRES_CUDA") == "1":
                sys.exit(f"fastres: FASTRES_CUDA=1, but {reason}")
        return info

    def compile_cuda(self, sources: list[str], binary: Path, info: dict) -> None:
        """Compiles and links `binary`, and says in `info` with what."""
        torch, info["torch"] = find_torch()
        compiler, (home, lib) = find_compiler(), find_cuda()
        nvcc = str(home / "bin" / "nvcc")
        info["nvcc"] = run([nvcc, "--version"]).strip().splitlines()[-1]
        info["architectures"] = architectures(nvcc)
        if not info["architectures"]:
            raise NotCompiled(f"{nvcc} knows none of the architectures {', '.join(ARCHITECTURES)}")
        last = info["architectures"][-1].rstrip("af")
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in info["architectures"]]
        targets += [f"-gencode=arch=compute_{last},code=compute_{last}"]
        own = shlex.split(os.environ.get("CXXFLAGS", ""))
        include = [
            "-Icsrc",
            *(f"-isystem{p}" for p in (torch / "include", sysconfig.get_path("include"), home / "include")),
        ]

        def compile_one(source: str) -> str:
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.endswith(".cu"):
                run([nvcc, "-O3", "-std=c++17", "-Xcompiler=-fPIC", *targets, "-c", source, "-o", str(target)])
            else:
                run([*compiler, *COMPILE, *DEFINES, "-DUSE_CUDA", *own, *include, "-c", source, "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        link = [f"-L{torch / 'lib'}", *LINK, f"-L{lib}", *LINK_CUDA, *shlex.split(os.environ.get("LDFLAGS", ""))]
        run([*compiler, "-shared", "-o", str(binary), *objects, *link])

    def compile(self, sources: list[str], binary: Path, info: dict) -> None:
        """Compiles and links `binary`, and says in `info` with what."""
        torch, info["torch"] = find_torch()
        compiler = find_compiler()
        info["compiler"] = run([*compiler, "--version"]).splitlines()[0]
        python = sysconfig.get_path("include")
        if not Path(python, "Python.h").is_file():
            raise NotCompiled(f"Python.h is not in {python}; install Python's development files (python3-dev)")
        sanitizers = os.environ.get("FASTRES_SANITIZE", "")
        sanitize = [*SANITIZE, f"-fsanitize={sanitizers}"] if sanitizers else []
        own = shlex.split(os.environ.get("CXXFLAGS", ""))
        info["flags"] = shlex.join([*COMPILE, *DEFINES, *sanitize, *own])
        include = ["-Icsrc", "-isystem", str(torch / "include"), "-isystem", python]

        def compile_one(source: str) -> str:
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            run([*compiler, *COMPILE, *DEFINES, *sanitize, *own, *include, "-c", source, "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        link = [f"-L{torch / 'lib'}", *LINK, *sanitize, *shlex.split(os.environ.get("LDFLAGS", ""))]
        run([*compiler, "-shared", "-o", str(binary), *objects, *link])


class Build(build):
    """Runs build_ext also where nothing is compiled: it writes down why."""

    sub_commands = [(name, None if name == "build_ext" else wanted) for name, wanted in build.sub_commands]


class PureDistribution(Distribution):
    """Its wheel is tagged py3-none-any if nothing is to be compiled."""

    def has_ext_modules(self) -> bool:
        return not PURE and super().has_ext_modules()


# Kernels first: they take longest to compile.
SOURCES = sorted(glob("csrc/cpu/*.cpp"), key=lambda path: ("_kernels" not in path, path))
EXTENSION = Extension("fastres._C", SOURCES, language="c++", py_limited_api=True)
EXTENSION.cuda_sources = sorted([*glob("csrc/cuda/*.cu"), *glob("csrc/cuda/*.cpp")])

setup(
    ext_modules=[EXTENSION],
    distclass=PureDistribution,
    cmdclass={"build": Build, "build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
