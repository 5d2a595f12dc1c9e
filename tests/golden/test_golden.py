"""Golden cases: ordinary YAML in, a readable dump of the maps out.

``cases/NAME.yaml`` holds the objects that the node ``n1`` sees, ``cases/NAME.txt`` beside it what the maps then say:

    SVC namespace/name port/PROTOCOL/FAMILY id=N cluster=BASE local=BASE [affinity=Ns] [serving=N]
        KIND address:port/PROTOCOL [FLAG...]  ->  backends | REFUSED | SILENT
        KIND address:port/PROTOCOL [FLAG...]  ->  what clients inside get  |  what those outside get
        RESERVED address | port/PROTOCOL
        RANGE address/bits
    DEGRADED namespace/name port/PROTOCOL/FAMILY: why
    MALFORMED Kind namespace/name field: why
    HEALTH namespace/name port=N local=N
    LACKS policy/FAMILY service ports without local endpoints

A first line ``# options: {...}`` says how the node is configured, by the names of a configuration file. Its addresses
are those of ``LOCAL``, of which the first of each family are primary.

After a change that is meant: ``EBPROXY_GOLDEN=update pytest tests/golden``, and read the difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from agent.cli.view import format_backends, format_frontend
from agent.core.abi import Frontend, FrontendFlag, FrontendKey, unpack_source_range
from agent.core.addresses import AddressRange, format_address, parse_address
from agent.core.events import AddressesChanged
from agent.core.model import Model
from agent.core.options import ServiceOptions
from agent.core.plan import Placement, Plan, Segment
from agent.core.planner import Planner
from agent.core.records import Algorithm, Forwarding
from agent.sources.decode import Decoder
from agent.sources.documents import read_contents
from tests.property.fake_maps import Answer, FakeMaps, apply_watched

CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
NODE = "n1"
LOCAL = ("192.0.2.1", "2001:db8::1", "198.51.100.1", "127.0.0.1", "::1")
_OPTIONS = "# options: "


def read_options(manifest: Path) -> ServiceOptions:
    first, _, _ = manifest.read_text(encoding="utf-8").partition("\n")
    said = yaml.safe_load(first.removeprefix(_OPTIONS)) if first.startswith(_OPTIONS) else {}
    node_ports = said.pop("nodePortAddresses", [])
    options = ServiceOptions(
        node_port_ranges=() if node_ports == "primary" else tuple(map(AddressRange.parse, node_ports)),
        is_node_port_primary=node_ports == "primary",
        masquerade_all=said.pop("masqueradeAll", False),
        allowed_external_ips=tuple(map(AddressRange.parse, said.pop("allowedExternalIPs", []))),
        forwarding=Forwarding(said.pop("forwarding", "snat")),
        algorithm=Algorithm(said.pop("algorithm", "random")),
    )
    assert not said, "options that are not read"
    return options


def read_model(manifest: Path) -> Model:
    contents = read_contents(manifest.read_bytes(), is_json=False)
    assert contents.faults == []
    model, decoder = Model(NODE, read_options(manifest)), Decoder(NODE)
    local = [*map(parse_address, LOCAL)]
    model.apply(AddressesChanged(frozenset(local), frozenset(local[:2])))
    for kind, value in contents.objects:
        model.apply(decoder.decode_object(kind, value))
    return model


def dump(model: Model) -> Iterator[str]:
    """Plan and write everything, the older Services first, and say what the maps hold."""
    maps = FakeMaps(frontend_limit=64)
    planner, plan = Planner(len(maps.segments), maps.frontend_limit, maps.read_state(), source_range_limit=64), Plan()
    for service in sorted(model.services.values(), key=lambda service: (service.created, service.key)):
        planner.plan_service(service.key, service.created, model.desired(service.key), plan)
    apply_watched(maps, plan)
    for _, placements in sorted(planner.placements.items()):
        for placement in sorted(placements, key=lambda placement: placement.port):
            yield from dump_placement(placement, maps)
    for (key, port), reason in sorted(planner.degraded.items()):
        yield f"DEGRADED {key} {port}: {reason}"
    for (kind, key), fault in sorted(model.malformed.items()):
        yield f"MALFORMED {kind} {key} {fault.field}: {fault.reason}"
    for key, check in sorted(model.health_checks().items()):
        yield f"HEALTH {key} port={check.port} local={check.local_endpoints}"
    for (policy, family), count in sorted(planner.no_local_endpoints.items()):
        yield f"LACKS {policy}/IPv{family.value} {count}"


def dump_placement(placement: Placement, maps: FakeMaps) -> Iterator[str]:
    """Say of one service port what the maps hold; nothing where no frontend leads to it."""
    values = {key: Frontend.unpack(value) for key, value in sorted(maps.frontends.items())}
    own = {key: value for key, value in values.items() if value.service == placement.service_id}
    if not own:
        return
    words = [f"SVC {placement.service} {placement.port} id={placement.service_id}"]
    words += [f"{name}={segment.base}" for name, segment in _segments(placement) if segment]
    words += [f"affinity={seconds}s" for seconds in {value.affinity_timeout for value in own.values()} - {0}]
    words += [f"serving={len(placement.serving)}"] if placement.serving is not None else []
    yield " ".join(words)
    yield from sorted(f"    {dump_frontend(key, value, maps)}" for key, value in own.items())
    for raw in sorted(maps.source_ranges):
        service, address, bits = unpack_source_range(raw)
        if service == placement.service_id:
            yield f"    RANGE {AddressRange(address, bits)}"


def _segments(placement: Placement) -> tuple[tuple[str, Segment | None], ...]:
    return (("cluster", placement.cluster), ("local", placement.local))


def dump_frontend(key: bytes, value: Frontend, maps: FakeMaps) -> str:
    assert value.kind is not None
    if value.kind.name == "RESERVED":
        asked = FrontendKey.unpack(key)
        return f"RESERVED {format_frontend(key) if asked.port else format_address(asked.address)}"
    inside, outside = (_answer(maps.answer_at(base)) for base in (value.inside, value.outside))
    flags = "".join(f" {flag.name}" for flag in FrontendFlag if value.flags & flag)
    gets = inside if inside == outside else f"{inside}  |  {outside}"
    return f"{value.kind.name} {format_frontend(key)}{flags}  ->  {gets}"


def _answer(answer: Answer) -> str:
    return " ".join(format_backends(b"".join(answer.backends))) or ("SILENT" if answer.is_silent else "REFUSED")


@pytest.mark.parametrize("manifest", CASES, ids=lambda path: path.stem)
def test_maps_are_as_the_golden_file_says(manifest):
    said = "".join(line + "\n" for line in dump(read_model(manifest)))
    golden = manifest.with_suffix(".txt")
    if os.environ.get("EBPROXY_GOLDEN") == "update":
        golden.write_text(said, encoding="utf-8")

    assert said == golden.read_text(encoding="utf-8")


def test_every_golden_file_has_its_case():
    assert {path.stem for path in (Path(__file__).parent / "cases").glob("*.txt")} == {path.stem for path in CASES}
