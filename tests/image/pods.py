"""Start the DaemonSet's container as a node's runtime would: its arguments, capabilities, mounts and profiles, by crun.

Nothing is written down twice: the OCI configuration is made from the manifests as `kubectl kustomize` gives them. What
stands in for the node is a node of the lab: its network namespace, its part of the cgroup tree, its own bpffs.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import certifi
import yaml

from tests.image.images import Image
from tests.lab import cgroups
from tests.lab.agents import Agent
from tests.lab.lab import Node
from tests.lab.manifests import Manifests
from tests.lab.polling import until
from tests.lab.processes import REPOSITORY, end

Json = dict[str, Any]
_PROFILE = Path("/usr/share/containers/seccomp.json")
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_BPFFS, _CGROUP, _STATE = "/sys/fs/bpf", "/sys/fs/cgroup", "/run/ebproxy"
# crun refuses machines that mount v1 hierarchies beside the v2 tree: give it a view of the v2 tree alone.
_ON_CGROUP2 = ("unshare", "--mount", "sh", "-c", f'mount -t cgroup2 cgroup2 {_CGROUP} && exec "$@"', "sh")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def rendered(directory: str) -> list[Json]:
    """Read what a kustomization gives."""
    path = REPOSITORY / "manifests" / directory
    said = subprocess.run(["kubectl", "kustomize", path], capture_output=True, text=True, check=True, timeout=60)
    return list(yaml.safe_load_all(said.stdout))


def only(objects: Iterable[Json], kind: str) -> Json:
    """Find the one object of a kind."""
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


class PodAgent(Agent):
    """The agent in its container.

    It reads ``manifests``, or else an API server that ``flags`` name, with ``token`` as its service account's.
    ``without``: a capability of the DaemonSet to leave out.
    """

    def __init__(
        self,
        image: Image,
        node: Node,
        manifests: Manifests | None = None,
        *,
        flags: tuple[str, ...] = (),
        token: str = "",
        without: str = "",
    ) -> None:
        super().__init__(node, manifests, flags=flags)
        self._token = token
        self._image = image
        self._without = without
        self._objects = rendered("base")
        self._bundle = node.directory / "bundle"
        self._crun = (*_ON_CGROUP2, "crun", f"--root={node.directory / 'crun'}", "--cgroup-manager=disabled")
        self._place = node.place("kubepods/ebproxy")

    @property
    def container(self) -> Json:
        """The container as the DaemonSet has it."""
        pod = only(self._objects, "DaemonSet")["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        return dict(container)

    def start(self) -> Self:
        """Start it, without waiting."""
        source = ["--manifests=/manifests"] if self.manifests else []
        command = self._bundled([*self.container["args"], *self._flags, *source])
        with self.log.open("a", encoding="utf-8") as log:
            self.process = self._place.start(*command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self

    def once(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another command in such a container, to its end."""
        return self._place.run(*self._bundled(list(arguments)))

    def kill(self) -> None:
        """End it as an out-of-memory kill does."""
        self._signal("KILL")

    def stop(self) -> int:
        """End it as the kubelet does; returns its exit status."""
        return self._signal("TERM")

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as `kubectl exec` does."""
        return self._place.run(*self._crun, "exec", self._id, *command)

    def pid(self) -> int:
        """The agent's process id."""
        return int(json.loads(self._place.run(*self._crun, "state", self._id).stdout)["pid"])

    def memory(self, field: str = "VmRSS") -> int:
        """What the agent's process holds, in bytes."""
        lines = Path(f"/proc/{self.pid()}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))

    def said(self) -> str:
        """Its log so far."""
        return self.log.read_text(encoding="utf-8")

    @property
    def _id(self) -> str:
        return self.node.netns

    def _signal(self, name: str) -> int:
        assert self.process
        self._place.run(*self._crun, "kill", self._id, name)
        with contextlib.suppress(TimeoutError):
            until(self.has_ended, "the container ends", 15)
        status = end(self.process)
        self._place.run(*self._crun, "delete", "--force", self._id)
        return status

    def _bundled(self, arguments: list[str]) -> tuple[str, ...]:
        """Write a bundle for the runtime, and return the command that runs it."""
        self._bundle.mkdir(exist_ok=True)
        (self._bundle / "config.json").write_text(json.dumps(self.oci_config(arguments)), encoding="utf-8")
        return (*self._crun, "run", f"--bundle={self._bundle}", self._id)

    def oci_config(self, arguments: list[str]) -> Json:
        """Write the runtime's configuration, as containerd would for this container."""
        security = self.container["securityContext"]
        kept = [f"CAP_{name}" for name in security["capabilities"]["add"] if name != self._without]
        assert security["capabilities"]["drop"] == ["ALL"]
        linux: Json = {"namespaces": [{"type": kind} for kind in ("mount", "pid", "ipc", "uts", "cgroup")]}
        if security["seccompProfile"]["type"] == "RuntimeDefault":
            linux["seccomp"] = default_seccomp(kept)
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": security["runAsUser"], "gid": security["runAsGroup"]},
                "args": [*self._image.command, *arguments],
                "env": [f"PATH={_PATH}", *self._environment()],
                "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), kept),
                "noNewPrivileges": not security["allowPrivilegeEscalation"],
            },
            "root": {"path": str(self._image.root), "readonly": security["readOnlyRootFilesystem"]},
            "hostname": self.node.name,
            "mounts": [*_KERNEL_MOUNTS, *self._volume_mounts(), *self._source_mounts()],
            "linux": linux,
        }

    def _source_mounts(self) -> list[Json]:
        """What objects are read from: a directory, or the account's credentials that the kubelet puts in every pod."""
        if self.manifests:
            return [_bind(self.manifests.directory, "/manifests", "ro")]
        directory = self.node.directory / "account"
        directory.mkdir(exist_ok=True)
        (directory / "token").write_text(self._token, encoding="ascii")
        (directory / "ca.crt").write_text(certifi.contents(), encoding="ascii")
        return [_bind(directory, _ACCOUNT, "ro")]

    def _environment(self) -> list[str]:
        fields = {"spec.nodeName": self.node.name}
        env = self.container["env"]
        return [f"{item['name']}={fields[item['valueFrom']['fieldRef']['fieldPath']]}" for item in env]

    def _volume_mounts(self) -> list[Json]:
        volumes = only(self._objects, "DaemonSet")["spec"]["template"]["spec"]["volumes"]
        sources = {volume["name"]: self._source(volume) for volume in volumes}
        return [
            _bind(sources[mount["name"]], mount["mountPath"], "ro" if mount.get("readOnly") else "rw")
            for mount in self.container["volumeMounts"]
        ]

    def _source(self, volume: Json) -> Path:
        """Where a volume is on the lab's node."""
        if "configMap" in volume:
            return self._config_directory(volume["configMap"]["name"])
        cgroup = Path(_CGROUP, self.node.cgroup.relative_to(cgroups.mount_point()))
        on_node = {_BPFFS: self.bpffs, _CGROUP: cgroup, _STATE: self.state_dir}
        source = on_node[volume["hostPath"]["path"]]
        if volume["hostPath"]["type"] == "DirectoryOrCreate":
            source.mkdir(exist_ok=True)
        return source

    def _config_directory(self, name: str) -> Path:
        config_map = only(self._objects, "ConfigMap")
        assert config_map["metadata"]["name"] == name
        directory = self.node.directory / "config"
        directory.mkdir(exist_ok=True)
        for file, text in config_map["data"].items():
            (directory / file).write_text(text, encoding="utf-8")
        return directory


