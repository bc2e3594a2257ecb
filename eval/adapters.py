"""LoRA adapters under evaluation: merged into their base one after another, in a folder that is removed afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from align.errors import UserError
from align.models.lora.folder import read_adapter
from align.models.lora.stream import merge_adapter
from align.run.adapted import require_base
from align.run.checkpoint import adapter_folder
from align.train.checkpoint import check_checkpoint, checked_config


def named_adapters(adapters: Mapping[str, Path | str], models: Mapping[str, Path]) -> dict[str, Path]:
    """{name: folder of an adapter}. Raises UserError unless they share one base and have unique names.

    An adapter's folder may be that of the stage that trained it.
    """
    if not adapters:
        return {}
    if len(models) > 1:
        raise UserError(
            f"--adapter: it needs one checkpoint, the base of all adapters, but {len(models)} are given. Pass one."
        )
    if twice := [name for name in adapters if name in models]:
        raise UserError(f"--adapter {twice[0]}: the checkpoint has this name. Give the adapter another name.")
    folders = {name: adapter_folder(Path(path)) for name, path in adapters.items()}
    (base,) = models.values()
    for folder in folders.values():
        read_adapter(folder)  # refuses a folder that is not an adapter
        require_base(folder, base)
    return folders


@contextmanager
def merged(base: Path, adapter: Path, scratch: Path) -> Iterator[Path]:
    """A checkpoint with the adapter merged into its base; the folder, in `scratch`, is removed at the end."""
    config = checked_config(check_checkpoint(base), str(base), "restore the published value")
    with TemporaryDirectory(dir=scratch, prefix=".merged-") as folder:
        merge_adapter(base, config, adapter, Path(folder) / "model")
        yield Path(folder) / "model"
