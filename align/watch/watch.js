"use strict";
// The script of the live page: requests changed data from the server, and draws it.
// Texts of recipes, data sets and models only become text nodes, never HTML.

const EVERY_MS = 2000; // at least, between two requests for the state
const SLOWEST_MS = 10000; // while the server does not respond
const COLORS = 7;
const FEW = 3; // with more runs, the bars of their stages are folded
const QUIET_S = 120; // a running stage without change for longer is said to be quiet

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// --- numbers and times, as in the report ----------------------------------------------------------------------

function number(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  let text;
  if (size >= 1000) text = Math.round(value).toLocaleString("en");
  else if (size >= 100) text = value.toFixed(1);
  else if (size >= 1) text = value.toFixed(2);
  else if (size >= 1e-3) text = value.toFixed(3);
  else return value.toExponential(1);
  return text.replace("-", "−");
}

function duration(seconds) {
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  const minutes = Math.round(whole / 60);
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function tickText(value) {
  const short = Number(value.toPrecision(6)), small = short !== 0 && Math.abs(short) < 1e-3;
  return (small ? short.toExponential() : String(short)).replace(/^-/, "−");
}

const stepText = (value) => value.toLocaleString("en");
const ago = (seconds) => (seconds < 2 ? "just now" : `${duration(Math.round(seconds))} ago`);

// --- server ---------------------------------------------------------------------------------------------------

let token = null;
try {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname);
  }
  token = sessionStorage.getItem("token");
} catch { /* without storage, the page prompts for the token */ }

class Refused extends Error {}

async function ask(path, parameters) {
  const response = await fetch(`${path}?${new URLSearchParams(parameters)}`, {
    headers: token === null ? {} : { Authorization: `Bearer ${token}` },
    cache: "no-store",
  });
  if (response.status === 401) throw new Refused();
  return response.status === 404 ? null : response.json();
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token").value.trim();
  try { sessionStorage.setItem("token", token); } catch { /* kept in this page only */ }
  wake();
});

// --- the loop: state first, then the parts that have changed ---------------------------------------------------

let state = null;
let chosen = null; // names of the runs that are shown; null: those that the server chooses
const parts = new Map(); // "part run stage" -> {version, data}
let updated = -Infinity; // time of the last update of the parts in milliseconds
let wake = () => {};

async function main() {
  let pause = EVERY_MS;
  for (;;) {
    try {
      if (!document.hidden && !(byId("pause").checked && state)) {
        const found = await ask("/state", (chosen || []).map((name) => ["run", name]));
        state = found;
        assignColors();
        if (state.runs.some((run) => run.stages === null)) chosen = shown().map((run) => run.id);
        byId("login").hidden = true;
        showState();
        if (!found.more || performance.now() - updated > EVERY_MS) await update();
        pause = found.more ? 50 : Math.max(EVERY_MS, 1000 * found.wait);
      }
    } catch (problem) {
      if (problem instanceof Refused) {
        byId("login").hidden = false;
        say(token === null ? "The server requires a token." : "This is not the server's token.", token !== null);
        pause = 1e9;
      } else if (problem instanceof TypeError || problem instanceof SyntaxError) { // no connection, or a part of a response
        say("The server does not respond. The page shows the last data, and tries again.", true);
        pause = Math.min(Math.max(pause, EVERY_MS) * 1.5, SLOWEST_MS);
      } else throw problem;
    }
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, Math.min(pause, 2 ** 31 - 1));
    });
  }
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) wake(); });
byId("pause").addEventListener("change", () => wake());

function say(text, lost = false) {
  setText(byId("status"), text);
  byId("status").classList.toggle("lost", lost);
}

const shown = () => state.runs.filter((run) => run.stages !== null);

/* The colour of a run: the first that no other shown run has. A run keeps its colour while it is shown. */
const colors = new Map();
function assignColors() {
  const names = shown().map((run) => run.id);
  for (const name of [...colors.keys()]) if (!names.includes(name)) colors.delete(name);
  for (const name of names) {
    if (colors.has(name)) continue;
    const taken = new Set(colors.values());
    const free = Array.from({ length: COLORS }, (_, k) => k).find((k) => !taken.has(k));
    colors.set(name, free ?? colors.size % COLORS);
  }
}

