"""Elementwise work over a large tensor in pieces that stay in the cache, on as many Python threads as torch may use.

A chain of k torch operations over a whole tensor moves it through memory k times, and pays for k temporaries. Cut into
pieces of at most torch's own grain (32,768 elements, below which it starts no OpenMP region) the chain runs from cache;
torch releases the interpreter lock inside operations, so plain threads scale. The cuts, and so the results, do not
depend on the number of threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

ROWS = 1024  # blocks of 32 in one piece: 32,768 elements


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="chunks")


def each_chunk(rows: int, device: torch.device, work: Callable[[slice], None], size: int = ROWS) -> None:
    """Call `work(slice)` without gradient until 0..`rows` is covered, `size` at a time; on anything but a CPU in one piece."""
    threads = min(torch.get_num_threads(), -(-rows // size))
    piece = size if device.type == "cpu" else max(rows, 1)

    def span(start: int, stop: int) -> None:
        with torch.inference_mode(False), torch.no_grad():  # both are thread-local
            for at in range(start, stop, piece):
                work(slice(at, min(at + piece, stop)))

    if threads <= 1 or device.type != "cpu":
        span(0, rows)
        return
    bounds = [min(rows, -(-rows // piece) * i // threads * piece) for i in range(threads + 1)]
    for done in [_pool(threads).submit(span, *pair) for pair in zip(bounds, bounds[1:], strict=False)]:
        done.result()
