"""The page: everything by section, problems last with remedies, within its columns; the same as JSON."""

import json

import pytest

from diffmoe_ep.doctor.finding import Finding, Report, Speed, looked

LONG = "a text that is longer than a line has room for, so that it has to be wrapped below itself more than once " * 2
FINDINGS = (
    Finding("software", "torch", "ok", "2.13", host="a"),
    Finding("software", "torch", "ok", "2.13", host="b"),
    Finding("host", "memory", "ok", "10 GB", host="a"),
    Finding("host", "memory", "ok", "11 GB", host="b"),
    Finding("host", "open files", "note", "1,024", "ulimit -n 65536", {"soft": 1024}, "b"),
    Finding("network", "own name", "problem", "does not resolve", "mend it", host="a"),
    Finding("network", "own name", "problem", "does not resolve", "mend it", host="b"),
    Finding("communication", "pair of hosts", "problem", LONG, LONG),
)
REPORT = Report(FINDINGS, ("a", "b"), 4, 1.5, (
    Speed("world", 4, "all-reduce", 1e-5, 4 << 20, 1e-3, (0, 1, 2, 3)),
    Speed("world", 4, "all-to-all", 2e-5, 4 << 20, 2e-3, (0, 1, 2, 3)),
))  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_the_page_fits(width: int) -> None:
    lines = REPORT.lines(width)
    assert max(map(len, lines)) <= min(max(width, 80), 100)
    assert lines[-1] == "8 checks on 2 hosts in 1.5 s: 2 problems, 1 note"


def test_hosts_that_agree_share_a_row_and_problems_come_last() -> None:
    page = REPORT.lines()
    assert sum("torch" in line for line in page) == 1
    assert "  ok       memory             10 GB (a; others likewise)" in page
    assert "  note     open files         b: 1,024" in page
    assert page.count("  PROBLEM  own name           on all hosts: does not resolve") == 1
    remedies = [number for number, line in enumerate(page) if "-> " in line]
    assert page.index("notes, and what to do") < remedies[0] < page.index("PROBLEMS, and what to do") < remedies[1]


def test_json_holds_it_all() -> None:
    said = json.loads(json.dumps(REPORT.as_dict()))
    assert (said["schema"], said["well"], said["problems"], said["notes"]) == (1, False, 3, 1)
    assert [one["host"] for one in said["checks"]] == ["a", "b", "a", "b", "b", "a", "b", None]
    assert said["checks"][4]["values"] == {"soft": 1024}
    assert said["speeds"][0]["bus_gb_s"] == pytest.approx(4.194304 * 2 * 3 / 4)
    assert said["speeds"][1]["bus_gb_s"] == pytest.approx(4.194304 / 2 * 3 / 4)


def test_what_the_system_does_not_let_look_at_is_said() -> None:
    def forbidden() -> list[Finding]:
        raise PermissionError(13, "Permission denied", "/proc/x")

    found = list(looked("host", [("limits", forbidden), ("cores", lambda: [Finding("host", "cores", "ok", "2")])]))
    assert [(one.name, one.state) for one in found] == [("limits", "note"), ("cores", "ok")]
    assert "Permission denied" in found[0].found


def test_a_fault_has_a_remedy() -> None:
    with pytest.raises(AssertionError):
        Finding("host", "memory", "problem", "none")
