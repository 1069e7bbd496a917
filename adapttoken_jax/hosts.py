"""The processes of one run, usually one per host: how they start, which one writes, and how they end.

Design decisions:
- Every process runs the same program and takes the same decisions: what it reads back from the devices it reads whole
  (`sharding.everywhere`), and process 0's clock counts (`sharding.agreed`). A process hands the devices its own part of
  an array only (`sharding.place`), so it decodes its share of the video and reads its share of the weights.
- Process 0 alone prints the answer and writes files.
- Nobody waits for a process that is lost. JAX notices it, by silence or by a collective that fails, and where no Python
  runs it ends the process by abort(); both become one line and the status `LOST`.
- A process that fails waits a moment for others that may be failing alike, then leaves, and the others lose it.
- Joining waits in a thread: signals are heard in the main one, which must not be in JAX for that. Nor may it wait for a
  lock: a signal that came just before, or to another thread, would not wake it. It looks up now and again instead.
"""

import concurrent.futures
import contextlib
import ctypes
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable

from adapttoken_jax.errors import UserError

LOST = 4  # exit status of a process that was left alone
LOST_AFTER = 60  # seconds without a sign of life
JOIN_WITHIN = 300  # seconds from the first process to the last

_GLANCE = 0.1  # seconds between two looks at what is waited for
_MOMENT = 5.0  # seconds in which processes that fail alike find each other
_PATIENCE = 7 * 24 * 3600  # seconds that a process waits at its end for others that are still at work

# What collectives say when a peer's connection breaks: gloo on CPUs, NCCL on GPUs, the coordination service.
_BROKEN = re.compile(r"gloo|nccl|coordination service|connection (closed|reset)", re.IGNORECASE)

_index = 0
_joining = _together = False
_handlers = []  # C keeps a bare pointer to them
_ending = threading.Lock()


def start(
    program: str,
    process: str | None = None,
    lost_after: int = LOST_AFTER,
    join_within: int = JOIN_WITHIN,
    debug: bool = False,
    shared_cache: bool = False,
) -> None:
    """Joins the other processes of the run; call it before anything else of JAX.

    Args:
      program: begins the line on stderr by which a process ends that was left alone.
      process: "INDEX/COUNT@HOST:PORT", where process 0 listens; None: as the cluster says (a TPU pod, SLURM, Open MPI).
      lost_after: seconds without a sign of life after which a process counts as lost.
      join_within: seconds to wait for the others.
      debug: let the runtime print what it has to say.
      shared_cache: whether all processes look for compiled programs in one directory, which the user has named.

    Raises:
      UserError: nothing says which process this is, or the others have not come.
    """
    global _index, _joining, _together
    known = {} if process is None else _parse(process)
    if not debug:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "4")  # else a page of C++ frames precedes the one line
    import jax  # after the variable above, and the help need not wait for it

    _keep_stdout()
    _on_abort(lambda: end(program))
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    _joining = True
    # JAX would end the process when its own time is over, so that is longer.
    coming = concurrent.futures.ThreadPoolExecutor(1).submit(
        jax.distributed.initialize, **known, initialization_timeout=join_within + LOST_AFTER,
        heartbeat_timeout_seconds=lost_after, shutdown_timeout_seconds=_PATIENCE,
    )  # fmt: skip
    _wait(coming.done, join_within)
    try:
        coming.result(0)
    except TimeoutError:
        flag = "--distributed" if process is None else f"--process={process}"
        raise UserError(f"{flag}: not all processes came within {join_within} s (--join_within); start all of them, "
                        f"with the same HOST:PORT, which each must reach") from None  # fmt: skip
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--distributed: {reason} Say where it is: --process=INDEX/COUNT@HOST:PORT") from None
    _joining = False
    _index, _together = jax.process_index(), True
    if not _may_skip_compiling(jax.default_backend(), jax.process_count(), shared_cache):
        jax.config.update("jax_enable_compilation_cache", False)


def _may_skip_compiling(backend: str, processes: int, shared_cache: bool) -> bool:
    """Whether processes may take programs from JAX's compilation cache, which process 0 alone writes.

    Others then miss what it finds in a directory of its own. On GPUs they wait for it to share the tuning of each
    program, which it skips with the rest. Gloo, on CPUs, gives up on processes that compile half a minute longer.
    """
    return processes == 1 or (shared_cache and backend != "cpu")


def _parse(process: str) -> dict:
    found = re.fullmatch(r"(\d+)/(\d+)@(.+:(\d+))", process)
    if not found or int(found[1]) >= int(found[2]) or not 0 < int(found[4]) < 2**16:
        raise UserError(f"--process={process}: write INDEX/COUNT@HOST:PORT, as 0/2@10.0.0.1:8476; INDEX counts from 0")
    return {"coordinator_address": found[3], "num_processes": int(found[2]), "process_id": int(found[1])}


def _keep_stdout() -> None:
    """Gloo greets its peers on the stdout that carries the answer; from here on only Python writes there."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def _on_abort(then) -> None:
    """Calls `then` where the runtime aborts, which it does in a thread of its own: Python's handlers would not run."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _handlers.append(kind(lambda _: then()))
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = (ctypes.c_int, kind), ctypes.c_void_p
    install(signal.SIGABRT, _handlers[-1])


def leads() -> bool:
    """Whether this process prints and writes."""
    return _index == 0


def default_mesh() -> str | None:
    """The mesh of a run of several processes: every device has a group of its own. None in a run of one."""
    if not _together:
        return None
    import jax

    return f"data={jax.device_count()}"


def lost(error: Exception) -> bool:
    """Whether an error means that another process is gone."""
    return _together and bool(_BROKEN.search(str(error)))


def end(program: str) -> None:
    """Ends this process, which another one has left alone, with one line on stderr and the status `LOST`."""
    _ending.acquire()  # both ways of noticing may come here; the first one prints, and is never done
    line = f"{program}: another process of this run was lost; start all of them again (--debug shows more)\n"
    os.write(2, line.encode())
    os._exit(LOST)


def leave(status: int) -> int:
    """Ends this process's part in the run: one that succeeded waits for the others, one that failed does not.

    Returns:
      `status`, the exit status.
    """
    if _joining:
        _go(status)
    if not _together:
        return status
    import jax

    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the wait
        _wait(lambda: not farewell.is_alive(), math.inf if status == 0 else _MOMENT)
    if farewell.is_alive():
        _go(status)
    return status


def _wait(done: Callable[[], bool], seconds: float) -> None:
    """Waits until something is done, at most so long; signals are heard meanwhile."""
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(_GLANCE)


def _go(status: int) -> None:
    """Ends this process though a thread of it is still in JAX."""
    sys.stderr.flush()
    os._exit(status)
