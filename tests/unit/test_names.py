"""The journal of names: what it appends, what survives a crash, what readers see."""

from __future__ import annotations

import pytest

from agent.core.plan import Placement
from agent.core.records import Family, Protocol
from agent.core.services import PortName
from agent.observe.names import FILE, Name, NameJournal, read_names
from tests.builders import key

WEB = Name("ns/web", "http", "TCP", "IPv4")
API = Name("ns/api", "", "UDP", "IPv6")


def placement(ident: int, name: Name) -> Placement:
    port = PortName(name.port, Protocol[name.protocol], Family(int(name.family[-1])))
    return Placement(key(name.service), port, ident, "")


def test_names_are_read_back(tmp_path):
    journal = NameJournal(tmp_path)
    journal.record([placement(1, WEB), placement(2, API)])
    journal.close()

    assert read_names(tmp_path) == {1: WEB, 2: API}


def test_readers_see_a_name_as_soon_as_it_is_recorded(tmp_path):
    journal = NameJournal(tmp_path)
    journal.record([placement(1, WEB)])

    assert read_names(tmp_path) == {1: WEB}
    journal.close()


def test_what_is_known_is_not_appended_again(tmp_path):
    journal = NameJournal(tmp_path)
    for _ in range(3):
        journal.record([placement(1, WEB)])
    journal.close()

    assert len((tmp_path / FILE).read_text().splitlines()) == 1


def test_the_next_agent_goes_on_and_drops_what_was_overruled(tmp_path):
    first = NameJournal(tmp_path)
    first.record([placement(1, WEB)])
    first.record([placement(1, API)])
    first.close()
    second = NameJournal(tmp_path)
    second.record([placement(2, WEB)])
    second.close()

    assert read_names(tmp_path) == {1: API, 2: WEB}
    assert len((tmp_path / FILE).read_text().splitlines()) == 2


@pytest.mark.parametrize("cut", range(1, len("2\tns/api\t\tUDP\tIPv6\n") + 1))
def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path, cut):
    whole = "1\tns/web\thttp\tTCP\tIPv4\n2\tns/api\t\tUDP\tIPv6\n"
    (tmp_path / FILE).write_text(whole[:-cut])

    assert read_names(tmp_path) == {1: WEB}
    journal = NameJournal(tmp_path)
    journal.record([placement(3, API)])
    journal.close()
    assert read_names(tmp_path) == {1: WEB, 3: API}


def test_no_file_means_no_names(tmp_path):
    assert read_names(tmp_path) == {}
