"""The package as it is built and installed: the mapping of kernels/, the list of packages, the version.

`kernels/` lies at the root, is installed as `selective.kernels`, and leaves the name `kernels` to Hugging Face's
package: `tests/test_kernels_name.py`. Each check of an import runs in a process of its own, because it is about
`sys.path`.
"""

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import setup_env
from fresh_python import python

import selective

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_below(root: Path) -> set[str]:
    """Every package that lies in the source tree, under the name that it is imported by."""

    def names(folder: Path, name: str) -> set[str]:
        found = {name} if any(folder.glob("*.py")) else set()
        for child in folder.iterdir():
            if child.is_dir() and not child.is_symlink() and child.name.isidentifier() and child.name != "__pycache__":
                found |= names(child, f"{name}.{child.name}")
        return found

    return names(root / "selective", "selective") | names(root / "kernels", "selective.kernels")


def test_every_package_is_listed():
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_below(ROOT)), "[tool.setuptools] packages in pyproject.toml is out of date"


def test_a_forgotten_package_is_found(tmp_path):
    for folder in ("selective/policies/families", "kernels/cpu", "selective/__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "selective/kernels").symlink_to("../kernels")
    assert packages_below(tmp_path) == {"selective.policies.families", "selective.kernels.cpu"}


def test_every_package_has_an_init():
    # A folder without one is a namespace package: it imports from a checkout, and the editable install breaks.
    folders = [ROOT / name.replace(".", "/") for name in packages_below(ROOT)]
    assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []


def test_the_symlink_is_one_and_is_relative():
    # Git on a system without symlinks checks it out as a file that holds the target.
    link = ROOT / "selective" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "kernels")


def test_kernels_import_from_a_source_checkout(tmp_path):
    where = python("import selective.kernels as k; print(k.__file__)", cwd=tmp_path, path=ROOT)
    assert Path(where).resolve() == ROOT / "kernels" / "__init__.py"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """A wheel of this tree, built from a copy: setuptools writes into the folder that it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("selective", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    # The build backend by hand: that needs neither pip nor a package index.
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    return out / python(code, cwd=source).splitlines()[-1]


def test_the_wheel_holds_all_of_the_source_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    expected = {"selective/py.typed"}
    for package in packages_below(ROOT):
        folder = ROOT / package.replace(".", "/")
        expected |= {f"{package.replace('.', '/')}/{file.name}" for file in folder.glob("*.py")}
    assert names == expected
    assert len(licenses) == 1


def test_the_wheel_imports(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import selective, selective.kernels.spec as spec; print(selective.__file__, spec.__file__, sep='\\n')"
    for where in python(code, cwd=tmp_path, path=tmp_path / "site").splitlines():
        assert Path(where).resolve().is_relative_to((tmp_path / "site").resolve())


def test_the_version_is_the_built_one(wheel):
    assert wheel.name.startswith(f"selective_update-{selective.__version__}-")


def test_dependencies_allow_what_the_documentation_promises():
    project = PYPROJECT["project"]
    assert project["requires-python"] == ">=3.10"
    assert "torch>=2.9" in project["dependencies"]  # no upper bound: a new torch is for its users to take
    assert {name.split(">")[0] for name in project["dependencies"]} == {"torch", "pydantic"}  # what a first step needs
    (triton,) = (d for d in project["optional-dependencies"]["test"] if d.startswith("triton"))
    assert triton.startswith("triton; sys_platform == 'linux'")  # no version: torch's CUDA builds pin theirs


def test_the_demo_installs_only_what_it_needs():
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert setup_env.EXTRAS["demo"] == "compare"
    assert {name.split(">")[0] for name in extras["compare"]} == {"matplotlib", "pyyaml", "rich"}
    assert set(setup_env.EXTRAS["all"].split(",")) == {"test", "test-stacks", "docs", "dev"}


@pytest.mark.parametrize(
    ("what", "stamps"), [("demo", [".ready-demo"]), ("all", [".ready", ".ready-demo"])], ids=["demo", "all"]
)
def test_an_environment_says_what_it_is_ready_for(what, stamps, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(setup_env.Environment, "create", lambda self: self.path.mkdir())
    monkeypatch.setattr(setup_env.Environment, "install_torch", lambda self: None)
    monkeypatch.setattr(setup_env.Environment, "pip", lambda self, *arguments: asked.append(arguments[-1]))
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--venv", str(tmp_path / "env"), "--for", what])
    setup_env.main()
    assert asked == [f"{ROOT}[{setup_env.EXTRAS[what]}]"]
    assert sorted(p.name for p in (tmp_path / "env").iterdir()) == stamps


def test_torch_is_pinned_by_the_version_that_pip_knows(tmp_path, monkeypatch):
    """PyPI's CUDA builds say "+cu130" of themselves, and are called otherwise there."""
    files = {
        "torch/__init__.py": "__version__ = '2.13.0+cu130'",
        "torch-2.13.0.dist-info/METADATA": "Version: 2.13.0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("TORCH_SPEC", raising=False)
    environment = setup_env.Environment(tmp_path)
    environment.python = sys.executable
    environment.install_torch()
    assert environment.constraints.read_text() == "torch==2.13.0\n"


def test_the_makefile_asks_for_it():
    """`make demo` stands on the small environment, everything that tests or checks on the whole one."""
    rules = re.findall(r"^([a-z-]+): (\$\(VENV\)/\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    needs = dict(rules)
    assert {name for name, stamp in needs.items() if stamp == "$(VENV)/.ready-demo"} == {"demo", "demo-quick"}
    assert needs["test"] == needs["lint"] == needs["docs"] == "$(VENV)/.ready"
