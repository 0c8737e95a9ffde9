"""Tests of how subtests appear in the JUnit XML that pytest writes; none needs a guest."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

TESTS = """
import pytest

def test_it(subtests):
    for number in range(3):
        with subtests.test("mmap"):
            assert number != 1
    with subtests.test("mmap", size=4096):
        pass
    with subtests.test("seals"):
        pytest.skip("no memfd")

def test_another(subtests):
    with subtests.test("mmap"):
        pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_subtests_of_one_name_are_as_many_cases_of_junits_document(
    pytester: pytest.Pytester, workers: list[str]
) -> None:
    pytester.makepyfile(test_it=TESTS)
    pytester.runpytest_subprocess("--junitxml=junit.xml", "--pyluo-junit-subtests", *workers)
    (suite,) = ElementTree.parse(pytester.path / "junit.xml").getroot()
    cases = {
        # With pytest-xdist, names that come from its worker process are in quotes.
        case.attrib["name"].replace("'", ""): [child.tag for child in case]
        for case in suite.iter("testcase")
    }
    assert cases == {
        "test_it": ["failure"],
        "test_it[mmap]": [],
        "test_it[mmap] 2": ["failure"],
        "test_it[mmap] 3": [],
        "test_it[mmap] (size=4096)": [],
        "test_it[seals]": ["skipped"],
        "test_another": [],
        "test_another[mmap]": [],
    }
    assert suite.get("tests") == str(len(cases))
