"""Folders as people have them: with what tools leave, links, parts, and other kinds of files."""

import os
import unicodedata

import fake_engine
import pytest
from PIL import Image

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import load_data


@pytest.fixture
def add(tmp_path):
    """Put files under a folder: small images, all of their own size, or other things."""
    sizes = iter(range(1, 1000))

    def put(*names, root=tmp_path / "data"):
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                Image.new("L", (2, next(sizes))).save(file, "PNG")
        return root

    return put


def found(data):
    return {entry.folder: entry.files for entry in data.classes}


LITTER = [
    ".ipynb_checkpoints/Forest_1-checkpoint.png",
    "._1.png",
    ".AppleDouble/1.png",
    "__MACOSX/1.png",
    "@eaDir/1.png/SYNOPHOTO_THUMB_M.png",
    ".@__thumb/default1.png",
    "@Recycle/1.png",
    "#recycle/1.png",
    "#snapshot/1.png",
    ".snapshot/hourly.0/1.png",
    "~snapshot/1.png",
    "$RECYCLE.BIN/1.png",
    "System Volume Information/1.png",
    ".thumbnails/1.png",
    "lost+found/1.png",
    ".Trash-1000/files/1.png",
    ".git/1.png",
    ".stversions/1.png",
    "1.sync-conflict-20240131-101112-ABCDEFG.png",
    "1 (Jane's conflicted copy 2024-01-31).png",
    "_vti_cnf/1.png",
]


@pytest.mark.parametrize("name", LITTER)
def test_what_tools_leave_is_no_image_and_no_class(add, name):
    root = add("Forest/1.png", "River/2.png", f"Forest/{name}", f"Forest/deep/{name}")
    if "/" in name:
        add(name)
    data = load_data(root)
    assert found(data) == {"Forest": ("Forest/1.png",), "River": ("River/2.png",)}
    (note,) = (note for note in data.notes if note.startswith("left out"))
    if "/" in name:
        assert note == f"left out of {root}: 3 folders called {name.partition('/')[0]}"
    else:
        assert note == f"left out of {root}: 2 images hidden or left by another program"


def test_copies_that_somebody_made_are_images(add):
    names = ("Forest/1 (1).png", "Forest/1.png", "Forest/Copy of 1.png")
    assert found(load_data(add(*names, "River/1.png")))["Forest"] == names


def test_other_files_are_counted_by_ending(add):
    root = add("Forest/1.png", "River/2.jfif", "River/3.gif")
    for name in ("Forest/a.DCM", "Forest/b.dcm", "River/README", "Forest/Thumbs.db", "x.csv"):
        (root / name).write_bytes(b"-")
    data = load_data(root)
    assert found(data)["River"] == ("River/2.jfif", "River/3.gif")
    assert f"left out of {root}: 2 files ending in .dcm, 1 file without an ending" == data.notes[0]
    complaint = r"class 'Forest' .* has 1 images \(left out: 2 files ending in \.dcm\) but 4 are"
    with pytest.raises(FewShotError, match=complaint):
        data.require(ways=2, shots=2, queries=2)
    for name in ("Forest/1.png", "River/2.jfif", "River/3.gif"):
        (root / name).unlink()
    complaint = r"no images in .* \(left out: 2 files ending in .dcm, .*\); files with .* \.avif "
    with pytest.raises(FewShotError, match=complaint):
        load_data(root)


def test_many_kinds_are_said_in_short(add):
    root = add("Forest/1.png")
    for letter in "abcdefghij":
        (root / "Forest" / f"1.{letter}").touch()
    assert load_data(root).notes[0].endswith("1 file ending in .f and 4 more kinds")


def test_a_loop_of_links_adds_nothing(add):
    root = add(*(f"Forest/{n}.png" for n in range(4)), "River/1.png")
    before = load_data(root)
    (root / "Forest" / "latest").symlink_to(".")
    data = load_data(root)
    assert found(data) == found(before)
    assert data.fingerprint == before.fingerprint
    assert data.notes[0] == f"left out of {root}: 1 link to folders that are listed already"


