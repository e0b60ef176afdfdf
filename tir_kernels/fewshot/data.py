"""Image folders as few-shot data: classes, their words, and decoded images."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file, make_dataset

from tir_kernels.fewshot.errors import FewShotError, first_line


@dataclass(frozen=True)
class ImageClass:
    """A class: its folder's name, the words a prompt uses, and its files relative to the root."""

    folder: str
    words: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class ImageFolderData:
    """A folder with one sub-folder of images per class, in sorted order.

    Args:
        root: The folder.
        classes: Its classes, sorted by folder name.
        fingerprint: Digest of class words, file names and file sizes.
    """

    root: Path
    classes: tuple[ImageClass, ...]
    fingerprint: str

    @classmethod
    def scan(
        cls, root: str | Path, class_names: Mapping[str, str] | str | Path | None = None
    ) -> ImageFolderData:
        """List the classes and images under a folder; no image is opened.

        Args:
            root: Folder with a sub-folder per class. Hidden files and folders are left out.
            class_names: Words of each class: a mapping from folder name to words, or a JSON or CSV
                file that holds one. ``None``: ``default_words`` of the folder's name.

        Raises:
            FewShotError: The folder or the class names can't be used.
        """
        root = Path(root).expanduser()
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise FewShotError(f"--data: {root} {what}; pass a folder with a sub-folder per class")
        files = _list_images(root)
        if class_names is not None and not isinstance(class_names, Mapping):
            class_names = read_class_names(class_names)
        words = _class_words(list(files), class_names)
        classes = tuple(ImageClass(name, words[name], tuple(files[name])) for name in files)
        return cls(root, classes, _fingerprint(root, classes))

    def require(self, *, ways: int, shots: int, queries: int) -> None:
        """Check that episodes of this size can be drawn.

        Raises:
            FewShotError: Too few classes, or a class with too few images.
        """
        if ways > len(self.classes):
            raise FewShotError(
                f"--ways {ways} is more than the {len(self.classes)} class folders in {self.root} "
                f"({_some([entry.folder for entry in self.classes])}); lower --ways"
            )
        needed = shots + queries
        small = [entry for entry in self.classes if len(entry.files) < needed]
        if small:
            others = f" ({len(small) - 1} more classes have too few)" if len(small) > 1 else ""
            raise FewShotError(
                f"class {small[0].folder!r} in {self.root} has {len(small[0].files)} images but "
                f"{needed} are needed ({shots} shots + {queries} queries){others}; add images, "
                "remove the class, or lower --shots or --queries"
            )


def default_words(folder: str) -> str:
    """The words of a class whose folder name is all that is known.

    A leading index or WordNet id goes, camel case and underscores become spaces, all lower case:
    ``AnnualCrop`` -> "annual crop", ``n03126707_crane`` -> "crane".
    """
    words = re.sub(r"^(n\d{8}|\d+)[\s._-]+", "", folder)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", words)
    words = re.sub(r"[\s._]+", " ", words).strip().lower()
    return words or folder


