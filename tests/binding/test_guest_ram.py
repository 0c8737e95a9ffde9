"""The RAM of a guest in several memfds, on the host's own kernel."""

from __future__ import annotations

import errno
import gc
import json
import mmap
import os
import re
import resource
import subprocess
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyluo import GuestRam, Memfd, NumaMode, NumaPolicy, RequestError, Seal, SealedError

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mmap.PAGESIZE
PART = 64 << 10
TIB = 1 << 40
SIZE = 2 * PART + PAGE
TEXT = bytes(range(251)) * (12 * PAGE // 251 + 2)  # no page begins like another
NUMA_MAPS = "/proc/self/numa_maps"
BIND = NumaPolicy(NumaMode.BIND, (0,))

needs_transparent_huge_pages = pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage"),
    reason="a kernel without transparent huge pages",
)
needs_numa = pytest.mark.skipif(not os.path.exists(NUMA_MAPS), reason="a kernel without NUMA")


@contextmanager
def three_parts(**options: Any) -> Iterator[GuestRam]:
    with GuestRam.create("ram", SIZE, part_size=PART, **options) as ram:
        yield ram


def test_a_ram_is_split_into_parts_of_one_size_and_a_smaller_last_one() -> None:
    with three_parts() as ram:
        assert ram.size == SIZE
        assert [memfd.size for memfd in ram.memfds] == [PART, PART, PAGE]
        assert ram.offsets == (0, PART, 2 * PART)
        names = [os.readlink(f"/proc/self/fd/{memfd.fileno()}") for memfd in ram.memfds]
        assert names == [f"/memfd:ram.{number} (deleted)" for number in range(3)]
        assert ram.read(2 * SIZE, 0) == bytes(SIZE)


