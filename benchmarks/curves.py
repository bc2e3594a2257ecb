"""Draw the curves of a stage: `python benchmarks/curves.py NAME RUN_DIR STAGE METRIC[,METRIC ...]`.

Writes benchmarks/results/curves/NAME.json (values, recipe, versions, hardware) and docs/images/NAME.svg, one panel per
metric: a dot per step, and a line for the moving average. `--redraw` draws all pictures again from the JSON files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "curves"
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 280, 180, 48, 28, 26, 12
INK, LINE, GROUND = "#57606a", "#0969da", "#ffffff"


def collect(run_dir: Path, stage: str, metrics: list[str]) -> dict[str, Any]:
    """The stage's metrics by step, with settings, versions and hardware."""
    lines = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    manifest = json.loads((run_dir / stage / "manifest.json").read_text(encoding="utf-8"))
    recipe = json.loads((run_dir / "recipe.json").read_text(encoding="utf-8"))
    return {
        "recipe": recipe["name"],
        "stage": stage,
        "settings": recipe["stages"][stage],
        **{key: manifest[key] for key in ("seconds", "packages", "hardware") if key in manifest},
        "steps": [line["step"] for line in lines],
        "curves": {name: [line.get(name) for line in lines] for name in metrics},
    }


def smoothed(values: list[float], reach: int) -> list[float]:
    """Moving average over up to `reach` values on either side."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def panel(name: str, steps: Sequence[float], values: list[float | None], left: int, across: str = "step") -> list[str]:
    """A dot per value and their moving average. across: name of the values in `steps`, which ascend."""
    points = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    xs, ys = [step for step, _ in points], [value for _, value in points]
    low, high = min(ys), max(ys)
    reach = (high - low) or 1.0

    def at(step: float, value: float) -> tuple[float, float]:
        across = (step - xs[0]) / ((xs[-1] - xs[0]) or 1)
        up = (value - low) / reach
        return (
            round(left + LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    line = smoothed(ys, max(1, len(ys) // 12))
    path = " ".join(f"{x},{y}" for x, y in (at(step, value) for step, value in zip(xs, line, strict=True)))
    bottom, right = HEIGHT - BOTTOM, left + WIDTH - RIGHT
    text = f'font-family="sans-serif" font-size="11" fill="{INK}"'
    return [
        f'<text x="{left + LEFT}" y="16" {text} font-weight="bold">{name}</text>',
        f'<path d="M{left + LEFT},{TOP} V{bottom} H{right}" fill="none" stroke="{INK}" stroke-width="0.7"/>',
        f'<text x="{left + LEFT - 5}" y="{TOP + 8}" {text} text-anchor="end">{high:.3g}</text>',
        f'<text x="{left + LEFT - 5}" y="{bottom}" {text} text-anchor="end">{low:.3g}</text>',
        f'<text x="{left + LEFT}" y="{HEIGHT - 10}" {text}>{across} {xs[0]}</text>',
        f'<text x="{right}" y="{HEIGHT - 10}" {text} text-anchor="end">{xs[-1]}</text>',
        *(f'<circle cx="{x}" cy="{y}" r="1.6" fill="{LINE}" opacity="0.35"/>' for x, y in (at(*p) for p in points)),
        f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.6"/>',
    ]


def draw(facts: dict[str, Any]) -> str:
    panels = [
        line
        for i, (name, values) in enumerate(facts["curves"].items())
        for line in panel(name, facts["steps"], values, i * WIDTH)
    ]
    width = WIDTH * len(facts["curves"])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}">'
    return "\n".join([head, f'<rect width="100%" height="100%" fill="{GROUND}"/>', *panels, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?")
    parser.add_argument("run_dir", nargs="?", type=Path)
    parser.add_argument("stage", nargs="?")
    parser.add_argument("metrics", nargs="?", type=lambda value: value.split(","))
    parser.add_argument("--redraw", action="store_true")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    if options.redraw:
        names = [path.stem for path in RESULTS.glob("*.json")]
    elif options.metrics:
        facts = collect(options.run_dir, options.stage, options.metrics)
        (RESULTS / f"{options.name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        names = [options.name]
    else:
        parser.error("pass NAME RUN_DIR STAGE METRICS, or --redraw")
    for name in names:
        facts = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        (IMAGES / f"{name}.svg").write_text(draw(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
