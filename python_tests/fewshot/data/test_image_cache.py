"""The cache of decoded images: same bits, decoded once, and trusted only as far as it is whole."""

import os
import shutil
import threading

import numpy as np
import pytest
import torch
from cached_images import Counting, Setting
from open_clip.transform import PreprocessCfg
from PIL import Image
from small_images import write_images

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data import cache as image_cache
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.decoding import Decoding
from tir_kernels.fewshot.data.load import load_episode
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.episode import plan_episode
from tir_kernels.towers.loading.preprocess import Preprocess


def test_only_what_is_asked_for_is_decoded_and_only_once(setting):
    first, plain = setting.reader(), setting.without_cache()
    assert first(2).dtype == torch.uint8
    assert first.preprocess.decoded == 1
    assert torch.equal(first.all(), plain.all())
    assert first.preprocess.decoded == 5
    again = setting.reader()
    assert torch.equal(again.all(), plain.all())
    assert torch.equal(again(3, 1), plain(3, 1))
    assert again.preprocess.decoded == 1
    assert [path.suffix for path in setting.files] == [".image"] * 6
    assert setting.notices == []


def test_an_episode_decodes_its_own_images_alone(setting):
    reader = setting.reader()
    plan = plan_episode(0, 0, [5, 4], 2)
    load_episode(plan, reader.data, reader.images, shots=1, queries=2)
    assert reader.preprocess.decoded == len(setting.files) == 6
    load_episode(plan, reader.data, reader.images, shots=1, queries=2)
    assert reader.preprocess.decoded == 6


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


def test_other_images_or_preprocessing_get_other_files(setting):
    def decoded(preprocess=None):
        reader = setting.reader(preprocess)
        assert torch.equal(reader.all(), setting.without_cache().all()) or preprocess
        return reader.preprocess.decoded

    assert decoded() == 5
    image = setting.root / "a" / "001.png"
    Image.effect_noise((24, 24), 90).convert("RGB").save(image)
    assert decoded() == 1
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert decoded() == 1
    for config in (PreprocessCfg(size=9), PreprocessCfg(size=8, interpolation="bilinear")):
        assert decoded(Counting(config)) == 5
    white = setting.reader(decoding=Decoding(white_value=np.float32(4095)))
    assert white.all().shape == (5, 3, 8, 8)
    assert white.preprocess.decoded == 5
    # The same names, sizes and times in another folder need not be the same images.
    copy = setting.root.with_name("copy")
    shutil.copytree(setting.root, copy)
    setting.root = copy
    assert decoded() == 5


def test_images_of_one_resize_serve_no_other(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "images" / "a" / "wide.png")
    setting, own = Setting(tmp_path / "images", tmp_path / "cache"), Preprocess(PreprocessCfg(8))
    seen = []
    for changed in (own, own.with_resize(True), own.with_resize(True, "bilinear")):
        first, again = (setting.reader(Counting(changed.config)) for _ in range(2))
        seen.append(first(0))
        assert first.preprocess.decoded == 1
        assert torch.equal(again(0), seen[-1])
        assert again.preprocess.decoded == 0
    assert len(torch.unique(torch.stack(seen), dim=0)) == len(setting.files) == 3


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    # In place, as a failing disk does, so that who has it open sees it.
    with open(path, "r+b") as file:
        file.write(content)


