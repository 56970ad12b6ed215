"""Exclusive creation on S3: of any number of processes that create one object, exactly one succeeds.

pyarrow cannot ask for it, so that this one request goes through s3fs, with the same endpoint, region, credentials and
patience as all others.
"""

from __future__ import annotations

import re
import time
import uuid
from functools import lru_cache
from typing import Any

from safetydpo.artifacts.object_store import CONNECT_SECONDS, REQUEST_SECONDS, PatientS3
from safetydpo.errors import SafetyDPOError

CREATE_SECONDS = 102.0
"""How long a creation is tried while S3 is gone: as long as any other request."""
Place = tuple[str | None, str, str]
_REFUSING: set[tuple[Place, str]] = set()
"""Buckets of servers that have shown to this process that they refuse to write over an object."""


class NoExclusiveCreation(SafetyDPOError):  # noqa: N818 (says what is missing)
    """The store cannot create an object only if none stands there."""


def create_object(filesystem: PatientS3, path: str, data: bytes) -> bool:
    """Write the object `bucket/key` if none stands there; return whether it is ours.

    `data` must be nobody else's (hold a random token, say): a request whose answer got lost is sent again and then
    refused because of its own first try, which only the content tells from somebody else's.

    Raises:
        OSError: if the store cannot be reached or refuses; its text is that of pyarrow's errors.
        NoExclusiveCreation: if the server says that it does not know conditional writes, or writes over an object that
            it was asked not to touch.
    """
    _check_server_refuses(filesystem, path)
    return _put_if_absent(filesystem, path, data)


def _check_server_refuses(filesystem: PatientS3, path: str) -> None:
    # Servers that do not know the header `If-None-Match: *` ignore it, answer "done" and write over the object; two
    # owners would then each believe to be the only one. Asked once per bucket and process, of an object of our own
    # beside the wanted one, since a policy may allow one prefix only.
    known = (filesystem.place, path.split("/")[0])
    if known in _REFUSING:
        return
    probe = f"{path.rpartition('/')[0]}/.exclusive-{uuid.uuid4().hex}"
    _put_if_absent(filesystem, probe, b"first")
    try:
        refused = not _put_if_absent(filesystem, probe, b"second")
    finally:
        filesystem.delete_file(probe)
    if not refused:
        raise _without_conditions(filesystem, "that it writes")
    _REFUSING.add(known)


def _without_conditions(filesystem: PatientS3, found: str) -> NoExclusiveCreation:
    return NoExclusiveCreation(
        f"expected the S3 server at {filesystem.place[0] or 'Amazon'} to refuse to write over an object when asked "
        f"with If-None-Match: *, found {found}: choose an execution.store on a server that knows conditional writes "
        "(Amazon's S3, MinIO, SeaweedFS) or on a disk"
    )


@lru_cache(maxsize=8)
def _conditional_client(place: Place) -> Any:
    # pyarrow cannot send the header. Heavy, and only needed by trainings: not at the top of the file.
    import s3fs

    endpoint, scheme, region = place
    return s3fs.S3FileSystem(
        skip_instance_cache=True,
        endpoint_url=f"{scheme}://{endpoint}" if endpoint else None,
        client_kwargs={"region_name": region},
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": REQUEST_SECONDS,
            "retries": {"mode": "standard", "max_attempts": 2},
            # As pyarrow does: a server of one's own has no host name per bucket.
            **({"s3": {"addressing_style": "path"}} if endpoint else {}),
        },
    )


def _put_if_absent(filesystem: PatientS3, path: str, data: bytes) -> bool:
    client = _conditional_client(filesystem.place)
    deadline, pause = time.monotonic() + CREATE_SECONDS, 0.05
    while True:
        try:
            client.pipe_file(path, data, mode="create")
            return True
        except Exception as error:  # botocore's errors have no class in common with s3fs's
            status, text = _answer(error)
            if status == 412:
                return _stands_there(filesystem, path, data)
            if status == 501:
                # Not a server that is in trouble: it will say the same in a minute.
                raise _without_conditions(filesystem, f"that it cannot, {text}") from error
            # 409: two creations at the same moment, of which neither won.
            if not (status is None or status == 409 or status >= 500) or time.monotonic() > deadline:
                raise OSError(text) from error
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _stands_there(filesystem: PatientS3, path: str, data: bytes) -> bool:
    deadline = time.monotonic() + CREATE_SECONDS
    while True:
        try:
            with filesystem.open_input_stream(path) as stream:
                return bool(stream.read() == data)
        except FileNotFoundError:
            # Somebody else's, and gone again since: a lease that was short.
            return False
        except OSError:
            # One that goes while it is read breaks the answer off; the next look finds it gone.
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _answer(error: Exception) -> tuple[int | None, str]:
    """Return HTTP status (None = no answer) and the text that pyarrow would have given."""
    from botocore.exceptions import NoCredentialsError

    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if response:
        code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(response["Error"].get("Code", ""))).upper()
        status = int(response["ResponseMetadata"]["HTTPStatusCode"])
        return status, f"AWS Error {code} (HTTP status {status}): {response['Error'].get('Message', '')}"
    if isinstance(error, NoCredentialsError):
        return 403, f"AWS Error ACCESS_DENIED: {error}"
    return None, f"AWS Error NETWORK_CONNECTION: {error}"
