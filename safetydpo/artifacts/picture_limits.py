"""Opening picture files of unknown origin: what their header claims is held against a limit before memory is taken."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL import Image

from safetydpo.errors import SafetyDPOError

MAX_PIXELS = 100_000_000
"""Of one picture, 300 MB in memory: a file of a hundred bytes may claim a billion."""
COMMON_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


class BrokenPicture(ValueError):  # noqa: N818 (says what was found)
    """Bytes that are no whole picture of a known format and a size that can be held; the message is one line."""


class PictureTooLarge(BrokenPicture):
    """A header that claims more pixels than are read."""

    def __init__(self, width: int, height: int, *, max_pixels: int) -> None:
        """Say what is claimed."""
        super().__init__(f"{width} x {height} pixels, where at most {max_pixels:,} are read")
        self.size = f"{width} x {height}"


@contextmanager
def opened_picture(
    data: bytes, *, formats: Sequence[str] = COMMON_FORMATS, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Give the decoded first frame of a picture file; the block turns it into what is needed and does nothing else.

    Args:
        data: The file.
        formats: Pillow's names of the formats that are tried, and no others.
        max_pixels: Most pixels that are read.

    Raises:
        PictureTooLarge: if the file claims more than `max_pixels`.
        BrokenPicture: if the bytes are no such picture, or what they hold cannot be converted.
    """
    try:
        with warnings.catch_warnings():
            # The limit is asked for below; Pillow's own, and its remarks on odd metadata, are of no use to anybody.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=list(formats)) as image:
                if image.width * image.height > max_pixels:
                    raise PictureTooLarge(image.width, image.height, max_pixels=max_pixels)
                image.load()
                yield image
    except (BrokenPicture, SafetyDPOError):
        raise
    except Exception as error:
        # Pillow's decoders raise whatever their parsing ends in: OSError, SyntaxError, ValueError, EOFError,
        # struct.error, zlib.error, IndexError, KeyError, TypeError, OverflowError, MemoryError, DecompressionBombError.
        told = " ".join(str(error).split())[:120]
        raise BrokenPicture(told or type(error).__name__) from error
