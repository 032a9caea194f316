"""What would keep a run from working here, or make it slow: this host, and under a launcher all hosts and what lies
between them."""

import json
import platform
import shutil
import sys
import time
from dataclasses import replace

from diffmoe_ep.doctor.examine import Patient, host_findings
from diffmoe_ep.doctor.finding import Report
from diffmoe_ep.doctor.visit import examine_hosts
from diffmoe_ep.parallel.mesh import launched_world


def run(patient: Patient, as_json: bool) -> None:
    """The verb: the first rank prints the report; exit code 1, on every rank, if there is a problem."""
    started = time.monotonic()

    def show(report: Report) -> None:
        width = shutil.get_terminal_size((100, 24)).columns
        print(json.dumps(report.as_dict(), indent=2) if as_json else "\n".join(report.lines(width)), flush=True)

    if launched_world() == 1:
        report = examine_host(patient, started)
        show(report)
        is_well = report.is_well
    else:
        is_well = examine_hosts(patient, started, show)
    if not is_well:
        sys.exit(1)


def examine_host(patient: Patient, started: float) -> Report:
    """This host alone, for a run of one process."""
    name = platform.node()
    findings = tuple(replace(one, host=name) for one in host_findings(patient, 1, 1, several=False))
    return Report(findings, (name,), 1, time.monotonic() - started)
