"""A bpffs that is mounted here is unmounted here, and only then."""

from __future__ import annotations

import pytest

from agent.kernel import bpffs
from tests.requirements import require_root


@pytest.mark.parametrize("was_there", [True, False], ids=["a directory of somebody's", "a directory of ours"])
def test_the_directory_goes_only_if_it_was_made_for_the_mount(tmp_path, was_there):
    require_root()
    path = tmp_path / "bpf"
    if was_there:
        path.mkdir()

    bpffs.ensure_mounted(path)
    try:
        assert bpffs.is_bpffs(path)
        (path / "pinned").mkdir()
        assert not bpffs.unmount_if_ours(path), "somebody's pins stay"
        (path / "pinned").rmdir()
    finally:
        assert bpffs.unmount_if_ours(path)

    assert path.exists() is was_there