/* Request the visible parts that have changed, then draw them. */
async function update() {
  const wanted = [];
  for (const run of shown()) {
    if (run.report) wanted.push(["comparison", run.id, "", run.report]);
    for (const stage of run.stages) {
      if (!boxes.get(stage.name)?.open) continue;
      for (const part of ["curves", "samples", "experts"]) {
        if (stage.versions[part]) wanted.push([part, run.id, stage.name, stage.versions[part]]);
      }
    }
  }
  const changed = new Set();
  for (const [part, run, stage, version] of wanted) {
    const key = JSON.stringify([part, run, stage]);
    const layer = part === "experts" ? layers.get(stage) || "" : "";
    const had = parts.get(key);
    if (had && had.version === version && had.layer === layer) continue;
    const data = await ask(`/${part}`, { run, ...(stage && { stage }), ...(layer && { layer }) });
    if (data === null) continue;
    parts.set(key, { version, layer, data });
    changed.add(JSON.stringify([part, stage]));
  }
  if (changed.has(JSON.stringify(["comparison", ""])) || stale) showComparison();
  for (const [name, box] of boxes) {
    for (const part of ["curves", "samples", "experts"]) {
      if (box.open && (changed.has(JSON.stringify([part, name])) || stale)) show[part](name, box);
    }
  }
  stale = false;
  updated = performance.now();
}

let stale = true; // true if all parts must be drawn again, because other runs are shown

const dataOf = (part, stage) => shown()
  .map((run) => ({ run, data: parts.get(JSON.stringify([part, run.id, stage]))?.data }))
  .filter((found) => found.data && (!stage || found.run.stages.some((other) => other.name === stage)));

// --- head, runs and stages --------------------------------------------------------------------------------------

const currentStage = (run) => run.stages.find((stage) => stage.status === "running")
  || run.stages.findLast((stage) => stage.status === "finished") || run.stages[0];

function showState() {
  const runs = shown();
  byId("main").hidden = runs.length === 0;
  if (!runs.length) {
    byId("tiles").replaceChildren();
    setText(byId("title"), state.folder);
    say("There is no run in this folder yet. The page shows it once it starts.");
    return;
  }
  const single = state.runs.length === 1;
  setText(byId("title"), single ? runs[0].name : state.folder);
  document.title = `${single ? runs[0].name : state.folder}: align watch`;
  byId("about").hidden = !(single && runs[0].description);
  setText(byId("about"), single ? runs[0].description : "");
  showRuns();
  showTiles(runs);
  showBars(runs);
  showBoxes(runs);
  const running = runs.some((run) => run.stages.some((stage) => stage.status === "running"));
  const changed = Math.min(...runs.map((run) => run.changed));
  const quiet = running && changed > QUIET_S ? "Nothing has been written for a while: the run may have stopped. " : "";
  const reading = state.more ? "Reading the files … " : "";
  say(`${reading}${quiet}Last change ${ago(changed)}.`);
}

function tile(term, value, detail = "") {
  const shownValue = element("dd", {}, value);
  if (detail) shownValue.append(element("small", {}, detail));
  return element("div", {}, element("dt", {}, term), shownValue);
}

function showTiles(runs) {
  const tiles = [];
  if (runs.length === 1) {
    const [run] = runs, stage = currentStage(run);
    const finished = run.stages.filter((other) => other.status === "finished").length;
    tiles.push(tile("Stages finished", `${finished} of ${run.stages.length}`));
    if (stage) {
      tiles.push(tile("Stage", stage.name, stage.status));
      if (stage.step !== null) tiles.push(tile("Step", progressText(stage)));
      if (stage.left !== null) tiles.push(tile("Time left", duration(stage.left), "of this stage"));
      if (stage.tokens !== null) tiles.push(tile("Throughput", `${stepText(Math.round(stage.tokens))} tokens/s`));
      if (stage.memory !== null) tiles.push(tile("Peak memory", `${number(stage.memory)} GiB`));
    }
  }
  byId("tiles").replaceChildren(...tiles);
}