def read_class_names(path: str | Path) -> dict[str, str]:
    """Read a class-name map: JSON (an object) or CSV (two columns), from folder name to words.

    A CSV file may start with a header line whose first cell is ``folder``.

    Raises:
        FewShotError: The file can't be read or is not such a map.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FewShotError(f"--class-names: can't read {path}: {first_line(error)}") from error
    if path.suffix.lower() == ".json":
        try:
            names = json.loads(text)
        except json.JSONDecodeError as error:
            raise FewShotError(f"--class-names: {path} is not valid JSON: {error}") from error
        if not isinstance(names, dict):
            raise FewShotError(f'--class-names: {path} must hold an object {{"folder": "words"}}')
    elif path.suffix.lower() == ".csv":
        names = _read_csv(path, text)
    else:
        raise FewShotError(f"--class-names: {path} must end in .json or .csv")
    for folder, words in names.items():
        if not isinstance(words, str) or not words.strip():
            raise FewShotError(f"--class-names: {path} has no words for {folder!r}; add them")
    return {folder: words.strip() for folder, words in names.items()}


def _read_csv(path: Path, text: str) -> dict[str, str]:
    names: dict[str, str] = {}
    reader = csv.reader(text.splitlines())
    for row in reader:
        cells = [cell.strip() for cell in row]
        is_header = reader.line_num == 1 and cells and cells[0].lower() == "folder"
        if not any(cells) or is_header:
            continue
        if len(cells) != 2:
            raise FewShotError(
                f"--class-names: line {reader.line_num} of {path} has {len(cells)} columns, not "
                "the 2 of 'folder,words'; put words that contain a comma in double quotes"
            )
        if cells[0] in names:
            raise FewShotError(
                f"--class-names: line {reader.line_num} of {path} names {cells[0]!r} again; "
                "keep one line per folder"
            )
        names[cells[0]] = cells[1]
    return names


def _list_images(root: Path) -> dict[str, list[str]]:
    def is_visible_image(path: str) -> bool:
        return is_image_file(path) and not Path(path).name.startswith(".")

    try:
        folders = sorted(
            entry.name
            for entry in root.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        index = {name: number for number, name in enumerate(folders)}
        found = (
            make_dataset(root, index, is_valid_file=is_visible_image, allow_empty=True)
            if index
            else []
        )
    except OSError as error:
        raise FewShotError(f"--data: can't list {root}: {first_line(error)}") from error
    if not folders:
        raise FewShotError(
            f"--data: {root} has no sub-folders; it needs one folder of images per class"
        )
    files: dict[str, list[str]] = {name: [] for name in folders}
    for path, number in found:
        files[folders[number]].append(Path(path).relative_to(root).as_posix())
    if not found:
        raise FewShotError(
            f"--data: no images in the sub-folders of {root}; "
            f"files with these endings are read: {' '.join(IMG_EXTENSIONS)}"
        )
    return {name: sorted(paths) for name, paths in files.items()}


def _class_words(folders: Sequence[str], names: Mapping[str, str] | None) -> dict[str, str]:
    if names is None:
        words = {folder: default_words(folder) for folder in folders}
    else:
        # Names of folders that are not there are fine: one map may serve several subsets.
        for folder in folders:
            if folder not in names:
                close = get_close_matches(folder, names, n=1)
                hint = f" (it has {close[0]!r})" if close else ""
                raise FewShotError(
                    f"--class-names: no words for class folder {folder!r}{hint}; add them"
                )
        words = {folder: names[folder] for folder in folders}
    owner: dict[str, str] = {}
    for folder, text in words.items():
        if text in owner:
            raise FewShotError(
                f"class folders {owner[text]!r} and {folder!r} have the same words {text!r}, so no "
                "prompt can tell them apart; give them different words with --class-names FILE"
            )
        owner[text] = folder
    return words


def _fingerprint(root: Path, classes: Sequence[ImageClass]) -> str:
    digest = hashlib.sha256()
    for entry in classes:
        try:
            sizes = [(name, (root / name).stat().st_size) for name in entry.files]
        except OSError as error:
            raise FewShotError(f"--data: {first_line(error)}") from error
        digest.update(json.dumps([entry.folder, entry.words, sizes]).encode())
    return digest.hexdigest()


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


class ImageReader:
    """Decodes and preprocesses images, and keeps the recently used ones in memory.

    Args:
        root: Folder that the names are relative to.
        preprocess: Makes a (3, H, W) float32 tensor from an RGB image.
        skip_unreadable: Answer ``None`` for an image that can't be decoded instead of raising.
        cache_bytes: Most memory for decoded images.
    """

    def __init__(
        self,
        root: Path,
        preprocess: Callable[[Image.Image], Tensor],
        *,
        skip_unreadable: bool = False,
        cache_bytes: int = 512 * 2**20,
    ) -> None:
        self._root = root
        self._preprocess = preprocess
        self._skip_unreadable = skip_unreadable
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._unreadable: set[str] = set()

    def read(self, name: str) -> Tensor | None:
        """The image as a (3, H, W) float32 tensor, or ``None`` if it is unreadable and skipped.

        Raises:
            FewShotError: The image can't be decoded and ``skip_unreadable`` is off.
        """
        if name in self._cache:
            self._cache.move_to_end(name)
            return self._cache[name]
        if name in self._unreadable:
            return None
        try:
            image = self._preprocess(_decode(self._root / name))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if not self._skip_unreadable:
                raise FewShotError(
                    f"can't read the image {self._root / name}: {first_line(error)}; "
                    "repair or remove it, or pass --skip-unreadable"
                ) from error
            self._unreadable.add(name)
            return None
        self._cache[name] = image
        self._cached_bytes += image.nbytes
        while self._cached_bytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return image


def _decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        if image.mode.startswith("I;16"):
            # Pillow's own conversion clips at 255, which turns such an image white.
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
