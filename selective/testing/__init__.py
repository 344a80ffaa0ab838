"""A public suite for wrappers of optimizers, anybody's, and contract checks for authors of policies.

```python
from selective.testing import Subject, check_wrapper

subject = Subject(name="mine over AdamW", base=lambda params: torch.optim.AdamW(params), wrap=MyWrapper)
report = check_wrapper(subject)
print(report)
report.raise_if_failed()
```

`check_policy(policy)` does the same for a policy. In pytest, parametrise over `conformance_checks`: each has
`.row`, `.name`, `.doc` and `.why`; call it with a subject.
"""

from selective.testing.harness import CheckFailed, NotApplicable, Skipped
from selective.testing.policy import check_policy, policy_checks
from selective.testing.report import Check, Outcome, Report, check_wrapper
from selective.testing.rows import conformance_checks
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
    "base_attribute",
    "check_policy",
    "check_wrapper",
    "conformance_checks",
    "itself",
    "policy_checks",
]