const progressText = (stage) => stage.step === null ? ""
  : stage.steps ? `${stepText(stage.step)} of ${stepText(stage.steps)}` : stepText(stage.step);

const rows = new Map(); // run -> row of the table

function showRuns() {
  byId("runs").hidden = state.runs.length === 1;
  if (state.runs.length === 1) return;
  for (const [id, row] of rows) if (!state.runs.some((run) => run.id === id)) { row.remove(); rows.delete(id); }
  state.runs.forEach((run, at) => {
    let row = rows.get(run.id);
    if (!row) {
      const box = element("input", { type: "checkbox" });
      box.addEventListener("change", () => choose(run.id, box.checked));
      const name = element("th", { scope: "row" }, element("label", {}, box, element("i", { class: "dot" }), run.id));
      row = element("tr", {}, name, ...Array.from({ length: 6 }, () => element("td")));
      rows.set(run.id, row);
    }
    const body = byId("run-rows");
    if (body.rows[at] !== row) body.insertBefore(row, body.rows[at] || null);
    const color = colors.get(run.id);
    row.querySelector("input").checked = color !== undefined;
    row.querySelector(".dot").className = color === undefined ? "dot" : `dot m${color}`;
    const stage = run.stages ? currentStage(run) : null;
    const cells = !stage ? ["", "", "", "", ""] : [
      stage.name + (stage.status === "running" ? "" : `, ${stage.status}`),
      progressText(stage),
      stage.left === null ? "" : duration(stage.left),
      stage.tokens === null ? "" : `${stepText(Math.round(stage.tokens))} tokens/s`,
      stage.memory === null ? "" : `${number(stage.memory)} GiB`,
    ];
    [...cells, ago(run.changed)].forEach((text, k) => setText(row.cells[k + 1], text));
  });
}

function choose(id, on) {
  const names = shown().map((run) => run.id).filter((name) => name !== id);
  if (on) names.push(id);
  chosen = names.length ? names : null;
  stale = true;
  wake();
}

function showBars(runs) {
  const before = new Map([...document.querySelectorAll("#stage-bars details")].map((box) => [box.dataset.run, box.open]));
  const cards = runs.map((run) => {
    const card = element("div", { class: "card stages" });
    for (const stage of run.stages) {
      const kind = stage.kind && stage.kind !== stage.name ? element("span", { class: "soft" }, ` ${stage.kind}`) : "";
      const bar = element("div", { class: `bar ${stage.status}` });
      const share = stage.status === "finished" ? 1 : stage.steps ? Math.min((stage.step || 0) / stage.steps, 1) : null;
      if (share !== null) bar.style.width = `${(100 * share).toFixed(2)}%`;
      else bar.classList.add("unknown");
      const track = element("div", { class: "track" });
      if (stage.status !== "waiting") track.append(bar);
      const progress = stage.status === "running" ? progressText(stage) : "";
      const time = stage.status === "waiting" ? "waiting" : stage.seconds === null ? stage.status : duration(stage.seconds);
      card.append(element(
        "div", { class: "stage" },
        element("div", {}, element("b", {}, stage.name), kind, progress ? element("div", { class: "of" }, `step ${progress}`) : ""),
        track,
        element("div", { class: "time" }, time, stage.left === null ? "" : element("div", { class: "of" }, `${duration(stage.left)} left`)),
      ));
    }
    if (runs.length === 1) return card;
    const name = element("summary", {}, element("i", { class: `dot m${colors.get(run.id)}` }), run.id);
    const box = element("details", { "data-run": run.id }, name, card);
    box.open = before.get(run.id) ?? runs.length <= FEW;
    return box;
  });
  byId("stage-bars").replaceChildren(...cards);
}

/* One box for each stage of the shown runs. The current stage is open; boxes that the user has toggled stay so. */
const boxes = new Map(), pressed = new Set();
let followed = "";

