"""Storage as (pyarrow filesystem, path): the same code writes to a local disk and to S3.

A `Location` is a path that may or may not exist. Writes are all-or-nothing: local files are written beside
their target, flushed to disk and renamed; object stores publish an object only when its upload is complete.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from safetydpo.errors import SafetyDPOError, UsageError


@dataclass(frozen=True)
class Location:
    """One path on one filesystem."""

    filesystem: pafs.FileSystem
    path: str

    def __truediv__(self, part: str) -> Location:
        """Return the location `part` below this one.

        Raises:
            SafetyDPOError: if `part` would leave this folder.
        """
        pieces = part.split("/")
        if part.startswith("/") or "\0" in part or any(piece in ("", ".", "..") for piece in pieces):
            raise SafetyDPOError(f"expected a plain relative path below {self.path}, found {part!r}")
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{part}")

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.filesystem.type_name}://{self.path}"

    @property
    def is_local(self) -> bool:
        """Whether the path lies on a disk of this machine."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def local_path(self) -> Path:
        """The path as a `pathlib.Path`.

        Raises:
            SafetyDPOError: if this is not a local path.
        """
        if not self.is_local:
            raise SafetyDPOError(f"expected a local path, found {self}: copy it to a local folder first")
        return Path(self.path)

    def is_file(self) -> bool:
        """Whether a file or object stands here."""
        return self._type() is pafs.FileType.File

    def is_folder(self) -> bool:
        """Whether a folder (or prefix) stands here; on object stores an empty prefix may linger."""
        return self._type() is pafs.FileType.Directory

    def exists(self) -> bool:
        """Whether a file or folder stands here."""
        return self._type() is not pafs.FileType.NotFound

    def _type(self) -> pafs.FileType:
        return self.filesystem.get_file_info([self.path])[0].type

    def make_folder(self) -> Location:
        """Create the folder and its parents; return itself.

        Raises:
            SafetyDPOError: if the place is not writable.
        """
        try:
            self.filesystem.create_dir(self.path, recursive=True)
        except OSError as error:
            raise SafetyDPOError(
                f"expected to make the folder {self}, found: {_one_line(error)}; "
                "free space or choose another folder, then run the same command again"
            ) from error
        return self

    def size_bytes(self) -> int:
        """Return the length of the file.

        Raises:
            SafetyDPOError: if no file stands here.
        """
        info = self.filesystem.get_file_info([self.path])[0]
        if info.type is not pafs.FileType.File:
            raise SafetyDPOError(f"expected a file at {self}, found nothing: run the stage that makes it")
        return int(info.size)

    def open_random_access(self) -> pa.NativeFile:
        """Open the file for reading of parts; use it in a `with` block.

        Raises:
            SafetyDPOError: if it cannot be read.
        """
        try:
            return self.filesystem.open_input_file(self.path)
        except OSError as error:
            raise SafetyDPOError(f"expected a readable file at {self}, found: {_one_line(error)}") from error

    @property
    def parent(self) -> Location:
        """The folder above."""
        return Location(self.filesystem, self.path.rstrip("/").rsplit("/", 1)[0])

    def read_bytes(self) -> bytes:
        """Return the whole content.

        Raises:
            SafetyDPOError: if nothing stands here or it cannot be read.
        """
        try:
            with self.filesystem.open_input_stream(self.path) as stream:
                return bytes(stream.read())
        except FileNotFoundError as error:
            raise SafetyDPOError(f"expected a file at {self}, found nothing: run the stage that makes it") from error
        except OSError as error:
            raise SafetyDPOError(f"expected a readable file at {self}, found: {_one_line(error)}") from error

    def write_bytes(self, data: bytes) -> None:
        """Write the whole content at once; afterwards either the old or the new content stands here.

        Raises:
            SafetyDPOError: if the disk is full or the place is not writable; nothing is left half-written.
        """
        try:
            if self.is_local:
                self._write_local(data)
            else:
                with self.filesystem.open_output_stream(self.path) as stream:
                    stream.write(data)
        except OSError as error:
            raise SafetyDPOError(
                f"expected to write {len(data):,} bytes to {self}, found: {_one_line(error)}; "
                "free space or choose another folder, then run the same command again"
            ) from error

    def _write_local(self, data: bytes) -> None:
        target = Path(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # The leading dot keeps half-written files out of every listing of ours.
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def list(self) -> list[Location]:
        """Return the direct children in name order, without hidden files; an absent folder is empty."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=False)
        found = [Location(self.filesystem, info.path) for info in self.filesystem.get_file_info(selector)]
        return sorted((child for child in found if not child.name.startswith(".")), key=lambda child: child.path)

    def walk(self) -> Iterator[Location]:
        """Yield all files below, in path order, without hidden ones."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=True)
        prefix = len(self.path.rstrip("/")) + 1
        for info in sorted(self.filesystem.get_file_info(selector), key=lambda info: info.path):
            hidden = any(part.startswith(".") for part in info.path[prefix:].split("/"))
            if info.type is pafs.FileType.File and not hidden:
                yield Location(self.filesystem, info.path)

    def delete(self) -> None:
        """Remove the file or the whole folder, if there is one."""
        kind = self._type()
        if kind is pafs.FileType.File:
            self.filesystem.delete_file(self.path)
        elif kind is pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)


def open_location(uri: str) -> Location:
    """Return the location of a local path or an `s3://bucket/prefix` address.

    Raises:
        UsageError: if the address is empty, has an unknown scheme or no bucket.
        SafetyDPOError: if the object store does not answer.
    """
    if not uri.strip() or uri.rstrip("/") == "s3:":
        raise UsageError(f"expected a local path or s3://bucket/prefix, found {uri!r}: name a folder or a bucket")
    if "://" not in uri:
        return Location(pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri)))
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise UsageError(f"expected a local path or s3://bucket/prefix, found {uri!r}: {_one_line(error)}") from error
    except OSError as error:
        raise SafetyDPOError(
            f"expected an answer from the object store of {uri!r}, found: {_one_line(error)}; "
            "check the bucket's name, the network and the credentials"
        ) from error
    return Location(filesystem, path.rstrip("/"))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
