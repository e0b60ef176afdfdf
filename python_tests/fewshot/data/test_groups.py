"""Images of one patient or lesion in tables, and episodes that keep them together."""

import fake_engine
import numpy as np
import pytest
from command_line import results, with_value
from PIL import Image

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.draw import draw_episode, require_groups
from tir_kernels.fewshot.data.load import load_episode
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.episode import plan_episode
from tir_kernels.fewshot.settings import Protocol

HAM = "lesion_id,image_id,dx,dx_type"


@pytest.fixture
def table(tmp_path):
    """Write a table of rows (class, subject), each with an image whose colour is its number."""

    def write(rows, header="subject,file,label", name="list.csv"):
        root = tmp_path / "listed"
        root.mkdir(exist_ok=True)
        lines = [header]
        more = header.count(",") - 2
        for number, (label, subject) in enumerate(rows):
            image = Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8))
            image.save(root / f"{number:03d}.png")
            lines.append(",".join([subject, f"{number:03d}", label, *["x"] * more]))
        (root / name).write_text("\n".join(lines))
        return root / name

    return write


def rows_of(classes, subjects=12, images=2):
    return [(c, f"{c}{s}") for c in classes for s in range(subjects) for _ in range(images)]


def subjects(data, entry, positions):
    return [data.classes[entry].groups[position] for position in positions]


def test_groups_follow_their_images(table):
    path = table([("cat", "one"), ("dog", "two"), ("cat", ""), ("cat", "one"), ("cat", "NaN")])
    data = load_data(path, group_column="subject")
    cat, dog = data.classes
    assert cat.files == ("000.png", "002.png", "003.png", "004.png")
    assert cat.groups[0] == cat.groups[2] == "one"
    assert len(set(cat.groups)) == 3  # those without a value are alone
    assert dog.groups == ("two",)
    assert data.group_column == "subject"
    assert "5 images show 4 subjects by column subject" in data.notes[-1]
    assert "2 images without a value count as subjects of their own" in data.notes[-1]


def test_known_columns_need_no_option(table):
    rows = [(c, f"{c}{number % 2}") for c in ("mel", "nv") for number in range(4)]
    data = load_data(table(rows, HAM))
    assert data.group_column == "lesion_id"
    assert [each.groups for each in data.classes] == [
        ("mel0", "mel1") * 2,
        ("nv0", "nv1") * 2,
    ]
    # The same lesions of other classes: nobody knows what they are.
    other = load_data(table([("a", "1"), ("b", "2"), ("a", "1")], HAM))
    assert other.group_column == ""
    assert any("--" not in note and "group_column=lesion_id" in note for note in other.notes)
    without = load_data(table(rows, HAM), group_column="none")
    assert without.group_column == ""
    assert not any("lesion_id" in note for note in without.notes)
    xray = "Patient ID,Image Index,Finding Labels"
    chest = load_data(table([("Mass", "1"), ("Nodule", "1"), ("Mass|Nodule", "2")], xray))
    assert chest.group_column == "Patient ID"
    assert [each.groups for each in chest.classes] == [("1",), ("1",)]


def test_a_column_of_subjects_is_pointed_out(table):
    rows = [("cat", "one"), ("dog", "two"), ("cat", "one")]
    for column in ("patient_id", "Patient ID", "subject", "CaseID", "lesion"):
        notes = load_data(table(rows, f"{column},file,label")).notes
        assert f"1 of the 2 values of column {column} stand for several images" in notes[-1]
        assert f"group_column={column}" in notes[-1]
    alone = [("cat", "one"), ("dog", "two"), ("cat", "three")]
    for header, own in (("patient_id,file,label", alone), ("owner,file,label", rows)):
        notes = load_data(table(own, header)).notes
        assert not any("stand for several" in note for note in notes)


def test_columns_that_are_not_there(table, make_images):
    path = table([("cat", "one"), ("dog", "two")])
    assert load_data(path, group_column="Sub-Ject").group_column == "subject"
    with pytest.raises(FewShotError, match="no column 'patient'; it has subject, file, label"):
        load_data(path, group_column="patient")
    with pytest.raises(FewShotError, match=r"group_column names a column of a CSV or TSV table"):
        load_data(make_images(), group_column="patient")
    with pytest.raises(FewShotError, match="group_column is empty"):
        load_data(path, group_column="")
    load_data(make_images(name="others"), group_column="none")


