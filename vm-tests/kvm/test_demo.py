"""`pyluo demo --vm`: a VM lives through an update of its host, as a newcomer sees it."""

from __future__ import annotations

from tests.json_output import read_json
from tests.snippets import run_command


def test_the_demo_with_a_vm_passes_and_tells_what_happened_in_order() -> None:
    done = run_command("docs/tutorials/a-vm-lives-through.md", 0, None, "--json")
    assert done.returncode == 0, done.stderr
    report = read_json("demo", done.stdout)
    assert report["passed"] is True
    last, first, later = (report[name] for name in ("last", "first", "later"))
    assert last["boot"] == first["boot"] == later["boot"]
    assert last["number"] < first["number"] < later["number"]
    assert [event["name"] for event in report["events"]] == [
        "VM stored", "loaded", "reboot called", "first sign of the new kernel", "worker up",
        "VM resumed", "first line of the VM",
    ]  # fmt: skip
    times = [event["at"] for event in report["events"]]
    assert times == sorted(times)
    assert times[0] > 0
