"""Storage as (pyarrow filesystem, path): the same code writes to a local disk and to S3.

A `Location` is a path that may or may not exist. Writes are all-or-nothing: local files are written beside
their target, flushed to disk and renamed; object stores publish an object only when its upload is complete.

An object store knows objects only. A folder stands there as long as an object lies below it: what is left of an emptied
one (a marker, or a prefix that the server still lists) is nothing.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from safetydpo.artifacts.exclusive_create import NoExclusiveCreation, create_object
from safetydpo.artifacts.object_store import BROKEN_OFF, PatientS3, check_reachable, one_line, open_s3, s3_remedy
from safetydpo.errors import SafetyDPOError, UsageError

CREATION_TRIES = 3
READ_TRIES, READ_PAUSE_SECONDS = 5, 1.0


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
    def shown(self) -> str:
        """The place as people read it: a local one below the working folder relative to that."""
        here = Path.cwd()
        below = self.is_local and here in Path(self.path).parents
        return str(Path(self.path).relative_to(here)) if below else str(self)

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
        """Whether a folder stands here; on an object store: whether an object lies below."""
        return self._type() is pafs.FileType.Directory and (self.is_local or self._holds_an_object())

    def exists(self) -> bool:
        """Whether a file or folder stands here."""
        return self.is_file() or self.is_folder()

    def _type(self) -> pafs.FileType:
        with self._answering("to look at"):
            return self.filesystem.get_file_info([self.path])[0].type

    def _holds_an_object(self) -> bool:
        children = self._children()
        if any(info.type is pafs.FileType.File for info in children):
            return True
        return any(Location(self.filesystem, info.path)._holds_an_object() for info in children)

    def _children(self, *, recursive: bool = False) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        with self._answering("to list"):
            try:
                return list(self.filesystem.get_file_info(selector))
            except FileNotFoundError:
                # Absent when pyarrow listed it and there when it asked whether that is all right: just being made.
                return list(self.filesystem.get_file_info(selector))

    @contextmanager
    def _answering(self, action: str) -> Iterator[None]:
        """Turn an error of the file system into one line of ours."""
        try:
            yield
        except OSError as error:
            remedy = s3_remedy(str(error)) or "mend the cause"
            raise SafetyDPOError(
                f"expected {action} {self}, found: {one_line(error)}; {remedy}, then run the same command again"
            ) from error

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = s3_remedy(str(error)) or "free space or choose another folder"
            raise SafetyDPOError(
                f"expected to {what} {self}, found: {one_line(error)}; {remedy}, then run the same command again"
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise SafetyDPOError(f"expected a file at {self}, found nothing: run the stage that makes it") from error
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> SafetyDPOError:
        remedy = s3_remedy(str(error))
        advice = f"; {remedy}, then run the same command again" if remedy else ""
        return SafetyDPOError(f"expected a readable file at {self}, found: {one_line(error)}{advice}")

    def check_reachable(self) -> None:
        """Ask an object store for this place, within seconds; a local disk is not asked.

        Raises:
            SafetyDPOError: if the store does not answer, has no such bucket, or refuses the credentials.
        """
        check_reachable(self.filesystem, self.path)

    def make_folder(self) -> Location:
        """Create the folder and its parents; return itself. An object store needs none.

        Raises:
            SafetyDPOError: if the place is not writable.
        """
        if self.filesystem.type_name != "s3":
            with self._writing("make the folder"):
                self.filesystem.create_dir(self.path, recursive=True)
        return self

    def size_bytes(self) -> int:
        """Return the length of the file.

        Raises:
            SafetyDPOError: if no file stands here.
        """
        with self._answering("to look at"):
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
            raise self._unreadable(error) from error

    @property
    def parent(self) -> Location:
        """The folder above."""
        return Location(self.filesystem, self.path.rstrip("/").rsplit("/", 1)[0])

    def read_bytes(self) -> bytes:
        """Return the whole content.

        Raises:
            SafetyDPOError: if nothing stands here or it cannot be read.
        """
        with self._reading():
            for _ in range(READ_TRIES - 1):
                try:
                    return self._read()
                except OSError as error:
                    if BROKEN_OFF not in str(error):
                        raise
                    time.sleep(READ_PAUSE_SECONDS)
            return self._read()

    def _read(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write_bytes(self, data: bytes) -> None:
        """Write the whole content at once; afterwards either the old or the new content stands here.

        Raises:
            SafetyDPOError: if the disk is full or the place is not writable; nothing is left half-written.
        """
        with self._writing(f"write {len(data):,} bytes to"):
            if self.is_local:
                self._write_local(data)
            else:
                with self.filesystem.open_output_stream(self.path) as stream:
                    stream.write(data)

    def create_exclusively(self, data: bytes) -> bool:
        """Write the whole content if nothing stands here; return whether it was this call that did.

        Of any number of processes on any number of machines one gets True. `data` must be the caller's own (hold a
        random token, say), because a request to an object store may arrive twice.

        Raises:
            NoExclusiveCreation: if the file system or the server has none.
            SafetyDPOError: if the disk is full or the place is not writable; nothing is left half-written.
        """
        with self._writing(f"create {len(data):,} bytes at"):
            if self.is_local:
                return self._create_local(data)
            if isinstance(self.filesystem, PatientS3):
                return create_object(self.filesystem, self.path, data)
        raise NoExclusiveCreation(
            f"expected a local disk or S3 for exclusive creation, found {self}: choose another execution.store"
        )

    def _create_local(self, data: bytes) -> bool:
        for _ in range(CREATION_TRIES - 1):
            # Another command may take the folder away in between, as one does that finds nothing left to be made in it.
            with suppress(FileNotFoundError):
                return self._link_new(data)
        return self._link_new(data)

    def _link_new(self, data: bytes) -> bool:
        target = Path(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"
        # A link, not O_EXCL: that would show the file to others before its content is there, and after a kill for
        # good. Over NFS a link is one step too.
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(temporary, target)
            except FileExistsError:
                # The answer to a first try that worked may have been lost on the way from a file server.
                return temporary.stat().st_nlink > 1
            return True
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def stream_out(self) -> Iterator[pa.NativeFile]:
        """Open the file for writing piece by piece; use it in a `with` block.

        A part may be seen before the end: write into a folder that does not count yet.

        Raises:
            SafetyDPOError: if the disk is full or the place is not writable.
        """
        with self._writing("write to"):
            with self.filesystem.open_output_stream(self.path) as stream:
                yield stream
            if self.is_local:
                with open(self.path, "rb") as written:
                    os.fsync(written.fileno())

    def rename_folder(self, target: Location) -> None:
        """Give a local folder the place of `target`, which is absent or empty, in one step.

        Raises:
            SafetyDPOError: if either is not local, or the target has come to hold something.
        """
        source, wanted = self.local_path, target.local_path
        with target._writing("make the folder"):
            os.rename(source, wanted)

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
        found = []
        for info in self._children():
            child = Location(self.filesystem, info.path)
            if child.name.startswith("."):
                continue
            if info.type is pafs.FileType.File or self.is_local or child._holds_an_object():
                found.append(child)
        return sorted(found, key=lambda child: child.path)

    def walk(self) -> Iterator[Location]:
        """Yield all files below, in path order, without hidden ones."""
        prefix = len(self.path.rstrip("/")) + 1
        for info in sorted(self._children(recursive=True), key=lambda info: info.path):
            hidden = any(part.startswith(".") for part in info.path[prefix:].split("/"))
            if info.type is pafs.FileType.File and not hidden:
                yield Location(self.filesystem, info.path)

    def count_files(self) -> int:
        """Return the number of all files below, hidden ones among them."""
        return sum(info.type is pafs.FileType.File for info in self._children(recursive=True))

    def delete(self) -> None:
        """Remove the file or the whole folder, if there is one."""
        kind = self._type()
        with self._answering("to delete"):
            if kind is pafs.FileType.File:
                self.filesystem.delete_file(self.path)
            elif kind is pafs.FileType.Directory:
                self.filesystem.delete_dir(self.path)


def open_location(uri: str) -> Location:
    """Return the location of a local path or an `s3://bucket/prefix` address.

    Raises:
        UsageError: if the address is empty, has an unknown scheme or no bucket, or holds credentials.
        SafetyDPOError: if nothing says in which region of Amazon's S3 the bucket is, and Amazon does not answer.
    """
    if not uri.strip() or uri.rstrip("/") == "s3:":
        raise UsageError(f"expected a local path or s3://bucket/prefix, found {uri!r}: name a folder or a bucket")
    if uri.startswith("s3://"):
        return Location(*open_s3(uri))
    if "://" not in uri:
        return Location(pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri)))
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise UsageError(f"expected a local path or s3://bucket/prefix, found {uri!r}: {one_line(error)}") from error
    return Location(filesystem, path.rstrip("/"))
