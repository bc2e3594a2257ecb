"""Data files and their rows."""

from __future__ import annotations

import gzip
import json

from .here import ANSWERS, Here, wrong


@wrong("bad-line", "A line that is not JSON")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps(ANSWERS[0]) + '\n{"messages": [\n')
    return here.run()


@wrong("line-without-columns", "A line that is not an object")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps(ANSWERS[0]) + "\n[1, 2]\n")
    return here.run()


@wrong("cache-not-writable", "A cache folder that cannot be written")
def _(here: Here) -> str:
    here.write("cache", "")
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "cache": "cache"})


@wrong("missing-column", "Columns with other names")
def _(here: Here) -> str:
    here.write("rows.jsonl", '{"question": "a", "answer": "b"}\n')
    return here.run()


@wrong("renamed-column-missing", "`columns` with a column that does not exist")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl", "columns": {"messages": "talk"}}]})


@wrong("format-of-other-columns", "`format` of a shape that the rows do not have")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl", "format": "alpaca"}]})


@wrong("format-of-pairs", "`format: preference` for labelled rows")
def _(here: Here) -> str:
    here.write("rows.jsonl", '{"prompt": "a", "completion": "b", "label": true}\n')
    data = {"train": [{"path": "rows.jsonl", "format": "preference"}]}
    return here.run(stages={"kto": {"kind": "kto", "data": data}})


@wrong("format-of-another-stage", "`format` of a shape that the stage does not accept")
def _(here: Here) -> str:
    here.write("rows.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return here.run(data={"train": [{"path": "rows.jsonl", "format": "preference"}]})


@wrong("columns-misspelt", "A misspelt key of `columns`, in `align check`")
def _(here: Here) -> str:
    return here.check(data={"train": [{"path": "rows.jsonl", "columns": {"mesages": "messages"}}]})


@wrong("columns-unknown", "A key of `columns` that is not a standard column")
def _(here: Here) -> str:
    return here.run(data={"train": [{"path": "rows.jsonl", "columns": {"topic": "messages"}}]})


@wrong("later-stage-without-pairs", "Rows of another shape in a later stage, in `align check`")
def _(here: Here) -> str:
    dpo = {"kind": "dpo", "init_from": "sft", "data": {"train": [{"path": "rows.jsonl"}]}}
    return here.check(stages={"sft": {"kind": "sft", "data": {"train": [{"path": "rows.jsonl"}]}}, "dpo": dpo})


@wrong("show-tasks-only", "`align data show` of an evaluate stage without prompts")
def _(here: Here) -> str:
    task = {"name": "t", "prompts": [{"path": "rows.jsonl"}], "metrics": [{"kind": "length", "max_tokens": 8}]}
    here.recipe(stages={"compare": {"kind": "evaluate", "models": ["base"], "tasks": [task]}})
    return here.align("data", "show", "recipe.yaml", "compare")


@wrong("empty-data", "A file without rows")
def _(here: Here) -> str:
    here.write("rows.jsonl", "\n")
    return here.run()


@wrong("all-truncated", "Rows whose answers all begin after `data.max_length`")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "max_length": 8})


@wrong("missing-data-file", "A missing data file")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.json1"}]})


@wrong("missing-data-file-checked", "A missing data file, in `align check`")
def _(here: Here) -> str:
    return here.check(data={"train": [{"kind": "file", "path": "rows.json1"}]})


@wrong("unknown-data-format", "A data file of another format")
def _(here: Here) -> str:
    here.write("rows.xlsx", "a,b\n")
    return here.run(data={"train": [{"kind": "file", "path": "rows.xlsx"}]})


@wrong("not-utf-8", "A message that is not UTF-8")
def _(here: Here) -> str:
    (here.folder / "rows.jsonl").write_bytes(json.dumps(ANSWERS[0]).encode().replace(b"It is", b"It\xe9s"))
    return here.run()


