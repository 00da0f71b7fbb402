"""A picture file as RGB of 8 bits, and what a file has that this leaves out.

In: a file. Out: the picture as `torchvision.datasets.ImageFolder` reads it, but for pictures of more than 8 bits, whose
whole range is scaled to 8; and names of what was left out or converted, which its header tells.
"""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION, _BITS = 274, 258  # numbers of tags in EXIF and TIFF
_UPRIGHT = 1
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_COLOURS = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "La", "RGBa", "RGBX", *_DEEP)

# What a picture may have that RGB of 8 bits has not, and what is done with it.
SAID = {
    "orientation": "an EXIF orientation, which is ignored as torchvision does (`--exif apply` turns them upright)",
    "turned": "an EXIF orientation, by which they are turned upright",
    "deep": "16 bits of grey, which are scaled to 8",
    "wide": "numbers of 32 bits, which are taken for 0 to 255",
    "alpha": "transparency, which is left out: the colours beneath it are taken",
    "frames": "several frames or pages, of which the first is taken",
    "palette": "a palette, whose colours are taken",
    "colours": "colours other than RGB and grey (such as CMYK), which are converted without a profile",
}


def read_picture(file: BinaryIO, exif: str = "ignore") -> Image.Image:
    """Read a picture file as RGB of 8 bits; with `exif="apply"` it is turned as its EXIF orientation says.

    Raises:
        ValueError: its numbers have 32 bits and are not from 0 to 255. OSError: the file is damaged.
    """
    picture: Image.Image = Image.open(file)
    if picture.mode in _DEEP:
        shallow = _scale(picture)
        picture = shallow if exif == "ignore" else _turn(shallow, _orientation(picture))
        return picture.convert("RGB")
    if exif == "apply":
        picture.load()  # in a PNG, the orientation may stand behind the pixels
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "P" and "transparency" in picture.info:  # Pillow warns where this step is left out
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _turn(picture: Image.Image, orientation: int) -> Image.Image:
    picture.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(picture)


def _scale(picture: Image.Image) -> Image.Image:
    """Grey of 8 bits: the largest number that the file's bits can hold becomes 255."""
    values = np.asarray(picture)
    if _is_wide(picture):
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and 1 < high < 256):
            raise ValueError(
                f"its numbers have 32 bits and are from {low:g} to {high:g}, so white is not known; allowed: pictures "
                "of at most 16 bits, or numbers from 0 to 255. Convert it to 8 bits"
            )
        return Image.fromarray(values.astype(np.uint8))
    top = (1 << _bits(picture)) - 1
    return Image.fromarray(((values.astype(np.int64).clip(0, top) * 255 + top // 2) // top).astype(np.uint8))


def _bits(picture: Image.Image) -> int:
    """Bits of a number of grey: what a TIFF says, else 16, to which Pillow scales PNM and PNG."""
    tags = getattr(picture, "tag_v2", None)
    return int(tags.get(_BITS, (16,))[0]) if tags is not None else 16


def _is_wide(picture: Image.Image) -> bool:
    return picture.mode == "F" or _bits(picture) > 16


def find_oddities(picture: Image.Image, exif: str = "ignore") -> list[str]:
    """Names in `SAID` of what a picture has, by what is known once its file is open."""
    found = []
    if _orientation(picture) != _UPRIGHT:
        is_turned = exif == "apply" or picture.format == "TIFF"  # which Pillow turns whenever it reads one
        found.append("turned" if is_turned else "orientation")
    if picture.mode in _DEEP:
        found.append("wide" if _is_wide(picture) else "deep")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        found.append("alpha")
    if getattr(picture, "n_frames", 1) > 1:
        found.append("frames")
    if picture.mode in ("P", "PA"):
        found.append("palette")
    if picture.mode not in _COLOURS:
        found.append("colours")
    return found


def _orientation(picture: Image.Image) -> int:
    try:
        # Not a format's own getexif: PNG's reads the pixels, too.
        found: Any = Image.Image.getexif(picture).get(_ORIENTATION, _UPRIGHT)
    except Exception:  # damaged EXIF data can raise anything; the picture itself may be sound
        return _UPRIGHT
    return found if isinstance(found, int) and 1 <= found <= 8 else _UPRIGHT


def count_oddities(paths: Iterable[str], exif: str = "ignore", n_threads: int = 1) -> Counter[str]:
    """Numbers of files that have each of `SAID`; only their headers are read. Files that can't be opened count none."""

    def look(path: str) -> list[str]:
        try:
            with open(path, "rb") as file, Image.open(file) as picture:
                return find_oddities(picture, exif)
        except Exception:  # the job reads it as well, and says what is wrong
            return []

    with ThreadPoolExecutor(max(1, n_threads)) as pool:
        return Counter(name for names in pool.map(look, paths) for name in names)


def say_oddities(counts: Counter[str], n: int) -> list[str]:
    """A sentence for each of `SAID` that was counted among `n` pictures."""
    return [f"{counts[name]:,} of {n:,} pictures have {what}" for name, what in SAID.items() if counts[name]]
