"""Ctrl-C and SIGTERM as exceptions that unwind a program from wherever it is.

An exception out of nowhere does harm in one place, an import: extension modules turn it into other errors or take the
process down. It does nothing in others, such as finalizers and callbacks of the garbage collector: Python prints and
forgets it. In both cases the signal is sent once more a moment later, until it finds a place where it is heard.
"""

import os
import signal
import sys
import threading


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


_RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_MOMENT_S = 0.05


class Unwinding:
    """A context manager within which Ctrl-C raises `KeyboardInterrupt` and SIGTERM `Terminated`.

    Signals that are ignored stay so. In a thread that is not the main one, which may not set handlers, it does nothing.
    """

    def __init__(self):
        self._handlers, self._hook, self._timer, self._frame = {}, None, None, None

    def __enter__(self) -> "Unwinding":
        if threading.current_thread() is threading.main_thread():
            self._frame = sys._getframe(1)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._lost
            heard = [number for number in _RAISED if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._come) for number in heard}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _RAISED)  # a launcher blocks them while it imports
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._hook:
            sys.unraisablehook = self._hook
        self._send_nothing()
        self._frame = None

    def _come(self, number, frame) -> None:
        if self._importing(frame):
            self._send_again(number)
        else:
            raise _RAISED[number]

    def _importing(self, frame) -> bool:
        """Whether an import that began within the block goes on in this frame."""
        while frame is not None and frame is not self._frame:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return True
            frame = frame.f_back
        return False

    def _lost(self, lost) -> None:
        """In place of `sys.unraisablehook`."""
        if issubclass(lost.exc_type, KeyboardInterrupt):
            self._send_again(signal.SIGTERM if issubclass(lost.exc_type, Terminated) else signal.SIGINT)
        else:
            self._hook(lost)

    def _send_again(self, number) -> None:
        self._send_nothing()
        self._timer = threading.Timer(_MOMENT_S, os.kill, (os.getpid(), number))
        self._timer.start()

    def _send_nothing(self) -> None:
        if self._timer:
            self._timer.cancel()
