"""Write docs/recipes.md, the reference of every setting, from the classes that validate a recipe."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from align.config import evaluation, filters, lora, parallel, parts, ppo, rewards, rollout, stage, stages
from align.config.recipe import Recipe
from align.config.section import RuntimeSetting

PAGE = Path(__file__).parent / "recipes.md"

INTRO = """# Every setting of a recipe

`python docs/make_reference.py` writes this page from `align/config`. [guide.md](guide.md) explains how the parts work
together, and `align show RECIPE` prints a recipe with all its defaults.

* Unknown keys are refused, and so are values of the wrong type: `"8"` and `true` are not numbers, `8.0` is not a whole
  number.
* A setting without a default (–) is required. A section in the recipe replaces the default section as a whole: keys
  that it does not set have the defaults of the section's own table.
* Paths of data, models and reward functions are relative to the working directory, not to the folder of the recipe.
* † marks a setting that does not affect a stage's result. It may change when a run is resumed, and a finished stage is
  kept.
* PPO computes log-probabilities and values in evaluation mode, also in the updates: without dropout and without a
  capacity limit of the experts.
"""

SECTIONS: list[tuple[str, list[tuple[str, type[BaseModel]]]]] = [
    ("The recipe", [("Recipe", Recipe)]),
    (
        "Models",
        [
            ("Model from scratch", parts.ScratchModel),
            ("Tokenizer to train", parts.ScratchTokenizer),
            ("Pretrained model", parts.PretrainedModel),
            ("Hot start", parts.HotStartModel),
        ],
    ),
    (
        "Data",
        [
            ("Data of a stage", parts.Data),
            ("Mixture of sources", parts.Mixture),
            ("Every source", parts.SourceBase),
            ("Rows of any shape", parts.RowSource),
            ("File", parts.FileSource),
            ("Hub data set", parts.HubSource),
            ("Python's documentation", parts.PythonDocsSource),
            ("Rows of a stage", parts.StageSource),
        ],
    ),
    (
        "Filters",
        [
            ("Length of a text", filters.LengthFilter),
            ("Language", filters.LanguageFilter),
            ("Repetition", filters.RepetitionFilter),
            ("Garbled text", filters.GarbledFilter),
            ("Truncated answers", filters.TruncatedFilter),
            ("Broken Markdown", filters.MarkdownFilter),
            ("Broken JSON", filters.JsonFilter),
            ("Refusals", filters.RefusalFilter),
            ("Personal data", filters.PersonalFilter),
            ("Regular expressions", filters.KeywordFilter),
            ("Duplicates", filters.DuplicateFilter),
            ("Contamination", filters.ContaminationFilter),
            ("Evaluation set", filters.EvaluationSet),
        ],
    ),
    ("Optimisation", [("Optimizer", parts.Optimizer), ("LoRA", lora.Lora), ("Group of adapters", lora.GroupLora)]),
    ("Several processes", [("Parallel", parallel.Parallel), ("Offload", parallel.Offload)]),
    (
        "Stages",
        [
            ("Every stage with a parent", stage.StageWithParent),
            ("Every training stage", stages.TrainingStage),
            ("Pretraining", stages.PretrainStage),
            ("Supervised fine-tuning", stages.SftStage),
            ("Every stage that samples rows", stages.SamplingStage),
            ("Preference pairs", stages.SampleStage),
            ("Rejection sampling", stages.RejectionSampleStage),
            ("Reward model", stages.RewardModelStage),
            ("DPO", stages.DpoStage),
            ("KTO", stages.KtoStage),
            ("PPO and its relatives", ppo.PpoStage),
            ("Evaluation", stages.EvaluateStage),
            ("Evaluation task", evaluation.EvaluationTask),
            ("Options of tasks", evaluation.TaskOptions),
            ("Evaluation during training", evaluation.EvaluateDuring),
            ("Word F1", evaluation.F1Metric),
        ],
    ),
    (
        "Generation and learning",
        [
            ("Rollout", rollout.Rollout),
            ("Critic", ppo.Critic),
            ("KL to the reference", ppo.Kl),
            ("Importance weights", ppo.Importance),
        ],
    ),
    (
        "Rewards",
        [
            ("Every reward", rewards.RewardBase),
            ("Reward of a model", rewards.ModelReward),
            ("Reward of a server", rewards.RemoteReward),
            ("Reward of a function", rewards.FunctionReward),
            ("Final answer", rewards.MathReward),
            ("Equal text", rewards.ExactReward),
            ("Regular expression", rewards.RegexReward),
            ("Tagged sections", rewards.FormatReward),
            ("Length", rewards.LengthReward),
            ("Chosen letter", rewards.ChoiceReward),
            ("JSON", rewards.JsonReward),
            ("Overlap with a text", rewards.OverlapReward),
            ("Verifiable instructions", rewards.InstructionsReward),
            ("Program", rewards.CodeReward),
        ],
    ),
]


def members(union: Any) -> tuple[type[BaseModel], ...]:
    """The classes of a discriminated union."""
    return tuple(get_args(member)[0] if get_origin(member) is Annotated else member for member in get_args(union))


def list_new_stages() -> None:
    """Give every stage that SECTIONS does not name a section of its own, so that a new kind needs no line here."""
    group = dict(SECTIONS)["Stages"]
    listed = [model for _, model in group]
    for model in members(get_args(stages.Stage)[0]):
        if model not in listed:
            group.append((f"Stage {get_args(model.model_fields['kind'].annotation)[0]}", model))


list_new_stages()
TITLES = {model: title for _, group in SECTIONS for title, model in group}
UNIONS = {
    get_args(parts.Model)[0]: "[one of the models](#models)",
    get_args(parts.Source)[0]: "[Source](#every-source)",
    get_args(filters.Filter)[0]: "[one of the filters](#filters)",
    get_args(stages.Stage)[0]: "[one of the stages](#stages)",
    get_args(rewards.Reward)[0]: "[Reward](#every-reward)",
}


def page() -> str:
    blocks = [INTRO]
    for heading, group in SECTIONS:
        blocks.append(f"## {heading}\n")
        blocks += [section(title, model) for title, model in group]
    return "\n".join(blocks)


def section(title: str, model: type[BaseModel]) -> str:
    """Section of a class: its docstring, a table of its own settings, and a link to its base class."""
    base = next((base for base in model.__bases__ if base in TITLES), None)
    inherited = base.model_fields if base else {}
    rows = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row(name, field)) + " |"
        for name, field in model.model_fields.items()
        if name not in inherited
    ]
    lines = [f"### {title}\n", f"{one_line(inspect.getdoc(model) or '')}\n"]
    lines += ["| setting | type | default | range | meaning |", "|---|---|---|---|---|", *rows, ""]
    if base is not None:
        lines.append(f"Also the settings of [{TITLES[base]}]({anchor(base)}).\n")
    return "\n".join(lines)


def row(name: str, field: FieldInfo) -> tuple[str, ...]:
    kind, bounds = words(field.annotation), limits(field.annotation, field.metadata)
    free = " †" if any(isinstance(mark, RuntimeSetting) for mark in field.metadata) else ""
    return f"`{name}`{free}", kind, default(field), bounds, one_line(field.description or "")


def anchor(model: type[BaseModel]) -> str:
    """Anchor that GitHub gives to the heading of a class."""
    kept = "".join(letter for letter in TITLES[model].lower() if letter.isalnum() or letter in " -_")
    return "#" + kept.replace(" ", "-")


def one_line(text: str) -> str:
    return " ".join(text.split())


# --- types and ranges in words -------------------------------------------------------------------------------

PLAIN = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "anything"}
UNION = (Union, types.UnionType)


def words(annotation: Any) -> str:
    """A type in words, as it is written in a recipe."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in PLAIN:
        return PLAIN[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{TITLES[annotation]}]({anchor(annotation)})"
    if origin is Annotated:
        return words(arguments[0])
    if annotation in UNIONS:
        return UNIONS[annotation]
    if origin in (Literal, *UNION):
        return " or ".join(f"`{a}`" if origin is Literal else words(a) for a in arguments)
    if origin is list:
        return f"list: {words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {words(arguments[0])}"
    if origin is dict:
        return f"section: {words(arguments[1])}"
    raise TypeError(f"no words for {annotation}")