@wrong("half-character", "A message with half of a surrogate pair")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps(ANSWERS[0]).replace("It is", "\\ud83d"))
    return here.run()


@wrong("same-key-twice", "A message with the same key twice")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps(ANSWERS[0]).replace('"role"', '"content"'))
    return here.run()


@wrong("nested-too-deeply", "Messages that are nested too deeply")
def _(here: Here) -> str:
    here.write("rows.jsonl", '{"messages": ' + "[" * 5000 + "]" * 5000 + "}")
    return here.run()


@wrong("array-without-end", "A JSON array without its end")
def _(here: Here) -> str:
    here.write("rows.json", json.dumps(ANSWERS)[:-1])
    return here.run(data={"train": [{"path": "rows.json"}]})


@wrong("element-cut-off", "A JSON array that ends inside a row")
def _(here: Here) -> str:
    here.write("rows.json", json.dumps(ANSWERS)[:-20])
    return here.run(data={"train": [{"path": "rows.json"}]})


@wrong("truncated-gzip", "A compressed file that is not complete")
def _(here: Here) -> str:
    data = gzip.compress(json.dumps(ANSWERS[0]).encode(), mtime=0)
    (here.folder / "rows.jsonl.gz").write_bytes(data[:-12])
    return here.run(data={"train": [{"path": "rows.jsonl.gz"}]})


@wrong("not-parquet", "A Parquet file that is damaged", varies=r"(?<=\().+(?=\))")
def _(here: Here) -> str:
    here.write("rows.parquet", "PAR1" + "x" * 20)
    return here.run(data={"train": [{"path": "rows.parquet"}]})


@wrong("not-arrow", "An Arrow file that is damaged", varies=r"(?<=\().+(?=\))")
def _(here: Here) -> str:
    here.write("rows.arrow", "ARROW1" + "x" * 20)
    return here.run(data={"train": [{"path": "rows.arrow"}]})


@wrong("csv-values", "A line of a CSV file with too few values")
def _(here: Here) -> str:
    here.write("rows.csv", "prompt,completion\nWhat is 1?\n")
    return here.run(data={"train": [{"path": "rows.csv"}]})


@wrong("csv-quote", "A CSV file with a quotation mark that is not closed")
def _(here: Here) -> str:
    here.write("rows.csv", 'prompt,completion\n"What is 1?,It is 1.\n')
    return here.run(data={"train": [{"path": "rows.csv"}]})


@wrong("several-splits", "A folder with several splits")
def _(here: Here) -> str:
    for name in ("train", "test"):
        here.write(f"rows/{name}.jsonl", json.dumps(ANSWERS[0]))
    return here.run(data={"train": [{"path": "rows"}]})


@wrong("unknown-split", "A split that the folder lacks")
def _(here: Here) -> str:
    for name in ("train", "test"):
        here.write(f"rows/{name}.jsonl", json.dumps(ANSWERS[0]))
    return here.run(data={"train": [{"path": "rows", "split": "validation"}]})


@wrong("folder-without-data", "A folder without data files")
def _(here: Here) -> str:
    here.write("rows/README.md", "# Rows")
    return here.run(data={"train": [{"path": "rows"}]})


@wrong("used-and-ignored", "A column that `columns` uses and `ignore` excludes")
def _(here: Here) -> str:
    return here.run(data={"train": [{"path": "rows.jsonl", "columns": {"messages": "talk"}, "ignore": ["talk"]}]})


@wrong("replaced-by-no-system-prompt", "`replace_system_prompt` without `system_prompt`")
def _(here: Here) -> str:
    return here.run(data={"train": [{"path": "rows.jsonl", "replace_system_prompt": True}]})


@wrong("unknown-roles", "Messages of unknown roles only")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps({"messages": [{"role": "Doctor", "content": "Hello."}]}))
    return here.run()


@wrong("data-set-offline", "A data set on an unreachable hub", varies=r"(?<=hub: ).+(?=\. Check)")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "hub", "id": "nobody/nothing"}]})


