"""What the process server counts, as Prometheus tells it."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class Measures:
    """All metrics; each in the unit that its name ends with."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, told: str) -> Counter:
            return Counter(f"understudy_{name}", told, registry=registry)

        def gauge(name: str, told: str) -> Gauge:
            return Gauge(f"understudy_{name}", told, registry=registry)

        self.segments_received = counter("segments_received_total", "Segments stored in the spool.")
        self.bytes_received = counter("bytes_received_total", "Their bytes.")
        self.changesets_committed = counter("changesets_committed_total", "Commits acknowledged.")
        self.bytes_uploaded = counter("bytes_uploaded_total", "Bytes put into the cache.")
        self.upload_retries = counter("upload_retries_total", "Requests to the cache that failed.")
        self.uploads_repeated = counter(
            "uploads_repeated_total", "Blobs put again: forgotten, damaged or asked for."
        )
        self.refusals = Counter(
            "understudy_refusals_total", "Requests refused.", ["code"], registry=registry
        )
        self.spool_bytes = gauge("spool_bytes", "Bytes in the spool, with those reserved.")
        self.spool_bytes_max = gauge("spool_bytes_max", "The most there may be.")
        self.unapplied_changesets = gauge(
            "unapplied_changesets", "Changesets committed and not known to be applied."
        )
        self.bodies_in_flight = gauge("bodies_in_flight", "Segments and manifests coming in.")
