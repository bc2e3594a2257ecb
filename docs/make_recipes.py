"""Fill the table of recipes/README.md from recipes/catalogue.json: `python docs/make_recipes.py`.

`python docs/make_recipes.py runs/tiny` prints the minutes and the results of a finished run, for its entry.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from align.recipes.catalogue import ShippedRecipe, read_catalogue

PAGE = Path(__file__).parents[1] / "recipes" / "README.md"
HEAD = "| recipe | what it shows | needs | minutes on two cores | expected result |\n|---|---|---|---|---|"


def row(recipe: ShippedRecipe) -> str:
    minutes = "not measured" if recipe.minutes is None else f"{recipe.minutes:g}"
    results = "; ".join(entry.text().replace("-", "−") for entry in recipe.expected)
    results = results.replace("reward−model", "reward-model") or "not measured"
    if recipe.estimate:
        results += f"; `{recipe.estimate}` estimates memory and time"
    if recipe.page:
        results += f"; [{recipe.page.partition('#')[0]}](../{recipe.page}) has {recipe.page_has}"
    return f"| `{recipe.name}` | {recipe.shows} | {recipe.needs or 'nothing'} | {minutes} | {results} |"


def fill(page: str) -> str:
    """The page with its table written anew."""
    table = "\n".join([HEAD, *map(row, read_catalogue())])
    return re.sub(r"(<!-- recipes -->\n).*?(\n<!-- end -->)", lambda m: f"{m[1]}{table}{m[2]}", page, flags=re.DOTALL)


def describe(run: Path) -> str:
    """Minutes of the stages, and the means of the last evaluation, of a finished run."""
    seconds = [json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in run.glob("*/manifest.json")]
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    lines = [f"minutes: {sum(seconds) / 60:.1f}"]
    for metric in report["evaluations"][-1]["metrics"]:
        means = {model: cell.get("mean") for model, cell in metric["models"].items() if cell}
        lines.append(f"{metric['label']}: {means}")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:]:
        print("\n".join(describe(Path(run)) for run in sys.argv[1:]))
    else:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
