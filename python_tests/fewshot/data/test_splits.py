"""Data that is divided into parts: support of one, queries of another."""

import json
import os
import shutil

import fake_engine
import pytest
from command_line import results
from small_images import write_images

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.draw import draw_episode, require_groups
from tir_kernels.fewshot.data.load import load_episode
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.data.split import load_split
from tir_kernels.fewshot.episode import plan_episode
from tir_kernels.fewshot.settings import Protocol

CLASSES = ("cat", "dog", "eel")


@pytest.fixture
def divided(tmp_path):
    """A folder with a part of 4 images a class, and one of 6."""

    def make(train="train", test="test", root=None):
        root = tmp_path / "divided" if root is None else root
        write_images(root / train, dict.fromkeys(CLASSES, 4), seed=1)
        write_images(root / test, dict.fromkeys(CLASSES, 6), seed=2)
        return root

    return make


def found(classes):
    return {entry.folder: entry.files for entry in classes}


def files(part, count, classes=CLASSES):
    return {c: tuple(f"{part}{c}/{number:03d}.png" for number in range(count)) for c in classes}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("Training", "Validation"),
        ("seg_train", "seg_test"),
        ("train2017", "val2017"),
        ("trainset", "TestData"),
    ],
)
def test_parts_in_a_folder(divided, train, test):
    root = divided(train, test)
    data = load_data(root)
    assert found(data.classes) == files(f"{train}/", 4)
    assert found(data.queries) == files(f"{test}/", 6)
    assert data.notes == (f"{root}: support images come from {train}, queries from {test}",)


def test_validation_is_left_out_where_there_is_a_test(divided, tmp_path):
    root = divided()
    write_images(root / "val", dict.fromkeys(CLASSES, 2))
    write_images(root / "test1", {"unknown": 2})
    shutil.move(root / "test1" / "unknown" / "000.png", root / "test1")
    data = load_data(root)
    assert found(data.queries) == files("test/", 6)
    assert data.notes[0].endswith("queries from test; left out: test1, val")
    write_images(root / "test1", dict.fromkeys(CLASSES, 1))
    shutil.rmtree(root / "test1" / "unknown")
    (root / "test1" / "000.png").unlink()
    with pytest.raises(FewShotError, match="has the parts of a data set"):
        load_data(root)  # which one is for tests?


def test_parts_with_other_classes_stay_refused(divided):
    root = divided()
    write_images(root / "test", {"fox": 6})
    with pytest.raises(FewShotError, match=r"has the parts of a data set, .*pass one part"):
        load_data(root)


def test_an_image_in_both_parts(divided):
    root = divided()
    (root / "test" / "cat" / "000.png").unlink()
    os.link(root / "train" / "dog" / "002.png", root / "test" / "cat" / "000.png")
    with pytest.raises(FewShotError, match=r"parts .* share a file: .*train/dog/002\.png"):
        load_data(root)
    match = r"test: .*test/cat/000\.png is also in train, as .*train/dog/002\.png; remove it"
    with pytest.raises(FewShotError, match=match):
        load_split(root / "train", root / "test")
    with pytest.raises(FewShotError, match="test is the same data as train"):
        load_split(root / "train", root / "train")


def test_classes_within_a_part_share_no_file(divided):
    root = divided()
    os.link(root / "train" / "dog" / "002.png", root / "train" / "cat" / "new.png")
    with pytest.raises(FewShotError, match=r"classes 'cat' and 'dog' of .*train share a file"):
        load_data(root)


def test_two_places(divided, tmp_path):
    root = divided()
    data = load_split(root / "train", root / "test")
    assert found(data.classes) == files("train:", 4)
    assert found(data.queries) == files("test:", 6)
    assert data.name == f"{root / 'train'} and {root / 'test'}"
    assert data.source.describe("test:cat/000.png") == str(root / "test" / "cat" / "000.png")
    swapped = load_split(root / "test", root / "train")
    assert swapped.fingerprint != data.fingerprint
    alone = load_data(root / "train")
    assert alone.queries == ()
    assert alone.fingerprint != data.fingerprint
    # A list and a folder go together.
    table = root / "test" / "list.csv"
    lines = [f"{c}/{number:03d}.png,{c}" for c in CLASSES for number in range(6)]
    table.write_text("\n".join(["file,label", *lines]))
    assert load_split(root / "train", table).fingerprint == data.fingerprint


