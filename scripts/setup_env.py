"""Makes the virtual environment of `make demo`, `make test` and .ci/run. Standard library only.

    python3 scripts/setup_env.py --venv .venv [--for demo] [--installed]

`--for demo` installs only the requirements of `make demo`. Without it everything is installed, for tests and tools,
too. One environment serves both: a second run completes it.

It is safe to run again, and keeps all packages that are installed. TORCH_SPEC (a requirement such as "torch==2.11.0")
overrides the choice of torch. Without it, and without an NVIDIA GPU, the script looks for a CPU build by a dry run of
pip, which downloads no wheel, because the default build for Linux brings gigabytes of CUDA libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTED_TORCH = "torch>=2.9,<2.14"  # the package requires >=2.9; the tests have run on this range
EXTRAS = {"all": "test,test-stacks,docs,dev", "demo": "compare"}  # by the environment's purpose
# The Makefile's stamps, written last, so that a half-made environment is finished.
STAMPS = {"all": (".ready", ".ready-demo"), "demo": (".ready-demo",)}
# Packages whose newest release can't be imported beside an older torch: by torch's version, the releases that can.
COMPANIONS = {"2.9": ["torchao==0.15.0"]}  # 0.18 imports `ScalingType` from torch.nn.functional, which 2.9 lacks
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Places that may have a CPU build, cheapest first: pip's options for the dry run, and those for the installation.
CPU_SOURCES = {
    "folders that pip is configured with (find-links)": (["--no-index"], []),
    "the configured package index": ([], []),
    "PyTorch's CPU index": (["--index-url", CPU_INDEX], ["--extra-index-url", CPU_INDEX]),
}


def say(message: str) -> None:
    print(f"setup_env: {message}", file=sys.stderr, flush=True)


class Environment:
    """A virtual environment in `path`, with the commands that run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.python = self.path / "bin" / "python"
        self.constraints = self.path / "constraints.txt"

    def create(self) -> None:
        if self.python.exists():
            return
        say(f"making {self.path} with Python {sys.version.split()[0]}")
        subprocess.run([sys.executable, "-m", "venv", str(self.path)], check=True)
        # The search for torch needs `pip install --dry-run --report`. A newer pip is not replaced.
        self.pip("install", "pip>=23.1")

    def pip(self, *arguments: str) -> None:
        subprocess.run([self.python, "-m", "pip", "--quiet", *arguments], check=True)

    def torch_version(self) -> str | None:
        """The version of torch in the environment, or None if it can't be imported."""
        code = "import torch; print(torch.__version__)"
        answer = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    def resolve(self, requirement: str, options: list[str]) -> str | None:
        """The version that pip would install, or None if it finds none. Downloads metadata at most."""
        dry_run = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary", ":all:", "--quiet"]
        patience = ["--retries", "0", "--timeout", "20"]
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.json")
            command = [self.python, "-m", "pip", *dry_run, *patience, "--report", str(report), *options, requirement]
            if subprocess.run(command, capture_output=True).returncode != 0:
                return None
            return json.loads(report.read_text())["install"][0]["metadata"]["version"]

    def install_torch(self) -> None:
        if requirement := os.environ.get("TORCH_SPEC"):
            say(f"torch: {requirement}, from TORCH_SPEC")
            self.pip("install", requirement)
        elif version := self.torch_version():
            say(f"torch: {version} is here already")
        elif sys.platform != "linux" or has_nvidia_gpu():
            say(f"torch: the default build of {TESTED_TORCH}")
            self.pip("install", TESTED_TORCH)
        else:
            self.install_cpu_torch()
        version = self.torch_version()
        if version is None:
            raise SystemExit(f"setup_env: torch cannot be imported; see `{self.python} -c 'import torch'`")
        # A constraint, so that later installations don't replace it by another build.
        companions = COMPANIONS.get(".".join(version.split(".")[:2]), [])
        self.constraints.write_text("\n".join([f"torch=={version}", *companions]) + "\n")

    def install_cpu_torch(self) -> None:
        for source, (search, options) in CPU_SOURCES.items():
            version = self.resolve(TESTED_TORCH, search)
            if version is not None and version.endswith("+cpu"):
                say(f"torch: {version} from {source}")
                return self.pip("install", *options, f"torch=={version}")
            say(f"torch: no CPU build from {source}" + (f" (it has {version})" if version else ""))
        say(
            "WARNING: no CPU build of torch was found, so the default build is installed: on Linux that is several GB "
            "of CUDA libraries. To choose another, stop this and set TORCH_SPEC or PIP_FIND_LINKS."
        )
        self.pip("install", TESTED_TORCH)

    def refuse_another_checkout(self) -> None:
        """Exit if the environment has an editable install of another checkout, which somebody else may be using."""
        for record in self.path.glob("lib/python*/site-packages/selective_update-*.dist-info/direct_url.json"):
            origin = json.loads(record.read_text())
            if origin.get("dir_info", {}).get("editable") and origin["url"] != ROOT.as_uri():
                raise SystemExit(f"setup_env: {self.path} belongs to {origin['url']}; give this checkout its own VENV")

    def install_project(self, installed: bool, extras: str) -> None:
        constrained = ["install", "--constraint", str(self.constraints)]
        self.refuse_another_checkout()
        if not installed:
            say(f"the project, editable, with [{extras}]")
            return self.pip(*constrained, "--editable", f"{ROOT}[{extras}]")
        # Through a source distribution, so that it is built outside the working tree (setuptools would pack stale
        # files of build/ into the wheel) and a file missing from the distribution shows.
        say(f"the project, as its users install it, with [{extras}]")
        self.pip("install", "build")
        with tempfile.TemporaryDirectory() as folder:
            build = [self.python, "-m", "build", "--sdist", "--outdir", folder, str(ROOT)]
            subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(folder).glob("*.tar.gz")
            self.pip(*constrained, f"selective-update[{extras}] @ {archive.as_uri()}")


def has_nvidia_gpu() -> bool:
    """True if the driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU " in listed.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the virtual environment of this project.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv)")
    parser.add_argument("--for", dest="what", choices=list(EXTRAS), default="all", help="what it is for (default: all)")
    parser.add_argument("--installed", action="store_true", help="install a built package instead of an editable one")
    arguments = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 (run by whatever Python the machine has)
        raise SystemExit(f"setup_env: Python {sys.version.split()[0]} is too old, 3.10 is needed; set PYTHON")
    environment = Environment(arguments.venv)
    try:
        environment.create()
        environment.install_torch()
        environment.install_project(arguments.installed, EXTRAS[arguments.what])
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        message = f"setup_env: this failed with exit status {error.returncode}, its output is above:\n  {command}"
        raise SystemExit(message) from None
    for stamp in STAMPS[arguments.what]:
        (environment.path / stamp).touch()
    say(f"{environment.path} is ready")


if __name__ == "__main__":
    main()
