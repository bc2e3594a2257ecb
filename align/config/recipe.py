"""The recipe: global settings, the model and the stages."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.config.parallel import Parallel
from align.config.parts import EMBEDDED, HotStartModel, Model, ScratchModel
from align.config.presets import unknown_keys
from align.config.section import Section
from align.config.stage import LANGUAGE_MODEL
from align.config.stages import Stage, TrainingStage

BASE = "base"
"""Name of the recipe's model in references of stages."""

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
STAGE_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Recipe(Section):
    """A model and the stages that run on it, in the order written."""

    name: Annotated[str, Field(pattern=RUN_NAME)]
    """Name of the run. Its folder is `runs/<name>` unless `--run-dir` is passed."""
    description: str = ""
    """Free text, not interpreted."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initial weights, shuffles, dropout and sampling. Each stage derives its own seed from it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of computation, and of frozen and saved weights. Trained weights are float32; under DeepSpeed they have
    this dtype, with float32 master weights in the optimizer. On a CPU without AVX-512 bf16, bfloat16 is several times
    slower than float32."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Number of CPU threads of each process. Default: `OMP_NUM_THREADS`, otherwise the CPUs available to the process;
    ranks that `align run` starts share the host's CPUs."""
    report_to: list[Literal["mlflow", "tensorboard", "trackio", "wandb"]] = Field(default_factory=list)
    """Experiment trackers that also receive the metrics of metrics.jsonl, the settings and the report. Their packages
    must be installed."""
    keep_checkpoints: bool = False
    """Keep the training checkpoints of finished stages. They are needed only to continue an interrupted stage, and are
    several times as large as the model."""
    parallel: Parallel | None = None
    """Several processes: ZeRO, expert parallelism, offload. Default: one process without DeepSpeed."""
    model: Model
    """The model that stages refer to as `base`."""
    stages: dict[str, Stage] = Field(min_length=1)
    """The stages by name (lower-case letters, digits and `_`). They run in the order written."""

    @model_validator(mode="after")
    def _model_has_known_keys(self) -> Recipe:
        problems = list[str]()
        if isinstance(self.model, ScratchModel):
            problems = self.model.problems()
        elif isinstance(self.model, HotStartModel) and self.model.source == EMBEDDED:
            problems = unknown_keys(self.model.config)  # of another source, its config.json decides the family
        if problems:
            raise ValueError(".\n".join(problems))
        return self

    @model_validator(mode="after")
    def _stages_refer_backwards(self) -> Recipe:
        seen: list[str] = []
        for name, stage in self.stages.items():
            if not STAGE_NAME.fullmatch(name) or name == BASE:
                raise ValueError(
                    f"stage name '{name}' is not valid; begin with a lower-case letter, use only lower-case letters, "
                    f"digits and '_', and do not use '{BASE}'"
                )
            for where, parent, accepted in stage.references():
                if parent in seen or parent == BASE:
                    made = LANGUAGE_MODEL if parent == BASE else self.stages[parent].result
                    if made not in accepted:
                        raise ValueError(
                            f"stages.{name}.{where} needs {' or '.join(accepted)}, but '{parent}' makes {made}; use "
                            "another stage"
                        )
                    continue
                if is_path(parent):
                    continue
                known = ", ".join([BASE, *seen])
                raise ValueError(
                    f"stages.{name}.{where}: '{parent}' is not an earlier stage; use one of: {known}; or a folder "
                    "whose path contains '/'"
                )
            seen.append(name)
        return self

    @model_validator(mode="after")
    def _added_tokens_are_trained(self) -> Recipe:
        if not getattr(self.model, "add_tokens", None):
            return self
        for name, stage in self.stages.items():
            lora = getattr(stage, "lora", None)
            if lora is not None and not lora.train_embeddings and getattr(stage, "init_from", None) == BASE:
                raise ValueError(
                    f"stages.{name}.lora does not train the embeddings of model.add_tokens; set "
                    f"stages.{name}.lora.train_embeddings to true, or train a stage before it in full"
                )
        return self

    @model_validator(mode="after")
    def _lora_settings_have_an_effect(self) -> Recipe:
        for name, stage in self.stages.items():
            critic = getattr(stage, "critic", None)
            sections = {"lora": getattr(stage, "lora", None), "critic.lora": getattr(critic, "lora", None)}
            adapted = {where: lora for where, lora in sections.items() if lora is not None}
            optimizer = getattr(stage, "optimizer", None)
            if optimizer is not None and optimizer.lora_b_learning_rate_scale != 1 and not adapted:
                raise ValueError(
                    f"stages.{name}.optimizer.lora_b_learning_rate_scale is set, but the stage has no adapters; remove "
                    f"it, or set stages.{name}.lora"
                )
            if self.parallel is not None and (dora := [where for where, lora in adapted.items() if lora.dora]):
                raise ValueError(
                    f"stages.{name}.{dora[0]}: DoRA needs the norms of whole weights, which `parallel` shards; set "
                    "dora to false, or remove parallel"
                )
            if self.parallel is not None and (four_bit := [where for where, lora in adapted.items() if lora.quantize]):
                raise ValueError(
                    f"stages.{name}.{four_bit[0]}: weights in 4 bits cannot be sharded; remove quantize, or remove "
                    "parallel"
                )
        return self

    @model_validator(mode="after")
    def _stages_fit_the_processes(self) -> Recipe:
        processes, source = 1, "parallel.processes, --nproc"
        if self.parallel is not None:
            processes = self.parallel.processes
            source = f"the slots of {self.parallel.hostfile}" if self.parallel.hostfile is not None else source
        problems = []
        for name, stage in self.stages.items():
            if isinstance(stage, TrainingStage) and (problem := _uneven(stage, processes, source)):
                problems.append(f"stages.{name}: {problem}")
        if problems:
            raise ValueError(".\n".join(problems))
        return self


def _uneven(stage: TrainingStage, processes: int, source: str) -> str | None:
    """Error message with valid sizes if the processes do not divide a step's rows, or if the loss needs the whole batch
    in one forward pass and the sizes split it. None if there is no problem.

    source: the setting that determines the number of processes, as the message names it.
    """
    batch = stage.batch_size
    if batch % processes:
        return (
            f"batch_size {batch} is not divisible by {processes} processes ({source}); set "
            f"batch_size to {nearest_batch(batch, processes)}, or change the number of processes"
        )
    whole = batch * stage.row_tokens
    if stage.needs_whole_batch and (processes > 1 or stage.pass_tokens < whole):
        size = f"micro_batch_tokens to {whole}" if stage.micro_batch_tokens else f"micro_batch_size to {batch}"
        return (
            f"{stage.needs_whole_batch}, so all {batch} rows (batch_size) must fit in one forward pass; "
            f"set {size}" + (" and use one process" if processes > 1 else "")
        )
    return None


def nearest_batch(batch: int, processes: int) -> int:
    """Smallest batch size of at least `batch` that the processes divide."""
    return processes * -(-batch // processes)


def is_path(reference: str) -> bool:
    """True if a reference to a checkpoint is a folder: it contains '/', which stage names and `base` do not."""
    return "/" in reference
