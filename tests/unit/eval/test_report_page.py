"""report.html of `align eval` in a real browser: at two widths, light and dark, with the mouse and the keyboard."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.eval.harness_index import Group
from align.eval.long_context.grid import Cell
from align.eval.long_context.heat_map import heat_map
from align.eval.report.samples import collect, keep
from align.eval.task import CorpusValue, Scores, Verdict
from align.run.folder import read_jsonl
from tests.browsers import SCHEMES, WIDTHS, low_contrast, opened, overflow
from tests.unit.eval.made_evaluation import sums, write_evaluation

MODELS = ("sft", "dpo")
ATTACK = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'><!-- \x07"
CHINESE = "鲁镇的酒店的格局，是和别处不同的：都是当街一个曲尺形的大柜台，柜里面预备着热水，可以随时温酒。"


def judged(model: str) -> Scores:
    """Grades of 40 answers in four categories."""
    grades = [float(1 + (number * 7 + len(model)) % 10) for number in range(40)]
    names = ("writing", "reasoning", "coding", "a category with a long name: extraction")
    categories = {
        f"grade by judge ({name})": CorpusValue(sum(grades[k::4]) / 10, sum(grades[k::4]) / 10 - 1, 9.0, "t")
        for k, name in enumerate(names)
    }
    verdicts = [
        Verdict(
            str(number),
            0,
            {"grade by judge": grade},
            shown={"question": f"Write a limerick about number {number}.", "answer": f"{model}: " + "la " * number},
        )
        for number, grade in enumerate(grades)
    ]
    return Scores(verdicts, categories)


def odd(model: str) -> Scores:
    """Texts that break pages: markup, one long word, another direction, Chinese, nothing."""
    texts = [ATTACK, "x" * 3000, "שלום עולם, 3 + 4", CHINESE, "", "a\n\n\nb\tc"]
    if model == "dpo":
        texts[3] = CHINESE.replace("热水", "冷水")
    values = [0.0, 1.0, 0.5, 1.0 if model == "sft" else 0.0, 0.0, 1.0]
    verdicts = [
        Verdict(f"odd/{number}", 0, {"f1": value}, shown={"question": "q " * 200, "answer": text, ATTACK: "key"})
        for number, (text, value) in enumerate(zip(texts, values, strict=True))
    ]
    return Scores(verdicts, {"perplexity": CorpusValue(23.5 if model == "sft" else 21.25, 20.0, 26.0, "bootstrap")})


def needles(model: str) -> Scores:
    cells = [
        Cell("single", "en", length, depth, (length, length), (1.0, float(depth != 50), 1.0, float(length < 9000)))
        for length in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
        for depth in (0, 25, 50, 75, 100)
    ]
    verdicts = [Verdict(str(n), 0, {"found": cell.scores[1]}, shown={"answer": "71"}) for n, cell in enumerate(cells)]
    return Scores(verdicts, figures={"single (en)": heat_map(cells, "single (en)")})


NOTES = [f"sft, gsm: note {number} about something that a reader must know before the numbers" for number in range(9)]
CONTAMINATION = {
    "rows": 12000,
    "run": "runs/chat",
    "threshold": 0.35,
    "tasks": {
        "add": {
            "documents": 100,
            "flagged": {"3": {"share": 0.8, "where": "sft: row 17", "item": "What is 20 + 34?", "training": "20 + 34"}},
            "scores": {
                model: {
                    "exact_match": {
                        part: {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 90} for part in ("all", "clean", "flagged")
                    }
                }
                for model in MODELS
            },
        }
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    tasks = {
        "add": {"sft": sums("sft", 100, 4), "dpo": sums("dpo", 100, 7)},
        "mul": {"sft": sums("sft", 60, 3, first=500), "dpo": sums("dpo", 60, 5, first=500)},
        "mt_bench": {model: judged(model) for model in MODELS},
        "odd": {model: odd(model) for model in MODELS},
        "needles": {model: needles(model) for model in MODELS},
    }
    group = Group("arithmetic", ["add", "mul"], [{"metric": "exact_match"}])
    write_evaluation(
        folder,
        tasks,
        groups=[group],
        truncated={"dpo": [("add", "5"), ("add", "6"), ("mul", "0")]},
        better={"odd": {"perplexity": -1}},
        notes=NOTES,
        contamination=CONTAMINATION,
    )
    return folder


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    with opened(browser, folder / "report.html") as page:
        yield page


def verdicts(folder: Path, task: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By document and model the rows of scores.jsonl."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for model in MODELS:
        for row in read_jsonl(folder / model / "scores.jsonl"):
            if row["task"] == task:
                found.setdefault(row["document"], {})[model] = row
    return found


def count(page: Any) -> int:
    """The number of samples that the page says it has found."""
    text = page.inner_text("#x-found")
    return 0 if text.startswith("None") else int(text.partition(" ")[0].replace(",", ""))


def search(page: Any, text: str) -> int:
    """The number of samples after a search; the page repeats the text beside the number."""
    page.fill("#x-search", text)
    page.wait_for_function("text => document.getElementById('x-found').textContent.endsWith(`“${text}”`)", arg=text)
    return count(page)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_fits_and_is_legible(browser: Any, folder: Path, width: int, scheme: str) -> None:
    with opened(browser, folder / "report.html", width=width, scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        page.select_option("#x-task", label="odd (6)")
        page.evaluate("document.querySelectorAll('#x-list details').forEach((details) => { details.open = true; })")
        page.wait_for_selector(".sample del, .sample ins")
        assert overflow(page) == []
        assert low_contrast(page) == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
        assert dark == (scheme == "dark")


def test_faults_of_a_page_are_seen(browser: Any, tmp_path: Path) -> None:
    """The checks themselves: a wide element, pale text, an error and a request are found."""
    file = tmp_path / "bad.html"
    file.write_text('<body><p style="color:#999">pale</p><div style="width:600px">wide</div>')
    with opened(browser, file, width=390) as page:
        assert any(line.startswith("DIV") for line in overflow(page))
        assert [line[:5] for line in low_contrast(page)] == ["P.: 2"]
    file.write_text("<script>nothing()</script>")
    with pytest.raises(AssertionError, match="nothing is not defined"), opened(browser, file):
        pass
    (tmp_path / "a.css").write_text("")
    file.write_text('<link rel="stylesheet" href="a.css">')
    with pytest.raises(AssertionError, match=r"a\.css"), opened(browser, file):
        pass


def test_the_leaderboard_has_the_results(page: Any, folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())["models"]
    heads = page.locator(".board thead th").all_inner_texts()
    assert [re.split(r"\n+", head)[0] for head in heads] == [
        "Model",
        "Mean",
        "arithmetic",
        "mt_bench",
        "odd",
        "needles",
    ]
    rows = {row[0]: row[1:] for row in page.eval_on_selector_all(".board tbody tr", CELLS)}
    shares = ("arithmetic/exact_match", "odd/f1", "needles/found")
    means = {model: sum(metric(results, model, name)["mean"] for name in shares) / 3 for model in MODELS}
    assert list(rows) == sorted(MODELS, key=lambda model: -means[model])
    for model, cells in rows.items():
        assert cells[0].startswith(f"{means[model]:.3f}[")
        for cell, name in zip(
            cells[1:], ("arithmetic/exact_match", "mt_bench/grade by judge", *shares[1:]), strict=True
        ):
            found = metric(results, model, name)
            digits = 2 if found["mean"] > 1 else 3
            low, high = (f"{found[end]:.{2 if found[end] > 1 else 3}f}" for end in ("low", "high"))
            assert cell == f"{found['mean']:.{digits}f}[{low}, {high}]"


CELLS = "rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"


def metric(models: dict[str, Any], model: str, name: str) -> dict[str, Any]:
    task, label = name.split("/")
    found: dict[str, Any] = models[model]["tasks"][task]["metrics"][label]
    return found


def test_bold_are_the_best_and_those_whose_interval_reaches_it(browser: Any, tmp_path: Path) -> None:
    """28, 26 and 10 of 30 right: Wilson's interval of 26 ends at 0.947, above 28 / 30; that of 10 does not."""

    def scored(right: int) -> Scores:
        return Scores([Verdict(str(n), 0, {"acc": float(n < right)}, shown={"question": "?"}) for n in range(30)])

    tasks = {"t": {"weak": scored(10), "best": scored(28), "close": scored(26)}}
    write_evaluation(tmp_path, tasks)
    with opened(browser, tmp_path / "report.html") as page:
        assert page.locator(".board tbody th").all_inner_texts() == ["best", "close", "weak"]
        bold = page.eval_on_selector_all(".board td", "cells => cells.map((cell) => getComputedStyle(cell).fontWeight)")
        assert bold == ["700", "700", "400"]


