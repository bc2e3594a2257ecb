"use strict";
// The script of an evaluation's page: sorts the leaderboard; filters, searches and compares samples.
// Texts of models and data sets only become text nodes, never HTML.

const PAGE = 25; // samples in the document at a time, so that its size does not depend on their number
const CHIPS = 6; // with more models, a sample's line has the scores of the two that are compared
const UNANSWERED = 1, TRUNCATED = 2;
const COLORS = 7;

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// --- leaderboard: sorted by the column whose head is pressed --------------------------------------------------

for (const table of document.querySelectorAll("table.board")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = element("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sortRows(table, heads, column));
  });
}

function sortRows(table, heads, column) {
  const head = heads[column];
  const before = head.getAttribute("aria-sort");
  const lowFirst = head.dataset.better === "1" ? before === "descending" : before !== "ascending";
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", lowFirst ? "ascending" : "descending");
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return lowFirst ? x - y : y - x;
  });
  table.tBodies[0].append(...rows);
}

// --- text: visible control characters, and marks --------------------------------------------------------------

const visible = (text) => text.replace(/\r\n/g, "\n").replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, "\ufffd");

function pattern(query) {
  return query ? new RegExp(query.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "giu") : null;
}

function markMatches(node, text, query) {
  const found = pattern(query);
  let end = 0;
  if (found) {
    for (const match of text.matchAll(found)) {
      node.append(text.slice(end, match.index), element("mark", {}, match[0]));
      end = match.index + match[0].length;
    }
  }
  node.append(text.slice(end));
}

// --- differences of two texts, by words, and by characters of scripts without spaces ---------------------------

const WORDS = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}]|[\p{L}\p{M}\p{N}_]+|\s+|[^]/gu;
const LARGEST = 16e6; // cells of the table of common subsequences: about 0.1 s and 32 MB
const LITTLE = 0.2; // share of common words below which marks would cover the texts
const LONG = 40;

/* The pieces of the first text, [[text, isOnlyHere], ...]; null if marks would not help. */
function difference(first, second) {
  const a = first.match(WORDS) || [], b = second.match(WORDS) || [];
  let start = 0, endA = a.length, endB = b.length;
  while (start < endA && start < endB && a[start] === b[start]) start++;
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) { endA--; endB--; }
  const n = endA - start, m = endB - start, width = m + 1;
  if (n * m > LARGEST) return null;
  const common = new Uint16Array((n + 1) * width);
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      common[i * width + j] = a[start + i] === b[start + j]
        ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const only = new Uint8Array(a.length);
  let i = 0, j = 0;
  while (i < n || j < m) {
    if (i < n && j < m && a[start + i] === b[start + j]) { i++; j++; }
    else if (j >= m || (i < n && common[(i + 1) * width + j] >= common[i * width + j + 1])) only[start + i++] = 1;
    else j++;
  }
  const words = (tokens) => tokens.filter((token) => token.trim()).length;
  const shorter = Math.min(words(a), words(b)), shared = words(a.filter((_, k) => !only[k]));
  return shorter > LONG && shared < LITTLE * shorter ? null : pieces(a, only);
}

/* Neighbouring tokens of the same kind as one piece; a space between two marked words is marked too. */
function pieces(tokens, only) {
  const found = [];
  tokens.forEach((token, k) => {
    const joins = !token.trim() && k > 0 && k + 1 < tokens.length && only[k - 1] && only[k + 1];
    const marked = Boolean(only[k] || joins);
    const last = found[found.length - 1];
    if (last && last[1] === marked) last[0] += token;
    else found.push([token, marked]);
  });
  return found;
}

// --- samples ---------------------------------------------------------------------------------------------------

const data = byId("samples-data") ? JSON.parse(byId("samples-data").textContent) : null;
if (data) explore(data.models, data.tasks, data.samples);

