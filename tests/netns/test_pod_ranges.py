"""Where nobody says what addresses pods have: as kube-proxy does, a ClusterIP keeps the client's address."""

from __future__ import annotations

import pytest

from tests.lab.scene import SIZES, Scene
from tests.lab.traffic import PACKET_MODES
from tests.netns.everywhere import publish
from tests.requirements import require_root

FAMILIES = [pytest.param(0, id="IPv4"), pytest.param(1, id="IPv6")]


@pytest.fixture(scope="module", params=["", "10.180.0.0/16"], ids=["none", "IPv4"])
def stage(request):
    """A node that has no podCIDRs, with a Service: its scene, and the families whose range of pods is known."""
    require_root()
    scene = Scene(web=1, socketLB="off", mapSizes=SIZES, **({"clusterCIDR": request.param} if request.param else {}))
    with scene.closed_on_failure():
        scene.manifests.write("node", scene.node.manifest() | {"spec": {}})
        outside = scene.lab.outsider().client()
    with scene:
        yield scene, outside, publish(scene, "web", scene.web), {0} if request.param else set()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", PACKET_MODES)
def test_a_pod_that_nobody_knows_for_one_keeps_its_address_towards_a_cluster_ip(stage, mode, family):
    scene, _, service, _ = stage

    answer = scene.pod.ask(mode, *service.at("ClusterIP", family))

    assert (answer.error, answer.name, answer.client) == ("", "web-1", scene.shopper.addresses[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_outside_is_masqueraded_where_pods_are_known(stage, family):
    """It might be a pod where they are not; the same node has the way back, as it is asked by its address there."""
    scene, outside, service, known = stage

    answer = outside.ask("tcp", *service.at("ClusterIP", family))

    assert answer.name == "web-1"
    assert (answer.client != scene.lab.outsiders[0].addresses[family]) == (family in known)


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_and_the_log_say_what_was_found(stage, family):
    scene, _, service, known = stage
    address, port = service.at("ClusterIP", family)
    target = f"[{address}]:{port}" if family else f"{address}:{port}"

    said = scene.agent.json("trace", "--from", scene.shopper.addresses[family], "--to", target)

    assert (said["origin"], said["source_nat"]) == ("pod" if family in known else "unknown", False)
    remark = f"IPv{(4, 6)[family]}: neither clusterCIDR nor this Node's podCIDRs say where pods are"
    assert (remark in scene.agent.log.read_text(encoding="utf-8")) == (family not in known)
