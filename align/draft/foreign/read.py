"""Import a configuration file of another tool as a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from align.config.load import dump, read_yaml
from align.config.recipe import BASE, Recipe
from align.draft.foreign import axolotl, llama_factory
from align.draft.foreign.common import Importing
from align.draft.foreign.keys import Keys, comments
from align.draft.recipe import run_name, write_recipe
from align.errors import UserError
from align.preflight import problems


@dataclass(frozen=True)
class Imported:
    """An imported recipe.

    tool: name of the tool that the file is for.
    keys: mapping of the file's keys.
    missing: problems that `align check` finds on this machine, such as missing files.
    """

    tool: str
    recipe: Recipe
    keys: Keys
    missing: list[str]


def import_recipe(file: Path, out: Path, how: Importing) -> Imported:
    """Convert a LLaMA-Factory or axolotl file to a recipe at `out`. Files that it names need not exist here."""
    if not file.is_file():
        raise UserError(f"{file}: no such file. Pass the YAML file of LLaMA-Factory or axolotl.")
    values = read_yaml(file, "a configuration; it must be a mapping of keys")
    if "base_model" in values:
        tool, (parts, keys) = axolotl.TOOL, axolotl.axolotl(str(file), values, how)
    elif "model_name_or_path" in values:
        tool, (parts, keys) = llama_factory.TOOL, llama_factory.llama_factory(str(file), values, how)
    else:
        raise UserError(
            f"{file}: neither model_name_or_path (LLaMA-Factory) nor base_model (axolotl) is set. Pass a file "
            "of one of the two."
        )
    parts.name = run_name(parts.name)
    text = "\n".join([*comments(tool, keys), dump(parts.values())])

    def of_recipe(recipe: Recipe) -> list[str]:
        return problems(recipe, [BASE, *recipe.stages], files=False)

    recipe = write_recipe(out, text, of_recipe)
    return Imported(tool, recipe, keys, problems(recipe, [BASE, *recipe.stages]))
