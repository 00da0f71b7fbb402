"""Which pictures are found and counted, and their classes: ImageNet with its devkit, as torchvision has it."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import imagenet

from ablation.errors import SpecError
from ablation.inputs import images
from ablation.inputs.data import labels_of, load_data
from ablation.inputs.images import DEVKIT, count_images, find_images

N_CLASSES = 1000
CLASSES = [f"n{number:08d}" for number in range(5, 10 * N_CLASSES, 10)]  # in the order of their numbers
TRUTH = np.concatenate([np.random.default_rng(0).permutation(N_CLASSES), [3, 3, 998]])  # of each validation picture


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("jpeg") / "x.JPEG"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.read_bytes()


def write_devkit(root: Path, *, n_classes: int = N_CLASSES) -> Path:
    """A devkit of the published form: classes in another order than their ids', among synsets that have children."""
    order = np.random.default_rng(1).permutation(n_classes)
    fields = [(CLASSES[label], 0, []) for label in order] + [("n00000001", 2, [1, 2]), ("n00000002", 1, [3])]
    rows = [
        (k + 1, wnid, f"thing {wnid}, other name", "what it is", n_children, np.array(children), 0, 1300)
        for k, (wnid, n_children, children) in enumerate(fields)
    ]
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    table = np.array(rows, dtype=[(name, object) for name in (*names, "num_train_images")]).reshape(-1, 1)
    data = root / DEVKIT / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": table})
    id_of = {label: k + 1 for k, label in enumerate(order)}
    lines = [f"{id_of[label]}\n" for label in TRUTH if label < n_classes]
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(lines))
    return root / DEVKIT


def pack_devkit(root: Path) -> Path:
    """The devkit as an archive instead of a folder."""
    archive = root / f"{DEVKIT}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / DEVKIT, DEVKIT)
    shutil.rmtree(root / DEVKIT)
    return archive