CONFIGS = "---\nconfigs:\n- {config_name: chat, data_files: a.jsonl}\n- {config_name: code, data_files: b.jsonl}\n---\n"


def _with_configs(here: Here, card: str, **source: str) -> str:
    here.write("rows/a.jsonl", json.dumps(ANSWERS[0]) + "\n")
    here.write("rows/b.jsonl", json.dumps(ANSWERS[0]) + "\n")
    here.write("rows/README.md", card)
    return here.run(data={"train": [{"path": "rows", **source}]})


@wrong("several-configurations", "A data set with several configurations")
def _(here: Here) -> str:
    return _with_configs(here, CONFIGS)


@wrong("unknown-configuration", "A configuration that the data set lacks")
def _(here: Here) -> str:
    return _with_configs(here, CONFIGS, name="math")


@wrong("no-configurations", "`name` for a folder without configurations")
def _(here: Here) -> str:
    return _with_configs(here, "# Rows\n", name="chat")


@wrong("configured-file-missing", "A file that README.md names and that is missing")
def _(here: Here) -> str:
    return _with_configs(here, CONFIGS.replace("a.jsonl", "gone.jsonl"), name="chat")


@wrong("damaged-configurations", "A README.md whose `configs` cannot be read")
def _(here: Here) -> str:
    return _with_configs(here, "---\nconfigs: {chat: a.jsonl}\n---\n")


@wrong("nothing-held-out", "Too few rows for a held-out split")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "held_out_fraction": 0.001})


@wrong("nothing-to-train-on", "Too few rows for a training split")
def _(here: Here) -> str:
    return here.run(data={"train": [{"kind": "file", "path": "rows.jsonl"}], "held_out_fraction": 0.999})


@wrong("convert-to-another-suffix", "`align data convert` to a file that is not .jsonl")
def _(here: Here) -> str:
    return here.align("data", "convert", "rows.jsonl", "out.json")


@wrong("convert-to-existing-file", "`align data convert` to a file that exists")
def _(here: Here) -> str:
    return here.align("data", "convert", "rows.jsonl", "rows.jsonl")


@wrong("convert-to-missing-folder", "`align data convert` to a folder that does not exist")
def _(here: Here) -> str:
    return here.align("data", "convert", "rows.jsonl", "missing/out.jsonl")


@wrong("convert-columns", "`align data convert` with columns that are not pairs")
def _(here: Here) -> str:
    return here.align("data", "convert", "rows.jsonl", "out.jsonl", "--columns", "prompt")


@wrong("convert-format", "`align data convert` with an unknown format")
def _(here: Here) -> str:
    return here.align("data", "convert", "rows.jsonl", "out.jsonl", "--format", "chatml")


@wrong("convert-nothing", "`align data convert` of a file whose rows have no known shape")
def _(here: Here) -> str:
    here.write("rows.jsonl", '{"question": "a", "answer": "b"}\n')
    return here.align("data", "convert", "rows.jsonl", "out.jsonl")


def _filtered(*filters: dict[str, object]) -> dict[str, object]:
    return {"train": [{"kind": "file", "path": "rows.jsonl"}], "filters": list(filters)}


@wrong("filter-language", "A language that cannot be identified")
def _(here: Here) -> str:
    return here.check(data=_filtered({"kind": "language", "keep": ["en", "qq"]}))


@wrong("filter-pattern", "A keyword that is not a regular expression")
def _(here: Here) -> str:
    return here.check(data=_filtered({"kind": "keywords", "patterns": ["("]}))


@wrong("filter-length", "A filter of length that drops every row")
def _(here: Here) -> str:
    return here.check(data=_filtered({"kind": "length", "min_chars": 20, "max_chars": 10}))


@wrong("filter-duplicates-twice", "Two filters of duplicates")
def _(here: Here) -> str:
    return here.check(data=_filtered({"kind": "duplicates"}, {"kind": "duplicates", "near": 0.5}))


