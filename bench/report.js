// The report's behaviour: sort and filter the leaderboard, draw the charts of one task at a time.
// Everything shown comes from the page itself; text goes in as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
for (const curve of ["sensitivity", "adaptation", "learning", "growth"]) {
  const { columns, rows } = data[curve];
  data[curve] = rows.map((row) => Object.fromEntries(columns.map((name, i) => [name, row[i]])));
}
const FRACTION = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const number = (value) =>
  Number.isInteger(value) ? value.toLocaleString("en") : FRACTION.format(value);

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Plotly reads labels as a little language of tags of its own.
const plain = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// The leaderboard

function sortable(table) {
  const body = table.tBodies[0];
  const buttons = table.tHead.querySelectorAll("button");
  const value = (row, column) => {
    const text = row.cells[column].dataset.sort;
    return text === "" ? null : isNaN(text) ? text : Number(text);
  };
  const sort = (header, up) => {
    const column = header.cellIndex;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (x === null || y === null) return (x === null) - (y === null); // unmeasured: last
      const order = typeof x === "number" && typeof y === "number" ? x - y : `${x}`.localeCompare(y);
      return up ? order : -order;
    });
    body.append(...rows);
    for (const other of table.tHead.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
  };
  for (const button of buttons) {
    const header = button.closest("th");
    button.addEventListener("click", () => {
      const now = header.getAttribute("aria-sort");
      const first = header.dataset.first !== "descending";
      sort(header, now === null ? first : now === "descending");
    });
  }
}