def test_two_places_that_do_not_go_together(divided, tmp_path):
    root = divided()
    write_images(root / "test", {"fox": 6})
    shutil.rmtree(root / "test" / "dog")
    match = "test: the classes of .* differ: 'dog' only in .*train; 'fox' only in .*test; rename"
    with pytest.raises(FewShotError, match=match):
        load_split(root / "train", root / "test")
    with pytest.raises(FewShotError, match=r"^test: .*missing does not exist"):
        load_split(root / "train", root / "missing")
    with pytest.raises(FewShotError, match=r"^train: .* is divided into parts itself; pass one"):
        load_split(divided(root=tmp_path / "other"), root / "test")


def test_episodes_take_support_and_queries_from_their_parts(divided):
    data = load_data(divided())
    protocol = Protocol(ways=2, shots=4, queries=6)
    data.require(ways=2, shots=4, queries=6)
    reader = ImageReader(data, fake_engine.small_preprocess)
    for index in range(4):
        plan = draw_episode(data, protocol, index)
        # The part of the support is drawn as if it were all.
        assert plan.orders == plan_episode(0, index, [4] * 3, 2).orders
        assert [sorted(order) for order in plan.query_orders] == [list(range(6))] * 2
        episode = load_episode(plan, data, reader, shots=4, queries=6)
        for way, c in enumerate(plan.classes):
            first = reader.read(data.classes[c], plan.orders[way][0])
            asked = reader.read(data.queries[c], plan.query_orders[way][0])
            normalise = fake_engine.small_preprocess.normalise
            assert episode.support_images[4 * way].equal(normalise(first))
            assert episode.query_images[6 * way].equal(normalise(asked))
        assert episode.folders == tuple(CLASSES[c] for c in plan.classes)
    drawn = {draw_episode(data, protocol, index).query_orders for index in range(4)}
    assert len(drawn) == 4
    with pytest.raises(ValueError, match="query_orders"):
        load_episode(plan_episode(0, 0, [4] * 3, 2), data, reader, shots=1, queries=1)


def test_each_part_has_its_own_need(divided):
    data = load_data(divided())
    with pytest.raises(FewShotError, match=r"class 'cat' in .* has 4 images for support but shots"):
        data.require(ways=2, shots=5, queries=1)
    with pytest.raises(FewShotError, match=r"has 6 images for queries .*\(2 more classes have too"):
        data.require(ways=2, shots=1, queries=7)


def test_unreadable_images_are_replaced_from_their_part(divided):
    root = divided()
    data = load_data(root)
    plan = draw_episode(data, Protocol(ways=2, shots=2, queries=5), 0)
    c = plan.classes[1]
    bad = data.classes[c].files[plan.orders[1][0]], data.queries[c].files[plan.query_orders[1][0]]
    for name in bad:
        (root / name).write_bytes(b"damaged")
    reader = ImageReader(data, fake_engine.small_preprocess, skip_unreadable=True)
    episode = load_episode(plan, data, reader, shots=2, queries=5)
    assert episode.skipped == bad
    asked = reader.read(data.queries[c], plan.query_orders[1][1])
    assert episode.query_images[5].equal(fake_engine.small_preprocess.normalise(asked))