function showBoxes(runs) {
  const names = [...new Set(runs.flatMap((run) => run.stages.filter(hasData).map((stage) => stage.name)))];
  const order = [...new Set(runs.flatMap((run) => run.stages.map((stage) => stage.name)))];
  names.sort((a, b) => order.indexOf(a) - order.indexOf(b));
  for (const [name, box] of boxes) if (!names.includes(name)) { box.remove(); boxes.delete(name); }
  names.forEach((name, at) => {
    let box = boxes.get(name);
    if (!box) {
      box = element(
        "details", { class: "stage-box" },
        element("summary", {}), element("div", { class: "curves" }), element("div", { class: "experts" }),
        element("div", { class: "samples" }),
      );
      box.firstChild.addEventListener("click", () => pressed.add(name));
      box.addEventListener("toggle", () => { if (box.open) { stale = true; wake(); } });
      boxes.set(name, box);
    }
    const places = byId("stages");
    if (places.children[at] !== box) places.insertBefore(box, places.children[at] || null);
    const stages = runs.map((run) => run.stages.find((stage) => stage.name === name)).filter(Boolean);
    const kind = stages[0].kind && stages[0].kind !== name ? ` ${stages[0].kind}` : "";
    const progress = stages.length === 1 && progressText(stages[0]) ? `, step ${progressText(stages[0])}` : "";
    setText(box.firstChild, `${name}${kind}${progress}`);
  });
  const current = runs.map(currentStage).filter((stage) => stage && names.includes(stage.name)).map((stage) => stage.name);
  const next = current[0] || names[names.length - 1] || "";
  if (next !== followed) {
    for (const [name, box] of boxes) if (!pressed.has(name)) box.open = name === next;
    followed = next;
  }
}

const hasData = (stage) => Object.values(stage.versions).some(Boolean);

// --- comparison and samples --------------------------------------------------------------------------------------

function showComparison() {
  const found = dataOf("comparison", "");
  const several = shown().length > 1, content = [];
  for (const { run, data } of found) {
    if (several) content.push(element("h3", {}, run.id));
    const lines = data.verdict.map((line) => element("li", {}, line));
    content.push(element("div", { class: "verdict" }, element("ul", {}, ...lines)));
    for (const table of data.tables) {
      const head = ["Model", ...table.head].map((name) => element("th", { scope: "col" }, name));
      const body = table.rows.map(([model, ...cells]) => element(
        "tr", {}, element("th", { scope: "row" }, model),
        ...cells.map(([value, ends]) => element("td", {}, value, element("small", {}, ends))),
      ));
      const made = element(
        "table", { class: "sticky" }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body),
      );
      content.push(element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Means by model" }, made));
    }
    if (data.samples.length) {
      content.push(element("details", {}, element("summary", {}, `Samples (${data.samples.length})`), ...cards(data.samples)));
    }
  }
  byId("comparison").hidden = content.length === 0;
  byId("comparison-body").replaceChildren(...content);
}

const cards = (samples) => samples.map((sample) => {
  const texts = sample.texts.map(({ title, text }) => element("div", {}, element("h3", {}, title || "completion"), textBox(text)));
  const prompt = element("p", { class: "text prompt", dir: "auto" }, sample.prompt);
  return element("article", { class: "card" }, element("h3", {}, sample.title), prompt, element("div", { class: "completions" }, ...texts));
});

function textBox(text) {
  const box = element("p", { class: "text", dir: "auto", tabindex: 0 });
  box.append(text.trim() ? text : element("span", { class: "soft" }, "(empty)"));
  return box;
}

const show = {
  curves: showCurves,
  experts: showExperts,
  samples(stage, box) {
    const place = box.querySelector(".samples"), content = [];
    for (const { run, data } of dataOf("samples", stage)) {
      if (!data.samples.length) continue;
      const title = shown().length > 1 ? `Samples of ${run.id}` : "Samples";
      const before = place.querySelector(`details[data-run="${CSS.escape(run.id)}"]`);
      const made = element("details", { "data-run": run.id }, element("summary", {}, title), ...cards([...data.samples].reverse()));
      made.open = before ? before.open : shown().length === 1;
      content.push(made);
    }
    place.replaceChildren(...content);
  },
};

// --- charts ------------------------------------------------------------------------------------------------------

