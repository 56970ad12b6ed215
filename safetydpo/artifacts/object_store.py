"""S3 and servers that speak its protocol: where they answer, how long one waits for them, what their errors mean.

Everything comes from the standard environment variables: `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` (a server of
one's own; unset = Amazon's), `AWS_REGION` or `AWS_DEFAULT_REGION`, and the credentials, which this project never
touches: the AWS library in pyarrow finds them in the environment, in `~/.aws` or in the machine's role, in each process
for itself. So they are in no config, no record, no message, and in nothing that is sent to a worker.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from safetydpo.errors import SafetyDPOError, UsageError

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
DEFAULT_REGION = "us-east-1"
"""Servers of one's own mostly take any region, but a signature needs one."""
RETRIES = 12
"""Of one request. The waits double from 50 ms; all together they last 102 s, so that S3 may be gone for a minute."""
FIRST_CONTACT_RETRIES = 4
"""Of the first request of a command, when nothing is in flight yet: a wrong address is told in a moment."""
BROKEN_OFF = "Failed to flush response stream"
"""What pyarrow says of an answer that ended in its middle, as those of a server that is just coming back may."""
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 20.0
"""Without a single byte. The end of a large upload and a copy are silent for seconds on the server's side."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")


class PatientS3(pafs.S3FileSystem):
    """pyarrow's S3 file system, which keeps its patience when it is sent to a worker (pyarrow's own forgets it)."""

    def __init__(self, *, region: str, endpoint: str | None, scheme: str, retries: int = RETRIES) -> None:
        self._arguments = {"region": region, "endpoint": endpoint, "scheme": scheme, "retries": retries}
        self._place = endpoint, scheme, region
        super().__init__(
            region=region,
            endpoint_override=endpoint,
            scheme=scheme,
            connect_timeout=CONNECT_SECONDS,
            request_timeout=REQUEST_SECONDS,
            # The standard strategy has a budget of retries that pyarrow never refills, and at most 20 s between them.
            retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=retries),
            # A small object is then one request instead of three; errors arrive when the stream is closed.
            allow_delayed_open=True,
        )

    def __reduce__(self) -> tuple[Callable[..., PatientS3], tuple[dict[str, Any]]]:
        return _rebuild, (self._arguments,)

    @property
    def place(self) -> tuple[str | None, str, str]:
        """Endpoint (None = Amazon's), scheme and region."""
        return self._place

    def for_first_contact(self) -> PatientS3:
        """Return the same store, given up on after a few tries."""
        return _rebuild({**self._arguments, "retries": FIRST_CONTACT_RETRIES})


def _rebuild(arguments: dict[str, Any]) -> PatientS3:
    return PatientS3(**arguments)


def open_s3(address: str) -> tuple[PatientS3, str]:
    """Return (file system, `bucket/prefix`) of an address `s3://bucket/prefix`.

    Raises:
        UsageError: if the address names no bucket or holds more than bucket and prefix, or the endpoint is no URL.
        SafetyDPOError: if neither region nor endpoint is set and Amazon does not say where the bucket is.
    """
    path = address.removeprefix("s3://").rstrip("/")
    bucket = path.split("/")[0]
    # An address may be `s3://KEY:SECRET@bucket`: from here on no message repeats it before this was ruled out.
    if "@" in bucket or ":" in bucket:
        raise UsageError(
            "expected s3://bucket/prefix, found more in front of the bucket's first slash: credentials belong into the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or ~/.aws, a server's address into "
            "AWS_ENDPOINT_URL_S3"
        )
    if "?" in path:
        raise UsageError(
            f"expected s3://bucket/prefix, found a question mark behind 's3://{path.split('?')[0]}': set the endpoint "
            "by AWS_ENDPOINT_URL_S3, the region by AWS_REGION"
        )
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"expected s3://bucket/prefix, found {address!r}: name a bucket of 3 to 63 small letters")
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise UsageError(f"expected s3://bucket/prefix, found {address!r}: write the prefix plainly")
    scheme, endpoint = _endpoint()
    return PatientS3(region=_region(bucket, endpoint), endpoint=endpoint, scheme=scheme), path


