"""The cache of decoded images: same bits, built once, and trusted only as far as it is whole."""

import contextlib
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_images import Counting, Setting
from fake_engine import run_main
from open_clip.transform import PreprocessCfg
from PIL import Image

from tir_kernels.fewshot import image_cache
from tir_kernels.fewshot.data import load_data
from tir_kernels.fewshot.episodes import load_episode, plan_episode
from tir_kernels.fewshot.errors import FewShotError
from tir_kernels.fewshot.image_cache import ImageCache, default_cache_folder
from tir_kernels.fewshot.images import ImageReader
from tir_kernels.fewshot.preprocess import Preprocess


@pytest.fixture
def setting(make_images, tmp_path):
    return Setting(make_images({"a": 5, "b": 4}), tmp_path / "cache" / "deep")


def test_a_class_is_decoded_once_and_gives_the_same_bits(setting):
    first, plain = setting.reader(), setting.without_cache()
    assert first(2).dtype == torch.uint8
    assert first.preprocess.decoded == 5  # all of the class, none of the other
    assert torch.equal(first.all(), plain.all())
    assert first.preprocess.decoded == 5
    again = setting.reader()
    assert torch.equal(again.all(), plain.all())
    assert torch.equal(again(3, 1), plain(3, 1))
    assert again.preprocess.decoded == 4
    assert [path.suffix for path in setting.files] == [".images"] * 2
    assert setting.notices == []


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_episodes_are_the_same_with_and_without_cache(make_images, tmp_path, mode):
    setting = Setting(make_images(), tmp_path / "cache")
    preprocess = Preprocess(PreprocessCfg(size=(20, 28), resize_mode=mode, fill_color=9))
    plan = plan_episode(3, 1, [8] * 6, 4)
    episodes = [
        load_episode(plan, data, reader, shots=2, queries=3, augment=1)
        for data in [load_data(setting.root)]
        for reader in (
            ImageReader(data, preprocess),
            setting.reader(preprocess).images,
            setting.reader(preprocess).images,
        )
    ]
    assert episodes[0].support_images.std() > 0.1
    for other in episodes[1:]:
        assert torch.equal(other.support_images, episodes[0].support_images)
        assert torch.equal(other.query_images, episodes[0].query_images)


def test_all_kinds_of_images(tmp_path):
    random = np.random.default_rng(0)
    color = Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    grey16 = Image.fromarray(random.integers(0, 2**16, (20, 30), dtype=np.uint16))
    kinds = {"rgb.png": color, "l.png": color.convert("L"), "16.png": grey16}
    kinds |= {"p.png": color.quantize(9), "cmyk.jpg": color.convert("CMYK"), "rgb.jpg": color}
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name, image in kinds.items():
        image.save(tmp_path / "images" / "a" / name)
    exif = color.getexif()
    exif[0x0112] = 6
    color.save(tmp_path / "images" / "a" / "turned.jpg", exif=exif)
    setting = Setting(tmp_path / "images", tmp_path / "cache")
    assert torch.equal(setting.reader().all(), setting.without_cache().all())
    assert torch.equal(setting.reader().all(), setting.without_cache().all())


def test_other_images_or_preprocessing_get_another_file(setting):
    setting.reader()(0)
    image = setting.root / "a" / "001.png"
    Image.effect_noise((24, 24), 90).convert("RGB").save(image)
    changed = setting.reader()
    assert torch.equal(changed.all(), setting.without_cache().all())
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    setting.reader()(0)
    assert len(setting.files) == 3
    for config in (PreprocessCfg(size=9), PreprocessCfg(size=8, interpolation="bilinear")):
        setting.reader(Counting(config))(0)
    assert len(setting.files) == 5
    # The same names, sizes and times in another folder need not be the same images.
    copy = setting.root.with_name("copy")
    shutil.copytree(setting.root, copy)
    setting.root = copy
    setting.reader()(0)
    assert len(setting.files) == 6


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    # In place, as a failing disk does, so that who has it mapped sees it.
    with open(path, "r+b") as file:
        file.write(content)


