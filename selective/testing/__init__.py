"""A public suite that checks anybody's wrapper of optimizers, and contract checks for authors of policies.

From a shell in any folder, with the name of a callable that takes an optimizer and returns it wrapped:

    pytest -p selective.testing --wrapper mypackage:MyWrapper

From Python:

```python
from selective.testing import Subject, check_wrapper

subject = Subject(name="mine over AdamW", base=lambda params: torch.optim.AdamW(params), wrap=MyWrapper)
report = check_wrapper(subject)
print(report)
report.raise_if_failed()
```

`check_policy(policy)` does the same for a policy. To parametrise a test of your own, `all_checks()` returns the checks,
each with `.row`, `.name`, `.doc` and `.why`; `.outcome(subject)` runs a check and returns its verdict.
"""

from selective.testing.harness import CheckFailed, NotApplicable, Skipped
from selective.testing.options import pytest_addoption as pytest_addoption  # pytest looks for both here
from selective.testing.options import pytest_configure as pytest_configure
from selective.testing.policy import check_policy, policy_checks
from selective.testing.report import Check, Outcome, Report, check_wrapper
from selective.testing.rows import all_checks, conformance_checks, stack_checks
from selective.testing.subject import ConfigClaims, Subject, base_attribute, itself

__all__ = [
    "Check",
    "CheckFailed",
    "ConfigClaims",
    "NotApplicable",
    "Outcome",
    "Report",
    "Skipped",
    "Subject",
    "all_checks",
    "base_attribute",
    "check_policy",
    "check_wrapper",
    "conformance_checks",
    "itself",
    "policy_checks",
    "stack_checks",
]
