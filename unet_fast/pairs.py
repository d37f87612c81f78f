"""Which label file belongs to which image: folders as people keep them.

One file each; a folder each, with equal names or a suffix (`x.png` and `x_mask.png`); both kinds in one folder; one
folder with `images/` and `masks/` (or `labels/`) in it; the Cell Tracking Challenge (`01/t007.tif` with
`01_GT/SEG/man_seg007.tif`), where frames without labels are normal.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import BadInput
from .files import SUFFIXES, list_images

__all__ = ["Pairing", "image_folder", "images_in", "labels_in", "pair", "without_labels"]

# longest first, so that `x_cp_masks` is x and not x_cp
_WORDS = "cp_masks|segmentation|instances|instance|labels|label|masks|mask|annotation|manual|truth|seg|lbl|gt"
_LABEL_SUFFIX = re.compile(rf"[_\-. ]({_WORDS})$", re.IGNORECASE)
_LABEL_PREFIX = re.compile(rf"^({_WORDS})[_\-. ]", re.IGNORECASE)
_IMAGE_SUFFIX = re.compile(r"[_\-. ](image|images|img|raw)$", re.IGNORECASE)
_IMAGE_PREFIX = re.compile(r"^(image|img|raw)[_\-. ]", re.IGNORECASE)
_IMAGE_FOLDERS, _LABEL_FOLDERS = ("images", "image", "raw"), ("masks", "labels", "mask", "label")
_CTC_FRAME, _CTC_LABEL = re.compile(r"^(?:t|mask)(\d+)$"), re.compile(r"^man_(?:seg|track)_?(\d+)$")


@dataclass(frozen=True, slots=True)
class Pairing:
    """Pairs (image, labels) in natural order, and the files that have no partner.

    `tracking` is True for a Cell Tracking Challenge layout: its labels are instances, and partial by design.
    """

    pairs: list[tuple[Path, Path]]
    lone_images: list[Path]
    lone_labels: list[Path]
    tracking: bool = False


def pair(images: Path, labels: Path) -> Pairing:
    """Match images with labels.

    Raises:
        BadInput: a path does not exist, holds no images, or two files claim one partner.
    """
    for path in (images, labels):
        if not path.exists():
            raise BadInput(f"{path} does not exist")
    if images.is_file() and labels.is_file():
        return Pairing([(list_images(images)[0], list_images(labels)[0])], [], [])
    if images.is_file() or labels.is_file():
        raise BadInput(f"{images} and {labels} must be two files or two folders")
    one_folder = images.resolve() == labels.resolve()
    pictures, truths = images_in(images), labels_in(images if one_folder else labels)
    if one_folder and pictures == truths:
        raise BadInput(
            f"{images} must hold images and their labels, such as x.png and x_mask.png, or images/ and masks/"
        )
    return _match(pictures, truths)


def images_in(path: Path) -> list[Path]:
    """The images of a file or folder: those of `images/` where there is one, and no labels that lie beside them.

    Raises:
        BadInput: there is nothing there, or nothing that can be read.
    """
    return without_labels(list_images(image_folder(path)))


def image_folder(path: Path) -> Path:
    """The folder `images/` (or `raw/`) in one that has no images of its own; otherwise the path itself."""
    return _folder_in(path, _IMAGE_FOLDERS) or path


def without_labels(files: list[Path]) -> list[Path]:
    """Without those that are named as the labels of another."""
    return [p for p in files if p not in _beside_images(files)]


def labels_in(path: Path) -> list[Path]:
    """The label files of a file or folder: those of `masks/`, `labels/` or `SEG/`, or those that lie beside images.

    Raises:
        BadInput: there is nothing there, or nothing that can be read.
    """
    inside = _folder_in(path, ("SEG", "TRA", *_LABEL_FOLDERS))
    files = list_images(inside or path)
    return _beside_images(files) or files


def _beside_images(files: list[Path]) -> list[Path]:
    """The files named as the labels of another one: x_mask.png where there is x.png."""
    stems = {_image_key(p) for p in files if _label_key(p) == p.stem}
    return [p for p in files if _label_key(p) != p.stem and _label_key(p) in stems]


def _folder_in(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the subfolders `names`; None in a folder that has images of its own."""
    if not folder.is_dir() or any(p.suffix.lower() in SUFFIXES for p in folder.iterdir() if p.is_file()):
        return None
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _match(images: list[Path], labels: list[Path]) -> Pairing:
    if all(_CTC_LABEL.match(p.stem) for p in labels) and any(_CTC_FRAME.match(p.stem) for p in images):
        by_key = _by_key(images, lambda p: _number(_CTC_FRAME, p)), _by_key(labels, lambda p: _number(_CTC_LABEL, p))
        return _paired(*by_key, tracking=True)
    exact = _by_key(images, lambda p: p.stem), _by_key(labels, lambda p: p.stem)
    if set(exact[0]) & set(exact[1]):
        return _paired(*exact, tracking=False)
    return _paired(_by_key(images, _image_key), _by_key(labels, _label_key), tracking=False)


def _number(pattern: re.Pattern[str], path: Path) -> str:
    found = pattern.match(path.stem)
    return str(int(found[1])) if found else path.stem


def _label_key(path: Path) -> str:
    return _LABEL_PREFIX.sub("", _LABEL_SUFFIX.sub("", path.stem))


def _image_key(path: Path) -> str:
    return _IMAGE_PREFIX.sub("", _IMAGE_SUFFIX.sub("", path.stem))


def _by_key(paths: list[Path], key: Callable[[Path], str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        name = key(path)
        if name in found:
            raise BadInput(f"{found[name]} and {path} are both called {name}; keep one of them")
        found[name] = path
    return found


def _paired(images: dict[str, Path], labels: dict[str, Path], *, tracking: bool) -> Pairing:
    return Pairing(
        [(path, labels[key]) for key, path in images.items() if key in labels],
        [path for key, path in images.items() if key not in labels],
        [path for key, path in labels.items() if key not in images],
        tracking,
    )
