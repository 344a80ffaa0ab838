from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# In importlib mode a test folder is no package: its helpers are loaded by path, under a name nobody else has.
_NAME = "compare_helpers"
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).with_name("helpers.py"))
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_NAME] = _module
    _spec.loader.exec_module(_module)