def test_groups_are_part_of_the_data(table):
    path = table([("cat", "one"), ("dog", "two"), ("cat", "three")])
    plain = load_data(path)
    grouped = load_data(path, group_column="subject")
    assert plain.fingerprint != grouped.fingerprint
    text = path.read_text()
    path.write_text(text.replace("three", "one"))
    assert load_data(path).fingerprint == plain.fingerprint
    assert load_data(path, group_column="subject").fingerprint != grouped.fingerprint


def test_episodes_keep_groups_apart(table):
    # Subjects with images of several classes, too.
    rows = [*rows_of("abcd"), *[(c, f"all{s}") for s in range(6) for c in "abcd"]]
    data = load_data(table(rows), group_column="subject")
    protocol = Protocol(ways=3, shots=3, queries=10)
    reader = ImageReader(data, fake_engine.small_preprocess)
    shown = [subject for _, subject in rows]
    seen = set()
    for index in range(12):
        plan = draw_episode(data, protocol, index)
        assert plan == draw_episode(data, protocol, index)
        sizes = [len(each.files) for each in data.classes]
        free = plan_episode(0, index, sizes, 3)
        assert plan.classes == free.classes
        assert [sorted(own) for own in plan.orders] == [sorted(own) for own in free.orders]
        episode = load_episode(plan, data, reader, shots=3, queries=10)
        # The colour of an image is the number of its row.
        support, query = (
            [shown[round(255 * float(image.mean()))] for image in images]
            for images in (episode.support_images, episode.query_images)
        )
        assert not set(support) & set(query)
        for c in range(3):
            assert len(set(support[3 * c : 3 * c + 3])) == 3
        seen.add(tuple(support))
    assert len(seen) == 12


def test_without_groups_nothing_changes(table):
    data = load_data(table(rows_of("abcd")))
    for index in range(5):
        drawn = draw_episode(data, Protocol(ways=3, shots=3, queries=10), index)
        assert drawn == plan_episode(0, index, [24] * 4, 3)


def test_a_replacement_takes_its_group_out_of_the_queries(table):
    path = table(rows_of("ab", subjects=4, images=3))
    data = load_data(path, group_column="subject")
    plan = draw_episode(data, Protocol(ways=2, shots=1, queries=6), 0)
    c, order = plan.classes[0], plan.orders[0]
    bad = data.classes[c].files[order[0]]
    (path.parent / bad).write_bytes(b"damaged")
    reader = ImageReader(data, fake_engine.small_preprocess, skip_unreadable=True)
    episode = load_episode(plan, data, reader, shots=1, queries=6)
    rows = [round(255 * float(image.mean())) for image in episode.query_images[:6]]
    support = round(255 * float(episode.support_images[0].mean()))
    assert episode.skipped == (bad,)
    assert support == int(data.classes[c].files[order[1]][:3])
    assert support // 3 not in {row // 3 for row in rows}
    with pytest.raises(FewShotError, match=r"has 9 readable images but 11 of other subjects"):
        load_episode(plan, data, reader, shots=1, queries=10)


def test_too_few_subjects_are_told_before_the_run(table):
    data = load_data(table(rows_of("ab", subjects=2, images=10)), group_column="subject")
    require_groups(data, Protocol(ways=2, shots=5, queries=10), 5)
    message = (
        r"episode 0: no way was found to take 5 shots and 11 queries from class '[ab]' in .* its "
        r"20 images show 2 subjects by column subject; lower shots, queries or ways"
    )
    with pytest.raises(FewShotError, match=message):
        require_groups(data, Protocol(ways=2, shots=5, queries=11), 5)


def test_a_run_with_groups(table, arguments, tmp_path, capsys):
    path = table(rows_of("abc", subjects=5))
    arguments = with_value(arguments, "--data", str(path))
    grouped = with_value(arguments, "--group-column", "subject")
    assert fake_engine.run_main(grouped) == 0
    assert "30 images show 15 subjects by column subject" in capsys.readouterr().err
    first = results(tmp_path / "out")
    assert fake_engine.run_main(grouped) == 0
    assert results(tmp_path / "out") == first
    assert fake_engine.run_main([*arguments, "--group-column=none"]) == 2
    assert "--group-column was subject, is unset" in capsys.readouterr().err
    other = [*grouped, "--shots=3", "--queries=7", "--out", str(tmp_path / "other")]
    assert fake_engine.run_main(other) == 2
    assert "lower --shots, --queries or --ways" in capsys.readouterr().err
