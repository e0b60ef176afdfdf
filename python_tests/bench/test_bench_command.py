"""The program as it is started, on a grid that takes no time."""

import functools
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_clip import write_small_clip

from bench.command import INTERRUPTED, OUT_OF_TIME, main
from bench.formulas import materialised_attention
from bench.records import KEYS
from bench.settings import Settings
from bench.shapes import Point, points
from bench.suites import SUITES, memory
from bench.suites.memory import _rebuild, added_in_new_process
from bench.suites.step import rebuild_step

pytestmark = [pytest.mark.usefixtures("low_ceilings"), pytest.mark.slow]

TINY = ["--device", "cpu", "--no-compile", "--threads", "1", "--seconds", "0"]
TINY += ["--lengths", "9", "--heads", "4", "--widths", "8", "--classes", "2", "--dtypes", "float32"]
ENOUGH = {"attention": 2, "relevance": 2, "operator": 5}  # cases


def run(*arguments, status=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_end_to_end_and_restart(tmp_path):
    path, picture = tmp_path / "records.json", tmp_path / "plot.png"
    arguments = [*ENOUGH, *TINY, "--json", path, "--plot", picture]
    output = run(*arguments)
    records = json.loads(path.read_text())
    for record in records:
        assert set(KEYS) <= set(record)
        assert set(record) <= {*KEYS, "environment", "unavailable"}
        assert (record["ms"] is None) == ("unavailable" in record)
        if record["ms"] is not None and "host time" not in record["operator"]:
            assert record["gbps"] > 0
            assert record["tflops"] > 0
            assert record["fraction_of_bound"] > 0
    for suite, cases in ENOUGH.items():
        found = [r for r in records if r["suite"] == suite]
        assert len({(r["operator"], r["direction"]) for r in found}) == cases
        assert "tir reference" in {r["implementation"] for r in found}
    assert "weighted_attention, forward, float32, cpu" in output
    has_targets = any(r["implementation"] == "tir cpu" and r["ms"] for r in records)
    assert ("Targets on cpu" in output) == has_targets
    assert picture.read_bytes().startswith(b"\x89PNG")

    before = path.read_text()
    assert "0 shapes measured, 9 kept" in run(*arguments[:-2])
    assert path.read_text() == before


def test_filters_and_directions(tmp_path):
    path = tmp_path / "records.json"
    run("attention", *TINY, "--directions", "backward", "--backends", "reference", "--json", path)
    records = json.loads(path.read_text())
    assert {r["direction"] for r in records} == {"backward"}
    ours = [r["implementation"] for r in records if r["implementation"].startswith("tir")]
    assert ours == ["tir reference"]
    assert records[0]["shape"] == {"B": 1, "H": 4, "L": 9, "d": 8}


def test_memory_suite(tmp_path, monkeypatch):
    def in_this_process(rebuild, threads):
        rebuild(True)()
        rebuild(False)()
        return 1.5

    monkeypatch.setattr(memory, "added_in_new_process", in_this_process)
    path = tmp_path / "records.json"
    model = write_small_clip(tmp_path)
    output = run("memory", *TINY, "--json", path, "--model", model)
    records = json.loads(path.read_text())
    assert {r["operator"] for r in records} == {
        "reweighted_attention",
        "weighted_attention",
        "token_weights",
        "fine-tuning step",
    }
    of_steps = {r["implementation"] for r in records if r["operator"] == "fine-tuning step"}
    assert "published float32" in of_steps
    assert of_steps.isdisjoint({"tir reference", "eager"})
    assert all(r["mib"] == 1.5 and r["ms"] is None for r in records if "unavailable" not in r)
    assert "1.5 MiB" in output


def test_memory_of_a_process_of_its_own():
    point = Point(1024, 64, images=1, heads=4, num_classes=5, dtype="float32")
    prepare = functools.partial(
        _rebuild, "weighted_attention", point, "forward", Settings(compiles=False), "eager"
    )
    scores = 4 * 1024 * 1024 * 4 / 2**20  # MiB; softmax holds two of them
    assert scores <= added_in_new_process(prepare, 1) <= 4 * scores


def test_memory_of_steps_in_a_process_of_their_own(tmp_path):
    pytest.importorskip("open_clip")
    model = str(write_small_clip(tmp_path))
    settings = Settings(heads=(36,), dtypes=("float32",), model=model)
    (point,) = points("step", settings)
    prepare = functools.partial(rebuild_step, point, settings, "published float32")
    assert 0 < added_in_new_process(prepare, 1) < 200


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_suite(tmp_path, dtype):
    pytest.importorskip("open_clip")
    path, model = tmp_path / "records.json", write_small_clip(tmp_path)
    arguments = ["--device", "cpu", "--threads", "1", "--seconds", "0", "--heads", "36"]
    run("step", *arguments, "--dtypes", dtype, "--model", model, "--json", path)
    records = json.loads(path.read_text())
    names = {}
    for record in records:
        assert record["shape"] == {"B": 3, "L": 5, "D": 32, "C": 5}
        assert "unavailable" in record or record["ms"] > 0
        names.setdefault(record["operator"], set()).add(record["implementation"])
    published = {"published float32", f"published {dtype}"}
    others = {"eager", "sdpa unweighted", "tir cpu", "tir reference"}
    assert names == {
        "fine-tuning step, placement tokens": published | others,
        "fine-tuning step, placement attention": others,
        "fine-tuning step per episode": {f"tir cpu, {number} at once" for number in (1, 2, 4)},
    }


def test_savings_suite(tmp_path):
    pytest.importorskip("open_clip")
    from bench.without import SAVINGS

    path, model = tmp_path / "records.json", write_small_clip(tmp_path)
    arguments = ["--device", "cpu", "--threads", "1", "--seconds", "0", "--heads", "36,48"]
    arguments += ["--dtypes", "float32", "--queries", "2"]
    run("savings", *arguments, "--model", model, "--json", path)
    records = json.loads(path.read_text())
    assert all(record["ms"] > 0 for record in records)
    names = {}
    for record in records:
        assert record["shape"]["B"] == 3
        names.setdefault(record["operator"], set()).add(record["implementation"])
    left_out = set().union(*names.values()) - {"tir cpu"}
    assert left_out == {f"without {name}" for name in SAVINGS} - {"without step_graph"}
    assert {"tir cpu", "without image_batches"} <= names["classifying"]
    assert {"tir cpu", "without low_rank_products"} <= names["fine-tuning step"]


def test_a_wrong_step_is_not_timed(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    from bench.published import PublishedStep

    plain = PublishedStep._encode_images
    monkeypatch.setattr(PublishedStep, "_encode_images", lambda *a: plain(*a).flip(0))
    arguments = ["--device", "cpu", "--threads", "1", "--seconds", "0", "--heads", "36", "--quick"]
    path = tmp_path / "records.json"
    model = write_small_clip(tmp_path)
    output = run("step", *arguments, "--model", model, "--json", path, status=1)
    assert "WRONG: published float32" in output
    of_published = [
        r for r in json.loads(path.read_text()) if r["implementation"] == "published float32"
    ]
    assert [r["ms"] for r in of_published] == [None]


def test_unknown_model_suggests_others():
    pytest.importorskip("open_clip")
    assert "did you mean ViT-B-16" in run("step", *TINY, "--model", "ViT-B-61", status=1)


def test_a_wrong_implementation_fails_the_run(monkeypatch):
    from bench import peers

    def unweighted(query, key, value, weights):
        return materialised_attention(query, key, value, None)

    monkeypatch.setattr(peers, "plain_attention", unweighted)
    output = run("attention", *TINY, "--directions", "forward", status=1)
    assert "WRONG: eager" in output
    assert "1 results were wrong and not timed" in output


def test_interrupt_ends_cleanly(tmp_path, monkeypatch):
    from bench import peers

    def interrupted(*inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "plain_attention", interrupted)
    path = tmp_path / "records.json"
    output = run("relevance", "attention", *TINY, "--json", path, status=INTERRUPTED)
    assert f"Interrupted. Records are kept in {path}" in output.replace("\n", "")
    assert {r["suite"] for r in json.loads(path.read_text())} == {"relevance"}


def test_budget_that_runs_out_has_a_status_of_its_own():
    output = run("attention", *TINY, "--budget", "0", status=OUT_OF_TIME)
    assert "2 shapes left" in output


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_results_file_is_a_new_one(tmp_path, content):
    path = tmp_path / "records.json"
    path.write_text(content)
    run("relevance", *TINY, "--json", path)
    assert len(json.loads(path.read_text())) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["records.json"]


def test_a_link_to_a_results_file_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "elsewhere" / "records.json"
    link.symlink_to(target)
    run("relevance", *TINY, "--json", link)
    assert link.is_symlink()
    assert json.loads(target.read_text())


def unusable(tmp_path, kind):
    """A path that no results can be written to, and what is said of it."""
    path = tmp_path / "results"
    if kind == "folder":
        path.mkdir()
        return path, "is a directory"
    if kind == "pipe":
        os.mkfifo(path)
        return path, "not a regular file; choose another file"
    if kind == "device":
        return os.devnull, "not a regular file; choose another file"
    if kind == "no folder":
        return tmp_path / "missing" / "results", "its folder does not exist; make it first"
    if kind == "below a file":
        path.touch()
        return path / "results", "its folder does not exist"
    if kind == "too deep":
        path.write_text("[" * 100_000)
        return path, "is nested too deeply; choose another file"
    if kind == "not text":
        path.write_bytes(b"\xff\xfe\x00")
        return path, "not UTF-8 text"
    path.write_text(json.dumps([dict.fromkeys(KEYS, 1)]))
    return path, "is no list of benchmark records; choose another file"


@pytest.mark.parametrize(
    "kind",
    [
        "folder",
        "pipe",
        "device",
        "no folder",
        "below a file",
        "too deep",
        "not text",
        "other types",
    ],
)
def test_results_files_that_cannot_serve_are_refused_at_once(tmp_path, kind, monkeypatch):
    path, message = unusable(tmp_path, kind)
    monkeypatch.setattr("bench.command.Runner", None)  # nothing is measured
    before = Path(path).lstat() if Path(path).exists() else None
    output = run("relevance", *TINY, "--json", path, status=2 if kind == "folder" else 1)
    assert message in " ".join(output.split())
    assert before is None or Path(path).lstat() == before
    if kind in ("pipe", "device", "no folder"):
        assert message.split(";")[0] in run("relevance", *TINY, "--plot", path, status=1)


def test_write_protected_results_are_refused_at_once(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("[]")
    monkeypatch.setattr("bench.command.Runner", None)
    monkeypatch.setattr(os, "access", lambda place, mode: (Path(place), mode) != (path, os.W_OK))
    for option in ("--json", "--plot"):
        output = run("relevance", *TINY, option, path, status=1)
        assert f"{path} is write-protected; choose another file" in " ".join(output.split())
    assert path.read_text() == "[]"


def test_records_of_another_environment_are_pointed_out(tmp_path):
    path = tmp_path / "records.json"
    arguments = ["relevance", *TINY, "--json", path]
    run(*arguments)
    path.write_text(path.read_text().replace('"python": "3', '"python": "2'))
    assert "keeps records of another environment" in run(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attentoin"], "'attentoin' is not one of 'attention', 'short'"),
        (["--lengths", "50,x"], "'x' is not a valid integer"),
        (["--heads", "0"], "0 is not in the range x>=1"),
        (["--dtypes", "float8"], "'float8' is not one of 'float32', 'float16', 'bfloat16'"),
        (["--device", "cpu", "--backends", "triton"], "triton is not measured on cpu"),
        (["--lenghts", "50"], "No such option"),
    ],
)
def test_usage_errors_help(arguments, message):
    assert message in run(*arguments, status=2)


def test_help_names_the_suites():
    output = run("--help")
    assert all(suite in output for suite in SUITES)
