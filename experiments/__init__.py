"""Launchers with absl flags: `python -m experiments.NAME --flags`."""

import signal
import sys

if sys.argv[0] == "-m":  # one is being started, not imported
    # What comes while it imports, for seconds, waits until `signals.Unwinding` can end it in one line.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
