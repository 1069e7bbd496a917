"""The certificate of a calibrated stop rule: what was promised, on which evidence, and for which settings.

The promise: for a video from where the calibration videos came from, with probability at least 1 - delta over the
choice of those, the risk that Lite answers one of its questions otherwise than the full run is at most alpha. It is
about that gap alone, not about being right, and it holds for the same model and settings only. It is the promise of one
test, planned before its outcome is seen: who tests until one certifies is promised nothing.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adapttoken_jax.calibration.full_runs import Log, first_difference
from adapttoken_jax.calibration.replay import at_threshold, replay
from adapttoken_jax.calibration.statistics import binomial_tail, certified, required_videos
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.result import write_text

CERTIFICATE_VERSION = 1

# The settings that a certificate decides; all others must be the calibration's.
RULE_FIELDS = ("stop_rule", "stop_groups", "stop_entropy", "stop_agreement", "stop_gain", "give_up_groups")

# Tested in this order. Fixed in advance: choosing thresholds by the calibration data would void the promise.
THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4)
_AFRESH = (
    "testing these videos again, with more beside them or with other settings, would void the promise; "
    "calibrate afresh on other videos, their number fixed in advance"
)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A certified stop rule.

    Attributes:
      alpha: certified bound on the share of videos in which Lite differs from the full run.
      delta: probability that the bound does not hold.
      videos, questions, losses: what the calibration had: losses are videos, under the certified threshold.
      p_value: of that threshold.
      mean_share_visited: of the groups, under that threshold.
      stop: the rule, `RULE_FIELDS` by name.
      tested: per threshold, in the order of the tests: "threshold", "losses", "p_value", "share", "accepted".
      data_sha256: of the log's videos.
      fingerprint: "model" (from `model_fingerprint`) and "config" (the settings beside `RULE_FIELDS`).
    """

    alpha: float
    delta: float
    videos: int
    questions: int
    losses: int
    p_value: float
    mean_share_visited: float
    stop: Mapping[str, Any]
    tested: Sequence[Mapping[str, Any]]
    data_sha256: str
    fingerprint: Mapping[str, Any]

    def to_json(self) -> str:
        """The certificate's file."""
        return json.dumps({"version": CERTIFICATE_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    def config_for(self, config: AdaptTokenConfig, model: str | None = None, source: str = "certificate"):
        """`config` with the certified stop rule.

        Args:
          config: resolved for the model.
          model: the model's fingerprint; None checks the settings alone.
          source: names the certificate in errors.

        Raises:
          UserError: a setting, or the model, is not what was calibrated, or is one that no certificate holds for.
        """
        check_unpruned(config)
        ours = config_fingerprint(config, model or self.fingerprint["model"])
        difference = first_difference(self.fingerprint, ours)
        if difference:
            raise UserError(f"{source}: calibrated with {difference}; calibrate again for these settings, or drop it")
        return dataclasses.replace(config, **self.stop)


def config_fingerprint(config: AdaptTokenConfig, model: str) -> dict[str, Any]:
    """What must be the same in calibration and use: the model and every setting that a certificate does not decide."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in RULE_FIELDS}
    return {"model": model, "config": settings}


def model_fingerprint(model) -> str:
    """SHA-256 of a loaded model: sizes, number format, tokenizer, and evenly spaced samples of every parameter.

    A sample of 1024 numbers per parameter tells trained models apart without reading all of one; it is no protection
    against somebody who wants to deceive. The checkpoint's format and the mesh do not matter.
    """
    import jax

    from adapttoken_jax import sharding

    digest = hashlib.sha256(f"{model.config} {model.dtype.name} {model.tokenizer.eos}".encode())
    digest.update(model.tokenizer.tokenizer.to_str().encode())
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model.module)}
    samples = jax.jit(lambda leaves: jax.tree.map(_sample, leaves))(leaves)
    samples = jax.device_get(sharding.everywhere(samples, model.mesh))
    for path in sorted(leaves):
        digest.update(f"{path} {leaves[path].shape}".encode() + samples[path].astype(np.float32).tobytes())
    return digest.hexdigest()


def _sample(array):
    """1024 evenly spaced elements, or all."""
    places = np.linspace(0, array.size - 1, min(array.size, 1024)).astype(np.int64)
    return array[np.unravel_index(places, array.shape)]


def certify(
    log: Log, config: AdaptTokenConfig, alpha: float, delta: float, thresholds: Sequence[float] = THRESHOLDS
) -> Certificate:
    """Calibrates the threshold of the configuration's stop rule on a log of full runs.

    Args:
      log: of this configuration's full runs.
      config: its `stop_` settings, but the threshold, are the rule.
      alpha, delta: the promise, see `Certificate`.
      thresholds: nats, ascending: from cautious to bold. They must not depend on the log.

    Raises:
      UserError: as `planned_test`, or the log does not certify even the most cautious threshold.
    """
    test = planned_test(log, config, alpha, delta, thresholds)
    n, thresholds = test["videos"], test["thresholds"]
    runs = [replay(log.videos, at_threshold(config, threshold)) for threshold in thresholds]
    accepted = certified([run.losses for run in runs], n, alpha, delta)
    if not accepted:
        needed = required_videos(alpha, delta, runs[0].losses)
        raise UserError(
            f"--alpha={alpha:g}: not certified: with the most cautious threshold, {thresholds[0]:g} nats, Lite differs "
            f"in {runs[0].losses} of {n} videos; {_AFRESH} (so many losses need {needed})"
        )
    chosen = runs[accepted - 1]
    rule = {name: getattr(config, name) for name in RULE_FIELDS} | {"stop_entropy": thresholds[accepted - 1]}
    return Certificate(
        alpha=alpha,
        delta=delta,
        videos=n,
        questions=sum(len(video.questions) for video in log.videos),
        losses=chosen.losses,
        p_value=binomial_tail(chosen.losses, n, alpha),
        mean_share_visited=chosen.share,
        stop=rule,
        tested=[
            {"threshold": threshold, "losses": run.losses, "p_value": binomial_tail(run.losses, n, alpha),
             "share": run.share, "accepted": place < accepted}
            for place, (threshold, run) in enumerate(zip(thresholds, runs, strict=True))
        ],
        data_sha256=log.sha256,
        fingerprint=log.fingerprint,
    )  # fmt: skip


def planned_test(
    log: Log,
    config: AdaptTokenConfig,
    alpha: float,
    delta: float,
    thresholds: Sequence[float] = THRESHOLDS,
    awaited: int = 0,
) -> dict[str, Any]:
    """All that the outcome of `certify` depends on. `LogWriter.record_test` writes it down before the outcome is seen.

    Args: as of `certify`, and
      awaited: videos that the log shall get before the test. Then this is a check in advance, to be made again after
        them: what it refuses would be refused then.

    Raises:
      UserError: as `check_plan`, a setting that no certificate holds for, or another test was made of the log.
    """
    thresholds = [float(threshold) for threshold in thresholds]
    videos = len(log.videos) + awaited
    check_plan(videos, alpha, delta, thresholds)
    check_unpruned(config)
    rule = {name: getattr(config, name) for name in RULE_FIELDS if name != "stop_entropy"}
    test = {"videos": videos, "alpha": alpha, "delta": delta, "thresholds": thresholds}
    test |= {**rule, "data_sha256": "that of other videos" if awaited else log.sha256}
    if log.test not in (None, test):
        difference = first_difference({"config": log.test}, {"config": test})
        raise UserError(f"--log: tested before with {difference}; {_AFRESH}, and in another log")
    return test


def check_plan(videos: int, alpha: float, delta: float, thresholds: Sequence[float]) -> None:
    """Raises `UserError` for a test that no log is good for: thresholds that do not ascend, or too few videos."""
    if list(thresholds) != sorted(set(thresholds)) or not thresholds:
        words = ",".join(f"{threshold:g}" for threshold in thresholds)
        raise UserError(f"--thresholds={words}: give numbers in ascending order, from cautious to bold")
    check_enough(videos, alpha, delta)


def check_unpruned(config: AdaptTokenConfig) -> None:
    """Raises `UserError` for pruning: a question's groups then answer otherwise beside other questions."""
    if config.keep_after_reference < 1:
        raise UserError(
            f"--keep_after_reference={config.keep_after_reference:g}: what a group says to a question then depends on "
            "those asked with it, and no certificate holds; leave it out"
        )


def check_enough(videos: int, alpha: float, delta: float) -> None:
    """Raises `UserError` if so few videos cannot certify `alpha` at `delta` whatever they show."""
    needed = required_videos(alpha, delta)
    if videos < needed:
        raise UserError(
            f"--alpha={alpha:g}: {videos} videos can never certify it at --delta={delta:g}; {needed} are needed, and "
            "more if Lite differs in any of them"
        )


def write_certificate(path, certificate: Certificate) -> None:
    """Writes a certificate."""
    write_text(path, certificate.to_json())


def read_certificate(path) -> Certificate:
    """Reads a certificate.

    Raises:
      UserError: no such file, not a certificate, or one whose own figures do not support its promise.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; experiments.calibrate_stop writes certificates")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version", None) != CERTIFICATE_VERSION:
            raise UserError(f"{path}: not a certificate, or of another version than {CERTIFICATE_VERSION}")
        certificate = Certificate(**content)
        sound = set(certificate.stop) == set(RULE_FIELDS) and {"model", "config"} <= set(certificate.fingerprint)
        supported = binomial_tail(certificate.losses, certificate.videos, certificate.alpha) <= certificate.delta
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        why = f" ({error})" if isinstance(error, ValueError) else ", its fields are others"
        raise UserError(f"{path}: not a certificate{why}; experiments.calibrate_stop writes them") from None
    if not sound or not supported:
        raise UserError(f"{path}: not a valid certificate: its figures do not support its promise; calibrate again")
    return certificate