def test_a_press_on_a_head_sorts_the_leaderboard(page: Any) -> None:
    def means() -> list[float]:
        rows = page.eval_on_selector_all(".board tbody tr", CELLS)
        return [float(row[2].split("[")[0]) for row in rows]

    before = means()
    assert len(set(before)) == 2
    page.locator(".board thead button").nth(2).focus()
    page.keyboard.press("Enter")
    assert means() == sorted(before, reverse=True)
    page.keyboard.press("Enter")
    assert means() == sorted(before)
    assert page.locator(".board [aria-sort]").get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize("width", WIDTHS)
def test_bars_are_as_long_as_the_means(browser: Any, folder: Path, width: int) -> None:
    """By task, by the tasks of the group, and by the categories of the judge; pixels against results.json."""
    results = json.loads((folder / "results.json").read_text())["models"]
    with opened(browser, folder / "report.html", width=width) as page:
        charts = page.eval_on_selector_all("details.bars", BARS)
    assert list(charts) == [
        "By task",
        "mt_bench: grade by judge",
        "arithmetic, by task: exact_match",
        "mt_bench, by category: grade by judge",
    ]
    for number, task in enumerate(("add", "mul")):
        for bar, model in zip(charts["arithmetic, by task: exact_match"][2 * number :], MODELS):
            found = metric(results, model, f"{task}/exact_match")
            assert bar["row"] == task
            assert bar["model"] == model
            assert bar["fill"] == pytest.approx([0, found["mean"]], abs=0.01)
            assert bar["whisker"] == pytest.approx([found["low"], found["high"]], abs=0.01)
    grades = charts["mt_bench, by category: grade by judge"]
    assert [bar["row"] for bar in grades[::2]] == [
        "writing",
        "reasoning",
        "coding",
        "a category with a long name: extraction",
    ]
    assert grades[0]["whisker"][1] == pytest.approx(1, abs=0.01)  # 9, the largest end, is the end of the axis
    writing = metric(results, "sft", "mt_bench/grade by judge (writing)")["mean"]
    assert grades[0]["fill"][1] == pytest.approx(writing / 9, abs=0.01)