/* The charts of a stage, each with the series of all shown runs. */
function showCurves(stage, box) {
  const found = dataOf("curves", stage), several = shown().length > 1;
  const merged = new Map();
  for (const { run, data } of found) {
    for (const chart of data.charts) {
      const key = `${chart.group}\n${chart.title}`;
      if (!merged.has(key)) merged.set(key, { ...chart, missing: 0, series: [], band: several ? null : chart.band });
      const into = merged.get(key);
      into.missing += chart.missing;
      chart.series.forEach((series, k) => into.series.push({
        ...series,
        color: several ? colors.get(run.id) : k % COLORS,
        dash: several ? Math.min(k, 3) : 0,
        label: !several ? series.label : chart.series.length > 1 ? `${run.id}, ${series.label}` : run.id,
      }));
    }
  }
  const place = box.querySelector(".curves");
  const groups = [...new Set([...merged.values()].map((chart) => chart.group))];
  const kept = new Map([...place.querySelectorAll("figure")].map((figure) => [figure.dataset.key, figure]));
  const content = groups.map((group) => {
    const figures = [...merged].filter(([, chart]) => chart.group === group).map(([key, chart]) => {
      const figure = kept.get(key) || newFigure(key);
      figure.chart = chart;
      draw(figure);
      return figure;
    });
    const plots = element("div", { class: "plots" }, ...figures);
    if (group === "Training") return plots;
    if (group !== "Other metrics") return element("div", {}, element("h4", { class: "group" }, group), plots);
    const made = element("details", { class: "others" }, element("summary", {}, `${group} (${figures.length})`), plots);
    made.open = Boolean(place.querySelector(".others")?.open);
    made.addEventListener("toggle", () => made.querySelectorAll("figure").forEach(draw));
    return made;
  });
  place.replaceChildren(...content);
  place.querySelectorAll("figure").forEach(draw); // now that they have a width
}

function newFigure(key) {
  const figure = element(
    "figure", { "data-key": key }, element("h4"), element("div", { class: "legend" }),
    drawn("svg", { class: "chart", role: "img", tabindex: 0 }), element("figcaption"),
  );
  const svg = figure.querySelector("svg");
  svg.addEventListener("pointermove", (event) => point(figure, event.clientX - svg.getBoundingClientRect().left));
  svg.addEventListener("pointerleave", () => unpoint(figure));
  svg.addEventListener("blur", () => unpoint(figure));
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !figure.plot) return;
    event.preventDefault();
    const { left, right } = figure.plot, from = figure.at ?? (by > 0 ? left : right);
    point(figure, Math.min(Math.max(from + (by * (right - left)) / 50, left), right));
  });
  sizes.observe(figure);
  return figure;
}

const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.drawnWidth !== target.clientWidth) draw(target);
});

const STEPS = [1, 2, 2.5, 5, 10];

/* About `wanted` round numbers from low to high. */
function ticks(low, high, wanted, whole = false) {
  const rough = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(rough));
  let step = power * STEPS.find((size) => size * power >= rough * 0.999);
  if (whole) step = Math.max(1, step % 1 ? Math.ceil(step) : step);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const digit of [1, 2, 5]) {
      const value = digit * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  const decades = found.filter((value) => Number.isInteger(Math.round(Math.log10(value) * 1e9) / 1e9));
  return found.length > 7 && decades.length > 1 ? decades : found;
}

const MARGIN = { left: 52, top: 8, bottom: 34 };
const labelWidth = (step) => 6.5 * stepText(Math.round(step)).length; // in pixels
const TALL = 200;

