"""What the doctor can find: for every kind of fault how bad it is, why it matters, and what to do."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]


class Rule(NamedTuple):
    """What a kind of finding means."""

    severity: Severity
    reason: str
    cure: str


RULES: dict[str, Rule] = {
    "dataset-json": Rule("error", "dataset.json breaks a rule.", "Correct it as said."),
    "case-count": Rule("warning", "numTraining in dataset.json is not the number of cases; nnU-Net refuses that.",
                       "Correct the number. Repaired automatically."),
    "unreadable": Rule("error", "A file cannot be read as a volume.", "Replace the file or take the case out."),
    "four-dimensional": Rule("error", "A file has a fourth axis where a volume is expected.",
                             "Write each channel as a file of its own: CASE_0000, CASE_0001, ... Repaired automatically"
                             " where the axis has as many entries as dataset.json has channels."),
    "missing-channel": Rule("error", "A channel of the case is missing.", "Add the file or take the case out."),
    "surplus-channel": Rule("error", "The case has a channel that dataset.json does not name.",
                            "Remove the file or name the channel in channel_names."),
    "missing-label": Rule("error", "The case has images but no label.", "Add the label or take the images out."),
    "label-without-image": Rule("warning", "A label has no images; it will not be used.",
                                "Add the images or remove the label."),
    "shape-mismatch": Rule("error", "The files of a case differ in their number of voxels.",
                           "Resample them to one grid. Labels are repaired automatically where their foreground lies "
                           "inside the image."),
    "geometry-mismatch": Rule("error", "The files of a case have as many voxels but say that they lie elsewhere, by "
                              "more than the tolerance.",
                              "Look at the overlay and copy the header of the image if the voxels agree. Repaired "
                              "automatically up to half a voxel, where only rounding can be the cause."),
    "flipped-axis": Rule("error", "The label's header runs along an axis against the image's, a frequent result of "
                         "conversions: voxel by voxel the label is mirrored, or its header is wrong.",
                         "Look at the overlay. Repaired automatically where the image tells which of the two."),
    "label-looks-flipped": Rule("warning", "The label fits the image's intensities much better after mirroring it.",
                                "Look at the overlay and mirror the label if it is wrong."),
    "not-finite": Rule("error", "A file holds NaN or infinite values; the loss would become NaN.",
                       "Find where they come from and replace them."),
    "constant-image": Rule("error", "A channel has the same value everywhere; normalising divides by zero.",
                           "Replace the image or take the case out."),
    "tiny-image": Rule("warning", "An axis has so few voxels that a 3D network sees mostly padding.",
                       "Check that the volume is complete; consider a 2D configuration."),
    "odd-spacing": Rule("warning", "The voxels are three times larger or smaller than in most cases.",
                        "Check the header; a unit other than millimetres is a common cause."),
    "fractional-label": Rule("error", "A label file holds values that are no integers.",
                             "Interpolate labels with nearest neighbour and store integers. Rounding errors are "
                             "repaired automatically."),
    "unexpected-label": Rule("error", "A label file holds values that dataset.json does not name.",
                             "Name them in dataset.json or correct the file."),
    "empty-label": Rule("note", "The label is background only.", "Check that nothing was forgotten."),
    "class-without-voxels": Rule("error", "A class of dataset.json has no voxel in any case; it cannot be learned.",
                                 "Remove the class or correct the labels."),
    "rare-class": Rule("note", "A class occurs in few cases; some folds may validate without it.",
                       "Read its Dice with the number of cases behind it."),
    "duplicate-images": Rule("warning", "Cases have identical images; in different folds they make the Dice too good.",
                             "Keep one of them, or put them into one fold."),
    "left-right-labels": Rule("warning", "Classes differ only by the side of the body, and mirroring swaps the sides.",
                              "Do not mirror along that axis, or swap the labels when mirroring."),
    "orientation-mixture": Rule("warning", "Volumes are stored in different orientations; planning looks at spacing "
                                "only, and the network has to learn the anatomy several times.",
                                "Bring all volumes to one orientation."),
    "huge-case": Rule("warning", "Preprocessing or predicting the case needs more memory than there is.",
                      "Use fewer workers or a machine with more memory, or crop the volume."),
}  # fmt: skip


class Problem(NamedTuple):
    """One fault of one case ("" for the dataset); findings are problems of one kind together."""

    kind: str
    case: str
    detail: str


@dataclass(frozen=True)
class Finding:
    """One kind of fault: the cases and, in the same order, what was seen in each."""

    kind: str
    severity: Severity
    reason: str
    cure: str
    cases: tuple[str, ...]
    details: tuple[str, ...]


def group(problems: list[Problem]) -> tuple[Finding, ...]:
    """Problems of one kind as one finding; errors first, then in the order of RULES."""
    by_kind = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    severities, kinds = ("error", "warning", "note"), list(RULES)
    order = sorted(by_kind, key=lambda kind: (severities.index(RULES[kind].severity), kinds.index(kind)))
    return tuple(
        Finding(kind, *RULES[kind], tuple(p.case for p in by_kind[kind]), tuple(p.detail for p in by_kind[kind]))
        for kind in order
    )