def test_each_file_counts_once_under_its_own_name(add, tmp_path):
    root = add("Forest/deep/z.png", "River/1.png")
    elsewhere = add("lake/9.png", root=tmp_path / "elsewhere")
    (root / "Forest" / "a.png").symlink_to("deep/z.png")
    (root / "Forest" / "a").symlink_to("deep")
    os.link(root / "Forest" / "deep" / "z.png", root / "Forest" / "zz.png")
    (root / "Lake").symlink_to(elsewhere / "lake")
    (root / "Lake" / "again.png").symlink_to(elsewhere / "lake" / "9.png")
    data = load_data(root)
    assert found(data) == {
        "Forest": ("Forest/deep/z.png",),
        "Lake": ("Lake/9.png",),
        "River": ("River/1.png",),
    }
    assert "3 further names of images that are listed already" in data.notes[0]
    assert "1 link to folders that are listed already" in data.notes[0]


@pytest.mark.parametrize("kind", ["link", "hard link", "folder", "root", "class"])
def test_a_file_in_two_classes_is_refused(add, kind):
    root = add("Forest/1.png", "River/2.png")
    if kind == "hard link":
        os.link(root / "Forest" / "1.png", root / "River" / "1.png")
    elif kind == "class":
        (root / "Wood").symlink_to("Forest")
    else:
        target = {"link": "../Forest/1.png", "folder": "../Forest", "root": ".."}[kind]
        (root / "River" / "x.png").symlink_to(target)
    with pytest.raises(FewShotError, match=r"classes 'Forest' and '(River|Wood)' of .* share a"):
        load_data(root)


def test_links_to_nothing_and_what_is_no_file(add):
    root = add("Forest/1.png", "River/2.png")
    (root / "Forest" / "gone.png").symlink_to("nothing.png")
    (root / "Forest" / "self.png").symlink_to("self.png")
    (root / "gone").symlink_to("nowhere")
    os.mkfifo(root / "Forest" / "pipe.png")
    (root / "River" / "zero.png").symlink_to("/dev/zero")
    data = load_data(root)
    assert found(data) == {"Forest": ("Forest/1.png",), "River": ("River/2.png",)}
    note = data.notes[0]
    assert "2 links that can't be followed" in note
    assert "1 pipe or device called pipe.png" in note
    assert "1 pipe or device called zero.png" in note


@pytest.mark.parametrize(
    ("parts", "first"),
    [
        (("images", "masks"), "images"),
        (("dev", "testset"), "dev"),
        (("train", "images"), "images"),
        (("train2016", "train2017", "val2017"), "train2016"),
    ],
)
def test_parts_of_a_data_set_are_not_classes(add, parts, first):
    root = add(*(f"{part}/{kind}/1.png" for part in parts for kind in ("cat", "dog")))
    complaint = rf"has the parts of a data set, .*\(cat, dog\); pass one part: data={root}/{first}"
    with pytest.raises(FewShotError, match=complaint):
        load_data(root)
    add("test1/1.png")  # one without labels beside them
    with pytest.raises(FewShotError, match=complaint):
        load_data(root)
    assert list(found(load_data(root / first))) == ["cat", "dog"]


def test_a_folder_too_many_is_named(add):
    root = add("2750/Forest/1.png", "2750/River/1.png")
    with pytest.raises(FewShotError, match=f"Forest, River; .* pass data={root}/2750"):
        load_data(root)


def test_classes_that_look_like_parts(add, tmp_path):
    flat = load_data(add("train/1.png", "test/1.png", root=tmp_path / "flat"))
    assert list(found(flat)) == ["test", "train"]
    assert "are called test, train, as parts of data sets are" in flat.notes[0]
    steam = load_data(add("train/steam/1.png", "bus/1.png", root=tmp_path / "vehicles"))
    assert (list(found(steam)), steam.notes) == (["bus", "train"], ())
    words = load_data(add("train_station/a/1.png", "test_tube/b/1.png", root=tmp_path / "words"))
    assert words.notes == ()
    sites = [f"{site}/{kind}/1.png" for site in ("north", "south") for kind in ("cat", "dog")]
    repeated = load_data(add(*sites, root=tmp_path / "sites"))
    assert list(found(repeated)) == ["north", "south"]
    assert "have the same folders in them (cat, dog)" in repeated.notes[0]


def test_images_without_folders(add):
    root = add("1.png", "2.png")
    with pytest.raises(FewShotError, match="has 2 images but no sub-folders; it needs"):
        load_data(root)
    (root / "labels.csv").write_text("image,label\n1.png,cat\n2.png,dog\n")
    with pytest.raises(FewShotError, match=f"or the list of them: data={root}/labels.csv"):
        load_data(root)
    add("cat/3.png", "dog/4.png")
    note = f"left out of {root}: 2 images beside the folders of the classes"
    assert load_data(root).notes == (note,)


