"""A directory of manifests as a source: what is emitted as files come, change, break and go."""

import errno
import json
import os
import queue
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.core.events import Delete, ListEnded, ListStarted, Malformed, Upsert
from agent.core.records import POLICY_KINDS, SERVICE_KINDS, Kind, ObjectKey
from agent.errors import ConfigError
from agent.sources import writers
from agent.sources.decode import Decoder
from agent.sources.documents import read_contents
from agent.sources.manifests import ManifestSource
from tests.lab.polling import until

DEADLINE_S = 5.0
KINDS = Decoder("here").kinds


def service(name="web", address="10.96.0.1", namespace="shop"):
    return f"""\
apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: {namespace}
  creationTimestamp: 2024-05-01T10:00:00Z
spec:
  clusterIP: {address}
  ports: [{{port: 80}}]
"""


def endpoint_slice(name="web-1", address="10.0.0.1", labels="kubernetes.io/service-name: web"):
    return f"""\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: shop, labels: {{{labels}}}}}
addressType: IPv4
endpoints: [{{addresses: [{address}]}}]
ports: [{{port: 8080}}]
"""


NODE = "{apiVersion: v1, kind: Node, metadata: {name: here}}"
CONFIG_MAP = "{apiVersion: v1, kind: ConfigMap, metadata: {name: other}}"


def key(name="web"):
    return ObjectKey("shop", name)


def gone(name="web"):
    return Delete(Kind.SERVICE, key(name))


def said(event):
    """Reduce an event to what tells one from another in these tests."""
    match event:
        case Upsert(record=record):
            return record.key, getattr(record, "cluster_ips", ())
        case Malformed(key=name, field=field):
            return name, field
    return event


class Watched:
    """A directory with a source on it, and what the source has said."""

    def __init__(self, directory):
        self.directory = directory
        self.events = queue.Queue()
        self.errors = queue.Queue()
        self.source = ManifestSource(
            directory, Decoder("here"), self.events.put, lambda _cause, message: self.errors.put(message)
        )

    def start(self):
        """Start, and return what the first load emits."""
        self.source.start()
        return self.listed()

    def listed(self):
        """Return what is emitted up to the end of the last list."""
        events = [self.next()]
        while not (isinstance(events[-1], ListEnded) and events[-1].kind is KINDS[-1]):
            events.append(self.next())
        return events

    def next(self):
        return self.events.get(timeout=DEADLINE_S)

    def error(self):
        return self.errors.get(timeout=DEADLINE_S)

    def write(self, name, *documents):
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("---\n".join(documents))
        return path

    def flush(self):
        """Return what is emitted up to now: everything before a new Service that is made for this."""
        name = f"flush-{time.monotonic_ns()}"
        self.write(f"{name}.yaml", service(name, "10.96.200.1"))
        events = [self.next()]
        while said(events[-1])[0] != key(name):
            events.append(self.next())
        return events[:-1]


@pytest.fixture
def watched(tmp_path):
    directory = tmp_path / "manifests"
    directory.mkdir()
    watched = Watched(directory)
    yield watched
    watched.source.stop()
    assert not watched.source._thread.is_alive()


def names(events):
    return [said(event)[0].name for event in events if isinstance(event, Upsert | Malformed)]


