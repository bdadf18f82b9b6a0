"""What any node can suffer from: silence, a clock of its own, a certificate that ends, troubles."""

from appliance.config_server.watching.reason import Code, Reason, Severity, duration, reason
from appliance.config_server.watching.rpo import NS, Sighting
from appliance.config_server.watching.thresholds import Thresholds
from replication.control.report import Trouble


def silence_reason(
    code: Code,
    heard_ns: int,
    expected_ns: int,
    now_ns: int,
    *,
    interval_seconds: float,
    thresholds: Thresholds,
) -> Reason | None:
    """Of a node that was last heard at ``heard_ns``; 0: never, and expected ``expected_ns``."""
    seconds = (now_ns - (heard_ns or expected_ns)) / NS
    severity = thresholds.silent(seconds, interval_seconds)
    if severity is None:
        return None
    if heard_ns == 0:
        return reason(code, severity, f"it has never reported, for {duration(seconds)} now")
    return reason(code, severity, f"nothing heard of it for {duration(seconds)}")


def certificate_reason(ends_ns: int, now_ns: int, thresholds: Thresholds) -> Reason | None:
    """Of a node whose newest good certificate ends at ``ends_ns``; 0: there is none to end."""
    if ends_ns == 0:
        return None
    seconds = (ends_ns - now_ns) / NS
    severity = thresholds.certificate_seconds.below(seconds)
    if severity is None:
        return None
    told = f"ends in {duration(seconds)}" if seconds > 0 else "has ended"
    return reason(Code.CERTIFICATE_ENDS, severity, f"its certificate {told}")


def skew_reason(sighting: Sighting | None, thresholds: Thresholds) -> Reason | None:
    """Of a node whose clock is not ours."""
    if sighting is None:
        return None
    seconds = sighting.skew_ns / NS
    severity = thresholds.skew_seconds.above(abs(seconds))
    if severity is None:
        return None
    way = "ahead of" if seconds > 0 else "behind"
    return reason(
        Code.CLOCK_SKEW,
        severity,
        f"its clock is {duration(abs(seconds))} {way} the config server's",
    )


def trouble_reason(code: Code, troubles: tuple[Trouble, ...]) -> Reason | None:
    """All that a daemon says of itself, worst first, as one reason."""
    if not troubles:
        return None
    worst = sorted(troubles, key=lambda trouble: -Severity(trouble.severity).rank)
    told = "; ".join(f"{trouble.part}: {trouble.reason}" for trouble in worst)
    return reason(code, Severity(worst[0].severity), told)
