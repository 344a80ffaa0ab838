"""The import name `kernels` in a shell at the root of a clone, where a folder of ours has that name.

It belongs to Hugging Face's package: that one is imported if it is installed, and an empty module if it is not.
"""

from pathlib import Path

import pytest
from fresh_python import python
from optional import missing

ROOT = Path(__file__).resolve().parents[1]

INSTALLED = {
    "kernels/__init__.py": "from kernels.hub import get_kernel\n__version__ = '0.15.2'\n",
    "kernels/hub.py": "def get_kernel(name):\n    return f'the kernel {name}'\n",
    "kernels-0.15.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.15.2\n",
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages with one called `kernels`."""
    for name, text in INSTALLED.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_installed_package_is_imported(site):
    code = (
        "import importlib.metadata, importlib.util, sys\n"
        "assert importlib.util.find_spec('kernels') is not None\n"
        "import kernels\n"
        "from kernels import get_kernel\n"
        "import kernels.hub\n"
        "assert kernels is sys.modules['kernels'] and get_kernel is kernels.hub.get_kernel\n"
        "assert importlib.util.find_spec('kernels').origin == kernels.__file__\n"
        "assert kernels.__version__ == importlib.metadata.version('kernels')\n"
        "print(kernels.__file__, get_kernel('x'), sorted(m for m in sys.modules if m.startswith('kernels')), sep='\\n')"
    )
    file, answer, modules = python(code, cwd=ROOT, path=site).splitlines()
    assert Path(file) == site / "kernels" / "__init__.py"
    assert answer == "the kernel x"
    assert modules == "['kernels', 'kernels.hub']"


@pytest.mark.parametrize("first", ["import kernels.hub", "from kernels import get_kernel"])
def test_it_may_be_imported_in_any_way(first, site):
    assert python(f"{first}; import kernels; print(kernels.__version__)", cwd=ROOT, path=site) == "0.15.2"


def test_ours_is_imported_beside_it(site):
    code = "import kernels, selective.kernels.spec as spec; print(kernels.__version__, spec.__name__)"
    assert python(code, cwd=ROOT, path=site) == "0.15.2 selective.kernels.spec"


@pytest.mark.parametrize("where", [ROOT, ROOT / "selective"], ids=["root", "inside"])
def test_without_one_the_module_is_empty(where):
    """Inside of `selective/` there is a symlink to the folder."""
    code = (
        "import importlib.util, sys\n"
        "assert importlib.util.find_spec('kernels') is not None\n"
        "import kernels\n"
        "print([name for name in vars(kernels) if not name.startswith('__')], hasattr(kernels, '__version__'))\n"
        "print(getattr(kernels, '__file__', None), sorted(m for m in sys.modules if m.startswith('kernels')))\n"
        "assert importlib.util.find_spec('kernels.spec') is None"
    )
    assert python(code, cwd=where).splitlines() == ["[] False", "None ['kernels']"]


@pytest.mark.parametrize("statement", ["from kernels import get_kernel", "import kernels.spec", "import kernels.hub"])
def test_without_one_what_is_in_it_is_an_import_error(statement):
    """Nothing of ours answers to the name, and code that tries the import goes on without it."""
    code = f"try:\n    {statement}\nexcept ImportError as error:\n    print(type(error).__name__)"
    assert python(code, cwd=ROOT) in ("ImportError", "ModuleNotFoundError")


def test_a_folder_without_an_init_is_no_package(tmp_path):
    (tmp_path / "kernels").mkdir()
    code = "import kernels; print(list(kernels.__path__), hasattr(kernels, '__file__'))"
    assert python(code, cwd=ROOT, path=tmp_path) == "[] False"


def test_an_error_in_the_installed_package_is_its_own(site):
    (site / "kernels" / "__init__.py").write_text("raise ImportError('needs a newer torch')")
    code = "import sys\ntry: import kernels\nexcept ImportError as error: print(error, 'kernels' in sys.modules)"
    assert python(code, cwd=ROOT, path=site) == "needs a newer torch False"


def test_under_any_other_name_the_folder_says_what_it_is(tmp_path):
    (tmp_path / "clone").symlink_to(ROOT)
    code = "try:\n    import clone.kernels\nexcept ImportError as error:\n    print(error)"
    assert "this folder is the package `selective.kernels`" in python(code, cwd=tmp_path)


@pytest.mark.skipif(bool(missing(["transformers"])), reason="transformers is not installed")
def test_transformers_finds_no_package():
    """By its own question, without what it imports after that."""
    code = "from transformers.utils import import_utils as asks; print(asks.is_kernels_available())"
    assert python(code, cwd=ROOT) == "False"


@pytest.mark.slow
@pytest.mark.skipif(bool(missing(["transformers"])), reason="transformers is not installed")
def test_the_trainer_is_imported():
    assert python("from transformers import Trainer; print(Trainer.__name__)", cwd=ROOT) == "Trainer"
