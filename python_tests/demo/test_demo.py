"""The target domain of the demonstration, and the folder of its images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tir_kernels.demo import drawings, write_image_folder
from tir_kernels.demo.drawings import CLASS_NAMES_FILE, CLASSES, draw_tissue


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file below `root`."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files
    }


def test_import_leaves_open_clip_and_torch_alone() -> None:
    # Run under a bare package, because tir_kernels itself imports torch.
    program = (
        "import sys, types; package = types.ModuleType('tir_kernels'); "
        f"package.__path__ = [{str(Path(drawings.__file__).parents[1])!r}]; "
        "sys.modules['tir_kernels'] = package; import tir_kernels.demo; "
        "print([name for name in ('open_clip', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", CLASSES)
def test_tissue_is_deterministic_and_low_in_contrast(name: str) -> None:
    pixels = draw_tissue(name, 5, seed=2)
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, draw_tissue(name, 5, seed=2))
    assert not np.array_equal(pixels, draw_tissue(name, 5, seed=3))
    assert not np.array_equal(pixels, draw_tissue(name, 6, seed=2))
    assert 10 < pixels.std() < 70


def test_folder_is_complete_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "tissue"
    assert write_image_folder(root, images_per_class=3, seed=1) == root
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == sorted(CLASSES)
    for name in CLASSES:
        assert sorted(p.name for p in (root / name).iterdir()) == ["000.png", "001.png", "002.png"]
        with Image.open(root / name / "002.png") as image:
            assert image.mode == "RGB"
            assert image.size == (64, 64)
            assert np.array_equal(np.asarray(image), draw_tissue(name, 2, seed=1))
    names = json.loads((root / CLASS_NAMES_FILE).read_text(encoding="utf-8"))
    assert set(names) == set(CLASSES)
    assert len(set(names.values())) == len(CLASSES)
    before = contents(root)
    write_image_folder(root, images_per_class=3, seed=1)
    assert contents(root) == before
    assert [path.name for path in root.parent.iterdir()] == ["tissue"]
    # Even drawn again they are the same files, so that a run can go on with them.
    shutil.rmtree(root)
    write_image_folder(root, images_per_class=3, seed=1)
    assert {name: times for name, times in contents(root).items() if name.endswith("png")} == {
        name: times for name, times in before.items() if name.endswith("png")
    }


def test_an_interrupted_call_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_late(name: str, index: int, *, seed: int) -> np.ndarray:
        if name == list(CLASSES)[-1]:
            raise KeyboardInterrupt
        return draw_tissue(name, index, seed=seed)

    with monkeypatch.context() as patch:
        patch.setattr(drawings, "draw_tissue", stop_late)
        with pytest.raises(KeyboardInterrupt):
            write_image_folder(tmp_path / "tissue", images_per_class=1)
    assert list(tmp_path.iterdir()) == []

    # A killed process cannot clean up; what it leaves lies beside the folder, never in it.
    (tmp_path / "tissue.partial-0" / "ADI").mkdir(parents=True)
    root = write_image_folder(tmp_path / "tissue", images_per_class=1)
    assert len(list(root.glob("*/*.png"))) == len(CLASSES)


def test_a_folder_that_holds_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="choose another folder"):
        write_image_folder(tmp_path / "mine", images_per_class=1)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"

    root = write_image_folder(tmp_path / "tissue", images_per_class=1)
    with pytest.raises(FileExistsError):  # other drawings
        write_image_folder(root, images_per_class=1, seed=1)
    (root / "ADI" / "000.png").unlink()
    with pytest.raises(FileExistsError):  # damaged
        write_image_folder(root, images_per_class=1)

    (tmp_path / "empty").mkdir()
    assert write_image_folder(tmp_path / "empty", images_per_class=1).is_dir()


@pytest.mark.parametrize("wrong", [{"images_per_class": 0}, {"seed": -1}])
def test_wrong_arguments_are_named(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        write_image_folder(tmp_path / "tissue", **wrong)
    assert list(tmp_path.iterdir()) == []
