"""The page of a reproduction: each table beside the paper's, which claims hold, the pictures."""

from __future__ import annotations

import html
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from gps_guidance.page import html_page, image_uri
from gps_guidance.photos.manifest import write_whole
from gps_guidance.reproduce.outcome import Outcome, Table

WIDE = 11  # columns that fit on a page in full size
STYLE = """\
h2 { font-weight: 600; font-size: 1.2rem; margin: 2.6rem 0 .6rem } p { margin: .4rem 0 }
table { margin: .8rem 0 } th { text-align: left; font-weight: 600; border-bottom: 1px solid #ccc }
td, th { padding: 3px 8px 3px 0; vertical-align: top } td:first-child { min-width: 9rem }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap } small { color: #666 }
td.paper { color: #8a6d1d } .holds { color: #246b38 } .fails { color: #a3261d }
.note { color: #666; font-size: .93rem } figure { margin: 1rem 0 } img { max-width: 100% }
figcaption { color: #555; font-size: .9rem } table.wide { font-size: .8rem }
"""


def write_report(folder: Path, scale: str, outcomes: Mapping[str, Outcome]) -> Path:
    """``report.html``, with its pictures inside: one file that can be mailed. It has no positions.
    """
    claims = [claim for outcome in outcomes.values() for claim in outcome.claims]
    held = sum(claim.holds for claim in claims)
    made_on = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    body = [
        f"<h1>GPS as a control signal, reproduced at {html.escape(scale)} scale</h1>",
        f"<p>{held} of {len(claims)} claims hold. Means with 95 % intervals; yellow numbers are "
        "the paper's, by other judges on other photos: compare orders, not values.</p>",
        f'<p class="note">Made on {html.escape(platform.machine())} with {made_on}.</p>',
        *(_section(name, outcome) for name, outcome in outcomes.items()),
    ]
    page = html_page("GPS as a control signal, reproduced", "\n".join(body), STYLE)
    write_whole(folder / "report.html", page.encode())
    return folder / "report.html"


def _section(name: str, outcome: Outcome) -> str:
    parts = [f'<h2 id="{name}">{html.escape(outcome.title)}</h2>']
    if outcome.table is not None:
        parts.append(_table(outcome.table))
    if outcome.claims:
        parts.append("<ul>" + "".join(
            f'<li><b class="{"holds" if claim.holds else "fails"}">'
            f'{"holds" if claim.holds else "does not hold"}</b>: {html.escape(claim.text)} '
            f'<span class="note">({html.escape(claim.evidence)})</span></li>'
            for claim in outcome.claims) + "</ul>")
    for path, caption in outcome.pictures:
        uri = image_uri("png", path.read_bytes())
        parts.append(f'<figure><img src="{uri}" alt="{html.escape(caption)}">'
                     f"<figcaption>{html.escape(caption)}</figcaption></figure>")
    notes = [*outcome.notes, f"{outcome.seconds / 60:.1f} minutes of one process."]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
    return "\n".join(parts)


def _table(table: Table) -> str:
    head, *rows = table.cells()
    ours = 1 + len(table.columns)
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        cells = [f"<td>{html.escape(row[0])}</td>"]
        cells += [f'<td class="{"n" if at < ours else "n paper"}">{_score(cell)}</td>'
                  for at, cell in enumerate(row) if at]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    wide = ' class="wide"' if len(head) > WIDE else ""
    return f"<table{wide}>{''.join(lines)}</table>"


def _score(cell: str) -> str:
    """A score with its interval below, or a table of many would not fit on a page."""
    mean, bracket, interval = html.escape(cell).partition(" [")
    return f"{mean}<br><small>[{interval}</small>" if bracket else mean