PIXELS = 5 * 3 * 8 * 8
DAMAGES = {
    "no end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "no description": lambda path: os.truncate(path, PIXELS),
    "few pixels": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "pixel": lambda path: flip_bit(path, 17),
    "description": lambda path: flip_bit(path, PIXELS + 20),
    "mark": lambda path: flip_bit(path, -1),
    "other file": lambda path: path.write_bytes(b"hello" * 1000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_not_used(setting, damage):
    setting.reader()(0)
    (path,) = setting.files
    DAMAGES[damage](path)
    again = setting.reader()
    assert torch.equal(again.all(), setting.without_cache().all())
    assert again.preprocess.decoded == 5
    assert setting.notices == [f"--cache: {path} is damaged; its images are decoded again"]
    last = setting.reader()
    assert torch.equal(last.all(), setting.without_cache().all())
    assert last.preprocess.decoded == 0


def test_a_file_damaged_while_in_use_is_not_used(setting):
    reader = setting.reader()
    reader(0)
    (path,) = setting.files
    flip_bit(path, 4 * 3 * 8 * 8)
    assert torch.equal(reader.all(), setting.without_cache().all())
    assert reader.preprocess.decoded == 10
    assert len(setting.notices) == 1


def test_a_disk_that_damages_what_it_gets_is_given_up(setting, monkeypatch):
    replace = os.replace

    def replace_and_damage(old, new):
        replace(old, new)
        flip_bit(Path(new), 0)

    monkeypatch.setattr(image_cache.os, "replace", replace_and_damage)
    reader = setting.reader()
    assert torch.equal(reader.all(), setting.without_cache().all())
    assert torch.equal(reader(0, 1), setting.without_cache()(0, 1))
    assert "what was just written is damaged; going on without" in setting.notices[-1]
    assert len(setting.notices) == 3


def test_images_may_vanish_once_they_are_in_the_cache(setting):
    reader, fresh, plain = setting.reader(), setting.reader(), setting.without_cache().all()
    reader(0)
    (setting.root / "a" / "003.png").unlink()
    (setting.root / "b" / "001.png").unlink()
    assert torch.equal(reader.all(), plain)
    assert torch.equal(fresh.all(), plain)
    complaint = r"can't read the image .*b/001\.png: .*No such file.*or pass --skip-unreadable"
    with pytest.raises(FewShotError, match=complaint):
        reader(1, 1)


def test_a_missing_image_is_not_remembered_as_unreadable(setting):
    image, kept = setting.root / "a" / "003.png", setting.root / "kept"
    lenient, strict = setting.reader(skip_unreadable=True), setting.reader()
    image.rename(kept)
    assert lenient(3) is None
    assert lenient(2) is not None
    kept.rename(image)
    assert torch.equal(strict.all(), setting.without_cache().all())
    assert strict.preprocess.decoded == 1


def test_an_image_that_changed_since_it_was_listed_is_not_kept(setting):
    reader = setting.reader()
    listed = (setting.root / "a" / "003.png").stat()
    old = setting.without_cache().all()
    content = (setting.root / "a" / "003.png").read_bytes()
    Image.effect_noise((24, 24), 90).convert("RGB").save(setting.root / "a" / "003.png")
    reader(0)
    (setting.root / "a" / "003.png").write_bytes(content)
    os.utime(setting.root / "a" / "003.png", ns=(listed.st_atime_ns, listed.st_mtime_ns))
    assert torch.equal(setting.reader().all(), old)


def test_unreadable_images_are_told_or_skipped_as_without_cache(setting):
    (setting.root / "a" / "001.png").write_bytes(b"damaged")
    with pytest.raises(FewShotError) as plain:
        setting.without_cache()(1)
    for _ in range(2):
        strict = setting.reader()
        assert strict(0) is not None
        with pytest.raises(FewShotError) as cached:
            strict(1)
        assert str(cached.value) == str(plain.value)
        lenient = setting.reader(skip_unreadable=True)
        assert lenient(1) is None
        assert lenient(4) is not None
        assert lenient.preprocess.decoded == 0
    assert "001.png" in str(plain.value)
    assert len(setting.files) == 1


def test_a_folder_that_cannot_be_written_is_told_once(setting, tmp_path):
    (tmp_path / "file").write_text("")
    setting.folder = tmp_path / "file" / "cache"
    reader = setting.reader()
    assert torch.equal(reader.all(), setting.without_cache().all())
    assert torch.equal(reader(0, 1), setting.without_cache()(0, 1))
    (notice,) = setting.notices
    assert notice.startswith(f"--cache: can't keep images in {setting.folder}: ")
    assert "Not a directory" in notice
    assert "going on without" in notice


@contextlib.contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_writing_fails_midway(setting):
    plain = setting.without_cache().all()
    reader = setting.reader()
    with file_size_limit(500):
        pixels = reader.all()
    assert torch.equal(pixels, plain)
    (notice,) = setting.notices
    assert "File too large" in notice
    assert setting.files == []


def test_a_full_disk_is_not_filled_further(setting, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=PIXELS - 1))
    reader = setting.reader()
    assert torch.equal(reader.all(), setting.without_cache().all())
    (notice,) = setting.notices
    assert "No space left" in notice
    assert setting.files == []
    assert reader.preprocess.decoded == 5


def test_a_folder_that_can_only_be_read_serves(setting, monkeypatch):
    plain = setting.without_cache().all()
    setting.reader()(0)

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image_cache.os, "open", refuse)
    reader = setting.reader()
    assert torch.equal(reader.all(), plain)
    assert reader.preprocess.decoded == 0
    assert setting.notices == []


