"""Objects from a directory of manifests, for a node without an API server.

Every ``*.yaml``, ``*.yml`` and ``*.json`` below the directory is read; names that begin with a dot are not, because
that is where editors keep drafts and where a mounted ConfigMap keeps the generations that its links point into.

- A file that cannot be read or parsed, or was emptied, is taken for half written: what it said before stays, the
  fault is reported, and the file's next change is the next attempt. To remove objects, remove the file or the
  document. The same holds when the directory itself vanishes.
- A file that somebody has open for writing is not read until it is closed, or has been open for ten seconds.
- While a file holds something that cannot be told to be this object or that, for want of a name or a kind, none of
  its objects is removed: it may be the one.
- An object that two files hold, or one file twice, is what the last of them says, in the order of paths; that is
  reported.
- Objects of kinds that are not decoded, as those of policy where it is off, are as if they were not there.
- What is emitted is the difference: an object that still says the same is not emitted again.
- A fault is reported when it appears, and again only after it was gone.

The watch only says when to look. What changed is told by each file's identity, size and time, so that a lost or
doubtful notice (the kernel's queue overflowed, a link's target changed elsewhere) costs a delay and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

from agent.core.events import Delete, Event, ListEnded, ListStarted, Malformed, Upsert
from agent.core.records import Kind, ObjectKey
from agent.errors import ConfigError
from agent.sources.decode import UNNAMED, Decoder
from agent.sources.documents import Contents, read_contents
from agent.sources.writers import has_writer, read_file

log = logging.getLogger("ebproxy.source.manifests")

OnError = Callable[[str, str], None]

_SUFFIXES = (".yaml", ".yml", ".json")
# A change is looked at once the directory has been quiet for a step, or changing for the longest wait. The step is
# also how often the watch looks at the stop event: 40 times a second costs 0.2 % of a core.
_STEP_MS = 25
_LONGEST_WAIT_MS = 75
_LOOK_ANYWAY_MS = 10_000
_RETRY_S = 1.0
# Closing a file gives no notice, so what is being written is looked at again, but not for ever: some never close.
_LOOK_AGAIN_MS = 50
_PATIENCE_S = 10.0

_NAMING_FIELDS = ("metadata.name", "metadata.namespace")

_Identity = tuple[Kind, ObjectKey]
_Said = Upsert | Malformed
_Signature = tuple[int, ...]


class _File(NamedTuple):
    """A file as it was last read: which version of it, what its objects are, and what is wrong with it."""

    signature: _Signature
    objects: tuple[tuple[_Identity, _Said], ...] = ()
    faults: tuple[str, ...] = ()
    was_read: bool = True
    """Whether any version of it could be read: else nobody knows what it says."""
    kept: tuple[tuple[_Identity, _Said], ...] = ()
    """Objects of former versions, one of which may be what cannot be identified in this one."""
    awaited_since: float | None = None
    """When it was first seen being written, if it is to be read once that ends."""
    is_overdue: bool = False
    """Whether it was read while it was being written, after waiting in vain."""


_UNREAD = _File((), was_read=False)


class ManifestSource:
    """Reads and watches a directory, on a thread of its own, from which ``emit`` and ``on_error`` are called.

    ``on_error`` is given a cause, fit for a metric's label, and a message that begins with the path.
    """

    def __init__(
        self,
        directory: str | Path,
        decoder: Decoder,
        emit: Callable[[Event], None],
        on_error: OnError = lambda _cause, _message: None,
    ) -> None:
        self._directory = Path(directory).absolute()
        self._decoder = decoder
        self._emit = emit
        self._on_error = on_error
        self._files: dict[str, _File] = {}
        self._published: dict[_Identity, _Said] = {}
        self._faults: frozenset[str] = frozenset()
        self._is_listed: bool | None = None  # None: nothing was said yet
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manifests", daemon=True)

    def start(self) -> None:
        """Begin to read and watch; returns at once.

        Raises: ConfigError, when the directory is not there.
        """
        if not self._directory.is_dir():
            raise ConfigError([f"manifests: {self._directory} is not a directory"])
        log.info("reading directory=%s", self._directory)
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """End the watch and wait for the thread."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def describe(self) -> dict[str, object]:
        """Say for ``ebproxy status`` what is read and how that goes."""
        return {
            "kind": "manifests",
            "directory": str(self._directory),
            "files": len(self._files),
            "objects": len(self._published),
            "faults": sorted(self._faults),
        }

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._follow()
            except (OSError, WatchfilesRustInternalError) as error:
                self._fail(f"{self._directory}: {error}; what it said before stays")
            except Exception as error:  # a dead thread would freeze the node unnoticed
                log.exception("defect directory=%s", self._directory)
                self._fail(f"{self._directory}: {type(error).__name__}: {error}")

    def _fail(self, fault: str) -> None:
        self._report(self._faults | {fault})
        self._stopping.wait(_RETRY_S)

    def _follow(self) -> None:
        """Watch the directory and refresh at each change, until another takes its place or the source stops.

        The watch is there before the first look, so that nothing falls between the two.
        """
        watched = _inode(self._directory)
        changed: set[str] = set()
        with RustNotify([str(self._directory)], False, False, 0, True, True) as watch:
            while not self._stopping.is_set():
                self._refresh(changed)
                notices = watch.watch(_LONGEST_WAIT_MS, _STEP_MS, self._pause_ms(), self._stopping)
                changed = {path for _, path in notices} if isinstance(notices, set) else set()
                if _inode(self._directory) != watched:
                    return

    def _pause_ms(self) -> int:
        is_awaiting = any(file.awaited_since is not None for file in self._files.values())
        return _LOOK_AGAIN_MS if is_awaiting else _LOOK_ANYWAY_MS

    def _refresh(self, changed: set[str]) -> None:
        """Read the files that are new, different or named in ``changed``, and emit what that makes of the objects."""
        files = {}
        for path, signature in sorted(_find(str(self._directory))):
            known = self._files.get(path, _UNREAD)
            is_same = known.signature == signature and path not in changed
            files[path] = known if is_same and not _is_done(path, known) else self._read(path, signature, known)
        self._files = files
        objects, repeats = _merge(files)
        self._report(repeats.union(f"{path}: {fault}" for path, file in files.items() for fault in file.faults))
        self._publish(objects)

    def _read(self, path: str, signature: _Signature, before: _File) -> _File:
        try:
            content, is_being_written = read_file(path)
            if is_being_written and (since := _await(before)) is not None:
                return before._replace(signature=(), awaited_since=since)
            if (before.objects or before.kept) and not content.strip():
                raise ValueError("empty")  # noqa: TRY301 - as good as unreadable
            contents = read_contents(content, is_json=path.lower().endswith(".json"))
        except FileNotFoundError:  # gone since it was found: the next look will say so
            return before
        except (OSError, ValueError) as error:
            stands = "what it said before stays" if before.was_read else "what is programmed of it stays"
            faults = (f"{error}; {stands}",)
            return _File(signature, before.objects, faults, before.was_read, before.kept)
        return self._decode(signature, contents, before, is_overdue=is_being_written)

    def _decode(self, signature: _Signature, contents: Contents, before: _File, *, is_overdue: bool) -> _File:
        objects: list[tuple[_Identity, _Said]] = []
        named: set[_Identity] = set()
        faults = contents.faults
        for kind, value in contents.objects:
            if kind not in self._decoder.kinds:
                continue
            match self._decoder.decode_object(kind, value):
                case Malformed(key=key, field=field, reason=reason) if key == UNNAMED or field in _NAMING_FIELDS:
                    faults.append(f"{kind}: {field}: {reason}")
                case Malformed(key=key) as event:
                    objects.append(((kind, key), event))
                case Upsert(record=record) as event:
                    objects.append(((kind, record.key), event))
                case Delete(key=key):
                    named.add((kind, key))
        named.update(identity for identity, _ in objects)
        kept = tuple(item for item in before.objects + before.kept if faults and item[0] not in named)
        if kept:
            faults = [f"{fault}; what it said before stays" for fault in faults]
        if is_overdue:
            faults.append(f"open for writing for more than {_PATIENCE_S:g} s; taken as it is")
        return _File(signature, tuple(objects), tuple(faults), kept=kept, is_overdue=is_overdue)

    def _report(self, faults: frozenset[str]) -> None:
        for fault in sorted(faults - self._faults):
            self._on_error("manifest", fault)
        self._faults = faults

    def _publish(self, objects: dict[_Identity, _Said]) -> None:
        """Emit everything, again at each change until all files could be read, and then the difference.

        Deletions come last, so that moved addresses have an heir.
        """
        if self._is_listed:
            self._publish_changes(objects)
        else:
            is_complete = all(file.was_read for file in self._files.values())
            if is_complete or self._is_listed is None or objects != self._published:
                self._publish_list(objects, is_complete=is_complete)
            self._is_listed = is_complete
        self._published = objects

    def _publish_list(self, objects: dict[_Identity, _Said], *, is_complete: bool) -> None:
        for kind in self._decoder.kinds:
            self._emit(ListStarted(kind))
            for event in (event for (other, _), event in objects.items() if other is kind):
                self._emit(event)
            self._emit(ListEnded(kind, is_complete=is_complete))

    def _publish_changes(self, objects: dict[_Identity, _Said]) -> None:
        for identity, event in objects.items():
            before = self._published.get(identity)
            if event is not before and event != before:
                self._emit(event)
        for kind, key in self._published:
            if (kind, key) not in objects:
                self._emit(Delete(kind, key))


