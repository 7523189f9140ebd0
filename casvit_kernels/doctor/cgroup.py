"""How much of the machine's CPU time Linux's control groups give this process."""

from __future__ import annotations

from pathlib import Path, PurePosixPath


def quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time, as `docker run --cpus` sets it; None where it is not limited.

    The smallest of the group's own and those around it.

    Args:
        root: where /proc and /sys are.
    """
    limits = [limit for folder in _folders(root) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _folders(root: Path) -> list[Path]:
    """Those of the process's group and of all around it, in both versions of control groups."""
    mounted = root / "sys" / "fs" / "cgroup"
    folders = []
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = mounted
        elif "cpu" in controllers.split(","):
            base = mounted / controllers
            if not base.is_dir():
                base = mounted / "cpu"
        else:
            continue
        # In a container the path may be the host's, of which only the mount itself is seen.
        inner = PurePosixPath(path.lstrip("/"))
        folders += [base / inner, *(base / parent for parent in inner.parents), base]
    return folders


def _limit(folder: Path) -> float | None:
    """Of one group."""
    words = _read(folder / "cpu.max").split()
    if not words:
        words = (
            _read(folder / "cpu.cfs_quota_us").split() + _read(folder / "cpu.cfs_period_us").split()
        )
    try:
        time, period = (int(word) for word in words)
    except ValueError:  # "max", or neither file
        return None
    return time / period if time > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return ""