class TestFirstLoad:
    def test_empty(self, watched):
        assert watched.start() == [step(kind) for kind in KINDS for step in (ListStarted, ListEnded)]

    def test_every_kind_in_its_list(self, watched):
        watched.write("a.yaml", endpoint_slice(), service(), NODE)

        assert [said(event) for event in watched.start()] == [
            ListStarted(Kind.SERVICE),
            (key(), (bytes(10) + b"\xff\xff\x0a\x60\x00\x01",)),
            ListEnded(Kind.SERVICE),
            ListStarted(Kind.ENDPOINT_SLICE),
            (key("web-1"), ()),
            ListEnded(Kind.ENDPOINT_SLICE),
            ListStarted(Kind.NODE),
            (ObjectKey("", "here"), ()),
            ListEnded(Kind.NODE),
        ]

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("a.yaml", ["web"]),
            ("a.yml", ["web"]),
            ("A.YAML", ["web"]),
            ("deep/er/a.yaml", ["web"]),
            ("a.yaml~", []),
            ("a.txt", []),
            (".a.yaml", []),
            (".git/a.yaml", []),
        ],
    )
    def test_which_files(self, watched, path, expected):
        watched.write(path, service())

        assert names(watched.start()) == expected

    def test_json(self, watched):
        value = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.1"},
        }
        watched.write("a.json", json.dumps(value))

        assert names(watched.start()) == ["web"]

    def test_the_last_file_wins_and_the_repetition_is_reported(self, watched):
        watched.write("a.yaml", service(address="10.96.0.1"))
        watched.write("b.yaml", service(address="10.96.0.2"))
        (_, addresses) = said(watched.start()[1])

        assert addresses[0].endswith(b"\x0a\x60\x00\x02")
        assert "Service shop/web is repeated in" in watched.error()

    def test_malformed(self, watched):
        watched.write("a.yaml", service(address="nonsense"))

        assert said(watched.start()[1]) == (key(), "spec.clusterIP")

    def test_a_broken_file_costs_only_itself(self, watched):
        broken = watched.write("a.yaml", "{")
        watched.write("b.yaml", service())

        assert names(watched.start()) == ["web"]
        assert watched.error().startswith(f"{broken}: not YAML")

    def test_a_list_is_complete_once_every_file_was_read(self, watched):
        broken = watched.write("a.yaml", "{")
        watched.write("b.yaml", service())
        first = watched.start()
        broken.write_text(service("mended", "10.96.0.2"))
        second = watched.listed()

        assert {event.is_complete for event in first if isinstance(event, ListEnded)} == {False}
        assert {event.is_complete for event in second if isinstance(event, ListEnded)} == {True}
        assert names(second) == ["mended", "web"]

    def test_no_directory(self, tmp_path):
        with pytest.raises(ConfigError, match="missing is not a directory"):
            Watched(tmp_path / "missing").source.start()