def test_an_interrupted_class_leaves_nothing(make_images, tmp_path):
    data = load_data(make_images({"a": 40}))
    preprocess = Counting(seconds=0.01)

    def interrupt(text, done, total):
        assert (text, total) == ("decoding a", 40)
        if done == 3:
            raise KeyboardInterrupt

    cache = ImageCache(
        tmp_path / "cache", data.source, preprocess, notify=print, on_decode=interrupt
    )
    with pytest.raises(KeyboardInterrupt):
        cache.read(data.classes[0], 0)
    assert preprocess.decoded < 20
    assert list((tmp_path / "cache").iterdir()) == []


def test_default_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_folder() == Path("/x/tir_kernels/images")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache" / "tir_kernels" / "images"


def test_what_a_killed_process_left_is_overwritten(setting):
    setting.reader()(0)
    (path,) = setting.files
    path.rename(path.with_suffix(".partial"))
    path.with_suffix(".partial").write_bytes(b"\xff" * 10**5)
    assert torch.equal(setting.reader().all(), setting.without_cache().all())
    assert setting.files == [path]
    assert setting.notices == []


def test_the_command_line_keeps_images_or_not(make_images, tmp_path):
    root = make_images()
    arguments = ["run", "--data", str(root), "--model", "fake", "--method", "lora", "--steps=1"]
    arguments += ["--ways=3", "--shots=2", "--queries=2", "--episodes=2", "--backend=reference"]
    assert run_main([*arguments, "--out", str(tmp_path / "1"), "--no-cache"]) == 0
    assert not default_cache_folder().exists()
    assert run_main([*arguments, "--out", str(tmp_path / "2")]) == 0
    assert len(list(default_cache_folder().iterdir())) >= 3
    kept = tmp_path / "kept"
    assert run_main([*arguments, "--out", str(tmp_path / "3"), "--cache", str(kept)]) == 0
    assert len(list(kept.iterdir())) == len(list(default_cache_folder().iterdir()))