def _endpoint() -> tuple[str, str | None]:
    name, url = _first_set(ENDPOINT_VARIABLES)
    if not url:
        return "https", None
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        plain = parts.path in ("", "/") and not (parts.query or parts.fragment or "@" in parts.netloc)
    except ValueError:
        usable = plain = False
    if not (usable and plain):
        # The value is not shown: somebody may have put a password into it.
        raise UsageError(
            f"expected a URL such as http://127.0.0.1:9000 in {name}, found something else: give scheme, host and port "
            "only, or unset it for Amazon's own S3"
        )
    return parts.scheme, parts.netloc


def _region(bucket: str, endpoint: str | None) -> str:
    _, region = _first_set(REGION_VARIABLES)
    if region:
        return region
    if endpoint is not None:
        return DEFAULT_REGION
    try:
        found: str = pafs.resolve_s3_region(bucket)
    except OSError as error:
        raise SafetyDPOError(
            f"expected Amazon's S3 to say where bucket {bucket!r} is, found: {one_line(error)}; set AWS_REGION, or "
            "AWS_ENDPOINT_URL_S3 for another server, or check the bucket's name and the network"
        ) from error
    return found


def _first_set(names: tuple[str, ...]) -> tuple[str, str]:
    return next(((name, os.environ[name]) for name in names if os.environ.get(name)), (names[0], ""))


def worker_variables() -> dict[str, str]:
    """Return the variables that say where S3 is, for workers on other machines; credentials are never among them."""
    return {name: os.environ[name] for name in (*ENDPOINT_VARIABLES, *REGION_VARIABLES) if os.environ.get(name)}


def one_line(error: BaseException) -> str:
    """Return what `error` says in one line, without any credential that stands in the environment."""
    text = " ".join(str(error).split()) or type(error).__name__
    for name in SECRET_VARIABLES:
        if os.environ.get(name):
            text = text.replace(os.environ[name], f"({name})")
    return text


_REMEDIES = (
    (r"NO_SUCH_BUCKET", "create the bucket, or correct the address"),
    (
        r"INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE|EXPIRED_TOKEN|INVALID_(CLIENT_)?TOKEN|"
        r"UNRECOGNIZED_CLIENT|INVALID_CLIENT_TOKEN_ID|MISSING_AUTHENTICATION_TOKEN",
        "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws, or the machine's role)",
    ),
    (
        r"ACCESS_DENIED|HTTP status 403",
        "correct the credentials, or have the bucket's policy allow what docs/storage.md lists",
    ),
    (
        r"NETWORK_CONNECTION|REQUEST_TIMEOUT|curlCode",
        "check AWS_ENDPOINT_URL_S3 (unset for Amazon), AWS_REGION and the network",
    ),
)


def s3_remedy(text: str) -> str | None:
    """Return what to do about an error of S3, from its text; None if it is none."""
    if "AWS Error" not in text:
        return None
    found = (remedy for pattern, remedy in _REMEDIES if re.search(pattern, text))
    return next(found, "look at the server's own log")


def check_reachable(filesystem: pafs.FileSystem, path: str) -> None:
    """Ask an object store for `path`, within seconds; do nothing on any other file system.

    Raises:
        SafetyDPOError: if it does not answer, has no such bucket, or refuses the credentials.
    """
    if not isinstance(filesystem, PatientS3):
        return
    try:
        filesystem.for_first_contact().get_file_info(pafs.FileSelector(path, allow_not_found=False, recursive=False))
    except FileNotFoundError:
        # The bucket is there and may be listed; nothing has been written below the prefix yet.
        return
    except OSError as error:
        text = one_line(error)
        raise SafetyDPOError(
            f"expected to list s3://{path}, found: {text}; {s3_remedy(text)}, then run the same command again"
        ) from error