BARS = """charts => Object.fromEntries(charts.map((chart) => [chart.querySelector("summary").textContent,
  [...chart.querySelectorAll(".bar")].map((bar) => {
    const rail = bar.querySelector(".rail").getBoundingClientRect();
    const ends = (name) => {
      const box = bar.querySelector(name).getBoundingClientRect();
      return [(box.left - rail.left) / rail.width, (box.right - rail.left) / rail.width];
    };
    const row = bar.closest(".bar-row");
    return {row: row && row.querySelector(".bar-name").textContent, model: bar.querySelector(".who").textContent,
            fill: ends(".fill"), whisker: ends(".whisker")};
  })]))"""


def test_filters_find_what_the_scores_say(page: Any, folder: Path) -> None:
    found = verdicts(folder, "add")
    values = {d: [rows[m]["values"]["exact_match"] for m in MODELS] for d, rows in found.items()}
    known = [pair for pair in values.values() if None not in pair]
    expected = {
        "all": len(found),
        "differ": sum(a != b for a, b in known),
        "higher": sum(a > b for a, b in known),
        "lower": sum(a < b for a, b in known),
        "zero": sum(pair == [0, 0] for pair in known),
        "unscored": len(values) - len(known),
        "unanswered": sum(any(row["unanswered"] for row in rows.values()) for rows in found.values()),
        "truncated": 2,
    }
    assert min(expected.values()) > 0
    page.select_option("#x-task", label="add (100)")
    for name, number in expected.items():
        page.select_option("#x-show", name)
        assert count(page) == number
        assert f"({number})" in page.locator(f"#x-show option[value={name}]").inner_text()
        assert page.locator("#x-list > li").count() == min(number, 25)
    page.click("#x-reset")
    assert count(page) == sum(len(verdicts(folder, task)) for task in ("add", "mul", "mt_bench", "odd", "needles"))


def test_search_finds_what_the_texts_say(page: Any, folder: Path) -> None:
    terms = {"makes 42,": "add", "WRITE A limerick about number 3": "mt_bench", "柜台": "odd"}
    for term, task in terms.items():
        expected = sum(
            any(term.lower() in text.lower() for row in rows.values() for text in row["shown"].values())
            for rows in verdicts(folder, task).values()
        )
        assert expected > 0
        assert search(page, term) == expected
        marked = page.locator("#x-list .preview mark").all_inner_texts()
        assert Counter(text.lower() for text in marked) == {term.lower(): expected}
    assert search(page, "nothing has this text") == 0
    assert page.inner_text("#x-found") == "None of 246 samples with “nothing has this text”"
    assert search(page, "document") == 0  # a word of the page, not of the samples