def test_places_that_hold_no_data(tmp_path):
    os.mkfifo(tmp_path / "list.json")
    for data, complaint in [
        (tmp_path / "list.json", "neither a folder nor a regular file"),
        ("/dev/zero", "neither a folder nor a regular file"),
        ("", "^data is empty"),
        ("nul\0byte", "can't read nul"),
        ("long" * 1000, "can't read long.*too long"),
        ("~nobody-here/data", "does not exist"),
    ]:
        with pytest.raises(FewShotError, match=complaint):
            load_data(data)
    with pytest.raises(FewShotError, match=r"^images is empty"):
        load_data(tmp_path, images="")
    with pytest.raises(FewShotError, match=r"^class_names is empty"):
        load_data(tmp_path, class_names="")


def test_names_that_are_not_utf_8(add, tmp_path):
    raw = os.fsdecode(b"for\xeat")
    root = add(f"{raw}/1.png", "River/\udce9.png")
    with pytest.raises(FewShotError, match=r"class 'for\\xeat' is not UTF-8, .* class_names"):
        load_data(root)
    (tmp_path / "names.json").write_text('{"for\\\\xeat": "forest", "River": "river"}')
    for names in ({raw: "forest", "River": "river"}, tmp_path / "names.json"):
        data = load_data(root, class_names=names)
        assert found(data) == {"River": ("River/\udce9.png",), r"for\xeat": (f"{raw}/1.png",)}
        assert [entry.words for entry in data.classes] == ["river", "forest"]
        assert data.source.file(data.classes[1].files[0]).is_file()
        assert len(data.fingerprint) == 64


def test_forms_of_unicode(add, tmp_path):
    composed, parted = "Forêt", unicodedata.normalize("NFD", "Forêt")
    one = add(f"{composed}/é.png", "River/1.png", root=tmp_path / "one")
    other = tmp_path / "other" / parted / unicodedata.normalize("NFD", "é.png")
    add("River/1.png", root=tmp_path / "other")
    other.parent.mkdir()
    river = "River/1.png"
    for source, copy in (
        (one / composed / "é.png", other),
        (one / river, tmp_path / "other" / river),
    ):
        copy.write_bytes(source.read_bytes())
        os.utime(copy, ns=(0, source.stat().st_mtime_ns))
    data, moved = (
        load_data(one),
        load_data(tmp_path / "other", class_names={composed: "a"} | {"River": "b"}),
    )
    assert [entry.folder for entry in moved.classes] == [entry.folder for entry in data.classes]
    assert moved.source.file(moved.classes[0].files[0]).is_file()
    assert load_data(tmp_path / "other").fingerprint == data.fingerprint
    (one / parted).mkdir()
    with pytest.raises(FewShotError, match="two folders called 'Forêt', written in different"):
        load_data(one)


def test_overwritten_images_are_noticed(add):
    root = add("Forest/1.png", "River/2.png")
    before = load_data(root).fingerprint
    path = root / "Forest" / "1.png"
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert load_data(root).fingerprint != before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_data(root).fingerprint == before


def test_on_the_command_line(add, tmp_path, capsys):
    names = [f"{kind}/{n}.png" for kind in ("Forest", "River") for n in range(3)]
    root = add(*names, "Forest/.ipynb_checkpoints/1-checkpoint.png")
    (root / "River" / "scan.dcm").touch()
    arguments = ["run", "--data", str(root), "--model", "fake", "--out", str(tmp_path / "out")]
    arguments += ["--method=zero-shot", "--backend=reference", "--ways=2", "--shots=1"]
    arguments += ["--queries=2", "--episodes=1"]
    assert fake_engine.run_main(arguments) == 0
    said = capsys.readouterr().err
    note = f"left out of {root}: 1 file ending in .dcm, 1 folder called .ipynb_checkpoints\n"
    assert said.count(note) == 1
    os.utime(root / "River" / "1.png", ns=(0, 1))
    assert fake_engine.run_main(arguments) == 2
    assert "data" in capsys.readouterr().err
    (root / "River" / "4.png").symlink_to("../Forest/1.png")
    assert fake_engine.run_main(arguments) == 2
    assert "classes 'Forest' and 'River' of" in capsys.readouterr().err
