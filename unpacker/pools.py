"""Where a run's tasks are executed: threads that ask registries, processes that read layers.

Both are `concurrent.futures.Executor`s, so that another engine's can take their place.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
A = TypeVar("A")

ASKING_THREADS = 16
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
# Of glibc's malloc.h: parameters of mallopt.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


@contextmanager
def asking(threads: int = ASKING_THREADS) -> Iterator[Executor]:
    """Threads that ask registries. Leaving by exception, such as a signal to stop, does not wait for them: a registry
    may keep them for as long as it likes."""
    executor = ThreadPoolExecutor(threads, "asking")
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown(wait=True)


class Pools:
    """The executors of one run. Leaving it normally waits for nothing that is still wanted; leaving it by exception
    ends the processes at once, and does not wait for threads, which a registry may keep for as long as it likes."""

    asking: Executor
    layers: Executor

    def __init__(self, jobs: int) -> None:
        """With one job layers are read in a thread of this process: one layer keeps a core busy by itself."""
        _keep_memory()
        self.jobs = jobs
        self._processes = jobs > 1
        if self._processes:
            layers = ProcessPoolExecutor(jobs, _context(), _start_worker, (os.getpid(),))
            # Forks all workers now, before this process has threads or connections that they would inherit.
            try:
                with _signals_held():
                    layers.submit(os.getpid).result()
            except BaseException:
                # If it is forking that failed, nobody else would end those that it made.
                for process in multiprocessing.active_children():
                    process.terminate()
                layers.shutdown(wait=True)  # as at the end, see there
                raise
            self.layers = layers
        else:
            self.layers = ThreadPoolExecutor(1, "layers")
        self.asking = ThreadPoolExecutor(ASKING_THREADS, "asking")
        self._isolating = ThreadPoolExecutor(1, "isolating")

    def read(self, function: Callable[[A], T], argument: A) -> Future[T]:
        """Has a task done by `layers`; by new processes if one of theirs died."""
        try:
            return self.layers.submit(function, argument)
        except BrokenProcessPool:
            self.layers.shutdown(wait=False)
            self.layers = ProcessPoolExecutor(self.jobs, _context(), _start_worker, (os.getpid(),))
            return self.layers.submit(function, argument)

    def alone(self, function: Callable[[A], T], argument: A) -> Future[T]:
        """Runs one task in a process of its own, which it may kill without harm to others; one such task at a time,
        because memory may be what they lack."""
        return self._isolating.submit(_isolated, function, argument)

    def __enter__(self) -> Pools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        threads = (self.asking, self._isolating) if self._processes else (self.asking, self._isolating, self.layers)
        for pool in threads:
            pool.shutdown(wait=False, cancel_futures=True)
        if error is not None and self._processes:
            for process in multiprocessing.active_children():
                process.terminate()
        if self._processes:
            # Once, and waiting: a pool of processes that was let go without cannot be waited for any more, and its
            # end then races with the interpreter's, which prints a traceback now and then.
            self.layers.shutdown(wait=True, cancel_futures=True)
        if error is None:
            for pool in threads:
                pool.shutdown(wait=True)


def _isolated(function: Callable[[A], T], argument: A) -> T:
    with ProcessPoolExecutor(1, _context(), _start_worker, (os.getpid(),)) as pool:
        return pool.submit(function, argument).result()


def _context() -> multiprocessing.context.BaseContext:
    # A fork of a process with other threads may inherit a lock that nobody will ever release.
    return multiprocessing.get_context("fork" if threading.active_count() == 1 else "spawn")


@contextmanager
def _signals_held() -> Iterator[None]:
    """Lets no signal arrive before the end. What a handler raises while the interpreter runs its hooks of fork is
    printed and lost, and then the locks that those hooks took stay taken."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _start_worker(parent: int) -> None:
    """Makes a worker die with its parent, and leaves Ctrl-C to the parent, which ends the workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _keep_memory() -> None:
    """Lets malloc keep what pieces of layers were read into, for the next ones.

    It would give each buffer back to the kernel and take new, zeroed pages for the next: a quarter of the time of
    reading a layer. What is kept is bounded by what was in use at once, a few MB. Another libc has no mallopt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 256 << 20)
    mallopt(_M_TOP_PAD, 4 << 20)