def _find(directory: str) -> Iterator[tuple[str, _Signature]]:
    """Find the manifests below a directory, and what tells one version of each from the next.

    Raises: OSError, when a directory cannot be listed: to take its files for removed would remove their objects.
    """
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # removed since it was found
                    yield from _find(entry.path)
            elif entry.name.lower().endswith(_SUFFIXES) and (signature := _sign(entry)):
                yield entry.path, signature


def _sign(entry: os.DirEntry[str]) -> _Signature | None:
    """Tell this version of a file from others; None for what is no file, or a link to nothing."""
    try:
        status = entry.stat()
    except FileNotFoundError:
        return None
    except OSError:
        return (-1,)  # let reading it say why
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _await(file: _File) -> float | None:
    """Tell since when a file is awaited that is being written; None once it was awaited for long enough."""
    now = time.monotonic()
    since = now if file.awaited_since is None else file.awaited_since
    return since if now - since < _PATIENCE_S else None


def _is_done(path: str, file: _File) -> bool:
    """Tell whether a file that was read while it was being written is no longer."""
    try:
        return file.is_overdue and not has_writer(path)
    except OSError:
        return True  # let reading it say why


def _inode(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_dev, status.st_ino


def _merge(files: dict[str, _File]) -> tuple[dict[_Identity, _Said], frozenset[str]]:
    """Gather the objects of all files, the last of a name winning, and word a fault for each that is repeated."""
    objects: dict[_Identity, _Said] = {}
    owners: dict[_Identity, str] = {}
    repeats = set()
    for path, file in files.items():
        for identity, event in file.objects:
            if identity in owners:
                repeats.add(f"{owners[identity]}: {identity[0]} {identity[1]} is repeated in {path}, which counts")
            owners[identity] = path
            objects[identity] = event
    for file in files.values():
        for identity, event in file.kept:
            objects.setdefault(identity, event)
    return objects, frozenset(repeats)
