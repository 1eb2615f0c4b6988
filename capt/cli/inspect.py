"""``capt doctor``."""

from __future__ import annotations


def doctor(json: bool = False) -> int:
    """Say what works on this machine: torch, GPU, kernels and why each was chosen, packages, model, disk, memory.

    Args:
        json: print the findings as JSON.
    """
    from capt import doctor as examination
    from capt.cli.common import print_json

    findings = examination.examine()
    if json:
        print_json([finding.as_dict() for finding in findings])
    else:
        examination.show(findings)
    return 0 if all(finding.status != "broken" for finding in findings) else 1