function draw(figure) {
  const { chart } = figure, width = figure.querySelector("svg").clientWidth;
  figure.drawnWidth = figure.clientWidth;
  if (!chart || !width) return;
  setText(figure.querySelector("h4"), chart.title);
  const svg = figure.querySelector("svg");
  svg.setAttribute("aria-label", chart.title);
  svg.setAttribute("viewBox", `0 0 ${width} ${TALL}`);
  const logarithmic = byId("log").checked && !chart.share;
  const every = chart.series.flatMap((series) => [series.x[0], series.x[series.x.length - 1]]).filter((x) => x !== undefined);
  const last = Math.max(...every), first = last - (last - Math.min(...every)) * Number(byId("range").value);
  const series = chart.series.map((found) => within(found, first, logarithmic));
  const band = chart.band && !logarithmic ? chart.band : null;
  const values = series.flatMap(({ y }) => y);
  if (band) band.x.forEach((x, k) => { if (x >= first) values.push(band.low[k], band.high[k]); });
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  figure.plot = null;
  if (low > high) {
    svg.replaceChildren();
  } else {
    if (chart.share) [low, high] = [-0.03, 1.03];
    else if (logarithmic) [low, high] = low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
    else {
      const room = high > low ? 0.05 * (high - low) : Math.max(Math.abs(high) * 0.05, 1e-12);
      [low, high] = [low - room, high + room];
    }
    const left = MARGIN.left, right = width - Math.max(10, labelWidth(last) / 2), bottom = TALL - MARGIN.bottom;
    const span = last - first || 1, from = last > first ? first : first - 0.5;
    const place = logarithmic ? Math.log : (value) => value;
    const xOf = (step) => left + ((step - from) / span) * (right - left);
    const yOf = (value) => bottom - ((place(value) - place(low)) / (place(high) - place(low))) * (bottom - MARGIN.top);
    figure.plot = { left, right, bottom, xOf, yOf, series, from, span, axis: chart.axis };
    svg.replaceChildren(...axes(figure.plot, low, high, logarithmic), ...curves(figure.plot, band, first));
  }
  showLegend(figure, chart);
  const windows = [...new Set(chart.series.map((found) => found.window).filter(Boolean))].sort((a, b) => a - b);
  const notes = windows.length ? [`bold line: mean of ${windows.map(stepText).join(" or ")} points`] : [];
  if (band) notes.push(`band: ${band.about}`);
  if (chart.missing) notes.push(`not finite, not drawn: ${stepText(chart.missing)} values`);
  setText(figure.querySelector("figcaption"), notes.join("; "));
  figure.querySelector("figcaption").hidden = !notes.length;
}

/* The part of a series from the step `first`; without values that a logarithmic scale cannot show. */
function within(series, first, logarithmic) {
  const cut = ({ x, y }) => {
    const kept = x.map((_, k) => k).filter((k) => x[k] >= first && (!logarithmic || y[k] > 0));
    return { x: kept.map((k) => x[k]), y: kept.map((k) => y[k]) };
  };
  return { ...series, ...cut(series), smooth: series.smooth ? cut(series.smooth) : null };
}