@wrong("filter-answers-of-prompts", "A filter of answers on prompts")
def _(here: Here) -> str:
    prompts = {"train": [{"kind": "file", "path": "rows.jsonl"}], "filters": [{"kind": "length", "max_chars": 9}]}
    return here.check(stages={"pairs": {"kind": "sample", **prompts}})


@wrong("filter-kind", "A filter that does not exist")
def _(here: Here) -> str:
    return here.check(data=_filtered({"kind": "duplicate"}))


@wrong("evaluation-set-missing", "A missing evaluation set")
def _(here: Here) -> str:
    target = {"name": "gsm8k", "path": "test.jsonl"}
    return here.check(data=_filtered({"kind": "contamination", "against": [target]}))


@wrong("evaluation-set-without-items", "An evaluation set whose column is not known")
def _(here: Here) -> str:
    here.write("test.jsonl", '{"task": "Add 2 and 2."}\n')
    target = {"name": "sums", "path": "test.jsonl"}
    return here.run(data=_filtered({"kind": "contamination", "against": [target]}))


@wrong("evaluation-set-of-nulls", "An evaluation set without a text")
def _(here: Here) -> str:
    here.write("test.jsonl", '{"question": null}\n')
    return here.run(data=_filtered({"kind": "contamination", "against": [{"name": "sums", "path": "test.jsonl"}]}))


STREAM = {"kind": "file", "path": "rows.jsonl", "streaming": True}


@wrong("stream-without-steps", "Streaming without `max_steps`")
def _(here: Here) -> str:
    return here.check(data={"train": [STREAM]}, max_steps=None)


@wrong("stream-in-length-groups", "Streaming with `group_by_length`")
def _(here: Here) -> str:
    return here.check(data={"train": [STREAM]}, max_steps=2, group_by_length=True)


@wrong("stream-with-temperature", "Streaming with the temperature of a mixture")
def _(here: Here) -> str:
    return here.check(data={"train": [STREAM], "mixture": {"temperature": 2.0}}, max_steps=2)


@wrong("stream-without-duplicates", "Streaming with the filter `duplicates`")
def _(here: Here) -> str:
    return here.check(data={"train": [STREAM], "filters": [{"kind": "duplicates"}]}, max_steps=2)


def label(here: Here, *labels: object) -> str:
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": value} for n, value in enumerate(labels)]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    here.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return here.run(kind="kto")


@wrong("one-label", "KTO rows that all have one label")
def _(here: Here) -> str:
    return label(here, True, 1, "true")


@wrong("no-labels", "KTO rows without a label")
def _(here: Here) -> str:
    return label(here, None, None)


@wrong("labels-of-another-type", "KTO rows with labels that are not true or false")
def _(here: Here) -> str:
    return label(here, "good", 5, [True], -1)


@wrong("contradicting-labels", "KTO rows whose `label` and `kto_tag` differ")
def _(here: Here) -> str:
    here.write("rows.jsonl", json.dumps({"prompt": "a", "completion": "b", "label": True, "kto_tag": False}) + "\n")
    return here.run(kind="kto")


@wrong("all-filtered", "Filters that drop every row")
def _(here: Here) -> str:
    return here.run(data=_filtered({"kind": "length", "min_chars": 1000}))


@wrong("stream-with-reference", "Streaming of pairs for a loss with a reference")
def _(here: Here) -> str:
    return here.check(kind="dpo", data={"train": [STREAM]}, max_steps=2)


@wrong("stream-without-rows", "A stream whose rows are all dropped")
def _(here: Here) -> str:
    here.write("rows.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n')
    return here.run(data={"train": [STREAM]}, max_steps=2)


@wrong("stream-without-held-out-rows", "Streaming with too small a `held_out_fraction`")
def _(here: Here) -> str:
    return here.run(data={"train": [STREAM], "held_out_fraction": 0.0001}, max_steps=2)
