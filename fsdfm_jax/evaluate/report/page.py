"""Look and action of the page of fsdfm_jax/evaluate/report/html.py: its styles and its script."""

STYLE = """
:root {
  --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5a6472; --line: #dde1e6;
  --accent: #0068a8; --bad: #fbe3d8; --bad-ink: #9a3412; --new: #fff0a8; --new-ink: #1b1f24;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2126; --ink: #e7eaee; --soft: #a0a9b5; --line: #343a42;
    --accent: #6cb9ee; --bad: #4a2a1c; --bad-ink: #ffb596; --new: #5c4d00; --new-ink: #fff6c9;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, nav, main { max-width: 1200px; margin: 0 auto; padding: 0 20px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 2rem 0 1rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 3rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .4rem 0 .8rem; max-width: 75ch; }
a { color: var(--accent); }
small { font-size: .8em; color: var(--soft); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 14px 28px;
  margin: 0;
}
.facts div { min-width: 0; border-top: 1px solid var(--line); padding-top: 8px; }
.facts dt { font-size: .8rem; color: var(--soft); }
.facts dd { margin: 0; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 1.6rem; }
nav a { text-decoration: none; padding: 4px 0; }
nav a:hover { text-decoration: underline; }
main { padding-bottom: 4rem; }
section { scroll-margin-top: 1rem; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px
  18px; min-width: 0;
}
figure.card {
  background: #fff; margin: .8rem 0 0; max-width: 780px; padding: 14px; color-scheme: light;
}
.pair { display: flex; flex-direction: column-reverse; }
.pair p { margin-bottom: .8rem; }
@media (min-width: 1000px) {
  .pair { display: grid; grid-template-columns: minmax(0, 780px) minmax(0, 1fr); gap: 28px; }
  .pair p { margin-top: .8rem; }
}
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg { display: block; width: 100%; height: auto; }
.cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px;
  margin-bottom: 1rem;
}
.cards .card h3 { margin: 0; font-size: .8rem; font-weight: 600; color: var(--soft); }
.cards .card p { margin: 2px 0; font-size: .9rem; line-height: 1.4; }
.cards .card.best { border-color: var(--accent); box-shadow: inset 0 3px 0 var(--accent); }
.cards .big {
  font-size: 1.9rem !important; line-height: 1.3 !important; font-variant-numeric: tabular-nums;
}
.big span { font-size: .85rem; color: var(--soft); }
.name { font-weight: 600; }
.flag {
  display: inline-block; padding: 0 7px; border-radius: 9px; background: var(--bad); color:
  var(--bad-ink); font-size: .8rem; font-weight: 600; white-space: nowrap;
}
.scroll {
  overflow: auto; max-height: 80vh; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; overflow-wrap: normal;
}
table {
  border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums;
}
th, td {
  padding: 6px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid
  var(--line); line-height: 1.35;
}
tbody tr:last-child > * { border-bottom: 0; }
.n { text-align: right; white-space: nowrap; }
td small { display: block; font-size: .72rem; }
thead th {
  position: sticky; top: 0; z-index: 2; background: var(--card); vertical-align: bottom;
  white-space: nowrap;
}
tbody th {
  position: sticky; left: 0; z-index: 1; background: var(--card); font-weight: 500; min-width:
  9.5rem; max-width: 16rem; overflow-wrap: break-word;
}
thead th:first-child { left: 0; z-index: 3; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 3px solid var(--accent); }
th button::after { content: " \\2195"; color: var(--soft); font: 400 .8em system-ui; opacity: .6; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
tr.real > * { font-weight: 600; }
tr.control th { font-style: italic; }
tbody th .flag { margin: 1px 0; font-size: .72rem; font-style: normal; }
details.more { border: 0; padding: 0; }
td.bad { background: var(--bad); color: var(--bad-ink); }
td.bad small { color: inherit; }
.remarks { padding-left: 1.2rem; }
.remarks li { margin: .3rem 0; max-width: 90ch; }
.controls {
  display: flex; flex-wrap: wrap; gap: 10px 14px; align-items: center; margin-bottom: 12px;
}
.controls:empty { display: none; }
button.key, select {
  font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 6px 12px; min-height: 40px; max-width: 100%;
}
button.key { cursor: pointer; }
button.key:hover, select:hover { border-color: var(--accent); }
button.main {
  background: var(--accent); border-color: var(--accent); color: var(--page); min-width: 5.5rem;
  font-weight: 600;
}
input[type=range] {
  flex: 1 1 180px; min-width: 0; accent-color: var(--accent); height: 40px; margin: 0;
}
.panels {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 14px;
  align-items: start;
}
.panel h3 { margin: 0 0 .5rem; }
.panel select { width: 100%; margin-bottom: .6rem; font-weight: 600; }
.sample {
  white-space: pre-wrap; unicode-bidi: isolate; margin: 0; max-width: none; font-size: .95rem;
}
.caption {
  font-variant-numeric: tabular-nums; color: var(--soft); margin: 0 0 .6rem; min-height: 1.6em;
}
.changed { background: var(--new); color: var(--new-ink); border-radius: 3px; }
#player select { margin-bottom: .5rem; }
.given { font-weight: 700; }
.masked { opacity: .4; }
p.key {
  font-size: .85rem; margin: 1rem 0 0; border-top: 1px solid var(--line); padding-top: .6rem;
  max-width: none;
}
p.key span { display: inline-block; margin-right: 1rem; padding: 1px 4px; }
.stamps {
  max-height: 34rem; overflow: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px;
}
details { border-bottom: 1px solid var(--line); padding: 8px 16px; }
details:last-child { border-bottom: 0; }
summary { cursor: pointer; }
pre { overflow: auto; font-size: .8rem; line-height: 1.4; overflow-wrap: normal; }
.definitions {
  display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: 8px 24px; margin: 0;
}
.definitions dt { font-weight: 600; }
.definitions dd { margin: 0; max-width: 75ch; }
@media (max-width: 560px) {
  header, nav, main { padding: 0 14px; }
  h2 { margin-top: 2.4rem; }
  figure.card { padding: 6px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 10px; }
  .cards .card { padding: 12px; }
  .cards .big { font-size: 1.5rem !important; }
  th, td { padding: 6px 9px; }
  table { font-size: .84rem; }
  tbody th { min-width: 7.6rem; max-width: 8.6rem; }
  .facts { grid-template-columns: 1fr 1fr; gap: 10px 16px; font-size: .9rem; }
  .cards .card:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .caption { min-height: 3.2em; }
  .definitions { grid-template-columns: 1fr; gap: 2px; }
  .definitions dd { margin-bottom: 10px; }
}
@media print { .scroll, .stamps { max-height: none; } .controls { display: none; } }
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

function make(name, properties = {}, attributes = {}) {
  const element = Object.assign(document.createElement(name), properties);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function chooser(titles, chosen, label, onChoice) {
  const select = make("select", {}, {"aria-label": label});
  for (const [i, title] of titles.entries()) {
    select.append(make("option", {textContent: title, value: String(i)}));
  }
  select.value = String(chosen);
  select.addEventListener("change", () => onChoice(Number(select.value)));
  return select;
}

function button(text, label, onClick) {
  const element = make("button", {type: "button", textContent: text, className: "key"});
  if (label) element.setAttribute("aria-label", label);
  element.addEventListener("click", onClick);
  return element;
}

function fill(element, pieces) {
  element.replaceChildren(...pieces.map(([content, kind]) =>
    make("span", {textContent: content, className: data.kinds[kind]})));
}

// Tables: a click on a head sorts; what has no number stays at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const sorter = make("button", {type: "button", textContent: head.textContent});
    const numeric = head.classList.contains("n");
    head.replaceChildren(sorter);
    sorter.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [row.cells[column].dataset.v, row]);
      const sign = down ? -1 : 1;
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b));
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}

// Samples side by side: all panels show the sample of the same number.
const samples = document.getElementById("compare");
if (samples) {
  let number = 0;
  const most = Math.max(...data.rows.map((row) => row.texts.length));
  const count = make("span", {}, {role: "status"});
  const panels = [...samples.querySelectorAll(".panel")].map((panel, i) => {
    const state = {row: Number(panel.dataset.row), text: panel.querySelector(".sample")};
    const titles = data.rows.map((row) => row.title);
    const choice = (row) => { state.row = row; show(); };
    const select = chooser(titles, state.row, `Row of panel ${i + 1}`, choice);
    panel.querySelector("h3").replaceWith(select);
    return state;
  });
  function show() {
    count.textContent = `sample ${number + 1} of ${most}`;
    for (const {row, text} of panels) {
      fill(text, data.rows[row].texts[number] ?? [["(no such sample)", 0]]);
    }
  }
  const move = (by) => { number = (number + by + most) % most; show(); };
  if (most > 1) {
    samples.querySelector(".controls").append(
      button("\\u2190", "Previous sample", () => move(-1)), count,
      button("\\u2192", "Next sample", () => move(1)));
  }
  show();
}

// A sample on its way: a slider over its frames.
const player = document.getElementById("player");
if (player) {
  const first = Number(player.dataset.path);
  let path = data.paths[first];
  let timer = null;
  const slider = make("input", {type: "range", min: 0}, {"aria-label": "Step"});
  const text = player.querySelector(".sample");
  const caption = player.querySelector(".caption");
  function show() {
    const frame = path.frames[Number(slider.value)];
    caption.textContent = frame.caption;
    slider.setAttribute("aria-valuetext", frame.caption);
    fill(text, frame.pieces);
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  function advance() {
    slider.value = Number(slider.value) + 1;
    show();
    if (slider.value === slider.max) stop();
  }
  function choose(index) {
    stop();
    path = data.paths[index];
    slider.max = path.frames.length - 1;
    slider.value = slider.max;
    show();
  }
  const play = button("Play", "", () => {
    if (timer !== null) { stop(); return; }
    if (slider.value === slider.max) { slider.value = 0; show(); }
    play.textContent = "Pause";
    timer = setInterval(advance, Math.max(150, Math.min(900, 9000 / path.frames.length)));
  });
  play.classList.add("main");
  slider.addEventListener("input", () => { stop(); show(); });
  player.querySelector(".name").replaceWith(
    chooser(data.paths.map((one) => one.title), first, "Sample to watch", choose));
  player.querySelector(".controls").append(play, slider);
  choose(first);
}
"""
