"""Topics of a report: which measures belong together, what one sees, and what would refute it."""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """A section of curves.

    Attributes:
        key: Part of its files' names.
        title: Heading.
        measures: Names of its measures in the registry; empty: all that no other topic has.
        caption: One sentence on what one sees.
        refuted: One sentence on what would speak against the method's claim; names arms as
            ``{arm}`` and ``{baseline}``.
        is_open: Whether the section is unfolded at first.
    """

    key: str
    title: str
    measures: tuple[str, ...]
    caption: str
    refuted: str
    is_open: bool = False


SIMILARITY = "similarity"

TOPICS = (
    Topic(
        "sinks",
        "Attention sinks",
        ("sink-ratio", "received-mass", "top-patch"),
        "How often and how strongly single tokens draw the attention of all others, from the first "
        "step to the last.",
        "If re-weighting prevents sinks, the lines of patches end lower for {arm} than for "
        "{baseline}, with bands apart; if they lie on each other, it does not, and if {baseline} "
        "stays level, fine-tuning makes no sinks here.",
        is_open=True,
    ),
    Topic(
        "relevance",
        "Relevance of simple and hard tokens",
        ("relevance-by-count",),
        "Closeness to the classes of the tokens that all classes pick (simple) and of those that "
        "one class picks (hard).",
        "If re-weighting acts on the tokens it aims at, simple tokens rise less for {arm} than for "
        "{baseline} while hard ones rise more; if both move alike, it does not.",
        is_open=True,
    ),
    Topic(
        SIMILARITY,
        "Similarity of representations",
        ("cka",),
        "Linear CKA, unbiased, of what stands for an image in each block: 1 is the same up to "
        "rotation and scale, 0 is chance.",
        "If {arm} and {baseline} differed in what they learn, their similarity would fall in late "
        "blocks; if it stays near 1 everywhere, they have learnt the same.",
        is_open=True,
    ),
    Topic(
        "entropy",
        "Spread of attention",
        ("attention-entropy",),
        "How evenly the class token and the patches spread their attention; 1 is even.",
        "If fine-tuning made attention collapse onto few tokens, the line of {baseline} would "
        "fall; if it rises, the premise does not hold for these data.",
    ),
    Topic(
        "norms",
        "Outliers among tokens",
        ("norm-outliers", "massive-activations"),
        "Patches whose norm, and channels whose activation, stick out from all others.",
        "If sinks came with outliers as in large towers, shares would lie well above chance; where "
        "none are found, this tower has none to repair.",
    ),
    Topic(
        "picks",
        "Tokens that classes pick",
        ("selection-overlap", "count-histogram"),
        "How much the classes' most relevant tokens overlap, and how many tokens are picked by "
        "each number of classes.",
        "If classes agreed on tokens only by chance, lines would run along the chance level; if "
        "{arm} does not move away from {baseline}, re-weighting does not part the classes.",
    ),
    Topic(
        "separability",
        "Separability of classes",
        ("separability",),
        "How far the classes lie apart, compared with the spread inside each, in support images.",
        "If {arm} kept classes apart that {baseline} blurs, its line would end higher; support "
        "images are those trained on, so that a rise alone shows fitting.",
    ),
    Topic(
        "other",
        "Other measures",
        (),
        "Measures through training, averaged over blocks and images.",
        "A difference between {arm} and {baseline} counts where their bands part.",
    ),
)

NORMS_BY_COUNT = "norms-by-count"
NORMS_CAPTION = (
    "Mean norm of the patches that 0, 1, … of the classes pick, from block to block, before "
    "training and after it."
)
NORMS_REFUTED = (
    "If fine-tuning over-pushed simple tokens, the line of those that all classes pick would rise "
    "above the others in late blocks for {baseline} but not for {arm}; if the panels look alike, "
    "it does not."
)

GALLERY_CAPTION = (
    "Support images of one episode: closeness of each patch to each class, the number of classes "
    "that pick it, and the attention it receives before and after training."
)
GALLERY_REFUTED = (
    "If sinks grew with {baseline} and not with {arm}, bright patches off the object would appear "
    "in its attention alone; one episode shows what to look for and proves nothing."
)

ACCURACY_REFUTED = (
    "Dots are means, bars their 95 % intervals, ticks single episodes, and the dotted line is "
    "chance."
)

COMPARISON_CAPTION = (
    "Each arm minus {baseline} on the same episodes, and how many episodes it would take to tell "
    "such a difference from chance."
)
COMPARISON_REFUTED = (
    "If {arm} helped, its difference would lie above 0 with p below 0.05; where p is larger, these "
    "episodes do not tell the two apart."
)
SINK_CHANGES_CAPTION = (
    "How training changes each measure of sinks under each arm, as a mean over blocks and images; "
    "columns are those of the table of accuracies."
)
SINK_CHANGES_REFUTED = (
    "If {arm} prevented sinks, its change in patches would lie below that of {baseline} with p "
    "below 0.05. Each table is corrected for its arms, not for the number of tables."
)

FIELD_CAPTION = (
    "Rows are arms, columns data sets. Below, each arm minus {baseline} on the same episodes; and, "
    "where papers report numbers for these data sets, those, quoted and apart."
)
RANKS_REFUTED = (
    "With few data sets such a test tells hardly anything apart: that a bar joins two arms does "
    "not show that they are alike."
)
