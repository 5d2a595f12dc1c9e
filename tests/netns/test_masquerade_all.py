"""`masqueradeAll`: backends of a ClusterIP see the node whoever asks, the node's own pods among them."""

from __future__ import annotations

import pytest

from tests.lab.scene import Scene
from tests.lab.traffic import PACKET_MODES
from tests.netns.everywhere import POD_RANGES, client_address, own_addresses, publish
from tests.requirements import require_root


@pytest.fixture(scope="module", params=[{"masqueradeAll": True}, {"iptables": {"masqueradeAll": True}}], ids=str)
def stage(request):
    """A node whose agent is configured so, and a Service with a backend here and one on another node."""
    require_root()
    with Scene(web=1, nodes=2, socketLB="off", clusterCIDR=POD_RANGES, **request.param) as scene:
        yield scene, publish(scene, "web", [*scene.web, *scene.far], "Local")


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("mode", PACKET_MODES)
def test_a_pod_is_masqueraded_towards_cluster_ips_and_nowhere_else(stage, mode, family):
    scene, web = stage

    for kind, seen in (("ClusterIP", own_addresses(scene)), ("externalIP", client_address(scene, "pod", family))):
        answers = scene.pod.ask_often(mode, *web.at(kind, family), 20)

        assert {answer.name for answer in answers} == {"web-1", "far-2"}, kind
        assert {answer.client for answer in answers} <= seen, kind
