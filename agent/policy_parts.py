"""The parts that enforce policy, put together over a dataplane; imported only where policy is on."""

from __future__ import annotations

import functools
from collections.abc import Callable

from agent.config import Config
from agent.config_options import flow_timeouts
from agent.core.options import NetworkPolicyMode, PolicyAnswer, PolicyOverflow
from agent.core.policy_model import PolicyModel
from agent.core.policy_plan import PolicySizes
from agent.core.records import ObjectKey
from agent.kernel.connections import ConnectionSweep
from agent.kernel.dataplane import Dataplane
from agent.kernel.neighbours import ask_device, solicit
from agent.kernel.netlink import Netlink
from agent.kernel.node_maps import NodeMaps
from agent.kernel.pod_devices import PodDevices
from agent.kernel.policy_maps import PolicyMaps, PolicySwitches
from agent.observe.former_policies import PolicyFile, read_policies
from agent.observe.metrics import Metrics
from agent.observe.numbers import NumberFile
from agent.observe.policy_metrics import PolicyMetrics
from agent.policy_sync import PolicyOptions, PolicySync


def make_policy(
    config: Config, dataplane: Dataplane, metrics: Metrics, on_degraded: Callable[[ObjectKey, str], None]
) -> PolicySync:
    """Build everything, over what the maps hold. Raises: DataplaneError, OSError."""
    store = dataplane.store
    maps = PolicyMaps(store)
    is_awaited = dataplane.is_migrating and maps.adopt(dataplane.former)
    maps.open(_switches(config))
    netlink = Netlink()
    found = dict(store.maps["pod_devices"].items())
    devices = PodDevices(
        NodeMaps(store), found, functools.partial(ask_device, netlink), functools.partial(solicit, netlink)
    )
    sync = PolicySync(
        PolicyModel(config.node_name, read_policies(config.state_dir)),
        maps,
        NumberFile(config.state_dir),
        devices,
        ConnectionSweep(
            store.maps["connections"], flow_timeouts(config), functools.partial(metrics.counted, "connections")
        ),
        metrics,
        _options(config),
        on_degraded=on_degraded,
        keep_policies=PolicyFile(config.state_dir).write,
    )
    sync.is_awaited = is_awaited
    sync.on_enforced = PolicyMetrics(metrics, sync.facts).enforced
    return sync


def _options(config: Config) -> PolicyOptions:
    sizes = config.map_sizes
    return PolicyOptions(
        PolicySizes(sizes.identities, sizes.blocks, sizes.policy, sizes.subjects),
        fails_open=config.policy_overflow is PolicyOverflow.OPEN,
        retry_s=config.sync_period_s,
        drift_period_s=config.drift_check_period_s,
    )


def _switches(config: Config) -> PolicySwitches:
    return PolicySwitches(
        sample=config.flow_sample,
        is_strict=config.network_policy is NetworkPolicyMode.STRICT,
        is_answered=config.policy_answer is PolicyAnswer.REJECT,
    )
