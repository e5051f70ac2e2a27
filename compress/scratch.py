"""Folders for temporary files that no kill leaves behind for good."""

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

SCRATCH = "compress-scratch-"


class Scratch:
    """A folder for temporary files, `path`: gone with this object, or with the process. What a
    killed process has left is removed by whoever makes the next one.

    The kernel releases the lock on a folder when its process dies.
    """

    def __init__(self) -> None:
        base = Path(tempfile.gettempdir())
        for older in base.glob(f"{SCRATCH}*"):
            if (handle := _locked(older)) is not None:
                shutil.rmtree(older, ignore_errors=True)
                os.close(handle)

        # Until the lock is there, somebody else may take a new folder for one that was left.
        handle = None
        while handle is None:
            self.path = Path(tempfile.mkdtemp(prefix=SCRATCH))
            handle = _locked(self.path)
            if not self.path.is_dir():
                handle = None
        self._gone = weakref.finalize(self, _let_go, self.path, handle, os.getpid())

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self._gone()


def _locked(folder: Path) -> int | None:
    """A handle that holds a folder of ours which nobody else holds."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(handle).st_uid == os.geteuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _let_go(folder: Path, handle: int, owner: int) -> None:
    """Remove a folder of temporary files, in the process that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)
