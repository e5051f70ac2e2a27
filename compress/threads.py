"""How many threads this process may compute on, and how they wait for one another."""

import os

BUSY_CPUS = 0.5  # of others, from which on waiting threads sleep
LOOK_SECONDS = 0.2


def available_threads() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def give_way() -> float:
    """Before torch is imported: where other processes keep CPUs busy, let OpenMP's threads sleep
    while they wait for one another, for this process and those that it starts. Returns how many
    of the CPUs that this process may run on are busy; numbers do not depend on it.

    By default they spin, which is faster on a quiet machine and takes the time of the very thread
    that is waited for on a busy one (results/speed/waiting.md). An environment that says how they
    wait is left alone.
    """
    import psutil

    shares = psutil.cpu_percent(LOOK_SECONDS, percpu=True)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(shares))
    busy = sum(share for cpu, share in enumerate(shares) if cpu in allowed) / 100
    if busy >= BUSY_CPUS:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return busy
