"""Pictures that are not RGB of 8 bits: what becomes of them, and that it is counted. Real files made by Pillow."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ablation.errors import DataError
from ablation.inputs.data import ImageFiles, load_data, say_pictures
from ablation.inputs.images import count_images, find_images, list_skipped
from ablation.inputs.pictures import SAID, count_oddities, read_picture

COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
DEEP = np.array([[0, 255, 256, 257], [32767, 32768, 65534, 65535], [5000, 12345, 40000, 60000]], dtype=np.uint16)


def read(path: Path, exif: str = "ignore") -> Image.Image:
    with path.open("rb") as file:
        picture = read_picture(file, exif)
    assert picture.mode == "RGB"
    return picture


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bits_of_grey_are_scaled_to_eight(name: str, tmp_path: Path) -> None:
    Image.fromarray(DEEP).save(tmp_path / name)
    grey = np.asarray(read(tmp_path / name))
    expected = np.rint(DEEP / 257).astype(int)
    for channel in range(3):
        assert np.abs(grey[..., channel].astype(int) - expected).max() == 0
    assert len(np.unique(grey)) > 5  # the control: torchvision makes 1 of 3 values white


@pytest.mark.parametrize("kind", ["floats", "whole numbers"])
def test_numbers_of_32_bits_are_taken_for_0_to_255_or_refused(kind: str, tmp_path: Path) -> None:
    dtype = np.float32 if kind == "floats" else np.int32
    sound = np.array([[0, 17, 200], [3, 99, 255]], dtype=dtype)
    Image.fromarray(sound).save(tmp_path / "sound.tif")
    assert (np.asarray(read(tmp_path / "sound.tif"))[..., 1] == sound).all()
    for name, scale in (("small", 1 / 255), ("large", 257), ("below", -1)):
        Image.fromarray((sound * scale).astype(dtype)).save(tmp_path / f"{name}.tif")
        with pytest.raises(ValueError, match="so white is not known"):
            read(tmp_path / f"{name}.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
def test_an_orientation_is_ignored_or_applied(name: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "x.webp" else {"quality": 95} if name == "x.jpg" else {}
    COLOURS.save(tmp_path / name, exif=exif, **options)
    as_stored = Image.open(tmp_path / name)
    as_stored.load()
    upright = ImageOps.exif_transpose(as_stored).convert("RGB")
    assert read(tmp_path / name, "apply").tobytes() == upright.tobytes()
    is_tiff = name == "x.tif"  # which Pillow itself turns when it reads one, for torchvision, too
    assert read(tmp_path / name).size == (upright if is_tiff else COLOURS).size
    for how, kind in (("ignore", "turned" if is_tiff else "orientation"), ("apply", "turned")):
        counted = count_oddities([str(tmp_path / name)], how)
        assert counted == Counter({kind: 1} if orientation > 1 else {}), (how, counted)


def test_a_deep_picture_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(DEEP).save(tmp_path / "x.png", exif=exif)
    assert read(tmp_path / "x.png").size == (4, 3)
    turned = read(tmp_path / "x.png", "apply")
    assert turned.tobytes() == read(tmp_path / "x.png").transpose(Image.Transpose.ROTATE_270).tobytes()


def write_odd(folder: Path) -> dict[str, set[str]]:
    """Pictures of every kind in `SAID`, and what each of them is counted as."""
    folder.mkdir(parents=True)
    other = COLOURS.transpose(Image.Transpose.ROTATE_180)
    exif = Image.Exif()
    exif[0x0112] = 3
    COLOURS.save(folder / "plain.png")
    COLOURS.convert("L").save(folder / "grey.jpg")
    COLOURS.convert("1").save(folder / "two-tone.png")
    COLOURS.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(DEEP).save(folder / "deep.png")
    Image.fromarray(DEEP.astype(np.float32) / 257).save(folder / "wide.tif")
    COLOURS.convert("RGBA").save(folder / "alpha.png")
    COLOURS.convert("LA").save(folder / "grey-alpha.png")
    COLOURS.quantize(7).save(folder / "palette.png")
    COLOURS.quantize(7).save(folder / "see-through.png", transparency=bytes([0, 128, 255]))
    COLOURS.save(folder / "animated.png", save_all=True, append_images=[other])
    COLOURS.save(folder / "animated.webp", save_all=True, append_images=[other], lossless=True)
    COLOURS.save(folder / "pages.tif", save_all=True, append_images=[other])
    COLOURS.convert("CMYK").save(folder / "cmyk.jpg")
    return {
        "plain.png": set(), "grey.jpg": set(), "two-tone.png": set(), "turned.jpg": {"orientation"},
        "deep.png": {"deep"}, "wide.tif": {"wide"}, "alpha.png": {"alpha"}, "grey-alpha.png": {"alpha"},
        "palette.png": {"palette"}, "see-through.png": {"palette", "alpha"}, "animated.png": {"frames"},
        "animated.webp": {"frames"}, "pages.tif": {"frames"}, "cmyk.jpg": {"colours"},
    }  # fmt: skip


def test_everything_that_is_left_out_is_counted_by_headers_alone(tmp_path: Path) -> None:
    expected = write_odd(tmp_path / "odd")
    for name, kinds in expected.items():
        assert set(count_oddities([str(tmp_path / "odd" / name)])) == kinds, name
        read(tmp_path / "odd" / name)
    counted = count_oddities([str(tmp_path / "odd" / name) for name in expected], n_threads=3)
    assert counted == Counter(kind for kinds in expected.values() for kind in kinds)
    assert set(counted) == set(SAID) - {"turned"}
    (tmp_path / "odd" / "broken.png").write_bytes(b"hello")
    assert count_oddities([str(tmp_path / "odd" / "broken.png")]) == {}


def test_the_first_frame_and_the_colours_beneath_are_taken(tmp_path: Path) -> None:
    write_odd(tmp_path / "odd")
    for name in ("animated.png", "animated.webp", "pages.tif", "alpha.png"):
        assert read(tmp_path / "odd" / name).tobytes() == COLOURS.tobytes(), name


JUNK = [
    "cat/._1.png", "cat/.DS_Store", "cat/Thumbs.db", "cat/desktop.ini", "cat/notes.txt", "__MACOSX/cat/._1.png",
    "__MACOSX/cat/1.png", ".git/1.png", "cat/.thumbnails/1.png", "cat/@eaDir/1.png", "loose.png.part",
]  # fmt: skip


def test_junk_is_skipped_and_counted_by_loader_and_catalog_alike(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/deep/2.png", "dog/3.png"):
        (tmp_path / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        COLOURS.save(tmp_path / "test" / name)
    for name in JUNK:
        (tmp_path / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "test" / name).write_bytes(b"\0\5\x16\7")
    assert {label: len(paths) for label, paths in find_images("imagefolder", tmp_path, "test").items()} == {
        "cat": 2, "dog": 1
    }  # fmt: skip
    assert count_images("imagefolder", tmp_path, "test") == (2, 1)
    assert sorted(list_skipped("imagefolder", tmp_path, "test")) == sorted(JUNK)
    data = load_data("imagefolder", tmp_path, "test")
    assert [picture.size for picture, _ in data] == [(5, 6)] * 3
    said = say_pictures(data, np.arange(3))
    assert len(said) == 1
    assert said[0].startswith("11 files skipped, which are no pictures of the data set: loose.png.part, .git/1.png")


def test_what_changes_pixels_is_said_in_sentences(tmp_path: Path) -> None:
    expected = write_odd(tmp_path / "test" / "odd")
    n = len(expected)
    said = say_pictures(load_data("imagefolder", tmp_path, "test"), np.arange(n))
    assert said[0] == (
        f"1 of {n} pictures have an EXIF orientation, which is ignored as torchvision does "
        "(`--exif apply` turns them upright)"
    )
    assert f"3 of {n} pictures have transparency, which is left out: the colours beneath it are taken" in said
    assert len(said) == len(SAID) - 1
    turned = load_data("imagefolder", tmp_path, "test", exif="apply")
    assert say_pictures(turned, np.arange(n))[0].endswith("an EXIF orientation, by which they are turned upright")
    assert isinstance(turned, ImageFiles)
    where = [path for path, _ in turned.samples].index(str(tmp_path / "test" / "odd" / "deep.png"))
    assert say_pictures(turned, np.array([where])) == [f"1 of 1 pictures have {SAID['deep']}"]


def test_a_picture_that_can_not_be_scaled_is_named(tmp_path: Path) -> None:
    from ablation.inputs.data import load_batches

    (tmp_path / "test" / "a").mkdir(parents=True)
    Image.fromarray(np.full((3, 4), 9e5, np.float32)).save(tmp_path / "test" / "a" / "x.tif")
    with pytest.raises(DataError, match=r"example 0 \(a/x\.tif\) can't be read: ValueError: its numbers have 32 bits"):
        list(load_batches(load_data("imagefolder", tmp_path), np.arange(1), 1))