def test_subjects_are_kept_apart_over_parts(tmp_path):
    for part, count in (("one", 4), ("two", 6)):
        write_images(tmp_path / part, dict.fromkeys(CLASSES, count))
        lines = [f"p{n % 5},{c}/{n:03d}.png,{c}" for c in CLASSES for n in range(count)]
        (tmp_path / part / "list.csv").write_text("\n".join(["patient,file,label", *lines]))
    train, test = (tmp_path / part / "list.csv" for part in ("one", "two"))
    data = load_split(train, test, group_column="patient")
    protocol = Protocol(ways=3, shots=1, queries=3)
    reader = ImageReader(data, fake_engine.small_preprocess)
    for index in range(5):
        plan = draw_episode(data, protocol, index)
        taken = {
            data.classes[c].groups[o[0]] for c, o in zip(plan.classes, plan.orders, strict=True)
        }
        assert len(load_episode(plan, data, reader, shots=1, queries=3).query_images) == 9
        assert sum(group not in taken for group in data.queries[0].groups) >= 3
    with pytest.raises(FewShotError, match="lower shots, queries or ways"):
        require_groups(data, Protocol(ways=3, shots=1, queries=6), 5)
    header = test.read_text().replace("patient", "person")
    test.write_text(header)
    with pytest.raises(FewShotError, match=r"group_column: .* has no column 'patient'"):
        load_split(train, test, group_column="patient")


@pytest.fixture
def coop(tmp_path):
    """A split as CoOp writes it, beside a folder of images."""
    write_images(tmp_path / "2750", {c: 6 for c in CLASSES})

    def write(**changes):
        rows = {
            part: [
                [f"{c}/{number:03d}.png", label, f"{c} land"]
                for label, c in enumerate(CLASSES)
                for number in numbers
            ]
            for part, numbers in {"train": (0, 1), "val": (2,), "test": (3, 4, 5)}.items()
        }
        path = tmp_path / "split_zhou_EuroSAT.json"
        path.write_text(json.dumps({**rows, **changes}))
        return load_data(path, images=tmp_path / "2750")

    return write


def test_splits_of_coop(coop):
    data = coop()
    assert [(each.folder, each.words) for each in data.classes] == [
        (f"{c} land", f"{c} land") for c in CLASSES
    ]
    assert data.classes[0].files == ("cat/000.png", "cat/001.png")
    assert data.queries[2].files == ("eel/003.png", "eel/004.png", "eel/005.png")
    assert data.notes[0].endswith(
        "support images come from train, queries from test; left out: val"
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"test": [["cat/003.png", 0, "cat land"]]},
            "differ: 'dog land', 'eel land' only in train",
        ),
        ({"test": {}}, "must hold a list of images for 'test'"),
        ({"test": [["cat/003.png", "cat land"]]}, r"'test' of .* must hold \[path, label, class"),
        (
            {"test": [["cat/003.png", 0, "cat"], ["cat/004.png", 0, "dog"]]},
            "gives label 0 the names 'cat' and 'dog'",
        ),
        ({"train": [["cat/000.png", 0, "a"]], "test": [["cat/001.png", 0, "a"]]}, None),
    ],
)
def test_splits_of_coop_that_are_refused(coop, changes, complaint):
    if complaint is None:
        assert [len(each.files) for each in coop(**changes).classes] == [1]
        return
    with pytest.raises(FewShotError, match=complaint):
        coop(**changes)


def test_an_image_in_both_parts_of_a_split(coop):
    rows = [
        [f"{c}/{number:03d}.png", at, f"{c} land"]
        for at, c in enumerate(CLASSES)
        for number in (1, 3)
    ]
    with pytest.raises(FewShotError, match="which are the same file"):
        coop(test=rows)


def test_runs_of_two_parts(divided, arguments, tmp_path, capsys):
    root = divided()
    at = arguments.index("--data")
    rest = arguments[:at] + arguments[at + 2 :]
    parts = ["--train", str(root / "train"), "--test", str(root / "test")]
    assert fake_engine.run_main([*rest, *parts]) == 0
    first = results(tmp_path / "out")
    assert all(record.total == 12 for record in first)
    out = ["--out", str(tmp_path / "whole")]
    assert fake_engine.run_main([*rest, "--data", str(root), *out]) == 0
    assert results(tmp_path / "whole") == first
    capsys.readouterr()
    for wrong, complaint in (
        ([], "--data is missing; pass it, or --train and --test"),
        (parts[:2], "--train and --test go together, in place of --data"),
        (["--data", str(root), *parts], "--train and --test go together"),
        ([*parts[:3], str(root / "no")], "--test: "),
    ):
        assert fake_engine.run_main([*rest, *wrong]) == 2
        assert f"error: {complaint}" in capsys.readouterr().err