function axes({ left, right, bottom, xOf, yOf, from, span, axis }, low, high, logarithmic) {
  const made = [];
  for (const value of logarithmic ? logTicks(low, high) : ticks(low, high, 5)) {
    const y = yOf(value);
    made.push(drawn("line", { class: "rule", x1: left, x2: right, y1: y, y2: y }));
    made.push(drawn("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, tickText(value)));
  }
  const wide = labelWidth(from + span) + 16; // a label and the space beside it
  for (const step of ticks(from, from + span, Math.min(Math.max(Math.floor((right - left) / wide), 1), 6), true)) {
    const x = xOf(step);
    made.push(drawn("line", { class: "rule", x1: x, x2: x, y1: MARGIN.top, y2: bottom }));
    made.push(drawn("text", { x, y: bottom + 14, "text-anchor": "middle" }, stepText(step)));
  }
  made.push(drawn("path", { class: "axis", d: `M${left} ${MARGIN.top}V${bottom}H${right}` }));
  made.push(drawn("text", { x: (left + right) / 2, y: TALL - 4, "text-anchor": "middle" }, axis));
  return made;
}

function curves({ xOf, yOf, series }, band, first) {
  const path = (x, y) => "M" + x.map((step, k) => `${xOf(step).toFixed(1)} ${yOf(y[k]).toFixed(1)}`).join("L");
  const made = [];
  if (band) {
    const kept = band.x.map((_, k) => k).filter((k) => band.x[k] >= first);
    const x = kept.map((k) => band.x[k]), backwards = [...kept].reverse();
    if (x.length > 1) {
      const d = path(x, kept.map((k) => band.high[k])) + "L" + path(backwards.map((k) => band.x[k]), backwards.map((k) => band.low[k])).slice(1);
      made.push(drawn("path", { class: "area c0", d: `${d}Z` }));
    }
  }
  for (const { x, y, smooth, color, dash } of series) {
    if (!x.length) continue;
    const look = `line c${color} d${dash}`;
    made.push(drawn("path", { class: smooth ? `${look} faint${shown().length > 1 ? " behind" : ""}` : look, d: path(x, y) }));
    if (smooth && smooth.x.length) made.push(drawn("path", { class: `${look} bold`, d: path(smooth.x, smooth.y) }));
    if (x.length <= 25) for (const [k, step] of x.entries()) made.push(drawn("circle", { class: `dots c${color}`, cx: xOf(step), cy: yOf(y[k]), r: 2.2 }));
  }
  return made;
}

function showLegend(figure, chart) {
  const legend = figure.querySelector(".legend"), named = chart.series.length > 1 || shown().length > 1;
  const entries = named ? chart.series.map((series) => [series.color, series.dash, series.label]) : [];
  const signature = JSON.stringify(entries);
  if (legend.dataset.has === signature) return;
  legend.dataset.has = signature;
  legend.replaceChildren(...entries.map(([color, dash, label]) => element(
    "span", { title: label }, element("i", { class: `c${color} d${dash}` }), element("b", {}, label),
  )));
}

/* A line at the step below the pointer, with the values there. x: in pixels from the left of the drawing. */
function point(figure, x) {
  unpoint(figure);
  const { plot } = figure;
  if (!plot) return;
  figure.at = x;
  const step = plot.from + ((x - plot.left) / (plot.right - plot.left)) * plot.span;
  const found = plot.series.map((series) => ({ series, k: nearest(series.x, step) })).filter(({ k }) => k >= 0);
  if (!found.length) return;
  const closest = found.map(({ series, k }) => series.x[k]).reduce((a, b) => (Math.abs(a - step) <= Math.abs(b - step) ? a : b));
  const at = plot.xOf(closest);
  figure.querySelector("svg").append(drawn("line", { class: "cross", x1: at, x2: at, y1: MARGIN.top, y2: plot.bottom }));
  const lines = found.map(({ series, k }) => element(
    "div", {}, element("i", { class: `dot m${series.color}` }), `${plot.series.length > 1 ? `${series.label} ` : ""}${number(series.y[k])}`,
  ));
  const tip = element("div", { class: "tip" }, `step ${stepText(closest)}`, ...lines);
  figure.append(tip);
  const box = figure.querySelector("svg").getBoundingClientRect(), around = figure.getBoundingClientRect();
  tip.style.top = `${box.top - around.top + 4}px`;
  if (at > box.width / 2) tip.style.right = `${around.right - box.left - at + 8}px`;
  else tip.style.left = `${box.left - around.left + at + 8}px`;
}

function unpoint(figure) {
  figure.querySelector(".tip")?.remove();
  figure.querySelector(".cross")?.remove();
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  if (high < 0) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high;
}

for (const id of ["log", "range"]) {
  byId(id).addEventListener("change", () => document.querySelectorAll("#stages .curves figure").forEach(draw));
}

// --- load of the experts -----------------------------------------------------------------------------------------

const layers = new Map(); // stage -> number of the layer that is shown; "" for the mean
const EXTREME = 4; // the load, or its inverse, from which the colour does not change

function showExperts(stage, box) {
  const place = box.querySelector(".experts"), content = [];
  for (const { run, data } of dataOf("experts", stage)) {
    if (!data.steps.length) continue;
    const of = shown().length > 1 ? `, ${run.id}` : "", count = data.last[0].length;
    const layer = layers.get(stage) || "";
    const which = layer === "" ? "mean of the layers" : `MoE layer ${layer}`;
    const turned = Array.from({ length: count }, (_, expert) => data.load.map((load) => load[expert]));
    content.push(heatMap(`Load of each expert (× uniform load), ${which}${of}`, turned, {
      rows: "expert", columns: (k) => `step ${stepText(data.steps[k])}`, ends: [data.steps[0], data.steps[data.steps.length - 1]].map(stepText), below: "step",
    }));
    content.push(heatMap(`Load at step ${stepText(data.steps[data.steps.length - 1])} (× uniform load)${of}`, data.last, {
      rows: "MoE layer", columns: (k) => `expert ${k}`, ends: ["0", String(count - 1)], below: "expert",
    }));
  }
  if (!content.length) { place.replaceChildren(); return; }
  const [{ data }] = dataOf("experts", stage);
  const select = element("select", {}, element("option", { value: "" }, "mean of the layers"));
  data.last.forEach((_, k) => select.append(element("option", { value: k }, `MoE layer ${k}`)));
  select.value = layers.get(stage) || "";
  select.addEventListener("change", () => { layers.set(stage, select.value); wake(); });
  place.replaceChildren(
    element("h4", { class: "group" }, "Router"),
    element("div", { class: "controls" }, element("label", {}, "Layer", select)),
    element("div", { class: "plots" }, ...content),
  );
  place.querySelectorAll("figure").forEach(paint);
}

function heatMap(title, table, names) {
  const canvas = element("canvas", { role: "img", "aria-label": title });
  const last = table.length - 1;
  const sides = element("div", { class: "up-down" }, element("span", {}, "0"), element("span", {}, names.rows), element("span", {}, String(last)));
  const under = element("div", { class: "sides" }, element("span", {}, names.ends[0]), element("span", {}, names.below), element("span", {}, names.ends[1]));
  const figure = element(
    "figure", {}, element("h4", {}, title), element("div", { class: "heat" }, sides, canvas, under),
    element("figcaption", {}, `blue: less than uniform load, orange: more; full colour from × ${1 / EXTREME} and × ${EXTREME}`),
  );
  figure.table = table;
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), around = figure.getBoundingClientRect();
    const row = Math.min(Math.max(Math.floor(((event.clientY - box.top) / box.height) * table.length), 0), last);
    const column = Math.min(Math.max(Math.floor(((event.clientX - box.left) / box.width) * table[0].length), 0), table[0].length - 1);
    figure.querySelector(".tip")?.remove();
    const tip = element("div", { class: "tip" }, `${names.rows} ${row}, ${names.columns(column)}: × ${number(table[row][column])}`);
    tip.style.top = `${event.clientY - around.top + 12}px`;
    if (event.clientX - around.left > around.width / 2) tip.style.right = `${around.right - event.clientX}px`;
    else tip.style.left = `${event.clientX - around.left}px`;
    figure.append(tip);
  });
  canvas.addEventListener("pointerleave", () => figure.querySelector(".tip")?.remove());
  return figure;
}

