"""The picture of time against length: what is measured, and what is said to be a model."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from click.testing import CliRunner
from sample_records import case_of

from bench import picture
from bench.counting import Cost
from bench.records import Record, make_record

matplotlib.use("Agg")

COST = Cost(10**6, 10**6)


def record(name: str, length: int, ms: float | None, **changes: Any) -> Record:
    shape = {"B": 5, "H": 12, "L": length, "d": 64} | changes.pop("shape", {})
    case = case_of(
        **{"device": "cpu", "direction": "forward+backward", "suite": "short", "shape": shape}
        | changes
    )
    facts = {"processor": "Some CPU", "threads": "2"}
    bound = None if ms is None else ms / 4
    return make_record(case, name, ms=ms, cost=COST, bound=bound, environment=facts)


RECORDS = [
    *(record("tir cpu", length, length / 100) for length in (256, 50, 197)),
    *(record("sdpa+mask", length, length / 50) for length in (50, 197)),
    record("ToMe", 50, 2.0),
    record("tir cpu", 577, 9.0, suite="attention"),
    record("tir cpu", 50, 99.0, suite="attention"),  # of which "short" has a time too
    # None of these is in the picture.
    record("flex_attention", 50, None),
    record("tir reference", 50, 70.0),
    record("sdpa+mask math", 50, 70.0),
    record("tir cpu", 51, 70.0, dtype="float32"),
    record("tir cpu", 52, 70.0, direction="forward"),
    record("tir cpu", 53, 70.0, device="cuda"),
    record("tir cpu", 54, 70.0, operator="attention_statistics"),
    record("tir cpu", 55, 70.0, shape={"d": 80}),
    record("tir cpu", 56, 70.0, shape={"B": 25}),
    record("tir cpu", 57, 70.0, shape={"Lq": 1}),
    record("tir cpu", 58, 70.0, shape={"causal": 1}),
    record("tir cpu", 59, 70.0, suite="operator"),
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were made."""
    import matplotlib.figure

    made = []
    plain = matplotlib.figure.Figure

    def figure(*arguments: Any, **options: Any) -> Any:
        made.append(plain(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(matplotlib.figure, "Figure", figure)
    return made


def run(tmp_path: Path, records: list[Record], *options: str) -> Any:
    (tmp_path / "results.json").write_text(json.dumps(records))
    arguments = [str(tmp_path / "results.json"), str(tmp_path / "speed.png"), *options]
    return CliRunner().invoke(picture.main, arguments)


def lines_of(axis: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()]
        for line in axis.lines
    }


def test_what_was_measured_is_drawn(tmp_path: Path, figures: list[Any]) -> None:
    done = run(tmp_path, RECORDS)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    left, _ = figures[0].axes
    assert lines_of(left) == {
        "ours, weighted": [(50, 0.5), (197, 1.97), (256, 2.56), (577, 9.0)],
        "sdpa+mask": [(50, 1.0), (197, 3.94)],
        "ToMe": [(50, 2.0)],
        "bound of this machine": [(50, 0.125), (197, 0.4925), (256, 0.64), (577, 2.25)],
    }
    assert [label.get_text() for label in left.get_xticklabels()] == ["50", "197", "577"]
    title = left.get_title()
    assert "CPU, measured: Some CPU, 2 threads" in title
    assert "forward+backward, bfloat16, B·H 60, d 64" in title


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_the_gpus_times_are_the_models(tmp_path: Path, figures: list[Any], direction: str) -> None:
    records = [record("tir cpu", 197, 2.0, direction=direction)]
    done = run(tmp_path, records, "--direction", direction, "--gpu", "h200")
    assert done.exit_code == 0, done.output
    _, right = figures[0].axes
    assert "H200: MODEL, not a measurement, ±30 %" in right.get_title()
    lines = lines_of(right)
    passes = ["forward"] if direction == "forward" else ["forward", "backward"]
    point, memory = picture.Point(197, 64, 5, 12, 5, "bfloat16"), picture.GPUS["h200"]
    times = {
        "ours, weighted (model, its range)": lambda p: picture.expect(
            point, p, memory
        ).microseconds[0],
        "bound": lambda p: picture.bound_microseconds(point, p, memory),
        **{
            f"{name}, unweighted (estimate)": lambda p, peer=peer: picture.peer_microseconds(
                peer, point, p, memory
            )
            for name, peer in picture.PEERS.items()
        },
    }
    assert set(lines) == set(times)
    for name, time in times.items():
        assert dict(lines[name])[197] == pytest.approx(sum(map(time, passes)))


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], [], "no time of tir cpu forward+backward in bfloat16 at B·H 60; measure it"),
        (RECORDS[3:5], [], "python -m bench attention short --device cpu --dtypes bfloat16"),
        (RECORDS, ["--heads", "12"], "at B·H 12"),
    ],
)
def test_where_there_is_nothing_to_draw_it_says_what_to_measure(
    tmp_path: Path, records: list[Record], options: list[str], message: str
) -> None:
    done = run(tmp_path, records, *options)
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "speed.png").exists()
