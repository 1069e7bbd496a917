"""A guarantee for Lite: learn-then-test on the gap between Lite and the full run. Needs no labels.

`record` runs the full method on calibration videos and logs it (`full_runs`); `replay` tells what every stop rule would
have done; `certificate` tests thresholds from cautious to bold with exact binomial p-values (`statistics`) and writes
what `adapttoken answer --lite --stop_calibration` reads. The unit is the video, not the question.
"""

from adapttoken_jax.calibration.certificate import (
    RULE_FIELDS,
    THRESHOLDS,
    Certificate,
    certify,
    check_enough,
    check_plan,
    check_unpruned,
    config_fingerprint,
    model_fingerprint,
    planned_test,
    read_certificate,
    write_certificate,
)
from adapttoken_jax.calibration.full_runs import Log, LogWriter, QuestionLog, Said, VideoLog, read_log
from adapttoken_jax.calibration.replay import (
    SIGNALS,
    at_threshold,
    compare_signals,
    replay,
    signals,
    stop_point,
    stop_points,
)
from adapttoken_jax.calibration.statistics import (
    allowed_losses,
    auroc,
    binomial_tail,
    certified,
    check_levels,
    required_videos,
    resampled_risks,
)

__all__ = [
    "RULE_FIELDS",
    "SIGNALS",
    "THRESHOLDS",
    "Certificate",
    "Log",
    "LogWriter",
    "QuestionLog",
    "Said",
    "VideoLog",
    "allowed_losses",
    "at_threshold",
    "auroc",
    "binomial_tail",
    "certified",
    "certify",
    "check_enough",
    "check_levels",
    "check_plan",
    "check_unpruned",
    "compare_signals",
    "config_fingerprint",
    "model_fingerprint",
    "planned_test",
    "read_certificate",
    "read_log",
    "replay",
    "required_videos",
    "resampled_risks",
    "signals",
    "stop_point",
    "stop_points",
    "write_certificate",
]
