"""What numbers stand for outlives agents; a damaged file is as none."""

from __future__ import annotations

import pytest

from agent.core.abi import Direction
from agent.core.policy import RuleName
from agent.core.policy_plan import Numbers
from agent.core.policy_records import NamedPort
from agent.core.records import Protocol
from agent.core.selectors import IdentityName
from agent.observe.numbers import FILE, NumberFile, read_numbers, remove_numbers
from tests.builders import key
from tests.policy_builders import prefix

WEB = IdentityName(
    namespace="shop",
    namespace_labels=(("kubernetes.io/metadata.name", "shop"),),
    labels=(("app", "web"), ("tier", "")),
    ports=(NamedPort("http", Protocol.TCP, 80),),
    block=prefix("10.0.0.0/8"),
)
NUMBERS = Numbers(
    {16: WEB, 21: IdentityName(is_pod=False, block=prefix("fd00::/8"))},
    {1: RuleName("NetworkPolicy", key("shop/web"), Direction.EGRESS, 3)},
    30,
    7,
)


def test_numbers_are_read_back(tmp_path):
    NumberFile(tmp_path).write(NUMBERS)

    assert read_numbers(tmp_path) == NumberFile(tmp_path).numbers == NUMBERS


def test_there_are_none_at_first(tmp_path):
    assert NumberFile(tmp_path).numbers == Numbers()


def test_readers_see_the_old_or_the_new(tmp_path):
    written = NumberFile(tmp_path)
    written.write(NUMBERS)
    with (tmp_path / FILE).open("rb") as reader:
        written.write(Numbers())

        assert b"shop" in reader.read()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_damaged_file_is_as_none(tmp_path, caplog, cut):
    NumberFile(tmp_path).write(NUMBERS)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:cut])

    assert read_numbers(tmp_path) == Numbers()
    assert "numbered anew" in caplog.text


@pytest.mark.parametrize("exists", [True, False])
def test_it_is_removed(tmp_path, exists):
    if exists:
        NumberFile(tmp_path).write(NUMBERS)
    remove_numbers(tmp_path)

    assert not list(tmp_path.iterdir())