def validation(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def write_files(folder: Path, content: bytes, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def both(root: Path, split: str, name: str = "imagenet") -> dict[str, list[str]]:
    """What is found, after seeing that as much is counted."""
    found = find_images(name, root, split, N_CLASSES if name == "imagenet" else None)
    counted = count_images(name, root, split, N_CLASSES if name == "imagenet" else None)
    assert counted == tuple(len(paths) for paths in found.values())
    return found


def refusal(root: Path, split: str = "test", name: str = "imagenet") -> str:
    """The one message that finding, counting and loading give; beside the root that was given it shows no host path."""
    n_classes = N_CLASSES if name == "imagenet" else None
    reads: list[Callable[[], Any]] = [
        lambda: find_images(name, root, split, n_classes),
        lambda: count_images(name, root, split, n_classes),
        lambda: load_data(name, root, split),
    ]
    messages = set()
    for read in reads:
        with pytest.raises(SpecError) as caught:
            read()
        assert (caught.value.field, caught.value.given) == ("data.root", str(root))
        messages.add(str(caught.value).removeprefix(f"data.root: got {str(root)!r}; "))
    assert len(messages) == 1
    assert str(root) not in str(messages)
    return messages.pop()


# --- ImageNet --------------------------------------------------------------------------------------------------------


def test_a_flat_validation_folder_is_what_torchvision_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jpeg: bytes
) -> None:
    """torchvision makes its tree from the two archives; ours reads the same pictures where one of them was unpacked."""
    theirs_at, ours_at = tmp_path / "theirs", tmp_path / "ours"
    write_files(ours_at / "val", jpeg, *(validation(number + 1) for number in range(len(TRUTH))))
    write_devkit(ours_at)
    shutil.copy(pack_devkit(ours_at), tmp_path)
    theirs_at.mkdir()
    (tmp_path / f"{DEVKIT}.tar.gz").rename(theirs_at / f"{DEVKIT}.tar.gz")
    with tarfile.open(theirs_at / "ILSVRC2012_img_val.tar", "w") as tar:
        for file in sorted((ours_at / "val").iterdir()):
            tar.add(file, file.name)
    for kind, (archive, _) in imagenet.ARCHIVE_META.items():
        monkeypatch.setitem(imagenet.ARCHIVE_META, kind, (archive, None))  # no checksums
    theirs = torchvision.datasets.ImageNet(theirs_at, "val")
    ours = load_data("imagenet", ours_at, "test")
    assert ours.classes == tuple(theirs.wnids)
    assert ours.targets == theirs.targets
    assert [Path(path).name for path, _ in ours.samples] == [Path(path).name for path, _ in theirs.samples]
    assert labels_of(ours).tolist() == sorted(TRUTH.tolist())
    assert ours[0][0].tobytes() == theirs[0][0].tobytes()
    both(ours_at, "test")
    # and the tree that torchvision has made is read as well, with and without the devkit
    for _ in range(2):
        tree = load_data("imagenet", theirs_at, "test")
        assert (tree.samples, list(tree.classes)) == (theirs.samples, theirs.wnids)
        (theirs_at / f"{DEVKIT}.tar.gz").unlink(missing_ok=True)


@pytest.mark.parametrize("packed", [False, True])
def test_the_devkit_numbers_the_classes_of_a_tree_with_some_of_them(tmp_path: Path, jpeg: bytes, packed: bool) -> None:
    write_devkit(tmp_path)
    if packed:
        pack_devkit(tmp_path)
    write_files(tmp_path / "train", jpeg, f"{CLASSES[7]}/b.JPEG", f"{CLASSES[7]}/a.JPEG", f"{CLASSES[998]}/x.JPEG")
    (tmp_path / "train" / CLASSES[8]).mkdir()
    write_files(tmp_path / "val", jpeg, f"{CLASSES[1]}/x.JPEG")  # the splits need not have the same classes now
    found = both(tmp_path, "train")
    assert list(found) == CLASSES
    assert {label: paths for label, paths in found.items() if paths} == {
        CLASSES[7]: [str(tmp_path / "train" / CLASSES[7] / name) for name in ("a.JPEG", "b.JPEG")],
        CLASSES[998]: [str(tmp_path / "train" / CLASSES[998] / "x.JPEG")],
    }
    dataset = load_data("imagenet", tmp_path, "train")
    assert (dataset.targets, len(dataset.classes)) == ([7, 7, 998], N_CLASSES)


def test_some_of_the_validation_pictures_keep_their_classes(tmp_path: Path, jpeg: bytes) -> None:
    write_devkit(tmp_path)
    write_files(tmp_path / "val", jpeg, validation(1003), validation(12), validation(500), "LICENSE.txt")
    names = {validation(number): TRUTH[number - 1] for number in (12, 500, 1003)}
    dataset = load_data("imagenet", tmp_path, "test")
    assert {Path(path).name: label for path, label in dataset.samples} == names
    both(tmp_path, "test")


def test_a_flat_folder_without_the_devkit_is_refused(tmp_path: Path, jpeg: bytes) -> None:
    write_files(tmp_path / "val", jpeg, validation(1))
    assert f"or {DEVKIT}.tar.gz beside it" in refusal(tmp_path)


def test_a_validation_picture_that_the_devkit_has_no_class_for_is_refused(tmp_path: Path, jpeg: bytes) -> None:
    write_devkit(tmp_path)
    write_files(tmp_path / "val", jpeg, validation(1), validation(1004))
    message = refusal(tmp_path)
    assert "allowed: validation pictures 1 to 1003" in message
    assert f"Remove val/{validation(1004)}." in message


def test_a_folder_that_is_no_class_of_the_devkit_is_refused(tmp_path: Path, jpeg: bytes) -> None:
    write_devkit(tmp_path)
    write_files(tmp_path / "val", jpeg, f"{CLASSES[0]}/x.JPEG", "n00000001/x.JPEG")  # a synset, but one with children
    assert "Rename or remove val/n00000001." in refusal(tmp_path)


def test_no_pictures_at_all_are_refused(tmp_path: Path) -> None:
    write_devkit(tmp_path)
    (tmp_path / "val" / CLASSES[0]).mkdir(parents=True)
    message = refusal(tmp_path)
    assert "allowed: class folders with pictures" in message
    assert "Add pictures to those in val/." in message


def test_a_class_without_pictures_is_named(tmp_path: Path, jpeg: bytes) -> None:
    write_files(tmp_path / "test", jpeg, "cat/1.jpg", "dog/x.txt")
    assert "Add pictures to test/dog, or remove it." in refusal(tmp_path, name="imagefolder")


@pytest.mark.parametrize(("split", "kind", "where"), [("train", "train", "into train/"), ("test", "val", "into val/")])
def test_an_archive_is_to_be_unpacked(tmp_path: Path, split: str, kind: str, where: str) -> None:
    (tmp_path / f"ILSVRC2012_img_{kind}.tar").touch()
    assert f"Unpack ILSVRC2012_img_{kind}.tar {where}" in refusal(tmp_path, split)
    assert "Unpack ILSVRC" not in refusal(tmp_path, split, "imagefolder")


def test_without_the_devkit_all_classes_must_be_there(tmp_path: Path, jpeg: bytes) -> None:
    write_files(tmp_path / "val", jpeg, *(f"{label}/x.JPEG" for label in CLASSES))
    both(tmp_path, "test")
    shutil.rmtree(tmp_path / "val" / CLASSES[7])
    message = refusal(tmp_path)
    assert "test split has 999" in message
    assert f"place {DEVKIT}.tar.gz beside it" in message


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no file in it": lambda kit: shutil.rmtree(kit / "data"),
    "no ground truth": lambda kit: (kit / "data" / "ILSVRC2012_validation_ground_truth.txt").unlink(),
    "no MATLAB file": lambda kit: (kit / "data" / "meta.mat").write_bytes(b"hello"),
    "another MATLAB file": lambda kit: savemat(kit / "data" / "meta.mat", {"other": [1, 2]}),
    "an id that there is not": lambda kit: (kit / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("77\n"),
    "no archive": lambda kit: (shutil.rmtree(kit), kit.with_name(f"{DEVKIT}.tar.gz").write_bytes(b"hello")),
    "an archive cut short": lambda kit: cut_short(pack_devkit(kit.parent)),
    "an archive of something else": lambda kit: (shutil.rmtree(kit / "data"), pack_devkit(kit.parent)),
}


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2000])


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_devkit_is_refused(tmp_path: Path, jpeg: bytes, damage: Callable[[Path], object]) -> None:
    kit = write_devkit(tmp_path, n_classes=70)
    write_files(tmp_path / "val", jpeg, validation(1))
    damage(kit)
    assert "the published devkit, with data/meta.mat" in refusal(tmp_path)
    assert "can't be read" in refusal(tmp_path)