function filterable(table, form, status) {
  const apply = () => {
    const rows = [...table.tBodies[0].rows];
    for (const row of rows) {
      row.hidden = [...form.elements].some((control) =>
        control.type === "search"
          ? !row.cells[0].dataset.sort.toLowerCase().includes(control.value.trim().toLowerCase())
          : control.value !== "" && row.dataset[control.name] !== control.value,
      );
    }
    const shown = rows.filter((row) => !row.hidden).length;
    status.textContent = `${shown} of ${rows.length} rows`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}

// Charts: each makes traces, axes and the table of its numbers from the rows of one task.

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const colour = (entry) => data.palette[entry.style % data.palette.length];
const symbol = (entry) => SYMBOLS[entry.style % SYMBOLS.length];
const dash = (entry) => DASHES[entry.style % DASHES.length];
const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const choice = (id) => $(id)?.value;

function scores(entries, task) {
  const scored = entries.filter((entry) => entry.mean !== null).reverse();
  const names = scored.map((entry) => plain(entry.label));
  const means = scored.map((entry) => entry.mean);
  const points = { x: means, y: names, type: "scatter", mode: "markers", showlegend: false };
  const bars = (key, look) => {
    const known = scored.filter((entry) => entry[key] !== null);
    return {
      ...points, hoverinfo: "skip", marker: { opacity: 0 },
      x: known.map((entry) => entry.mean), y: known.map((entry) => plain(entry.label)),
      error_x: { array: known.map((entry) => entry[key]), ...look },
    };
  };
  return {
    traces: [
      bars("ci_episodes", { thickness: 7, width: 0, color: theme("--bar") }),
      bars("ci_seeds", { thickness: 1.4, width: 5, color: theme("--ink") }),
      {
        ...points,
        marker: {
          color: scored.map(colour), symbol: scored.map(symbol), size: 11,
          line: { color: theme("--panel"), width: 1.5 },
        },
        text: scored.map((entry) => entry.score),
        hovertemplate: "%{y}: %{text}<extra></extra>",
      },
    ],
    x: { title: task.axis },
    y: { type: "category", categoryarray: names, automargin: true, showgrid: false },
    height: 90 + 36 * scored.length,
    chance: { along: "x", value: task.chance },
    columns: ["algorithm", task.axis, "± over seeds", "seeds", "± over episodes", "episodes"],
    rows: [...scored].reverse().map((entry) => [
      entry.label, entry.mean, entry.ci_seeds, entry.seeds, entry.ci_episodes, entry.episodes,
    ]),
  };
}

// A line with its interval as a band behind it, for each entry that has rows.
function lines(entries, points, x) {
  return entries.flatMap((entry) => {
    const mine = points.filter((point) => point.entry === entry.entry);
    if (mine.length === 0) return [];
    const along = mine.map((point) => point[x]);
    const banded = mine.filter((point) => point.low !== null);
    const few = mine.length <= 20;
    return [
      {
        x: [...banded.map((p) => p[x]), ...banded.map((p) => p[x]).reverse()],
        y: [...banded.map((p) => p.high), ...banded.map((p) => p.low).reverse()],
        type: "scatter", mode: "lines", line: { width: 0 }, fill: "toself", opacity: 0.13,
        fillcolor: colour(entry), hoverinfo: "skip", showlegend: false, legendgroup: entry.label,
      },
      {
        x: along, y: mine.map((point) => point.mean), name: plain(entry.label),
        type: "scatter", mode: few ? "lines+markers" : "lines", legendgroup: entry.label,
        cliponaxis: false,
        line: { color: colour(entry), dash: dash(entry), width: 2 },
        marker: { color: colour(entry), symbol: symbol(entry), size: 8 },
        hovertemplate: "%{fullData.name}: %{y:.4g} at %{x:.4g}<extra></extra>",
      },
    ];
  });
}

function sensitivity(entries, task) {
  const axis = choice("sensitivity-axis");
  const title = $("sensitivity-axis").selectedOptions[0].text;
  const mine = new Set(entries.map((entry) => entry.entry));
  const points = data.sensitivity.filter((point) => point.axis === axis && mine.has(point.entry));
  const all = data.sensitivity.filter((point) => point.axis === axis).map((point) => point.line);
  const looks = new Map([...new Set(all)].map((line, style) => [line, { style }]));
  const values = [...new Set(points.map((point) => point.value))];
  const numbers = values.every((value) => typeof value === "number");
  const [least, most] = numbers ? [Math.min(...values), Math.max(...values)] : [0, 0];
  const ticks = numbers && values.length <= 8 ? { tickvals: values, ticktext: values.map(String) } : {};
  const reach = (point, bound) => (point[bound] === null ? 0 : Math.abs(point[bound] - point.mean));
  const traces = [...looks].flatMap(([line, look]) => {
    const along = points.filter((point) => point.line === line);
    if (along.length === 0) return [];
    return [
      {
        x: along.map((point) => (numbers ? point.value : plain(point.value))), y: along.map((point) => point.mean),
        name: plain(line), type: "scatter", mode: numbers ? "lines+markers" : "markers",
        line: { color: colour(look), dash: dash(look), width: 2 },
        marker: { color: colour(look), symbol: symbol(look), size: 8 },
        error_y: {
          type: "data", symmetric: false, color: colour(look), thickness: 1.4, width: 5,
          array: along.map((p) => reach(p, "high")), arrayminus: along.map((p) => reach(p, "low")),
        },
        hovertemplate: "%{fullData.name}: %{y:.4g} at %{x}<extra></extra>",
      },
    ];
  });
  const kind = !numbers ? "category" : least > 0 && most >= 8 * least ? "log" : "linear";
  return {
    traces,
    x: { title, type: kind, ...ticks },
    y: { title: task.axis },
    chance: { along: "y", value: task.chance },
    columns: ["algorithm", title, task.axis, "low", "high"],
    rows: points.map((p) => [p.line, p.value, p.mean, p.low, p.high]),
  };
}

function adaptation(entries, task) {
  const mine = new Map(entries.map((entry) => [entry.entry, entry.label]));
  const points = data.adaptation.filter((point) => mine.has(point.entry));
  return {
    traces: lines(entries, points, "step"),
    x: { title: "inner steps", rangemode: "tozero", dtick: tick(points) },
    y: { title: task.axis },
    chance: { along: "y", value: task.chance },
    columns: ["algorithm", "inner steps", task.axis, "low", "high"],
    rows: points.map((p) => [mine.get(p.entry), p.step, p.mean, p.low, p.high]),
  };
}

const tick = (points) => (Math.max(0, ...points.map((point) => point.step)) <= 12 ? 1 : undefined);

function learning(entries, task) {
  const [x, of] = [choice("learning-x"), choice("learning-of")];
  const mine = new Map(entries.map((entry) => [entry.entry, entry.label]));
  const points = data.learning.filter((point) => point.of === of && mine.has(point.entry));
  return {
    traces: lines(entries, points, x),
    x: { title: x === "seconds" ? "seconds of training" : "iterations", rangemode: "tozero" },
    y: { title: `${task.axis}, ${of}` },
    chance: { along: "y", value: task.chance },
    columns: ["algorithm", "iteration", "seconds", `${task.axis}, ${of}`, "lowest seed", "highest seed"],
    rows: points.map((p) => [mine.get(p.entry), p.iteration, p.seconds, p.mean, p.low, p.high]),
  };
}

function growth(entries) {
  const mine = new Map(entries.map((entry) => [entry.entry, entry.label]));
  const points = data.growth.filter((point) => mine.has(point.entry));
  const title = "peak memory, MiB";
  return {
    traces: lines(entries, points, "step"),
    x: { title: "inner steps of a meta-step", rangemode: "tozero", dtick: tick(points) },
    y: { title, rangemode: "tozero" },
    columns: ["algorithm", "inner steps", title, "lowest seed", "highest seed"],
    rows: points.map((p) => [mine.get(p.entry), p.step, p.mean, p.low, p.high]),
  };
}

function cost(entries, task) {
  const kind = choice("cost-x");
  const title = $("cost-x").selectedOptions[0].text;
  const known = entries.filter((entry) => entry.mean !== null && entry[kind] !== null);
  known.sort((a, b) => a[kind] - b[kind]);
  const front = (entry) => entry[`pareto_${kind}`];
  const frontier = known.filter(front);
  const costs = known.map((entry) => entry[kind]);
  const logarithmic = Math.max(...costs) > 8 * Math.min(...costs);
  return {
    traces: [
      {
        x: frontier.map((entry) => entry[kind]), y: frontier.map((entry) => entry.mean),
        type: "scatter", mode: "lines", name: "Pareto front", hoverinfo: "skip",
        line: { color: theme("--muted"), width: 1.5, dash: "dot", shape: "hv" },
      },
      ...known.map((entry) => ({
        x: [entry[kind]], y: [entry.mean], type: "scatter", mode: "markers",
        name: plain(entry.label), cliponaxis: false,
        marker: {
          color: front(entry) ? colour(entry) : theme("--panel"), symbol: symbol(entry), size: 12,
          line: { color: colour(entry), width: 2 },
        },
        hovertemplate: `%{fullData.name}: ${plain(entry.score)}, %{x:.4g}<extra></extra>`,
      })),
    ],
    x: { title, type: logarithmic ? "log" : "linear", automargin: true },
    y: { title: task.axis },
    columns: ["algorithm", task.axis, title, "on the Pareto front"],
    rows: known.map((entry) => [entry.label, entry.mean, entry[kind], front(entry) ? "yes" : "no"]),
  };
}

const CHARTS = { scores, sensitivity, adaptation, learning, growth, cost };

function axis(settings) {
  return {
    gridcolor: theme("--line"), linecolor: theme("--line"), zeroline: false, automargin: true,
    ...settings, title: { text: settings.title ? plain(settings.title) : "", standoff: 10, font: { size: 12 } },
  };
}

function draw(name) {
  const task = data.tasks[Number(choice("task"))];
  const entries = data.entries.filter((entry) => entry.task === task.index);
  const chart = CHARTS[name](entries, task);
  const { along, value } = chart.chance ?? { value: null };
  const upright = along === "x";
  const line = { color: theme("--muted"), width: 1, dash: "dot" };
  const ends = upright ? { x0: value, x1: value, y0: 0, y1: 1 } : { y0: value, y1: value, x0: 0, x1: 1 };
  const refs = upright ? { xref: "x", yref: "paper" } : { xref: "paper", yref: "y" };
  const at = upright ? { x: value, y: 1, yanchor: "bottom" } : { x: 1, y: value, xanchor: "right", yanchor: "bottom" };
  const marked = typeof value === "number";
  const named = chart.traces.filter((trace) => trace.showlegend !== false).length;
  const layout = {
    height: chart.height ?? 320 + 14 * named, // the legend's rows are not taken from the chart
    margin: { l: 8, r: 18, t: 22, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: theme("--ink") },
    hoverlabel: { bgcolor: theme("--panel"), bordercolor: theme("--line"), font: { color: theme("--ink") } },
    legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom" },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    xaxis: axis(chart.x), yaxis: axis(chart.y),
    shapes: marked ? [{ type: "line", layer: "below", line, ...ends, ...refs }] : [],
    annotations: marked
      ? [{ text: "chance", showarrow: false, font: { size: 11, color: theme("--muted") }, ...at, ...refs }]
      : [],
  };
  const drawing = $(`chart-${name}`);
  const said = chart.rows.length ? "the numbers are in the table below it" : "nothing to show";
  drawing.setAttribute("aria-label", `${drawing.dataset.title}, ${task.name}: ${said}`);
  drawing.style.height = `${layout.height}px`; // Plotly fills what it is given, also when resized
  // A name with dollar signs is no formula.
  const config = { displayModeBar: false, responsive: true, typesetMath: false };
  Plotly.react(drawing, chart.traces, layout, config);
  numbers($(`numbers-${name}`), chart, `${drawing.dataset.title}, ${task.name}`);
}

function numbers(place, chart, caption) {
  const fill = () => {
    const table = element("table", undefined, { class: "data" });
    table.append(element("caption", caption, { class: "hidden" }));
    const head = table.createTHead().insertRow();
    for (const title of chart.columns) head.append(element("th", title, { scope: "col" }));
    const body = table.createTBody();
    for (const [name, ...values] of chart.rows) {
      const row = body.insertRow();
      row.append(element("th", name, { scope: "row" }));
      for (const value of values) {
        const text = value === null ? "" : typeof value === "number" ? number(value) : value;
        row.append(element("td", text));
      }
    }
    place.querySelector(".scroll").replaceChildren(table);
  };
  place.ontoggle = () => place.open && fill(); // thousands of rows are made when they are asked for
  if (place.open) fill();
}

function showTask() {
  for (const part of document.querySelectorAll("[data-task]")) {
    part.hidden = part.dataset.task !== choice("task");
  }
  // A run in which nothing was swept has no chart of it.
  Object.keys(CHARTS).filter((name) => $(`chart-${name}`)).forEach(draw);
}

// Plotly comes packed in the page; the policy lets exactly this text run.
async function unpack() {
  const packed = Uint8Array.from(atob($("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(element("script", await new Response(stream).text()));
}

async function start() {
  for (const table of document.querySelectorAll("table.sortable")) sortable(table);
  if ($("filters")) filterable($("leaderboard"), $("filters"), $("shown"));
  if (!$("task")) return;
  await unpack();
  showTask();
  $("task").addEventListener("change", showTask);
  for (const id of ["learning-x", "learning-of"]) $(id).addEventListener("change", () => draw("learning"));
  $("sensitivity-axis")?.addEventListener("change", () => draw("sensitivity"));
  $("cost-x").addEventListener("change", () => draw("cost"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTask);
  document.documentElement.dataset.ready = "yes";
}

start();
