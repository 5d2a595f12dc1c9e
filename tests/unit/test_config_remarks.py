"""What the agent says of a configuration when it starts."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from agent.config import Config
from agent.config_remarks import read_ephemeral_ports, remarks
from agent.config_values import PortRange
from agent.core.options import NetworkPolicyMode, PolicyAnswer, PolicyOverflow

PODS = (ipaddress.ip_network("10.244.0.0/16"),)
USUAL = PortRange(32_768, 60_999)


def config(**changes: object) -> Config:
    return Config(**{"node_name": "a", "cluster_cidrs": PODS, **changes})


@pytest.mark.parametrize(
    ("given", "ephemeral", "parts"),
    [
        pytest.param(config(), USUAL, [], id="nothing to say"),
        pytest.param(
            config(unused=("mode", "portRange")), USUAL, ["without effect here: mode, portRange"], id="unused"
        ),
        pytest.param(
            config(manifests=Path("/m"), api_server="https://192.0.2.1"),
            USUAL,
            ["objects come from /m"],
            id="both sources",
        ),
        pytest.param(config(), PortRange(29_999, 60_999), ["sourcePorts 10000-29999 overlap"], id="one port above"),
        pytest.param(config(), PortRange(1_024, 10_000), ["sourcePorts 10000-29999 overlap"], id="one port below"),
        pytest.param(config(), PortRange(30_000, 60_999), [], id="side by side"),
        pytest.param(
            config(policy_overflow=PolicyOverflow.OPEN, policy_answer=PolicyAnswer.REJECT, flow_sample=1),
            USUAL,
            ["networkPolicy is off: policyOverflow, policyAnswer, flowSample have no effect"],
            id="policy is off",
        ),
        pytest.param(config(network_policy=NetworkPolicyMode.STRICT, flow_sample=1), USUAL, [], id="policy is on"),
        pytest.param(config(source_ports=PortRange(1_024, 65_535)), None, [], id="ports not known"),
    ],
)
def test_remarks(given, ephemeral, parts):
    said = list(remarks(given, ephemeral))

    assert len(said) == len(parts)
    assert all(part in remark for part, remark in zip(parts, said, strict=True))


@pytest.mark.parametrize(
    ("text", "ports"),
    [("32768\t60999\n", USUAL), ("", None), ("a b", None), (None, None)],
    ids=["two numbers", "empty", "words", "absent"],
)
def test_the_ephemeral_ports_are_read(tmp_path, text, ports):
    file = tmp_path / "ip_local_port_range"
    if text is not None:
        file.write_text(text)

    assert ports == read_ephemeral_ports(file)