def test_a_ram_of_less_than_half_a_tebibyte_is_one_memfd() -> None:
    with GuestRam.create("ram", TIB // 2) as ram:
        assert len(ram.memfds) == 1


def test_no_part_of_a_larger_ram_is_too_large_to_be_preserved() -> None:
    with GuestRam.create("ram", 2 * TIB) as ram:
        assert {memfd.size for memfd in ram.memfds} == {TIB // 2}


def test_a_ram_of_three_tebibytes_is_mapped_in_one_piece() -> None:
    with GuestRam.create("ram", 3 * TIB, part_size=3 * TIB // 4) as ram, ram.map() as mapping:
        assert len(ram.memfds) == 4
        assert len(mapping) == mapping.size() == 3 * TIB
        mapping[-1] = 0xFF
        mapping[ram.offsets[2] - 1 : ram.offsets[2] + 1] = b"ab"
        assert ram.read(1, 3 * TIB - 1) == b"\xff"
        assert ram.memfds[1].read(9, ram.memfds[1].size - 1) == b"a"
        assert ram.memfds[2].read(1, 0) == b"b"


@pytest.mark.parametrize(
    ("size", "part_size", "why"),
    [
        (0, PART, "a guest's RAM of 0 bytes"),
        (-PAGE, PART, "a guest's RAM of -"),
        (PAGE + 1, PART, "must consist of pages"),
        (PART, 0, "a part of 0 bytes"),
        (PART, -PAGE, "a part of -"),
        (PART, PAGE + 1, "must consist of pages"),
        (2 * TIB, TIB, "less than 1 TiB"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(size: int, part_size: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        GuestRam.create("ram", size, part_size=part_size)


@pytest.mark.parametrize(
    ("size", "part_size"), [(3 << 20, 2 << 20), (4 << 20, 1 << 20)], ids=["RAM", "part"]
)
def test_sizes_are_whole_huge_pages(size: int, part_size: int) -> None:
    with pytest.raises(ValueError, match="pages of 2097152 bytes"):
        GuestRam.create("ram", size, part_size=part_size, huge_page_size=2 << 20)


def test_huge_pages_are_not_of_two_kinds_at_once() -> None:
    with pytest.raises(ValueError, match="never transparent"):
        GuestRam.create("ram", 2 << 20, huge_page_size=2 << 20, transparent_huge_pages=True)


def test_a_huge_page_size_that_the_machine_lacks_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        GuestRam.create("ram", 8 << 20, huge_page_size=8 << 20)
    assert caught.value.errno == errno.ENODEV


def test_huge_pages_that_nobody_reserved_are_not_mapped() -> None:
    with open("/proc/meminfo") as file:
        if "HugePages_Total:       0\n" not in file.read():
            pytest.skip("this host has huge pages")
    huge = 2 << 20
    with GuestRam.create("ram", 2 * huge, part_size=huge, huge_page_size=huge) as ram:
        before = count_descriptors()
        with pytest.raises(RequestError, match=r"vm\.nr_hugepages") as caught:
            ram.map()
        assert caught.value.errno == errno.ENOMEM
        assert count_descriptors() == before
        assert ranges_of("/memfd:") == []


def test_a_failed_creation_leaves_no_descriptor_behind() -> None:
    before = count_descriptors()
    with pytest.raises(RequestError):
        GuestRam.create("ram", SIZE, part_size=PART, seals=Seal.SEAL | Seal(1 << 20))
    with pytest.raises(ValueError, match="does not lie within"):
        GuestRam.create("ram", SIZE, part_size=PART, numa=NumaPolicy(NumaMode.LOCAL, (), SIZE))
    assert count_descriptors() == before


def test_too_many_parts_leave_no_descriptor_behind() -> None:
    before = count_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 16, hard))
    try:
        with pytest.raises(RequestError) as caught:
            GuestRam.create("ram", 64 * PAGE, part_size=PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    assert count_descriptors() == before


def test_each_part_has_the_seals() -> None:
    with three_parts(seals=Seal.SHRINK | Seal.FUTURE_WRITE, populate=True) as ram:
        assert {memfd.seals for memfd in ram.memfds} == {Seal.SHRINK | Seal.FUTURE_WRITE}
        before = count_descriptors()
        with pytest.raises(SealedError):
            ram.map()
        assert count_descriptors() == before
        with ram.map(writable=False) as mapping:
            assert mapping[-1] == 0


# Addresses in the RAM.


def test_an_offset_is_located_in_its_memfd() -> None:
    with three_parts() as ram:
        first, second, last = ram.memfds
        assert ram.locate(0) == (first, 0)
        assert ram.locate(PART - 1) == (first, PART - 1)
        assert ram.locate(PART) == (second, 0)
        assert ram.locate(SIZE - 1) == (last, PAGE - 1)
        for outside in (-1, SIZE):
            with pytest.raises(ValueError, match="do not lie within"):
                ram.locate(outside)


def test_a_range_is_split_where_one_memfd_ends() -> None:
    with three_parts() as ram:
        pieces = ram.pieces(PART - 1, PART + 2)
        assert [(piece.offset, piece.length) for piece in pieces] == [
            (PART - 1, 1),
            (0, PART),
            (0, 1),
        ]
        assert tuple(piece.memfd for piece in pieces) == ram.memfds
        assert ram.pieces(PART, 0) == ()


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, SIZE + 1), (SIZE, 1), (0, -1)])
def test_a_range_outside_the_ram_is_refused(offset: int, length: int) -> None:
    with three_parts() as ram:
        with pytest.raises(ValueError, match="do not lie within"):
            ram.pieces(offset, length)
        if length > 0:
            with pytest.raises(ValueError, match="do not lie within"):
                ram.write(bytes(length), offset)
        assert ram.read(SIZE, 0) == bytes(SIZE)


def test_reading_ends_where_the_ram_does() -> None:
    with three_parts() as ram:
        ram.write(b"end", SIZE - 3)
        assert ram.read(PART, SIZE - 3) == b"end"
        assert ram.read(1, SIZE) == ram.read(1, SIZE + PART) == b""
        with pytest.raises(ValueError, match="negative"):
            ram.read(1, -1)


pages = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@given(pages, st.data())
def test_reads_and_writes_are_those_of_one_file(counts: list[int], data: st.DataObject) -> None:
    size = sum(counts) * PAGE
    expected = bytearray(size)
    memfds = [Memfd.create("part", count * PAGE) for count in counts]
    with GuestRam.from_memfds(memfds) as ram, ram.map() as mapping:
        for _ in range(data.draw(st.integers(1, 8))):
            # Most ranges begin close to where one memfd ends.
            border = data.draw(st.sampled_from(ram.offsets))
            start = min(max(border + data.draw(st.integers(-PAGE, PAGE)), 0), size - 1)
            length = data.draw(st.integers(0, size - start))
            seed = data.draw(st.integers(0, 250))
            value = TEXT[seed : seed + length]
            expected[start : start + length] = value
            if data.draw(st.booleans()):
                ram.write(value, start)
            else:
                mapping[start : start + length] = value
            first = data.draw(st.integers(0, size))
            wanted = data.draw(st.integers(0, size))
            assert ram.read(wanted, first) == expected[first : first + wanted]
        assert mapping[:] == ram.read(size, 0) == expected


# Mappings.


def test_a_mapping_is_one_range_of_addresses() -> None:
    with three_parts() as ram, ram.map() as mapping:
        assert ranges_of("/memfd:") == [
            (f"/memfd:ram.{number}", mapping.address + offset, size)
            for number, (offset, size) in enumerate(
                zip(ram.offsets, [PART, PART, PAGE], strict=True)
            )
        ]


def test_a_mapping_outlives_the_ram() -> None:
    with three_parts() as ram:
        mapping = ram.map()
    with mapping, memoryview(mapping) as view:
        view[PART - 1 : PART + 1] = b"ab"
        assert bytes(view[PART - 2 : PART + 2]) == b"\0ab\0"


def test_a_mapping_cannot_be_closed_while_a_buffer_is_exported() -> None:
    with three_parts() as ram:
        mapping = ram.map()
        view = memoryview(mapping)[PART:]
        with pytest.raises(BufferError):
            mapping.close()
        view[0] = 1  # still mapped
        assert ram.read(1, PART) == b"\x01"
        view.release()
        mapping.close()
        assert ranges_of("/memfd:") == []
        with pytest.raises(ValueError, match="closed"):
            assert mapping.address


def test_a_mapping_that_was_dropped_lives_as_long_as_its_buffers() -> None:
    with three_parts() as ram:
        view = memoryview(ram.map())[PART - 1 :]
        gc.collect()
        view[:2] = b"ab"
        assert ram.read(2, PART - 1) == b"ab"
        assert len(ranges_of("/memfd:")) == 3
        del view
        gc.collect()
        assert ranges_of("/memfd:") == []


def test_a_mapping_is_not_resized() -> None:
    with three_parts() as ram, ram.map() as mapping, pytest.raises(TypeError, match="resized"):
        mapping.resize(PAGE)


def test_a_read_only_mapping_is_not_written_to() -> None:
    with three_parts() as ram, ram.map(writable=False) as mapping:
        with pytest.raises(TypeError):
            mapping[0] = 1
        with memoryview(mapping) as view:
            assert view.readonly


def test_a_mapping_that_fails_leaves_nothing_mapped() -> None:
    with three_parts() as ram:
        before = count_descriptors()
        ram.memfds[2].seal(Seal.FUTURE_WRITE)
        with pytest.raises(SealedError):
            ram.map()
        assert ranges_of("/memfd:") == []
        assert count_descriptors() == before


# Pages.


def test_populating_allocates_every_page() -> None:
    with three_parts() as sparse, three_parts(populate=True) as whole:
        assert allocated(sparse) == [0, 0, 0]
        assert allocated(whole) == [PART, PART, PAGE]


def test_a_mapping_is_populated_in_whole_or_in_part() -> None:
    with three_parts() as ram:
        with ram.map() as mapping:
            mapping.populate(PART - PAGE, 2 * PAGE)
        assert allocated(ram) == [PAGE, PAGE, 0]
        with ram.map(writable=False, populate=True):
            assert resident() == SIZE
        assert allocated(ram) == [PART, PART, PAGE]


@pytest.mark.parametrize(("offset", "length"), [(-PAGE, PAGE), (0, SIZE + PAGE), (SIZE, None)])
def test_populating_outside_of_a_mapping_is_refused(offset: int, length: int | None) -> None:
    with (
        three_parts() as ram,
        ram.map() as mapping,
        pytest.raises(ValueError, match="do not lie within"),
    ):
        mapping.populate(offset, length)


def test_a_populated_range_begins_at_a_page() -> None:
    with three_parts() as ram, ram.map() as mapping, pytest.raises(RequestError) as caught:
        mapping.populate(1, PAGE)
    assert caught.value.errno == errno.EINVAL


@needs_transparent_huge_pages
def test_transparent_huge_pages_are_asked_for_in_each_mapping() -> None:
    with three_parts(transparent_huge_pages=True) as ram, three_parts() as other:
        for asked, expected in [(ram, True), (other, False)]:
            with asked.map():
                assert ["hg" in flags for flags in read_flags()] == [expected] * 3


# NUMA policies.


@needs_numa
def test_a_policy_for_the_whole_ram_is_that_of_each_file() -> None:
    with three_parts(numa=BIND) as ram:
        for memfd in ram.memfds:
            with memfd.map():  # a mapping that knows nothing of the policy
                assert [policy for _, policy in read_policies()] == ["bind:0"]


@needs_numa
def test_ranges_have_policies_of_their_own() -> None:
    interleaved = NumaPolicy(NumaMode.INTERLEAVE, (0,), PART - PAGE, 2 * PAGE)
    with three_parts(numa=[BIND, interleaved]) as ram, ram.map() as mapping:
        found = [(address - mapping.address, policy) for address, policy in read_policies()]
        assert found == [
            (0, "bind:0"),
            (PART - PAGE, "interleave:0"),
            (PART, "interleave:0"),
            (PART + PAGE, "bind:0"),
            (2 * PART, "bind:0"),
        ]


@needs_numa
def test_a_node_that_does_not_exist_is_refused() -> None:
    before = count_descriptors()
    with pytest.raises(RequestError, match="A node does not exist") as caught:
        three_parts(numa=NumaPolicy(NumaMode.BIND, (1023,))).__enter__()
    assert caught.value.errno == errno.EINVAL
    assert count_descriptors() == before


@pytest.mark.parametrize(
    ("nodes", "offset", "length"),
    [((-1,), 0, None), ((1024,), 0, None), ((0,), -PAGE, None), ((0,), 0, 0), ((0,), 0, -PAGE)],
)
def test_policies_that_no_kernel_could_have_are_refused(
    nodes: tuple[int, ...], offset: int, length: int | None
) -> None:
    with pytest.raises(ValueError, match=r"nodes|range"):
        NumaPolicy(NumaMode.BIND, nodes, offset, length)


@pytest.mark.parametrize(
    ("offset", "length"), [(SIZE, None), (PAGE, SIZE), (1, PAGE), (PAGE, PAGE + 1)]
)
def test_policies_that_do_not_fit_the_ram_are_refused(offset: int, length: int | None) -> None:
    with pytest.raises(ValueError, match=r"does not lie within|whole pages"):
        three_parts(numa=NumaPolicy(NumaMode.BIND, (0,), offset, length)).__enter__()


# From memfds, and their description.


def test_memfds_become_a_ram_in_their_order() -> None:
    first, second = (Memfd.create("part", size) for size in (PAGE, PART))
    with GuestRam.from_memfds([second, first]) as ram:
        assert ram.memfds == (second, first)
        assert ram.offsets == (0, PART)
    assert first.closed
    assert second.closed


@needs_numa
@needs_transparent_huge_pages
def test_a_description_restores_what_memfds_do_not_have() -> None:
    policies = (BIND, NumaPolicy(NumaMode.LOCAL, (), PART, PAGE))
    with three_parts() as ram:
        described = GuestRam.from_memfds(
            ram.memfds,
            {
                **ram.as_json(),
                "numa": [policy.as_json() for policy in policies],
                "transparent_huge_pages": True,
            },
        )
        assert (described.numa, described.transparent_huge_pages) == (policies, True)
        with ram.memfds[2].map():
            assert [policy for _, policy in read_policies()] == ["bind:0"]
        again = json.loads(json.dumps(described.as_json()))
        assert GuestRam.from_memfds(ram.memfds, again).as_json() == described.as_json()


def test_a_description_is_text_for_numbers_of_bytes() -> None:
    policy = NumaPolicy(NumaMode.LOCAL)
    with Memfd.create("part", PART) as memfd, GuestRam([memfd], numa=[policy]) as ram:
        assert ram.as_json() == {
            "version": 1,
            "sizes": ["0x10000"],
            "numa": [{"mode": "local", "nodes": [], "offset": "0x0", "length": None}],
            "transparent_huge_pages": False,
        }


def test_memfds_in_another_order_are_not_those_of_the_description() -> None:
    with three_parts() as ram:
        with pytest.raises(RequestError, match="The description is of") as caught:
            GuestRam.from_memfds(ram.memfds[::-1], ram.as_json())
        assert caught.value.errno == errno.EBADMSG
        assert not ram.memfds[0].closed


@pytest.mark.parametrize(
    "damage",
    [
        {"nodes": [0.0]},
        {"nodes": [-1]},
        {"nodes": 0},
        {"mode": "home"},
        {"mode": 2},
        {"offset": hex(SIZE)},
        {"offset": "0x1"},
        {"offset": 0},
        {"length": hex(SIZE + PAGE)},
        {"length": "0x0"},
    ],
)
def test_a_damaged_policy_is_refused(damage: dict[str, Any]) -> None:
    with three_parts() as ram:
        policy = NumaPolicy(NumaMode.DEFAULT).as_json()
        again = GuestRam.from_memfds(ram.memfds, ram.as_json() | {"numa": [policy]})
        assert again.numa == (NumaPolicy(NumaMode.DEFAULT),)
        with pytest.raises(RequestError, match="Damaged") as caught:
            GuestRam.from_memfds(ram.memfds, ram.as_json() | {"numa": [policy | damage]})
        assert caught.value.errno == errno.EBADMSG
        assert not ram.memfds[0].closed


def test_a_newer_version_is_named() -> None:
    with three_parts() as ram:
        with pytest.raises(RequestError, match="version 2") as caught:
            GuestRam.from_memfds(ram.memfds, ram.as_json() | {"version": 2})
        assert caught.value.errno == errno.EPROTONOSUPPORT


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.data())
def test_a_damaged_description_is_another_one_or_refused(data: st.DataObject) -> None:
    with Memfd.create("part", PART) as memfd:
        whole: Any = GuestRam([memfd], numa=[NumaPolicy(NumaMode.DEFAULT)]).as_json()
        where = data.draw(st.sampled_from([*whole, *whole["numa"][0], None]))
        if where is None:
            whole = data.draw(json_values.filter(lambda value: value is not None))
        elif where in whole:
            whole[where] = data.draw(json_values)
        else:
            whole["numa"][0][where] = data.draw(json_values)
        try:
            read = GuestRam.from_memfds([memfd], whole)
        except RequestError:
            assert not memfd.closed
            return
        assert GuestRam.from_memfds([memfd], read.as_json()).as_json() == read.as_json()


def test_memfds_that_make_no_ram_are_refused_and_stay_the_callers() -> None:
    with (
        Memfd.create("good", PAGE) as good,
        Memfd.create("empty", 0) as empty,
        Memfd.create("odd", PAGE + 1) as odd,
        Memfd.create("large", TIB) as large,
        Memfd.create("huge", 2 << 20, huge_page_size=2 << 20) as huge,
    ):
        faults = [
            ([], "0 memfds"),
            ([good, empty], "0 bytes"),
            ([good, odd], "must consist of pages"),
            ([good, large], "less than 1 TiB"),
            ([good, good], "there twice"),
            ([huge, good], "2 memfds with pages of"),
        ]
        description = GuestRam([good]).as_json()
        for memfds, why in faults:
            with pytest.raises(ValueError, match=why):
                GuestRam.from_memfds(memfds)
            with pytest.raises(ValueError, match=why):
                GuestRam.from_memfds(memfds, description)
        assert not good.closed


# The end of a RAM.


def test_closing_twice_is_closing_once() -> None:
    ram = GuestRam.create("ram", SIZE, part_size=PART)
    memfds = ram.memfds
    ram.close()
    ram.close()
    assert ram.closed
    assert all(memfd.closed for memfd in memfds)
    for use in (ram.map, ram.pieces, ram.detach, ram.__enter__, lambda: ram.memfds):
        with pytest.raises(ValueError, match="GuestRam is closed"):
            use()


def test_detached_memfds_are_the_callers() -> None:
    ram = GuestRam.create("ram", SIZE, part_size=PART)
    memfds = ram.detach()
    assert ram.closed
    ram.close()
    assert [memfd.size for memfd in memfds] == [PART, PART, PAGE]
    for memfd in memfds:
        memfd.close()


def test_a_ram_dropped_open_warns_and_is_closed() -> None:
    before = count_descriptors()
    ram = GuestRam.create("ram", SIZE, part_size=PART)
    assert count_descriptors() == before + 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del ram
        gc.collect()
    assert [warning.category for warning in caught] == [ResourceWarning] * 3
    assert count_descriptors() == before


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def allocated(ram: GuestRam) -> list[int]:
    return [os.fstat(memfd.fileno()).st_blocks * 512 for memfd in ram.memfds]


def ranges_of(prefix: str) -> list[tuple[str, int, int]]:
    """Return the name, address and length of each mapping of files whose names begin so."""
    found = []
    with open("/proc/self/maps") as file:
        for line in file:
            addresses, *_, name = line.removesuffix(" (deleted)\n").split()
            if name.startswith(prefix):
                start, end = (int(address, 16) for address in addresses.split("-"))
                found.append((name, start, end - start))
    return found


def resident() -> int:
    """Return how many bytes of the process's mappings of memfds have a page mapped."""
    return sum(int(rss) << 10 for rss in re.findall(r"\nRss: +(\d+) kB", read_smaps()))


def read_flags() -> list[list[str]]:
    """Return the flags of each mapping of a memfd."""
    return [flags.split() for flags in re.findall(r"\nVmFlags: (.*)", read_smaps())]


def read_smaps() -> str:
    """Return the entries of /proc/self/smaps that are of memfds."""
    with open("/proc/self/smaps") as file:
        entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", file.read(), flags=re.MULTILINE)
    return "".join(entry for entry in entries if "/memfd:" in entry.split("\n")[0])


def read_policies() -> list[tuple[int, str]]:
    """Return the address and the policy of each mapping of a memfd, as the kernel shows them."""
    with open(NUMA_MAPS) as file:
        lines = [line.split() for line in file if "/memfd:" in line]
    return [(int(address, 16), policy) for address, policy, *_ in lines]


def test_only_one_has_the_lock_on_a_ram() -> None:
    with GuestRam.create("ram", PAGE) as ram:
        with ram.lock():
            # Also by another descriptor of the same open file, as each one that a session returns.
            again = GuestRam.from_memfds([Memfd.from_fd(os.dup(ram.memfds[0].fileno()))])
            with again, pytest.raises(RequestError, match="Another process") as caught:
                again.lock()
            assert caught.value.errno == errno.EWOULDBLOCK
        ram.lock().close()


def test_a_process_that_was_given_the_lock_on_a_ram_keeps_it() -> None:
    with GuestRam.create("ram", PAGE) as ram:
        with ram.lock() as lock:
            command = ["sleep", "60"]
            child = subprocess.Popen(command, pass_fds=[lock.fileno()])
        try:
            with pytest.raises(RequestError):
                ram.lock()
        finally:
            child.kill()
            child.wait()
        ram.lock().close()