function explore(models, tasks, samples) {
  const controls = Object.fromEntries(
    ["search", "task", "metric", "first", "second", "show", "order", "marks", "reset"].map((id) => [id, byId(`x-${id}`)]),
  );
  const several = models.length > 1;
  const haystacks = new Array(samples.length);
  const open = new Set(); // samples that stay open when the list is made again
  let chosen = [], from = 0;

  const option = (value, label) => element("option", { value }, label);
  controls.task.append(option("", `all (${samples.length.toLocaleString("en")})`));
  tasks.forEach((task, k) => {
    const n = samples.reduce((sum, sample) => sum + (sample[0] === k), 0);
    controls.task.append(option(k, `${task.name} (${n.toLocaleString("en")})`));
  });
  models.forEach((model, k) => {
    controls.first.append(option(k, model));
    controls.second.append(option(k, model));
  });
  if (several) controls.second.value = "1";
  for (const [id, needed] of [["first", 3], ["second", 3], ["marks", 2], ["task", 1]]) {
    const count = id === "task" ? tasks.length - 1 : models.length;
    controls[id].closest("label").hidden = count < needed;
  }
  const orders = [["given", "as evaluated"], ["low", "lowest score first"]];
  if (several) orders.push(["far", "largest difference first"]);
  controls.order.append(...orders.map(([value, label]) => option(value, label)));

  const first = () => Number(controls.first.value), second = () => Number(controls.second.value);
  const metric = () => Number(controls.metric.value || 0);
  const score = (sample, model) => {
    const answer = sample[4][model];
    const value = answer ? answer[0][metric()] : null;
    return typeof value === "number" ? value : null;
  };
  const known = (sample) => models.map((_, model) => score(sample, model)).filter((value) => value !== null);
  const pair = (sample) => [score(sample, first()), score(sample, second())];
  const flagged = (flag) => (sample) => sample[4].some((answer) => answer && answer[1] & flag);
  const both = (test) => (sample) => {
    const [a, b] = pair(sample);
    return a !== null && b !== null && test(a, b);
  };
  const filters = {
    all: [() => "all", () => true],
    ...(several && {
      differ: [() => "scores differ", both((a, b) => a !== b)],
      higher: [() => `${models[first()]} above ${models[second()]}`, both((a, b) => a > b)],
      lower: [() => `${models[second()]} above ${models[first()]}`, both((a, b) => a < b)],
    }),
    zero: [() => (several ? "0 for all models" : "score 0"), (s) => s[4].every((a, k) => a && score(s, k) === 0)],
    unscored: [() => "unscored", (sample) => sample[4].some((answer, k) => answer && score(sample, k) === null)],
    unanswered: [() => "no answer found", flagged(UNANSWERED)],
    truncated: [() => "reached max_new_tokens", flagged(TRUNCATED)],
  };
  controls.show.append(...Object.keys(filters).map((name) => option(name, name)));

  function haystack(k) {
    if (haystacks[k] === undefined) {
      const [task, document, , common, answers] = samples[k];
      const own = answers.flatMap((answer) => (answer ? [answer[2], ...Object.values(answer[3])] : []));
      haystacks[k] = [tasks[task].name, document, ...Object.values(common), ...own].join("\n").toLowerCase();
    }
    return haystacks[k];
  }

  function listMetrics() {
    const names = controls.task.value === "" ? null : tasks[Number(controls.task.value)].metrics;
    const shown = tasks.length === 1 ? tasks[0].metrics : names;
    controls.metric.replaceChildren(
      ...(shown ? shown.map((name, k) => option(k, name)) : [option(0, "first metric of each task")]),
    );
    controls.metric.closest("label").hidden = controls.metric.options.length < 2 && tasks.length === 1;
  }

  function choose() {
    const query = controls.search.value.trim().toLowerCase();
    const task = controls.task.value;
    const candidates = [];
    samples.forEach((sample, k) => {
      if ((task === "" || sample[0] === Number(task)) && (!query || haystack(k).includes(query))) candidates.push(k);
    });
    for (const entry of controls.show.options) {
      const [label, test] = filters[entry.value];
      const count = candidates.reduce((sum, k) => sum + test(samples[k]), 0);
      entry.textContent = `${label()} (${count.toLocaleString("en")})`;
    }
    const test = filters[controls.show.value][1];
    chosen = candidates.filter((k) => test(samples[k]));
    const rank = {
      low: (sample) => { const values = known(sample); return values.length ? sum(values) / values.length : -Infinity; },
      far: (sample) => { const [a, b] = pair(sample); return a === null || b === null ? 0 : -Math.abs(a - b); },
    }[controls.order.value];
    if (rank) {
      const ranks = new Map(chosen.map((k) => [k, rank(samples[k])]));
      chosen.sort((a, b) => (ranks.get(a) < ranks.get(b) ? -1 : ranks.get(a) > ranks.get(b) ? 1 : a - b));
    }
    from = 0;
    render();
  }

  function render() {
    const total = samples.length.toLocaleString("en"), count = chosen.length.toLocaleString("en");
    const query = controls.search.value.trim();
    byId("x-found").textContent = `${chosen.length ? count : "None"} of ${total} samples${query ? ` with “${query}”` : ""}`;
    byId("x-list").replaceChildren(...chosen.slice(from, from + PAGE).map(item));
    byId("x-list").start = from + 1;
    const last = Math.min(from + PAGE, chosen.length);
    byId("x-place").textContent = chosen.length ? `${(from + 1).toLocaleString("en")} to ${last.toLocaleString("en")}` : "";
    byId("x-before").disabled = from === 0;
    byId("x-after").disabled = last >= chosen.length;
    byId("x-before").parentElement.hidden = chosen.length <= PAGE;
  }

  function item(k) {
    const [task, document, number, common, answers] = samples[k];
    const query = controls.search.value.trim();
    const name = [tasks.length > 1 ? tasks[task].name : "", `document ${document}`, number ? `sample ${number + 1}` : ""];
    const chips = element("span", { class: "chips" });
    for (const m of models.length > CHIPS ? new Set([first(), second()]) : models.keys()) {
      if (answers[m]) chips.append(chip(models[m], m, score(samples[k], m)));
    }
    const preview = element("span", { class: "preview", dir: "auto" });
    markMatches(preview, snippet(common, answers, query), query);
    const summary = element(
      "summary", {}, element("span", { class: "name" }, name.filter(Boolean).join(", ")), chips, preview,
    );
    const details = element("details", {}, summary);
    details.open = open.has(k);
    details.addEventListener("toggle", () => {
      if (details.open) open.add(k);
      else open.delete(k);
      if (details.open && details.childElementCount === 1) {
        details.append(content(samples[k], query));
        for (const box of details.querySelectorAll(".text")) {
          if (box.scrollHeight > box.clientHeight) box.tabIndex = 0;
        }
      }
    });
    return element("li", {}, details);
  }

  function snippet(common, answers, query) {
    const texts = [...Object.values(common), ...answers.flatMap((a) => (a ? [...Object.values(a[3]), a[2]] : []))];
    const found = query && texts.find((text) => text.toLowerCase().includes(query.toLowerCase()));
    const shown = visible(found || texts.find(Boolean) || "");
    const place = found ? Math.max(shown.toLowerCase().indexOf(query.toLowerCase()) - 50, 0) : 0;
    const cut = shown.slice(place, place + 160).replace(/^[\udc00-\udfff]|[\ud800-\udbff]$/g, "");
    return (place ? "… " : "") + cut.replace(/\s+/g, " ");
  }

  function content(sample, query) {
    const [, , , common, answers] = sample;
    const parts = [];
    const text = (value) => { const box = textBox(); markMatches(box, visible(value), query); return box; };
    const same = several && answers.filter(Boolean).length > 1 ? ", the same for all models" : "";
    for (const [key, value] of Object.entries(common)) {
      parts.push(element("h4", {}, key + (key === "answer" ? same : "")), text(value));
    }
    const order = [...new Set([first(), ...(several ? [second()] : []), ...models.keys()])].filter((m) => answers[m]);
    const columns = order.map((m) => column(sample, m, query));
    parts.push(element("div", { class: "columns" }, ...columns));
    return element("div", { class: "sample" }, ...parts);
  }

  function column(sample, m, query) {
    const [values, flags, reason, own] = sample[4][m];
    const reference = m === first() ? second() : first();
    const other = several && reference !== m ? sample[4][reference] : null;
    const scores = tasks[sample[0]].metrics.map((name, k) => `${name} ${shownScore(values[k])}`);
    if (flags & UNANSWERED) scores.push("no answer found");
    if (flags & TRUNCATED) scores.push("reached max_new_tokens");
    const box = element(
      "section", {},
      element("h4", {}, element("i", { class: `dot m${m % COLORS}` }), models[m]),
      element("p", { class: "scores" }, scores.join(" · ")),
    );
    if (reason) box.append(element("p", { class: "reason" }, visible(reason)));
    for (const [key, value] of Object.entries(own)) {
      const shown = textBox(), against = other ? other[3][key] : undefined;
      box.append(element("h5", {}, key), shown);
      const wanted = controls.marks.checked && against !== undefined;
      const marks = wanted ? difference(visible(value), visible(against)) : undefined;
      if (marks === null) box.append(element("p", { class: "soft" }, "Too different to mark."));
      if (!value) shown.append(element("span", { class: "soft" }, "(empty)"));
      if (!marks) { markMatches(shown, visible(value), query); continue; }
      const tag = m === first() ? "del" : "ins";
      for (const [piece, isOnly] of marks) shown.append(isOnly ? element(tag, {}, piece) : piece);
    }
    return box;
  }

  const textBox = () => element("p", { class: "text", dir: "auto" });

  function chip(model, m, value) {
    return element(
      "span", { class: "chip", title: model },
      element("i", { class: `dot m${m % COLORS}` }), element("span", { class: "who" }, model), element("b", {}, shownScore(value)),
    );
  }

  const shownScore = (value) => (value === null || value === undefined ? "unscored" : String(value));
  const sum = (values) => values.reduce((a, b) => a + b, 0);

  function move(by) {
    from = Math.max(0, from + by);
    render();
    byId("x-found").scrollIntoView();
  }

  let waiting;
  controls.search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(choose, 120);
  });
  controls.task.addEventListener("change", () => { listMetrics(); choose(); });
  for (const id of ["metric", "first", "second", "show", "order"]) controls[id].addEventListener("change", choose);
  controls.marks.addEventListener("change", render);
  controls.reset.addEventListener("click", () => {
    controls.search.value = "";
    for (const id of ["task", "first", "show", "order"]) controls[id].selectedIndex = 0;
    controls.second.selectedIndex = several ? 1 : 0;
    controls.marks.checked = true;
    listMetrics();
    choose();
  });
  byId("x-before").addEventListener("click", () => move(-PAGE));
  byId("x-after").addEventListener("click", () => move(PAGE));
  listMetrics();
  choose();
  byId("explorer").hidden = false;
}
