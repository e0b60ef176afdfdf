"""Scores are scikit-learn's, and intervals cover what they promise to."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from tir_kernels.fewshot.evaluation.calibration import calibration
from tir_kernels.fewshot.evaluation.intervals import Answers, bootstrap_intervals
from tir_kernels.fewshot.evaluation.scores import compute_scores

LABELS = ("a", "b", "c", "d", "e")


def random_answers(count, present=5):
    random, classes = np.random.default_rng(0), len(LABELS)
    targets = random.integers(0, present, count)
    logits = random.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), targets] += 1
    return logits, targets


def softmax(logits):
    scaled = np.exp(logits - logits.max(1, keepdims=True))
    return scaled / scaled.sum(1, keepdims=True)


def test_scores_are_those_of_scikit_learn():
    logits, targets = random_answers(300)
    found = compute_scores(logits, targets, LABELS, temperature=2.0)
    said, probabilities = logits.argmax(1), softmax(logits.astype(float) / 2)
    expected = {
        "accuracy": metrics.accuracy_score(targets, said),
        "balanced_accuracy": metrics.balanced_accuracy_score(targets, said),
        "macro_f1": metrics.f1_score(targets, said, average="macro"),
        "log_loss": metrics.log_loss(targets, probabilities),
        "top3_accuracy": metrics.top_k_accuracy_score(targets, probabilities, k=3),
    }
    assert {name: score.value for name, score in found.scores.items()} == pytest.approx(expected)
    assert (found.confusion == metrics.confusion_matrix(targets, said)).all()
    report = metrics.classification_report(targets, said, target_names=LABELS, output_dict=True)
    for each in found.classes:
        own = report[each.label]
        assert each.images == own["support"]
        assert (each.precision, each.recall, each.f1) == pytest.approx(
            (own["precision"], own["recall"], own["f1-score"])
        )


def test_by_hand():
    """Two of a, of which one is taken for b; one b; c is missing and never said."""
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1]]))
    found = compute_scores(logits.astype(np.float32), np.array([0, 0, 1]), ("a", "b", "c"), 1.0)
    scores = {name: score.value for name, score in found.scores.items()}
    assert scores == pytest.approx(
        {
            "accuracy": 2 / 3,
            "balanced_accuracy": (1 / 2 + 1) / 2,
            "macro_f1": (2 / 3 + 2 / 3) / 2,
            "log_loss": -np.log([0.7, 0.3, 0.8]).mean(),
        }
    )
    assert found.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert [each.images for each in found.classes] == [2, 1, 0]
    assert found.classes[2][2:] == (None, None, None)


def test_a_class_without_images_is_no_part_of_means():
    logits, targets = random_answers(200, present=4)
    said = logits.argmax(1)
    assert (said == 4).any(), "it is said, though no image is of it"
    found = compute_scores(logits, targets, LABELS, 1.0)
    present = [0, 1, 2, 3]
    f1 = metrics.f1_score(targets, said, labels=present, average="macro")
    assert found.scores["macro_f1"].value == pytest.approx(f1)
    recall = metrics.recall_score(targets, said, labels=present, average="macro")
    assert found.scores["balanced_accuracy"].value == pytest.approx(recall)
    assert found.classes[4].recall is None
    assert found.classes[4].precision == 0


def test_of_equal_logits_the_first_class_wins_in_all_scores():
    logits = np.zeros((3, 5), dtype=np.float32)
    found = compute_scores(logits, np.array([0, 2, 4]), LABELS, 1.0, resamples=50)
    assert found.scores["accuracy"].value == pytest.approx(1 / 3)
    assert found.scores["top3_accuracy"].value == pytest.approx(2 / 3)
    assert found.scores["top3_accuracy"].low < found.scores["top3_accuracy"].high


def test_a_low_temperature_changes_no_order():
    """Probabilities of the classes behind the first are all 0 then."""
    logits = np.array([[0, 30, 1, 2, 3], [0, 30, 1, 2, 3]], dtype=np.float32)
    found = compute_scores(logits, np.array([4, 2]), LABELS, 0.01, resamples=50)
    assert found.probabilities[0].tolist() == [0, 1, 0, 0, 0]
    assert found.scores["top3_accuracy"].value == 0.5


def test_the_order_of_classes_does_not_matter():
    logits, targets = random_answers(100)
    order = np.array([3, 0, 4, 1, 2])
    found = compute_scores(logits, targets, LABELS, 1.0, resamples=50)
    places = np.argsort(order)
    other = compute_scores(
        logits[:, order], places[targets], tuple(LABELS[at] for at in order), 1.0, resamples=50
    )
    for name, score in found.scores.items():
        assert other.scores[name] == pytest.approx(score)
    for one, two in zip(sorted(other.classes), sorted(found.classes), strict=True):
        assert one[:2] == two[:2]
        assert one[2:] == pytest.approx(two[2:])


def test_calibration_error_by_hand():
    confidences = np.array([0.9, 0.9, 0.55, 0.6, 1.0])
    is_right = np.array([True, False, True, True, True])
    found = calibration(confidences, is_right, bins=10)
    # (0.8, 0.9]: two of 0.9, half right; (0.5, 0.6]: 0.575 on average, all right; 1.0: right.
    assert found.error == pytest.approx((2 * 0.4 + 2 * 0.425 + 0) / 5)
    assert [each.images for each in found.bins] == [0, 0, 0, 0, 0, 2, 0, 0, 2, 1]
    assert found.bins[8][3:] == pytest.approx((0.9, 0.5))
    assert found.bins[0][3:] == (None, None)
    assert len(calibration(confidences, is_right).bins) == 15


@pytest.mark.parametrize("has_groups", [False, True])
def test_intervals_are_those_of_scores_by_scikit_learn(has_groups):
    """The same resamples, each scored by scikit-learn."""
    logits, targets = random_answers(40)
    groups = np.arange(40) % 9 if has_groups else np.arange(40)
    said, probabilities = logits.argmax(1), softmax(logits.astype(float))
    members = [np.flatnonzero(groups == each) for each in range(groups.max() + 1)]

    def scores(drawn):
        rows = np.concatenate([members[each] for each in drawn])
        own, answers = targets[rows], said[rows]
        present = np.unique(own)
        every = np.arange(len(LABELS))
        return np.array(
            [
                metrics.accuracy_score(own, answers),
                metrics.recall_score(own, answers, labels=present, average="macro"),
                metrics.f1_score(own, answers, labels=present, average="macro"),
                metrics.log_loss(own, probabilities[rows], labels=every),
                metrics.top_k_accuracy_score(own, probabilities[rows], k=3, labels=every),
            ]
        )

    random = np.random.default_rng(5)
    draws = random.integers(0, len(members), (60, len(members)))
    expected = np.percentile([scores(drawn) for drawn in draws], [2.5, 97.5], axis=0).T
    found = compute_scores(
        logits, targets, LABELS, 1.0, groups=groups if has_groups else None, resamples=60, seed=5
    )
    ends = [(score.low, score.high) for score in found.scores.values()]
    assert np.array(ends) == pytest.approx(expected)


def answers_of(is_right):
    said = np.where(is_right, 0, 1)
    zeros = np.zeros(len(said))
    return Answers(np.zeros(len(said), dtype=np.int64), said, zeros, is_right, 2)


def coverage(draw, truth, has_groups, repeats=200):
    random, covered = np.random.default_rng(0), 0
    for repeat in range(repeats):
        is_right, groups = draw(random)
        found = bootstrap_intervals(
            answers_of(is_right), groups if has_groups else None, 400, repeat
        )
        low, high = found["accuracy"]
        covered += low <= truth <= high
    return covered


@pytest.mark.slow
def test_intervals_cover_the_truth():
    def draw(random):
        return random.random(150) < 0.7, None

    covered = coverage(draw, 0.7, False)
    assert stats.binomtest(covered, 200, 0.95).pvalue > 0.001, covered


@pytest.mark.slow
def test_intervals_over_groups_cover_where_those_over_images_do_not():
    """Forty subjects of five images each, which are all right or all wrong."""

    def draw(random):
        return np.repeat(random.random(40) < 0.7, 5), np.repeat(np.arange(40), 5)

    assert coverage(draw, 0.7, True) >= 180
    assert coverage(draw, 0.7, False) <= 140


def test_one_group_has_no_interval():
    logits, targets = random_answers(20)
    found = compute_scores(
        logits, targets, LABELS, 1.0, groups=np.zeros(20, dtype=int), resamples=50
    )
    assert all(score.low is None and score.high is None for score in found.scores.values())
