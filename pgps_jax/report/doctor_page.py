"""The doctor's report: one self-contained HTML page to look at, one JSON file to compute with."""

import base64
import dataclasses
import html
import io
import json
import os
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pgps_jax.data.doctor import CaseFacts, Examination
from pgps_jax.data.findings import Finding
from pgps_jax.data.labels import Label
from pgps_jax.data.nifti import axis_codes, read_volume
from pgps_jax.errors import InputError

COLOUR = {"error": "#b3261e", "warning": "#a15c00", "note": "#44546a"}
SHOWN = 12  # occurrences of a finding on the page; the JSON has all
OVERLAY = (0.95, 0.25, 0.15)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1d2430; }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.finding { border-left: .3rem solid; padding: .1rem 1rem; margin: 1rem 0; background: #f6f7f9 }
.severity { color: #fff; border-radius: .3rem; padding: .05rem .5rem; font-size: .8rem; margin-right: .5rem }
.cure::before { content: "What to do: "; font-weight: 600 } .seen { font-size: .9rem; color: #44546a }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #dde1e7 }
td:first-child, th:first-child { text-align: left } figure { display: inline-block; margin: .5rem 1rem .5rem 0 }
figcaption { font-size: .85rem; color: #44546a } img { max-width: 100%; height: auto }
"""


def write_doctor_report(examination: Examination, folder: Path) -> tuple[Path, Path]:
    """Write doctor.html and doctor.json into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "doctor.html", folder / "doctor.json"
    for path, text in ((data, json.dumps(report_json(examination), indent=1) + "\n"), (page, report_html(examination))):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return page, data


def report_json(examination: Examination) -> dict:
    """Findings and facts as JSON values."""
    counts = {s: sum(len(f.cases) for f in examination.findings if f.severity == s) for s in COLOUR}
    return {
        "dataset": examination.folder.name,
        "folder": str(examination.folder),
        "counts": counts,
        "findings": [dataclasses.asdict(finding) for finding in examination.findings],
        "classes": [
            {"name": name, "label": label, "cases": len(cases), "voxels": sum(_voxels(c, label) for c in cases)}
            for name, label in _classes(examination)
            for cases in [_cases_with(examination, label)]
        ],
        "cases": [
            {
                "id": case.id,
                "shape": None if case.header is None else case.header.shape,
                "spacing": None if case.header is None else case.header.spacing,
                "orientation": None if case.header is None else axis_codes(case.header.affine),
                "voxels_of_label": case.voxels_of_label,
            }
            for case in examination.cases
        ],
    }


def report_html(examination: Examination) -> str:
    """The page; pictures are embedded, nothing is loaded from elsewhere."""
    name = html.escape(examination.folder.name)
    content = report_json(examination)
    said = ", ".join(f"{n} {severity}{'s' if n != 1 else ''}" for severity, n in content["counts"].items() if n)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}: examination</title><style>{STYLE}</style>",
        f"<h1>{name}</h1><p>{len(examination.cases)} cases, channels {html.escape(', '.join(examination.channel_names))}. "
        f"{said or 'Nothing found'}.</p>",
        "<h2>Findings</h2>" if examination.findings else "",
        *(_finding_html(finding) for finding in examination.findings),
        "<h2>Classes</h2>",
        _classes_html(examination),
        "<h2>Geometry</h2>",
        _geometry_html(examination),
    ]
    return "\n".join(parts) + "\n</html>\n"


def _finding_html(finding: Finding) -> str:
    seen = [html.escape(f"{case}: {detail}" if case else detail)
            for case, detail in zip(finding.cases, finding.details, strict=True)]
    if len(seen) > SHOWN:
        seen = [*seen[:SHOWN], f"and {len(seen) - SHOWN} more (doctor.json lists all)"]
    colour = COLOUR[finding.severity]
    return (
        f'<div class=finding style="border-color:{colour}">'
        f'<p><span class=severity style="background:{colour}">{finding.severity}</span><b>{finding.kind}</b> '
        f"({len(finding.cases)})</p><p>{html.escape(finding.reason)}</p><p class=cure>{html.escape(finding.cure)}</p>"
        f"<p class=seen>{'<br>'.join(seen)}</p></div>"
    )


def _classes_html(examination: Examination) -> str:
    rows, figures = [], []
    for name, label in _classes(examination):
        cases = _cases_with(examination, label)
        voxels = [_voxels(case, label) for case in cases]
        median = f"{np.median(voxels):,.0f}" if voxels else "–"
        rows.append(f"<tr><td>{html.escape(name)}<td>{label}<td>{len(cases)}<td>{median}</tr>")
        figures.append(_overlay_html(examination, name, label))
    header = "<tr><th>class<th>label<th>cases with it<th>median voxels</tr>"
    return f"<table>{header}{''.join(rows)}</table><p>{''.join(figures)}</p>"


def _overlay_html(examination: Examination, name: str, label: Label) -> str:
    """Picture of the case with the median volume of a class, without faults in its files where there is one."""
    cases = sorted(_cases_with(examination, label), key=lambda case: (bool(case.problems), _voxels(case, label)))
    cases = [case for case in cases if not case.problems] or cases
    if not cases:
        return ""
    case = cases[len(cases) // 2]
    try:
        picture = overlay(case, label)
    except InputError:
        return ""
    data = base64.b64encode(picture).decode()
    text = html.escape(f"{name}: {case.id}")
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def overlay(case: CaseFacts, label: Label) -> bytes:
    """PNG of three slices through a class, one per axis, where most of it is; the image grey, the class red.

    If the label has another grid than the image, it is drawn voxel on voxel, as training would take it.
    """
    image, seg = read_volume(next(iter(case.files.images.values()))), read_volume(case.files.label)
    mask = np.isin(seg.array, label)
    low, high = np.percentile(image.array[np.isfinite(image.array)], (0.5, 99.5))
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in enumerate(figure.subplots(1, 3)):
        place = int(np.argmax(mask.sum(axis=tuple(a for a in range(3) if a != axis))))
        rows, columns = (spacing for a, spacing in enumerate(image.spacing) if a != axis)
        grey = np.take(image.array, min(place, image.array.shape[axis] - 1), axis=axis)
        panel.imshow(grey, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=rows / columns)
        red = np.take(mask, place, axis=axis)
        tint = np.zeros((*red.shape, 4), np.float32)
        tint[red] = (*OVERLAY, 0.35)
        panel.imshow(tint, origin="lower", aspect=rows / columns, interpolation="nearest")
        if red.any() and not red.all() and min(red.shape) > 1:
            panel.contour(red, levels=[0.5], colors=[OVERLAY], linewidths=1.0)
        panel.set_title(f"array axis {axis}, slice {place}", fontsize=8)
        panel.set_xticks([])
        panel.set_yticks([])
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=90)
    return picture.getvalue()


def _geometry_html(examination: Examination) -> str:
    headers = [case.header for case in examination.cases if case.header is not None]
    if not headers:
        return "<p>No image could be read.</p>"
    shapes = np.array([header.shape for header in headers])
    spacings = np.array([header.spacing for header in headers])
    rows = []
    for what, values, pattern in (("voxels", shapes, "{:.0f}"), ("spacing, mm", spacings, "{:.3g}")):
        for statistic, numbers in (("smallest", values.min(0)), ("median", np.median(values, 0)), ("largest", values.max(0))):
            rows.append(f"<tr><td>{what}, {statistic}" + "".join(f"<td>{pattern.format(n)}" for n in numbers) + "</tr>")
    codes = sorted({axis_codes(header.affine) for header in headers})
    return (f"<table><tr><th>array axis<th>0<th>1<th>2</tr>{''.join(rows)}</table>"
            f"<p>Orientation (file axes x, y, z): {', '.join(codes)}.</p>")


def _classes(examination: Examination) -> list[tuple[str, Label]]:
    labels = examination.labels
    if labels is None:
        return []
    return [(name, value) for name, value in zip(labels.names, labels.values, strict=True) if value != 0]


def _voxels(case: CaseFacts, label: Label) -> int:
    return sum(case.voxels_of_label.get(v, 0) for v in (label if isinstance(label, tuple) else (label,)))


def _cases_with(examination: Examination, label: Label) -> list[CaseFacts]:
    return [case for case in examination.cases if case.files.images and _voxels(case, label)]