HEAD, PIXELS = 80, 3 * 8 * 8
DAMAGES = {
    "no end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "no pixels": lambda path: os.truncate(path, HEAD),
    "few pixels": lambda path: os.truncate(path, 100),
    "no head": lambda path: os.truncate(path, 30),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "pixel": lambda path: flip_bit(path, HEAD + 17),
    "mark": lambda path: flip_bit(path, 0),
    "key": lambda path: flip_bit(path, 8),
    "whether there are pixels": lambda path: flip_bit(path, 72),
    "conversions": lambda path: flip_bit(path, 75),
    "checksum": lambda path: flip_bit(path, HEAD - 1),
    "other file": lambda path: path.write_bytes(b"hello" * 1000),
    "zeros": lambda path: path.write_bytes(bytes(HEAD + PIXELS)),
    "of another image": lambda path: shutil.copy(path.with_name("other"), path),
    "unknown conversions": lambda path: path.write_bytes(
        (head := image_cache._head(path.stem, 0, 1 << 14, b"")) + path.read_bytes()[len(head) :]
    ),
    "unreadable with pixels": lambda path: path.write_bytes(
        image_cache._head(path.stem, 0, 0, path.read_bytes()[HEAD:]) + path.read_bytes()[HEAD:]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_not_used(setting, damage):
    setting.reader()(1)
    (other,) = setting.files
    other.rename(setting.own_folder / "other")
    setting.reader()(0)
    path = next(path for path in setting.files if path.suffix)
    DAMAGES[damage](path)
    again = setting.reader()
    assert torch.equal(again(0), setting.without_cache()(0))
    assert again.preprocess.decoded == 1
    (notice,) = setting.notices
    assert notice.startswith(f"cache: {path} is damaged; its image is decoded again")
    last = setting.reader()
    assert torch.equal(last(0), setting.without_cache()(0))
    assert last.preprocess.decoded == 0


def test_files_damaged_while_in_use_are_not_used_and_told_once(setting):
    reader = setting.reader()
    reader.all()
    for path in setting.files[:3]:
        os.truncate(path, 100)
    assert torch.equal(reader.all(), setting.without_cache().all())
    assert reader.preprocess.decoded == 8
    assert len(setting.notices) == 1
    setting.files[0].unlink()
    assert torch.equal(reader.all(), setting.without_cache().all())
    assert reader.preprocess.decoded == 9


def test_a_disk_that_damages_what_it_gets_is_given_up(setting, monkeypatch):
    rename = os.rename

    def rename_and_damage(old, new, **folders):
        rename(old, new, **folders)
        flip_bit(setting.own_folder / new, HEAD)

    monkeypatch.setattr(image_cache.os, "rename", rename_and_damage)
    reader, plain = setting.reader(), setting.without_cache()
    for _ in range(4):
        assert torch.equal(reader(0), plain(0))
    assert torch.equal(reader(0, 1), plain(0, 1))
    assert reader.preprocess.decoded == 4  # what can't be kept on the disk is kept in memory
    assert "what was just written is damaged; going on without" in setting.notices[-1]
    assert len(setting.notices) == 2


def test_images_may_vanish_once_they_are_in_the_cache(setting):
    plain = setting.without_cache().all()
    setting.reader().all()
    reader = setting.reader()
    (setting.root / "a" / "003.png").unlink()
    (setting.root / "b" / "001.png").unlink()
    assert torch.equal(reader.all(), plain)
    complaint = r"can't read the image .*b/001\.png: .*No such file.*or pass skip_unreadable"
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
    assert strict.preprocess.decoded == 4


def test_an_image_that_changed_since_it_was_listed_is_not_kept(setting):
    reader = setting.reader()
    path = setting.root / "a" / "003.png"
    listed, content = path.stat(), path.read_bytes()
    old = setting.without_cache().all()
    Image.effect_noise((24, 24), 90).convert("RGB").save(path)
    reader.all()
    path.write_bytes(content)
    os.utime(path, ns=(listed.st_atime_ns, listed.st_mtime_ns))
    assert torch.equal(setting.reader().all(), old)


def test_unreadable_images_are_told_or_skipped_as_without_cache(setting, monkeypatch):
    image = setting.root / "a" / "001.png"
    image.write_bytes(image.read_bytes()[:-300])
    with pytest.raises(FewShotError) as plain:
        setting.without_cache()(1)
    assert "001.png" in str(plain.value)
    decoded, decode = [], Decoding.decode
    monkeypatch.setattr(
        Decoding, "decode", lambda self, file: decoded.append(file.name) or decode(self, file)
    )
    for _ in range(2):
        strict = setting.reader()
        assert strict(0) is not None
        with pytest.raises(FewShotError) as cached:
            strict(1)
        assert str(cached.value) == str(plain.value)
        lenient = setting.reader(skip_unreadable=True)
        assert lenient(1) is None
        assert lenient(4) is not None
    assert decoded == ["000.png", "001.png", "004.png", "001.png"]
    assert len(setting.files) == 3


def test_what_other_settings_could_read_is_not_remembered(setting):
    small = setting.reader(decoding=Decoding(max_pixels=9), skip_unreadable=True)
    assert small(0) is None
    assert setting.files == []
    (setting.root / "a" / "000.png").write_bytes(b"of a kind to come")
    assert setting.reader(skip_unreadable=True)(0) is None
    assert setting.files == []


@pytest.mark.parametrize("threads", [1, 3])
def test_what_was_decoded_before_an_interrupt_is_kept(setting, monkeypatch, threads):
    setting.root = write_images(setting.root.with_name("many"), {"a": 40})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    preprocess = Counting(seconds=0.01)
    reader = setting.reader(preprocess)
    settled = reader.images._settled

    def interrupted(name, loaded):
        if name == "a/003.png":
            raise KeyboardInterrupt
        return settled(name, loaded)

    monkeypatch.setattr(reader.images, "_settled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader.all()
    assert 4 <= preprocess.decoded < 20
    assert len(setting.files) == preprocess.decoded
    rest = setting.reader()
    assert torch.equal(rest.all(), setting.without_cache().all())
    assert rest.preprocess.decoded == 40 - preprocess.decoded


def test_images_are_decoded_side_by_side_in_the_order_asked_for(setting, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = threading.Barrier(3, timeout=60)

    class Meeting(Counting):
        def to_pixels(self, image):
            together.wait()
            return super().to_pixels(image)

    reader, plain = setting.reader(Meeting()), setting.without_cache()
    a, b = reader.data.classes
    images = reader.images.read_many([(b, 2), (a, 4), (b, 0)])
    for pixels, expected in zip(images, (plain(2, 1), plain(4), plain(0, 1)), strict=True):
        assert torch.equal(pixels, expected)


def test_what_images_lose_is_told_once_a_kind_also_from_the_cache(tmp_path):
    folder = tmp_path / "images" / "a\x1b[1m"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(np.full((8, 8), 20000, np.uint16)).save(folder / f"{number}.png")
    setting = Setting(tmp_path / "images", tmp_path / "cache")
    for decoded in (3, 0):
        told = []
        reader = setting.reader(notify=told.append)
        reader.all()
        assert reader.preprocess.decoded == decoded
        (note,) = told
        assert note.startswith(f"{tmp_path}/images/a\\x1b[1m/0.png has more than 8 bits per value")


def test_what_killed_processes_left_is_deleted_in_time(setting):
    setting.reader()(0)
    (path,) = setting.files
    old, young = setting.own_folder / "0.partial", setting.own_folder / "1.partial"
    for partial in (old, young):
        partial.write_bytes(b"\xff" * 100)
    os.utime(old, (0, 0))
    setting.reader()(1)
    assert not old.exists()
    assert young.exists()
    assert path.exists()
    assert setting.notices == []
