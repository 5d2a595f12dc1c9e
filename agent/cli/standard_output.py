"""Standard output as commands have it: what cannot be written there ends them in a line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from agent.errors import EbproxyError


class StandardOutput:
    """A stream whose errors are told from others'; None = nobody listens, as where it was closed."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write. Raises: EbproxyError."""
        if self._stream is None:
            return len(text)
        with self._telling(self._stream):
            return self._stream.write(text)

    def flush(self) -> None:
        """Write what has gathered. Raises: EbproxyError."""
        if self._stream is not None:
            with self._telling(self._stream):
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _telling(self, stream: TextIO) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            # What has gathered would be tried again when the interpreter ends.
            with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
            message = f"cannot write: {error.strerror}"
            raise EbproxyError(message) from error