LIMITS: dict[type, Callable[[Any], str]] = {
    annotated_types.Gt: lambda limit: f"> {limit.gt:.10g}",
    annotated_types.Ge: lambda limit: f"≥ {limit.ge:.10g}",
    annotated_types.Lt: lambda limit: f"< {limit.lt:.10g}",
    annotated_types.Le: lambda limit: f"≤ {limit.le:.10g}",
    annotated_types.MinLen: lambda limit: f"entries ≥ {limit.min_length}",
}


def limits(annotation: Any, metadata: list[Any]) -> str:
    """The allowed range of a setting, or of the entries of a list."""
    found = [LIMITS[type(limit)](limit) for limit in flat(metadata) if type(limit) in LIMITS]
    if annotation is str and found:
        found = ["not empty"]
    found += [f"`{limit.pattern}`" for limit in flat(metadata) if getattr(limit, "pattern", None)]
    if get_origin(annotation) is Annotated:
        first, *more = get_args(annotation)
        found.append(limits(first, more))
    elif get_origin(annotation) in (*UNION, tuple):
        found += dict.fromkeys(limits(argument, []) for argument in get_args(annotation))
    return ", ".join(filter(None, found))


def flat(metadata: list[Any]) -> list[Any]:
    """Limits of a field; pydantic stores them alone or inside the metadata of a `Field`."""
    return [limit for item in metadata for limit in (item.metadata if isinstance(item, FieldInfo) else [item])]


# --- defaults ------------------------------------------------------------------------------------------------


def default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "–"
    if isinstance(value, BaseModel):
        changed = value.model_dump(exclude_defaults=True)
        return f"`{{{', '.join(f'{key}: {shown(item)}' for key, item in changed.items())}}}`"
    return f"`{shown(value)}`"


def shown(value: Any) -> str:
    """A value in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return str(value).replace("e-0", "e-")
    return '""' if value == "" else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