def _bind(source: Path, target: str, access: str) -> Json:
    options = ["rbind", "rslave", access]
    return {"destination": target, "type": "bind", "source": str(source), "options": options}


_SEALED = ["nosuid", "noexec", "nodev"]
_KERNEL_MOUNTS = (
    {"destination": "/proc", "type": "proc", "source": "proc", "options": _SEALED},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_SEALED, "ro"]},
    {"destination": "/sys/fs/cgroup", "type": "cgroup2", "source": "cgroup", "options": [*_SEALED, "ro"]},
)


def default_seccomp(capabilities: list[str]) -> Json:
    """Write the runtimes' default profile as it is for a container with these capabilities.

    The file is the one of containers/common, which asks CAP_SYS_ADMIN of callers of bpf(2); containerd 1.7 and Docker
    23 ask CAP_BPF, and CAP_PERFMON for perf_event_open(2), which is added here.
    """
    profile = json.loads(_PROFILE.read_text(encoding="utf-8"))
    allowed = [
        {key: rule[key] for key in ("names", "action", "args") if rule.get(key)}
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and _applies(rule, capabilities)
    ]
    gated = {"CAP_BPF": "bpf", "CAP_PERFMON": "perf_event_open"}
    allowed += [{"names": [gated[name]], "action": "SCMP_ACT_ALLOW"} for name in capabilities if name in gated]
    return {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": allowed}


def _applies(rule: Json, capabilities: list[str]) -> bool:
    included, excluded = (rule.get(key) or {} for key in ("includes", "excludes"))
    return set(included.get("caps", ())) <= set(capabilities) and not set(excluded.get("caps", ())) & set(capabilities)
