"""Where an S3-compatible tier is and how it is spoken to. Apart from `s3`, so that reading a configuration does not load
the client."""

from __future__ import annotations

from dataclasses import dataclass, field

DEFAULT_TIMEOUT_S = 20.0
DEFAULT_LINGER_S = 30.0
DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True)
class S3Settings:
    """A bucket. `endpoint` None: AWS, by region; with one, the bucket goes into the path (Ceph, MinIO).

    `prefix`: folder of the bucket, without slashes at its ends. Keys None: those of the machine's role, if it has one.
    `timeout_s`: for each call, and for each 8 MiB that it moves. `linger_s`: how long small packs wait for company.
    """

    bucket: str
    endpoint: str | None = None
    region: str = DEFAULT_REGION
    prefix: str = ""
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    timeout_s: float = DEFAULT_TIMEOUT_S
    linger_s: float = DEFAULT_LINGER_S

    @property
    def label(self) -> str:
        """The tier's name in messages: "S3 bucket rethaw at http://127.0.0.1:9000"."""
        return f"S3 bucket {self.bucket} at {self.endpoint or self.region}"
