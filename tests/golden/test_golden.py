"""Golden cases: ordinary YAML in, a readable dump of the maps out.

``cases/NAME.yaml`` holds the objects that the node ``n1`` sees, ``cases/NAME.txt`` beside it what the maps then say:

    SVC namespace/name port/PROTOCOL/FAMILY id=N base=N  frontends  ->  backends | REFUSED | SILENT
    DEGRADED namespace/name port/PROTOCOL/FAMILY: why
    MALFORMED Kind namespace/name field: why

After a change that is meant: ``EBPROXY_GOLDEN=update pytest tests/golden``, and read the difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cli.view import format_backends, format_frontend
from agent.core.abi import Frontend
from agent.core.model import Model
from agent.core.plan import Plan
from agent.core.planner import Planner
from agent.sources.decode import Decoder
from agent.sources.documents import read_contents
from tests.property.fake_maps import FakeMaps, apply_watched

CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
NODE = "n1"


def read_model(manifest: Path) -> Model:
    contents = read_contents(manifest.read_bytes(), is_json=False)
    assert contents.faults == []
    model, decoder = Model(NODE), Decoder(NODE)
    for kind, value in contents.objects:
        model.apply(decoder.decode_object(kind, value))
    return model


def dump(model: Model) -> Iterator[str]:
    """Plan and write everything, the older Services first, and say what the maps hold."""
    maps = FakeMaps()
    planner, plan = Planner(len(maps.segments), maps.frontend_limit, maps.read_state()), Plan()
    for service in sorted(model.services.values(), key=lambda service: (service.created, service.key)):
        planner.plan_service(service.key, service.created, model.desired(service.key), plan)
    apply_watched(maps, plan)
    for _, placements in sorted(planner.placements.items()):
        for placement in sorted(placements, key=lambda placement: placement.port):
            keys = [key for key, value in maps.frontends.items() if _service(value) == placement.service_id]
            if not keys:
                continue
            answer = maps.answer(keys[0])
            assert answer is not None
            backends = format_backends(b"".join(answer.backends)) or ("SILENT" if answer.is_silent else "REFUSED",)
            where = f"id={placement.service_id} base={placement.base}"
            frontends = " ".join(sorted(map(format_frontend, keys)))
            yield f"SVC {placement.service} {placement.port} {where}  {frontends}  ->  {' '.join(backends)}"
    for (key, port), reason in sorted(planner.degraded.items()):
        yield f"DEGRADED {key} {port}: {reason}"
    for (kind, key), fault in sorted(model.malformed.items()):
        yield f"MALFORMED {kind} {key} {fault.field}: {fault.reason}"


def _service(value: bytes) -> int:
    return Frontend.unpack(value).service


@pytest.mark.parametrize("manifest", CASES, ids=lambda path: path.stem)
def test_maps_are_as_the_golden_file_says(manifest):
    said = "".join(line + "\n" for line in dump(read_model(manifest)))
    golden = manifest.with_suffix(".txt")
    if os.environ.get("EBPROXY_GOLDEN") == "update":
        golden.write_text(said, encoding="utf-8")

    assert said == golden.read_text(encoding="utf-8")


def test_every_golden_file_has_its_case():
    assert {path.stem for path in (Path(__file__).parent / "cases").glob("*.txt")} == {path.stem for path in CASES}