def test_the_difference_of_two_answers_is_marked(page: Any) -> None:
    """Document 3 of `add`: sft answers 44 instead of 54; dpo is right, and has the word First."""
    page.select_option("#x-task", label="add (100)")
    opened_sample(page, "add, document 3")
    assert page.locator(".sample del").all_text_contents() == ["44", "44"]
    assert page.locator(".sample ins").all_text_contents() == ["First ", "54", "54"]
    assert page.locator(".columns section h4").all_inner_texts() == ["sft", "dpo"]
    assert page.locator(".sample > .text").all_inner_texts()[1] == "54"  # the target, the same for both
    page.click("#x-marks")  # the sample stays open
    page.wait_for_function("() => document.querySelector('.sample') && !document.querySelector('.sample ins')")
    assert page.locator(".sample del").count() == 0
    page.click("#x-marks")
    page.select_option("#x-task", label="odd (6)")
    opened_sample(page, "odd, document odd/3")
    assert page.locator(".sample del").all_inner_texts() == ["热"]
    assert page.locator(".sample ins").all_inner_texts() == ["冷"]


def opened_sample(page: Any, name: str) -> None:
    page.locator("#x-list summary", has=page.get_by_text(name, exact=True)).click()
    page.wait_for_selector(".sample")


def test_texts_of_models_are_never_markup(page: Any) -> None:
    page.select_option("#x-task", label="odd (6)")
    opened_sample(page, "odd, document odd/0")
    shown = page.locator(".sample .text").all_inner_texts()
    assert ATTACK.replace("\x07", "\ufffd") in shown
    assert page.evaluate("window.hit") is None


def test_three_models_are_compared_by_choice(browser: Any, tmp_path: Path) -> None:
    tasks = {"add": {name: sums(name, 30, right) for name, right in (("base", 2), ("sft", 4), ("dpo", 7))}}
    write_evaluation(tmp_path, tasks)
    with opened(browser, tmp_path / "report.html") as page:
        page.select_option("#x-first", label="sft")
        page.select_option("#x-second", label="dpo")
        page.select_option("#x-show", "lower")
        wrong = {n for n in range(30) if n % 4 == 3} - {n for n in range(30) if n % 7 == 6}
        assert count(page) == len(wrong)
        opened_sample(page, "document 3")
        assert page.locator(".columns section h4").all_inner_texts() == ["sft", "dpo", "base"]


def test_many_models_and_tasks_fit(browser: Any, tmp_path: Path) -> None:
    """Ten models and six tasks with long names: a chart of 60 bars is folded, and the title counts the models."""
    names = [f"runs-chat-sft-with-a-long-name-{number}" for number in range(10)]
    tasks = {
        f"hendrycks_math_counting_and_probability_{task}": {
            name: sums(name, 12, 2 + (number + task) % 5) for number, name in enumerate(names)
        }
        for task in range(6)
    }
    write_evaluation(tmp_path, tasks)
    for width in WIDTHS:
        with opened(browser, tmp_path / "report.html", width=width) as page:
            chart = page.locator("details.bars")
            assert (chart.count(), chart.get_attribute("open"), chart.locator(".bar").count()) == (1, None, 60)
            assert page.inner_text("h1").endswith("and 6 more")
            chart.locator("summary").click()
            page.locator("#x-list summary").first.click()
            page.wait_for_selector(".sample")
            assert overflow(page) == []
            first = page.locator("#x-list > li").first
            assert first.locator(".chip").count() == 2  # of the two models that are compared
            assert first.locator(".columns section").count() == 10


def test_one_model_needs_no_comparison(browser: Any, tmp_path: Path) -> None:
    write_evaluation(tmp_path, {"add": {"sft": sums("sft", 30, 4)}})
    with opened(browser, tmp_path / "report.html") as page:
        labels = page.locator(".controls label:visible").all_inner_texts()
        assert [label.split("\n")[0] for label in labels] == ["Search", "Show", "Order"]
        page.select_option("#x-order", "low")
        assert "document 3" in page.locator("#x-list .name").first.inner_text()


