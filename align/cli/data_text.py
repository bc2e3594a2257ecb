"""Print the data of a stage: colours on a terminal, brackets around the tokens in the loss in a log."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from align.cli.terminal import color
from align.data.report import REASONS
from align.data.show import Labels, LengthBias, Segment, Side, bar
from align.recipes.duration import Estimate
from align.recipes.preview import Lengths, Preview

WIDTH = 12
"""Width of the names of the report's lines, in characters."""
OPEN, CLOSE = "\u27e6", "\u27e7"
"""Brackets around tokens in the loss; texts rarely contain these characters."""
FILES = 10
"""Maximum number of file names printed."""
GREEN, GREY = 32, 90
BOUNDS = {"earlier run": "about", "lower bound": "at least"}
"""{kind of an estimate: word before the time}."""
UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))


def print_preview(found: Preview, time: Estimate, rows: Sequence[Sequence[Side]], start: int, *, ids: bool) -> None:
    """Print the report and some rows. start: number of the first row."""
    for line in [*report_lines(found), *time_lines(time)]:
        print(line)
    for number, row in enumerate(rows, start=start):
        print(f"\n{color(f'row {number}', 36)}")
        for side in row:
            if len(row) > 1:
                print(color(f"{side.name} ({len(side.ids)} tokens)", GREY))
            print(marked(side.segments, colored=sys.stdout.isatty()))
            if ids:
                print(color(" ".join(map(str, side.ids)), GREY))


def marked(segments: Sequence[Segment], *, colored: bool) -> str:
    """The text of a row, with the tokens in the loss in green or in brackets."""
    parts = []
    for text, in_loss in segments:
        parts.append(text if not in_loss else color(text, GREEN) if colored else f"{OPEN}{text}{CLOSE}")
    return "".join(parts)


def report_lines(found: Preview) -> list[str]:
    """The report, one fact per line."""
    lines = []
    if (report := found.report) is not None:
        held_out = report.held_out_seen if report.held_out_from else report.rows_held_out
        held = f", {held_out:,} held out" if held_out else ""
        first = "the first rows of a stream: " if found.streams else ""
        lines.append(_line("rows", f"{first}{report.rows_read:,} read, {report.rows_train:,} {found.use}{held}"))
        lines += [_line("", report.held_out_apart())] if report.held_out_from else []
        share = f", {report.loss_tokens / report.tokens:.0%} of them in the loss" if report.loss_tokens else ""
        lines.append(_line("tokens", f"{report.tokens:,}{share}"))
        if report.labelled:
            lines.append(_line("labels", f"{report.desirable:,} desirable, {report.undesirable:,} undesirable"))
        lines += [_line("note", note) for note in report.notes]
        lines += [_line("truncated", f"{report.truncated:,} rows")] if report.truncated else []
        what = "pairs became two rows each" if report.labelled else "conversations became several rows"
        lines += [_line("split", f"{report.split:,} {what}")] if report.split else []
        common = Counter(report.dropped).most_common(REASONS)
        for reason, count in common:
            lines.append(_line("dropped", f"{count:,}: {reason}"))
            if (example := (found.examples or {}).get(reason)) is not None:
                lines.append(_line("", f"{example[0]}: {example[1]}"))
        if others := sum(report.dropped.values()) - sum(count for _, count in common):
            lines.append(_line("dropped", f"{others:,}: {len(report.dropped) - REASONS:,} other reasons"))
        if report.unused_columns:
            columns = ", ".join(f"{name} ({count:,} rows)" for name, count in report.unused_columns.items())
            lines.append(_line("not used", f"columns {columns}"))
        for source, files in report.unread_files.items():
            more = ", ..." if len(files) > FILES else ""
            lines.append(_line("not read", f"{len(files):,} files in {source}: {', '.join(files[:FILES])}{more}"))
        for setting, count in report.unmatched.items():
            lines.append(_line("unmatched", f"{setting}: none of {count:,} rows has it"))
        for name, count in report.too_short.items():
            lines.append(_line("too short", f"{count:,} items of {name} have too few words to be found"))
        if len(report.sources) > 1:
            lines += [
                _line("source", f"{s['name']}: {s['rows']:,} rows, {s['tokens']:,} tokens") for s in report.sources
            ]
    lines += _length_lines(found.lengths) if found.lengths else []
    lines += [_line("answers", _bias_text(found.bias))] if found.bias else []
    lines += _label_lines(found.labels) if found.labels else []
    if found.steps:
        lines.append(_line("steps", f"{found.steps:,} {found.step_name}"))
    return lines


def time_lines(time: Estimate) -> list[str]:
    """The estimate of the time, if the stage trains."""
    if time.kind == "does not train":
        return []
    if time.seconds is None:
        return [_line("time", f"unknown: {time.basis}")]
    if time.seconds < 1:
        bound = " as a lower bound" if time.kind == "lower bound" else ""
        return [_line("time", f"under a second{bound}: {time.basis}")]
    return [_line("time", f"{BOUNDS[time.kind]} {duration(time.seconds)}: {time.basis}")]


def duration(seconds: float) -> str:
    """Seconds as text, in the largest unit that gives at least 1.5."""
    size, unit = next((entry for entry in UNITS if seconds >= 1.5 * entry[0]), UNITS[-1])
    number = seconds / size
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"


def _length_lines(lengths: Lengths) -> list[str]:
    lines = [_line("lengths", f"mean {lengths.mean:,.0f}, longest {lengths.longest:,} tokens")]
    most = max(count for *_, count in lengths.bins)
    for low, high, count in lengths.bins:
        lines.append(_line("", f"{low:>7,} to {high:<7,} {count:>9,} {bar(count / most)}"))
    if lengths.duplicates:
        lines.append(_line("duplicates", f"{lengths.duplicates:,} rows equal an earlier row"))
    return lines


def _bias_text(bias: LengthBias) -> str:
    return (
        f"chosen longer in {bias.chosen_longer:.0%} of the pairs, rejected in {bias.rejected_longer:.0%}; mean "
        f"{bias.chosen_tokens:,.0f} and {bias.rejected_tokens:,.0f} tokens"
    )


def _label_lines(labels: Labels) -> list[str]:
    means = {"desirable": labels.desirable_tokens, "undesirable": labels.undesirable_tokens}
    shown = {name: mean for name, mean in means.items() if mean is not None}
    parts = (f"{mean:,.0f}{'' if number else ' tokens'} if {name}" for number, (name, mean) in enumerate(shown.items()))
    lines = [_line("answers", f"mean {', '.join(parts)}")]
    if labels.contradictory:
        lines.append(_line("", f"{labels.contradictory:,} rows occur with both labels"))
    return lines


def _line(name: str, text: str) -> str:
    return f"{name:<{WIDTH}}{text}".rstrip()