class TestChanges:
    def test_new_file(self, watched):
        watched.start()
        watched.write("a.yaml", service())

        assert said(watched.next())[0] == key()

    def test_only_differences_are_emitted(self, watched):
        watched.write("a.yaml", service("a"), service("b"), endpoint_slice())
        watched.start()
        watched.write("a.yaml", service("b", "10.96.0.9"), "# a comment\n" + service("a"), endpoint_slice())

        assert names(watched.flush()) == ["b"]

    def test_the_file_is_removed(self, watched):
        path = watched.write("a.yaml", service())
        watched.start()
        path.unlink()

        assert watched.next() == gone()

    def test_a_document_is_removed(self, watched):
        watched.write("a.yaml", service("a"), service("b"))
        watched.start()
        watched.write("a.yaml", service("b"))

        assert watched.next() == gone("a")

    def test_only_comments_are_left(self, watched):
        watched.write("a.yaml", service())
        watched.start()
        watched.write("a.yaml", "# nothing now\n")

        assert watched.next() == gone()

    def test_a_folder_is_removed(self, watched):
        watched.write("deep/er/a.yaml", service())
        watched.start()
        shutil.rmtree(watched.directory / "deep")

        assert watched.next() == gone()

    def test_a_new_folder(self, watched):
        watched.start()
        watched.write("deep/er/a.yaml", service())

        assert said(watched.next())[0] == key()

    def test_a_file_is_renamed(self, watched):
        path = watched.write("a.yaml", service())
        watched.start()
        path.rename(watched.directory / "b.yaml")

        assert watched.flush() == []

    def test_an_object_moves_to_another_file(self, watched):
        watched.write("a.yaml", service("a"), service("b"))
        watched.start()
        watched.write("b.yaml", service("b"))
        watched.write("a.yaml", service("a"))

        assert watched.flush() == []

    def test_an_editor_renames_its_draft_over_the_file(self, watched):
        path = watched.write("a.yaml", service())
        watched.start()
        watched.write(".a.yaml.swp", service(address="10.96.0.2")).rename(path)

        assert said(watched.next())[1][0].endswith(b"\x02")

    def test_a_config_map_swaps_its_generations(self, watched):
        watched.write("..1/a.yaml", service())
        (watched.directory / "..data").symlink_to("..1")
        (watched.directory / "a.yaml").symlink_to("..data/a.yaml")
        assert names(watched.start()) == ["web"]

        watched.write("..2/a.yaml", service(address="10.96.0.2"))
        (watched.directory / "..data_tmp").symlink_to("..2")
        (watched.directory / "..data_tmp").rename(watched.directory / "..data")

        assert said(watched.next())[1][0].endswith(b"\x02")

    def test_size_and_time_alike(self, watched):
        path = watched.write("a.yaml", service(address="10.96.0.1"))
        times = path.stat()
        watched.start()
        path.write_text(service(address="10.96.0.2"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

        assert said(watched.next())[1][0].endswith(b"\x02")

    def test_a_slice_loses_its_service(self, watched):
        watched.write("a.yaml", endpoint_slice())
        watched.start()
        watched.write("a.yaml", endpoint_slice(labels=""))

        assert watched.next() == Delete(Kind.ENDPOINT_SLICE, key("web-1"))

    def test_an_object_breaks_and_is_mended(self, watched):
        watched.write("a.yaml", service())
        watched.start()
        watched.write("a.yaml", service(address="nonsense"))
        assert said(watched.next()) == (key(), "spec.clusterIP")
        watched.write("a.yaml", service())

        assert isinstance(watched.next(), Upsert)

    def test_the_repetition_ends(self, watched):
        watched.write("a.yaml", service(address="10.96.0.1"))
        path = watched.write("b.yaml", service(address="10.96.0.2"))
        watched.start()
        path.unlink()

        assert said(watched.next())[1][0].endswith(b"\x01")

    def test_a_change_arrives_soon(self, watched):
        watched.start()
        took = []
        for number in range(5):
            begun = time.monotonic()
            watched.write("a.yaml", service(address=f"10.96.0.{number}"))
            watched.next()
            took.append(time.monotonic() - begun)

        assert min(took) < 0.1

    def test_it_does_not_wake_itself(self, watched, monkeypatch):
        """Reading a file is no change of it."""
        watched.write("a.yaml", service())
        refreshed = queue.Queue()
        refresh = watched.source._refresh
        monkeypatch.setattr(watched.source, "_refresh", lambda changed: (refresh(changed), refreshed.put(changed)))
        watched.start()
        assert refreshed.get(timeout=DEADLINE_S) == set()

        with pytest.raises(queue.Empty):
            refreshed.get(timeout=0.3)


class TestHalfWritten:
    @pytest.mark.parametrize("content", ["{", "", " \n", "a: [", "\0", "!!int x", "!!bool x", "[" * 20_000], ids=repr)
    def test_what_it_said_before_stays(self, watched, content):
        path = watched.write("a.yaml", service())
        watched.start()
        path.write_text(content)

        assert watched.error().startswith(f"{path}: ")
        assert watched.flush() == []

    def test_the_next_change_is_read(self, watched):
        path = watched.write("a.yaml", service())
        watched.start()
        path.write_text(service()[:-4])
        assert watched.error().endswith("what it said before stays")
        path.write_text(service(address="10.96.0.2"))

        assert said(watched.next())[1][0].endswith(b"\x02")

    def test_a_fault_is_reported_once_until_it_is_gone(self, watched):
        path = watched.write("a.yaml", "[]")
        watched.start()
        assert watched.error() == f"{path}: document 1 is not a mapping"
        path.write_text("[] # still")
        watched.flush()
        assert watched.errors.empty()
        assert watched.source.describe()["faults"] == [f"{path}: document 1 is not a mapping"]

        path.write_text(service())
        watched.next()
        path.write_text("[]")
        assert watched.error() == f"{path}: document 1 is not a mapping; what it said before stays"

    def test_of_what_never_could_be_read_only_what_is_programmed_stays(self, watched):
        watched.write("a.yaml", "{ half")
        watched.start()

        assert watched.error().endswith("what is programmed of it stays")

    def test_the_directory_vanishes_and_returns(self, watched):
        watched.write("a.yaml", service("a"), service("b"))
        watched.start()
        watched.directory.rename(watched.directory.with_name("aside"))
        assert "what it said before stays" in watched.error()
        staged = Watched(watched.directory.with_name("staged"))
        staged.write("a.yaml", service("a"))
        staged.directory.rename(watched.directory)

        assert watched.next() == gone("b")
        watched.write("a.yaml", service("a", "10.96.0.2"))
        assert names([watched.next()]) == ["a"]

    def test_another_directory_takes_its_place(self, tmp_path, monkeypatch):
        """As when the directory is a link: no notice tells of that, and the old watch would tell of nothing more."""
        old, new = Watched(tmp_path / "old"), Watched(tmp_path / "new")
        old.write("a.yaml", service("a"))
        new.write("a.yaml", service("b"))
        link = tmp_path / "link"
        link.symlink_to("old")
        watched = Watched(link)
        monkeypatch.setattr("agent.sources.manifests._LOOK_ANYWAY_MS", 100)
        assert names(watched.start()) == ["a"]
        (tmp_path / "next").symlink_to("new")
        (tmp_path / "next").rename(link)
        assert names([watched.next()]) == ["b"]
        assert watched.next() == gone("a")
        monkeypatch.setattr("agent.sources.manifests._LOOK_ANYWAY_MS", 60_000)

        assert watched.flush() == watched.flush() == []
        watched.source.stop()

    def test_links_in_a_circle_cost_only_themselves(self, watched):
        (watched.directory / "a.yaml").symlink_to("a.yaml")
        watched.write("b.yaml", service())

        assert names(watched.start()) == ["web"]
        assert "a.yaml: " in watched.error()

    @pytest.mark.timeout(20)
    def test_what_is_no_file_is_left_alone(self, watched):
        os.mkfifo(watched.directory / "a.yaml")
        (watched.directory / "b.yaml").symlink_to("nowhere")
        (watched.directory / "c.yaml").mkdir()

        assert names(watched.start()) == []
        assert watched.errors.empty()

    def test_a_consumer_that_fails_is_told_again(self, tmp_path):
        events, errors = queue.Queue(), queue.Queue()

        def emit(event):
            events.put(event)
            if event == ListEnded(Kind.SERVICE) and errors.empty():
                raise RuntimeError("full")

        source = ManifestSource(tmp_path, Decoder("here"), emit, lambda _cause, message: errors.put(message))
        source.start()
        seen = [events.get(timeout=DEADLINE_S) for _ in range(3)]
        source.stop()

        assert seen == [ListStarted(Kind.SERVICE), ListEnded(Kind.SERVICE), ListStarted(Kind.SERVICE)]
        assert errors.get_nowait() == f"{tmp_path}: RuntimeError: full"


class TestBeingWritten:
    """Each cut is valid YAML; ``flush`` shows that the source has looked since."""

    @pytest.mark.parametrize(
        "pieces",
        [
            pytest.param(["", service("a") + "---\n", service("b", "10.96.0.9")], id="between documents"),
            pytest.param([service("a") + "---\n", *service("b", "10.96.0.9").splitlines(keepends=True)], id="lines"),
        ],
    )
    def test_what_it_said_before_stays_until_it_is_closed(self, watched, pieces):
        path = watched.write("a.yaml", service("a"), service("b"))
        watched.start()
        with path.open("w") as file:
            for piece in pieces:
                file.write(piece)
                file.flush()
                assert watched.flush() == []
            closed = time.monotonic()

        assert names([watched.next()]) == ["b"]
        assert time.monotonic() - closed < 1
        assert watched.flush() == []
        assert watched.errors.empty()

    def test_an_endpoint_list_is_cut(self, watched):
        head = endpoint_slice().split("endpoints:")[0]
        lists = "ports: [{port: 8080}]\nendpoints:\n", "- addresses: [10.0.0.1]\n", "- addresses: [10.0.0.2]\n"
        path = watched.write("a.yaml", head + "".join(lists))
        watched.start()
        with path.open("w") as file:
            for piece in (head, *lists):
                file.write(piece)
                file.flush()
                assert watched.flush() == []

        assert watched.flush() == []

    def test_the_first_list_is_incomplete(self, watched):
        path = watched.write("a.yaml", service("a"))
        watched.write("b.yaml", service("b"))
        with path.open("r+") as file:
            first = watched.start()
            assert names(first) == ["b"]
            assert {event.is_complete for event in first if isinstance(event, ListEnded)} == {False}
            with pytest.raises(queue.Empty):  # nor is it said again at each look
                watched.events.get(timeout=0.3)
            file.write(service("a"))
        second = watched.listed()

        assert names(second) == ["a", "b"]
        assert {event.is_complete for event in second if isinstance(event, ListEnded)} == {True}

    def test_one_that_is_never_closed(self, watched, monkeypatch):
        monkeypatch.setattr("agent.sources.manifests._PATIENCE_S", 0.3)
        monkeypatch.setattr("agent.sources.manifests._LOOK_ANYWAY_MS", 100)
        path = watched.write("a.yaml", service("a"))
        watched.start()
        with path.open("a") as file:
            begun = time.monotonic()
            file.write("---\n" + service("b"))
            file.flush()
            assert names([watched.next()]) == ["b"]
            assert time.monotonic() - begun > 0.3
            assert watched.error() == f"{path}: open for writing for more than 0.3 s; taken as it is"
            file.write("---\n" + service("c"))
            file.flush()
            assert names([watched.next()]) == ["c"]
            assert watched.source.describe()["faults"]
        until(lambda: not watched.source.describe()["faults"], "the fault goes when the file is closed", DEADLINE_S)

        assert watched.errors.empty()
        assert watched.flush() == []

    def test_it_does_not_spin(self, watched, monkeypatch):
        looks = queue.Queue()
        refresh = watched.source._refresh
        monkeypatch.setattr(watched.source, "_refresh", lambda changed: (refresh(changed), looks.put(time.monotonic())))
        with watched.write("a.yaml", service()).open("r+"):
            watched.start()
            times = [looks.get(timeout=DEADLINE_S) for _ in range(6)]

        assert times[-1] - times[0] > 5 * 0.04

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.ENOLCK], ids=errno.errorcode.get)
    def test_where_there_are_no_leases(self, watched, monkeypatch, code):
        def refuse(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(writers.fcntl, "fcntl", refuse)
        with watched.write("a.yaml", service()).open("a"):
            assert names(watched.start()) == ["web"]

    @pytest.mark.parametrize(("mode", "expected"), [("r", False), ("a", True), ("r+", True)])
    def test_who_has_it_open(self, tmp_path, mode, expected):
        path = tmp_path / "a.yaml"
        path.write_text("content")
        with path.open(mode):
            assert writers.has_writer(str(path)) is expected
            assert writers.read_file(str(path)) == (b"content", expected)

        assert not writers.has_writer(str(path))

    def test_a_writer_that_came_and_went_meanwhile(self, tmp_path, monkeypatch):
        path = tmp_path / "a.yaml"
        path.write_text("content")
        monkeypatch.setattr(writers, "_has_writer", lambda _: path.write_text("longer content") == 0)

        assert writers.read_file(str(path)).is_being_written

    def test_a_writer_that_breaks_the_lease_does_not_end_the_process(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("content")
        done = subprocess.run(
            [sys.executable, "-c", BREAK_THE_LEASE, str(path)], capture_output=True, text=True, timeout=20, check=False
        )

        assert (done.returncode, done.stdout) == (0, "broken\nFalse\n")


BREAK_THE_LEASE = """
import fcntl, os, signal, sys
from agent.sources import writers

signal.signal(signal.SIGIO, signal.SIG_DFL)
control = fcntl.fcntl

def control_and_open(descriptor, command, value):
    control(descriptor, command, value)
    if (command, value) == (fcntl.F_SETLEASE, fcntl.F_RDLCK):
        try:
            os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)
        except BlockingIOError:
            print("broken", flush=True)

fcntl.fcntl = control_and_open
print(writers.has_writer(sys.argv[1]))
"""


class TestUnidentified:
    @pytest.mark.parametrize(
        ("old", "new", "fault"),
        [
            ("name: x", "name: 5", "Service: metadata.name: Expected `str`, got `int`"),
            ("  name: x\n", "", "Service: metadata.name: missing"),
            ("namespace: shop", "namespace: 5", "Service: metadata.namespace: Expected `str | null`, got `int`"),
            ("kind: Service\n", "", "document 1 has no kind"),
            ("apiVersion: v1\n", "", "document 1 has no apiVersion"),
            ("kind: Service", "kind: Sevice", "document 1 is v1 Sevice; did you mean v1 Service?"),
            ("apiVersion: v1", "apiVersion: v2", "document 1 is v2 Service; did you mean v1 Service?"),
        ],
        ids=["name", "no name", "namespace", "no kind", "no apiVersion", "kind", "apiVersion"],
    )
    def test_what_it_said_before_stays_until_it_is_mended(self, watched, old, new, fault):
        path = watched.write("a.yaml", service("x"), service("y"))
        watched.start()
        broken = service("x").replace(old, new)
        watched.write("a.yaml", broken, service("y", "10.96.0.9"))
        assert names([watched.next()]) == ["y"]
        assert watched.error() == f"{path}: {fault}; what it said before stays"
        watched.write("a.yaml", broken, "# still broken\n" + service("y"))
        assert names(watched.flush()) == ["y"]
        path.write_text("")
        assert watched.error().endswith("empty; what it said before stays")
        watched.write("a.yaml", broken)
        assert watched.flush() == []

        watched.write("a.yaml", service("y"))
        assert watched.next() == gone("x")
        assert watched.flush() == []

    def test_it_is_mended_with_another_address(self, watched):
        watched.write("a.yaml", service("x"))
        watched.start()
        watched.write("a.yaml", service(5))
        assert "metadata.name" in watched.error()
        watched.write("a.yaml", service("x", "10.96.0.9"))

        assert said(watched.next())[1][0].endswith(b"\x09")

    def test_another_kind_keeps_nothing(self, watched):
        watched.write("a.yaml", service("x"), service("y"))
        watched.start()
        watched.write("a.yaml", service("x").replace("kind: Service", "kind: Pod"), service("y"))

        assert watched.next() == gone("x")
        assert watched.errors.empty()

    def test_a_file_that_says_it_counts_more(self, watched):
        watched.write("z.yaml", service("x"), service("y"))
        watched.start()
        watched.write("z.yaml", service(5))
        assert watched.error().endswith("stays")
        watched.write("a.yaml", service("x", "10.96.0.9"))

        assert said(watched.next())[1][0].endswith(b"\x09")

    def test_a_slice_that_lost_its_service_is_known(self, watched):
        watched.write("a.yaml", endpoint_slice(), service("x"))
        watched.start()
        watched.write("a.yaml", endpoint_slice(labels=""), service(5))

        assert watched.next() == Delete(Kind.ENDPOINT_SLICE, key("web-1"))
        assert watched.flush() == []


class TestLife:
    def test_stops_promptly(self, watched):
        watched.start()
        begun = time.monotonic()
        watched.source.stop()

        assert time.monotonic() - begun < 0.5
        assert not watched.source._thread.is_alive()

    def test_stops_unstarted(self, tmp_path):
        ManifestSource(tmp_path, Decoder("here"), print).stop()

    def test_describe(self, watched):
        watched.write("a.yaml", service("a"), service("b"))
        watched.start()
        watched.flush()

        assert watched.source.describe() == {
            "kind": "manifests",
            "directory": str(watched.directory),
            "files": 2,
            "objects": 3,
            "faults": [],
        }


class TestContents:
    """What is found in one file, without a directory."""

    @pytest.mark.parametrize(
        ("text", "objects", "faults"),
        [
            pytest.param("", 0, [], id="empty"),
            pytest.param("---\n---\n# nothing\n", 0, [], id="empty documents"),
            pytest.param(f"{NODE}\n---\n{CONFIG_MAP}", 1, [], id="a kind that is not read"),
            pytest.param("{apiVersion: serving.knative.dev/v1, kind: Service}", 0, [], id="another API's Service"),
            pytest.param("{apiVersion: v1}", 0, ["document 1 has no kind"], id="no kind"),
            pytest.param("{kind: Service}", 0, ["document 1 has no apiVersion"], id="no apiVersion"),
            pytest.param("{apiVersion: [v1], kind: {a: b}}", 0, ["document 1 has no apiVersion"], id="wrong types"),
            pytest.param(f"text\n---\n{NODE}", 1, ["document 1 is not a mapping"], id="text"),
            pytest.param(f"{{apiVersion: v1, kind: List, items: [{NODE}, {CONFIG_MAP}]}}", 1, [], id="List"),
            pytest.param("{apiVersion: v1, kind: NodeList, items: [{metadata: {name: a}}]}", 1, [], id="NodeList"),
            pytest.param("{apiVersion: v1, kind: List, items: null}", 0, [], id="null items"),
            pytest.param("{apiVersion: v1, kind: List, items: 3}", 0, ["document 1: items is not a list"], id="items"),
            pytest.param(
                "{apiVersion: v1, kind: List, items: [3, {}]}",
                0,
                ["document 1, item 1 is not a mapping", "document 1, item 2 has no apiVersion"],
                id="bad items",
            ),
            pytest.param(
                "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: ServiceList}]}",
                0,
                [],
                id="a list in a list",
            ),
            pytest.param("&a {apiVersion: v1, kind: List, items: [*a]}", 0, [], id="a list within itself"),
        ],
    )
    def test_yaml(self, text, objects, faults):
        contents = read_contents(text.encode(), is_json=False)

        assert (len(contents.objects), contents.faults) == (objects, faults)

    @pytest.mark.parametrize(
        ("version", "kind", "meant"),
        [
            ("v1", "Sevice", "v1 Service"),
            ("v1", "service", "v1 Service"),
            ("v1", "Services", "v1 Service"),
            ("v1", "NODE", "v1 Node"),
            ("v1", "Lst", "v1 List"),
            ("V1", "Service", "v1 Service"),
            ("v2", "Service", "v1 Service"),
            ("apps/v1", "Service", "v1 Service"),
            ("v1", "EndpointSlice", "discovery.k8s.io/v1 EndpointSlice"),
            ("discovery.k8s.io/v1beta1", "EndpointSlice", "discovery.k8s.io/v1 EndpointSlice"),
            ("discovery.k8s.io/v1", "EndpointsSlice", "discovery.k8s.io/v1 EndpointSlice"),
            ("v1", "NetworkPolicy", "networking.k8s.io/v1 NetworkPolicy"),
            ("extensions/v1beta1", "NetworkPolicy", "networking.k8s.io/v1 NetworkPolicy"),
            (
                "policy.networking.k8s.io/v1alpha1",
                "ClusterNetworkPolicy",
                "policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy",
            ),
            ("v1", "Pods", "v1 Pod"),
            *(
                ("policy.networking.k8s.io/v1alpha1", kind, "policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy")
                for former in ("AdminNetworkPolicy", "BaselineAdminNetworkPolicy")
                for kind in (former, f"{former}List")
            ),
        ],
    )
    def test_misspelt(self, version, kind, meant):
        contents = read_contents(f"{{apiVersion: {version}, kind: {kind}}}".encode(), is_json=False)

        assert contents == ([], [f"document 1 is {version} {kind}; did you mean {meant}?"])

    @pytest.mark.parametrize("suffix", ["", "List"])
    def test_simply_others(self, suffix):
        core = """Binding ComponentStatus ConfigMap Endpoints Event LimitRange PersistentVolume
            PersistentVolumeClaim PodTemplate ReplicationController ResourceQuota Secret ServiceAccount"""
        types = [("v1", kind) for kind in core.split()]
        types += [("apps/v1", "Deployment"), ("networking.k8s.io/v1", "ServiceCIDR"), ("batch/v1", "Job")]
        types += [("crd.projectcalico.org/v1", "NetworkPolicy"), ("policy/v1", "PodDisruptionBudget")]
        types += [("example.org/v1alpha1", "AdminNetworkPolicy")]
        types += [("config.openshift.io/v1", "Node"), ("metrics.k8s.io/v1beta1", "NodeMetrics")]
        text = "\n---\n".join(f"{{apiVersion: {version}, kind: {kind}{suffix}}}" for version, kind in types)

        assert read_contents(text.encode(), is_json=False) == ([], [])

    @pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"{} {}", b"[" * 100_000], ids=lambda text: repr(text[:6]))
    def test_not_json(self, text):
        with pytest.raises(ValueError, match="not JSON"):
            read_contents(text, is_json=True)

    @pytest.mark.parametrize(
        "text",
        [b"{", b"!!int x", b"!!bool x", b"!!timestamp x", b"9" * 5000, b"? [1]\n: 2", b"\xff\xff", b"- " * 20_000],
        ids=lambda text: repr(text[:12]),
    )
    def test_not_yaml(self, text):
        with pytest.raises(ValueError, match="not YAML"):
            read_contents(text, is_json=False)

    def test_timestamps_stay_text(self):
        ((_, value),) = read_contents(service().encode(), is_json=False).objects

        assert value["metadata"]["creationTimestamp"] == "2024-05-01T10:00:00Z"