def test_each_sample_of_a_document_is_listed(browser: Any, tmp_path: Path) -> None:
    found = [
        Verdict(str(n), sample, {"acc": float(sample)}, shown={"question": "q", "answer": f"a{sample}"})
        for n in range(3)
        for sample in range(2)
    ]
    write_evaluation(tmp_path, {"t": {"m": Scores(found)}})
    with opened(browser, tmp_path / "report.html") as page:
        names = page.locator("#x-list .name").all_inner_texts()
        assert names[:2] == ["document 0", "document 0, sample 2"]
        assert count(page) == 6


def test_the_keyboard_reaches_and_moves_everything(page: Any) -> None:
    page.focus("#x-search")
    reached = []
    for _ in range(9):
        reached.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert reached == ["x-search", "x-task", "x-metric", "x-show", "x-order", "x-marks", "x-reset", "", ""]
    page.locator("#x-list summary").first.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector(".sample")
    page.keyboard.press("Enter")
    assert page.locator(".sample:visible").count() == 0
    page.focus("#x-after")
    page.keyboard.press("Enter")
    assert page.inner_text("#x-place") == "26 to 50"
    assert page.evaluate("document.activeElement.id") == "x-after"
    page.focus(".scroll")  # tables that scroll sideways
    page.keyboard.press("ArrowRight")


def test_a_phone_scrolls_the_tables_and_the_heat_map_not_the_page(browser: Any, folder: Path) -> None:
    """The row heads of tables stay in view. Cells of the heat map keep their size, so their numbers are legible."""
    with opened(browser, folder / "report.html", width=390) as page:
        assert page.evaluate(WIDER, ".scroll:has(.board)")
        page.evaluate("document.querySelector('.scroll:has(.board)').scrollLeft = 200")
        head = page.locator(".board tbody th").first.bounding_box()
        assert head["x"] >= 0
        assert page.evaluate(WIDER, ".scroll:has(.heat)")
        sizes = page.eval_on_selector_all(".heat text", TEXT_SIZES)
        assert len(sizes) == 2 * (1 + 8 + 5 + 40)
        assert min(sizes) >= 11
        assert overflow(page) == []


WIDER = "name => { const box = document.querySelector(name); return box.scrollWidth > box.clientWidth; }"
TEXT_SIZES = "texts => texts.map((text) => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)"


def test_ten_thousand_samples_stay_usable(browser: Any, tmp_path: Path) -> None:
    """The document's size does not depend on the number of samples: it opens, and a search answers."""
    write_evaluation(tmp_path, {"add": {"sft": sums("sft", 10_000, 4), "dpo": sums("dpo", 10_000, 7)}})
    with opened(browser, tmp_path / "report.html", width=390) as page:
        nodes = "document.querySelectorAll('*').length"
        assert page.evaluate(nodes) < 1000
        assert count(page) == 10_000
        expected = sum("makes 5042," in text for text in texts(tmp_path))
        assert search(page, "makes 5042,") == expected > 0
        page.select_option("#x-show", "differ")
        page.select_option("#x-order", "far")
        page.fill("#x-search", "")
        page.wait_for_function("() => document.querySelectorAll('#x-list > li').length === 25")
        for _ in range(3):
            page.click("#x-after")
        assert page.inner_text("#x-place") == "76 to 100"
        assert page.evaluate(nodes) < 1000


def texts(folder: Path) -> list[str]:
    """The texts of each document as one."""
    found: dict[str, str] = {}
    for model in MODELS:
        for row in read_jsonl(folder / model / "scores.jsonl"):
            found[row["document"]] = found.get(row["document"], "") + "\n".join(row["shown"].values())
    return list(found.values())


def test_samples_beyond_the_budget_are_left_out_and_counted(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {name: {"sft": sums("sft", 40, 4), "dpo": sums("dpo", 40, 7)} for name in ("a", "b")}
    results = write_evaluation(tmp_path, tasks)
    found = collect(results)
    size = sum(sample.size for sample in found)
    kept = keep(found, {"a": "exact_match", "b": "exact_match"}, size // 2)
    assert sum(sample.size for sample in kept) <= size // 2
    by_task = Counter(sample.task for sample in kept)
    assert abs(by_task["a"] - by_task["b"]) <= 1
    differing = {s.document for s in found if len({v["values"]["exact_match"] for v in s.verdicts.values()}) > 1}
    assert differing <= {sample.document for sample in kept}
    monkeypatch.setattr("align.eval.report.samples.TEXT_BUDGET", size // 2)
    results.write()
    with opened(browser, tmp_path / "report.html") as page:
        assert (
            page.locator("#samples p.soft").first.inner_text().startswith(f"{len(kept)} of 80 samples are on this page")
        )
        assert count(page) == len(kept)