function paint(figure) {
  const { table } = figure, canvas = figure.querySelector("canvas");
  const style = getComputedStyle(document.documentElement);
  const [few, many, none] = ["--m0", "--m1", "--card"].map((name) => channels(style.getPropertyValue(name)));
  canvas.width = table[0].length;
  canvas.height = table.length;
  canvas.style.height = `${Math.min(Math.max(table.length * 12, 96), 200)}px`;
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  table.forEach((row, r) => row.forEach((load, c) => {
    const strength = Math.min(Math.abs(Math.log(Math.max(load, 1e-9))) / Math.log(EXTREME), 1);
    const color = load < 1 ? few : many, at = 4 * (r * canvas.width + c);
    for (let k = 0; k < 3; k++) image.data[at + k] = none[k] + (color[k] - none[k]) * strength;
    image.data[at + 3] = 255;
  }));
  context.putImageData(image, 0, 0);
}

/* #rgb or #rrggbb as three numbers. */
function channels(color) {
  const digits = color.trim().slice(1), wide = digits.length === 3 ? [...digits].map((digit) => digit + digit).join("") : digits;
  return [0, 2, 4].map((at) => parseInt(wide.slice(at, at + 2), 16));
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  document.querySelectorAll(".experts figure").forEach(paint);
});

main();