def test_a_devkit_of_another_year_is_refused(tmp_path: Path, jpeg: bytes) -> None:
    write_devkit(tmp_path, n_classes=70)
    write_files(tmp_path / "val", jpeg, validation(1))
    assert f"{DEVKIT} has 70 classes instead of 1000" in refusal(tmp_path)


def test_a_devkit_means_nothing_to_other_data_sets(tmp_path: Path, jpeg: bytes) -> None:
    write_devkit(tmp_path)
    write_files(tmp_path / "test", jpeg, "cat/1.JPEG")
    assert list(both(tmp_path, "test", "imagefolder")) == ["cat"]


# --- counts are kept -------------------------------------------------------------------------------------------------


def settle(root: Path) -> None:
    """Make every folder look unchanged for an hour."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, ns=(0, folder.stat().st_mtime_ns - 3600 * 10**9))


def test_settled_folders_are_not_listed_again(tmp_path: Path, jpeg: bytes) -> None:
    write_files(tmp_path / "test", jpeg, "cat/1.jpg", "cat/deep/er/2.jpg", "dog/3.jpg", "dog/x.txt")
    settle(tmp_path)
    assert count_images("imagefolder", tmp_path, "test") == (2, 1)
    before = images._list.cache_info()
    assert count_images("imagefolder", tmp_path, "test") == (2, 1)
    after = images._list.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (4, 0)  # cat, cat/deep, cat/deep/er, dog


def test_a_change_at_any_depth_is_seen(tmp_path: Path, jpeg: bytes) -> None:
    write_files(tmp_path / "test", jpeg, "cat/1.jpg", "cat/deep/er/2.jpg")
    settle(tmp_path)
    assert count_images("imagefolder", tmp_path, "test") == (2,)
    write_files(tmp_path / "test", jpeg, "cat/deep/er/3.jpg")
    assert count_images("imagefolder", tmp_path, "test") == (3,)
    (tmp_path / "test" / "cat" / "1.jpg").unlink()
    assert count_images("imagefolder", tmp_path, "test") == (2,)


def test_a_folder_that_has_just_changed_is_listed_every_time(tmp_path: Path, jpeg: bytes) -> None:
    """Two changes may fall into one tick of the file system's clock; here the second one's time is set back."""
    write_files(tmp_path / "test", jpeg, "cat/1.jpg")
    folder = tmp_path / "test" / "cat"
    changed_ns = folder.stat().st_mtime_ns
    assert count_images("imagefolder", tmp_path, "test") == (1,)
    write_files(folder, jpeg, "2.jpg")
    os.utime(folder, ns=(0, changed_ns))
    assert count_images("imagefolder", tmp_path, "test") == (2,)