POD = "{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop}, status: {podIP: 10.0.0.1}}"
NAMESPACE = "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}"
POLICY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {}, ingress: [{ports: [{port: 80}]}]}
"""
CLUSTER_POLICY = """\
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: all}
spec: {tier: Admin, priority: 1, subject: {namespaces: {}}}
"""


@pytest.mark.parametrize("policy", [True, False], ids=["on", "off"])
def test_policy_is_read_where_it_is_on(tmp_path, policy):
    documents = [CLUSTER_POLICY, POLICY, NAMESPACE, POD, service()]
    (tmp_path / "a.yaml").write_text("\n---\n".join(documents))
    events = queue.Queue()
    decoder = Decoder("here", policy=policy)
    source = ManifestSource(tmp_path, decoder, events.put)
    source.start()
    try:
        found = [events.get(timeout=DEADLINE_S)]
        while not (isinstance(found[-1], ListEnded) and found[-1].kind is decoder.kinds[-1]):
            found.append(events.get(timeout=DEADLINE_S))
    finally:
        source.stop()
    read = {(event.record.kind, str(event.record.key)) for event in found if isinstance(event, Upsert)}

    listed = [event.kind for event in found if isinstance(event, ListStarted)]
    of_policy = {
        (Kind.POD, "shop/web"),
        (Kind.NAMESPACE, "shop"),
        (Kind.NETWORK_POLICY, "shop/web"),
        (Kind.CLUSTER_NETWORK_POLICY, "all"),
    }
    assert read == {(Kind.SERVICE, "shop/web")} | (of_policy if policy else set())
    assert set(listed) == SERVICE_KINDS | (POLICY_KINDS if policy else set())


def test_a_policy_that_cannot_be_read_is_told_with_its_field(tmp_path):
    (tmp_path / "a.yaml").write_text(POLICY.replace("80", "0"))
    events = queue.Queue()
    source = ManifestSource(tmp_path, Decoder("here", policy=True), events.put)
    source.start()
    try:
        while not isinstance(event := events.get(timeout=DEADLINE_S), Malformed):
            assert event != ListEnded(Kind.CLUSTER_NETWORK_POLICY)
    finally:
        source.stop()

    assert (event.kind, event.key, event.field) == (Kind.NETWORK_POLICY, key(), "spec.ingress[0].ports[0].port")


def test_a_link_to_the_directory_is_watched(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    watched = Watched(tmp_path / "link")
    watched.start()
    Path(tmp_path, "real", "a.yaml").write_text(service())
    event = watched.next()
    watched.source.stop()

    assert said(event)[0] == key()
