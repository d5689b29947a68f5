#include "experiments/report_page.h"

namespace qlab {

const char* const report_style = R"css(
:root {
  color-scheme: light dark;
  --bg: #f6f7f9; --card: #ffffff; --ink: #1c2430; --soft: #5d6b7c; --line: #dfe4ea;
  --grid: #e8ecf1; --accent: #2f5fd0; --mark: #eef3ff; --good: #1f8a4c; --bad: #c23b3b;
  --warn: #a86b00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #12161c; --card: #1a2029; --ink: #e6ebf2; --soft: #97a4b5; --line: #2c3541;
    --grid: #28313c; --accent: #86a9ff; --mark: #202c44; --good: #5cc98a; --bad: #ff8080;
    --warn: #e0ae5a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 1280px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 26px; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 0; }
.sub { color: var(--soft); margin: 0 0 14px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 26px; margin: 0 0 22px; font-size: 13.5px; }
.facts div { display: flex; gap: 7px; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; }
.tile, section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.tile { padding: 13px 16px; }
.tile .label { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile .note { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
section { margin-top: 18px; padding: 16px 18px 18px; }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 18px; margin-bottom: 12px; }
.bar h2 { margin-right: auto; }
.choice { display: inline-flex; border: 1px solid var(--line); border-radius: 7px; }
.choice button {
  border: 0; background: none; color: var(--soft); font: inherit; font-size: 13px;
  padding: 3px 11px; cursor: pointer; border-radius: 6px;
}
.choice button[aria-pressed="true"] { background: var(--mark); color: var(--accent); }
label { font-size: 13px; color: var(--soft); display: inline-flex; gap: 6px; align-items: center; }
select {
  font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 7px; padding: 2px 6px;
}
input[type="range"] { width: 110px; accent-color: var(--accent); }
.curves { display: grid; grid-template-columns: minmax(0, 1fr) 250px; gap: 18px; }
.plot { position: relative; height: 430px; }
.legend { max-height: 430px; overflow-y: auto; font-size: 13px; margin: 0; padding: 0; }
.legend li {
  list-style: none; display: flex; gap: 8px; align-items: center; padding: 2px 6px;
  border-radius: 6px; cursor: pointer;
}
.legend li:hover { background: var(--mark); }
.legend li.off { opacity: 0.4; }
.legend .text { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.dot { flex: none; width: 11px; height: 11px; border-radius: 50%; display: inline-block; }
.hint { color: var(--soft); font-size: 13px; margin: 8px 0 0; }
.keys { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 18px; }
.keys .plot { height: 270px; }
.scroll { overflow-x: auto; max-height: 640px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 6px 11px; text-align: left; white-space: nowrap; }
th {
  position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600;
  border-bottom: 2px solid var(--line); cursor: pointer; user-select: none;
}
th[aria-sort="ascending"]::after { content: " \2191"; }
th[aria-sort="descending"]::after { content: " \2193"; }
td { border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
tbody tr:hover td { background: var(--mark); }
.num { text-align: right; font-variant-numeric: tabular-nums; }
.best { font-weight: 700; color: var(--good); }
td .dot { margin-right: 8px; vertical-align: -1px; }
.status { font-size: 12.5px; font-weight: 600; }
.finished { color: var(--good); } .failed { color: var(--bad); }
.interrupted, .running, .pending { color: var(--warn); }
.failure { border-left: 3px solid var(--bad); padding: 4px 12px; margin: 10px 0 0; }
.failure pre { margin: 2px 0 0; white-space: pre-wrap; font-size: 13px; color: var(--soft); }
details summary { cursor: pointer; font-weight: 600; }
.settings { columns: 3 280px; margin: 12px 0 0; font-size: 13px; }
.settings div { break-inside: avoid; display: flex; gap: 8px; padding: 1px 0; }
.settings dt { color: var(--soft); min-width: 170px; }
.settings dd { margin: 0; overflow-wrap: anywhere; }
.missing { padding: 14px 16px; border: 1px dashed var(--line); border-radius: 8px; }
footer { color: var(--soft); font-size: 13px; margin-top: 20px; }
[hidden] { display: none !important; }
@media (max-width: 820px) { .curves { grid-template-columns: 1fr; } .legend { max-height: 170px; } }
@media print { section, .tile { break-inside: avoid; } .legend, .scroll { max-height: none; } }
)css";

const char* const report_body = R"html(<body>
<main>
<h1 id="title"></h1>
<p class="sub" id="subtitle"></p>
<dl class="facts" id="facts"></dl>
<div class="tiles" id="tiles"></div>
<section id="no-charts" hidden><p class="missing">Charts need Chart.js, which was not found when this
report was written. Install the package <b>libjs-chart.js</b> and run <b>qlab report</b> on the
directory again.</p></section>
<section id="curves">
  <div class="bar">
    <h2>Loss curves</h2>
    <span class="choice" id="show"></span>
    <span class="choice" id="against"></span>
    <span class="choice" id="scale"></span>
    <label>smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.02"></label>
    <label>colour by <select id="colour"></select></label>
  </div>
  <div class="curves">
    <div class="plot"><canvas id="loss"></canvas></div>
    <ul class="legend" id="legend"></ul>
  </div>
  <p class="hint">Lines: training loss, smoothed. Dashed lines with points: evaluation loss. Click an
  entry to hide or show it; point at one to bring it out.</p>
</section>
<section id="by-key">
  <div class="bar"><h2>Result against each swept key</h2>
    <label>result <select id="result"></select></label></div>
  <div class="keys" id="keys"></div>
  <p class="hint" id="key-hint">One point per trial; the line joins the means.</p>
</section>
<section>
  <div class="bar"><h2>Trials</h2></div>
  <div class="scroll"><table id="trials"></table></div>
</section>
<section id="over-seeds" hidden>
  <div class="bar"><h2>Over seeds</h2><span class="hint">mean ± sample standard deviation</span></div>
  <div class="scroll"><table id="groups"></table></div>
</section>
<section id="failures" hidden><div class="bar"><h2>Failed trials</h2></div></section>
<section id="shared" hidden><details><summary>Settings that all trials share</summary>
  <dl class="settings" id="settings"></dl></details></section>
<footer>Written by qlab. One file, nothing loaded from elsewhere.</footer>
</main>
)html";

const char* const report_script = R"js(
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const el = (id) => document.getElementById(id);
const measured = ['trainable_params', 'steps', 'trained_tokens', 'train_loss', 'eval_loss',
  'eval_loss_0', 'best_eval_loss', 'tokens_per_s', 'peak_bytes', 'gang_size'];
const isLoss = (column) => column.includes('loss');
const metric = measured.includes(data.metric) ? data.metric : 'eval_loss';
const better = (a, b) => data.goal === 'maximize' ? a > b : a < b;
const trials = data.trials;

function node(tag, text, className) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (className) e.className = className;
  return e;
}
function bytes(x) {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let i = 0;
  while (x >= 1000 && i < units.length - 1) { x /= 1000; ++i; }
  return (i === 0 ? x.toFixed(0) : x.toFixed(2)) + ' ' + units[i];
}
function show(column, x) {
  if (x === null || x === undefined) return '';
  if (isLoss(column)) return x.toFixed(4);
  if (column === 'peak_bytes') return bytes(x);
  return Math.round(x).toLocaleString('en-US');
}
function shortNumber(x) {
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6)) {
    return x.toExponential().replace('e+', 'e');
  }
  return String(x);
}
const isNumber = (text) => text !== '' && Number.isFinite(Number(text));
const valueText = (text) => isNumber(text) ? shortNumber(Number(text)) : text;
const unique = (items) => [...new Set(items)];
const compareText = (a, b) => isNumber(a) && isNumber(b) ? Number(a) - Number(b)
  : a.localeCompare(b, undefined, {numeric: true});

// ---- head ----
el('title').textContent = data.name;
const count = (status) => trials.filter((t) => t.status === status).length;
const parts = unique(trials.map((t) => t.status)).map((s) => count(s) + ' ' + s);
el('subtitle').textContent = trials.length + (trials.length === 1 ? ' trial' : ' trials') + ' (' +
  parts.join(', ') + ')' + (data.keys.length ? ' over ' + data.keys.join(', ') : '');
const order = ['model', 'data', 'device', 'date', 'commit', 'version'];
const facts = Object.entries(data.environment).filter(([, v]) => v !== '');
const rank = (key) => order.includes(key) ? order.indexOf(key) : order.length;
facts.sort((a, b) => rank(a[0]) - rank(b[0]));
for (const [key, value] of facts) {
  const row = node('div');
  row.append(node('dt', key), node('dd', value));
  el('facts').append(row);
}
const scored = trials.filter((t) => t[metric] !== null);
const best = scored.length ? scored.reduce((a, b) => better(b[metric], a[metric]) ? b : a) : null;
function tile(label, value, note) {
  const t = node('div', undefined, 'tile');
  t.append(node('div', label, 'label'), node('div', value, 'value'), node('div', note, 'note'));
  el('tiles').append(t);
}
if (best) {
  tile('best ' + metric, show(metric, best[metric]), best.name);
  const worst = scored.reduce((a, b) => better(a[metric], b[metric]) ? b : a);
  if (worst !== best) tile('worst ' + metric, show(metric, worst[metric]), worst.name);
  if (best.eval_loss !== null && best.eval_loss_0 !== null) {
    const fall = best.eval_loss - best.eval_loss_0;
    tile('eval loss, best trial', (fall > 0 ? '+' : '\u2212') + Math.abs(fall).toFixed(4),
      'from ' + show('eval_loss', best.eval_loss_0) + ' before the first step');
  }
}
const speeds = trials.map((t) => t.tokens_per_s).filter((x) => x !== null).sort((a, b) => a - b);
if (speeds.length) {
  tile('median tokens/s', show('tokens_per_s', speeds[speeds.length >> 1]),
    'per trial; highest peak ' + bytes(Math.max(...trials.map((t) => t.peak_bytes || 0))));
}

// ---- colours ----
const palette = ['#4269d0', '#e08a00', '#e8553d', '#2fa58f', '#3c9a46', '#e0619f', '#9352e8',
  '#5aa0e8', '#9c6b4e', '#7d8794'];
function hue(i, n) {
  if (n <= palette.length) return palette[i];
  return 'hsl(' + Math.round(360 * i / n) + ' 62% ' + [42, 56][i % 2] + '%)';
}
const ramp = [[68, 57, 131], [49, 104, 142], [33, 145, 140], [64, 184, 106], [222, 180, 30]];
function ramped(t) {
  const x = t * (ramp.length - 1), i = Math.min(Math.floor(x), ramp.length - 2), f = x - i;
  const mix = ramp[i].map((c, k) => Math.round(c + f * (ramp[i + 1][k] - c)));
  return 'rgb(' + mix.join(' ') + ')';
}
let colourKey = '';
const hidden = new Set();
const keyValues = (k) => unique(trials.map((t) => k < 0 ? t.seed : t.swept[k])).sort(compareText);
const keyIndex = (key) => key === 'seed' ? -1 : data.keys.indexOf(key);
function valueColour(values, value) {
  const i = values.indexOf(value);
  if (!values.every(isNumber) || values.length < 3) return hue(i, values.length);
  return ramped(i / (values.length - 1));
}
function colourOf(trial) {
  if (colourKey === '') return hue(trials.indexOf(trial), trials.length);
  const k = keyIndex(colourKey);
  return valueColour(keyValues(k), k < 0 ? trial.seed : trial.swept[k]);
}
const groupOf = (trial) => {
  if (colourKey === '') return trial.name;
  const k = keyIndex(colourKey);
  return k < 0 ? trial.seed : trial.swept[k];
};
function faded(colour, alpha) {
  const probe = document.createElement('canvas').getContext('2d');
  probe.fillStyle = colour;
  probe.fillRect(0, 0, 1, 1);
  const [r, g, b] = probe.getImageData(0, 0, 1, 1).data;
  return `rgba(${r}, ${g}, ${b}, ${alpha})`;
}
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- tables ----
function table(target, columns, rows) {
  const head = node('thead'), body = node('tbody'), line = node('tr');
  let sorted = null, upward = true;
  const fill = () => {
    body.replaceChildren(...rows.map((row) => {
      const tr = node('tr');
      for (const c of columns) {
        const td = node('td', undefined, c.numeric ? 'num' : '');
        c.render(td, row);
        tr.append(td);
      }
      return tr;
    }));
  };
  for (const c of columns) {
    const th = node('th', c.title, c.numeric ? 'num' : '');
    th.addEventListener('click', () => {
      upward = sorted === c ? !upward : true;
      sorted = c;
      const sign = upward ? 1 : -1;
      const empty = (v) => v === null || v === '';
      rows.sort((a, b) => {
        const x = c.value(a), y = c.value(b);
        if (empty(x) || empty(y)) return empty(x) - empty(y);
        return sign * (typeof x === 'number' ? x - y : compareText(x, y));
      });
      for (const other of line.children) other.removeAttribute('aria-sort');
      th.setAttribute('aria-sort', upward ? 'ascending' : 'descending');
      fill();
    });
    line.append(th);
  }
  head.append(line);
  target.replaceChildren(head, body);
  fill();
}
const plain = (title, value, numeric) => ({title, value, numeric,
  render: (td, row) => { td.textContent = valueText(value(row)); }});
const sweptColumns = data.keys.map((key, k) => plain(key, (row) => row.swept[k],
  trials.every((t) => isNumber(t.swept[k]))));
function drawTrials() {
  const columns = [{title: 'trial', value: (t) => t.name, render: (td, t) => {
    const dot = node('span', undefined, 'dot');
    dot.style.background = colourOf(t);
    td.append(dot, t.name);
    td.title = t.directory;
  }}, ...sweptColumns, plain('seed', (t) => t.seed, true)];
  for (const c of measured) {
    columns.push({title: c, numeric: true, value: (t) => t[c], render: (td, t) => {
      td.textContent = show(c, t[c]);
      if (c === metric && best && t[c] === best[c]) td.classList.add('best');
    }});
  }
  columns.push({title: 'status', value: (t) => t.status, render: (td, t) => {
    td.append(node('span', t.status, 'status ' + t.status));
    td.title = t.error;
  }});
  const rows = [...trials].sort((a, b) => {
    const x = a[metric], y = b[metric];
    if (x === null || y === null) return (x === null) - (y === null);
    return x === y ? 0 : better(x, y) ? -1 : 1;
  });
  table(el('trials'), columns, rows);
}
function drawGroups() {
  el('over-seeds').hidden = !data.several_seeds;
  if (!data.several_seeds) return;
  const columns = [...sweptColumns, plain('n', (g) => String(g.n), true)];
  for (const c of unique([metric, 'eval_loss', 'train_loss', 'best_eval_loss', 'tokens_per_s'])) {
    columns.push({title: c, numeric: true, value: (g) => g[c][0], render: (td, g) => {
      const [mean, deviation] = g[c];
      td.textContent = show(c, mean) + (deviation === null ? '' : ' ± ' + show(c, deviation));
    }});
  }
  table(el('groups'), columns, [...data.groups]);
}
for (const t of trials.filter((x) => x.status === 'failed')) {
  const box = node('div', undefined, 'failure');
  box.append(node('b', t.name), node('pre', t.error || 'no reason was recorded'));
  el('failures').append(box);
  el('failures').hidden = false;
}
for (const [key, value] of data.shared) {
  const row = node('div');
  row.append(node('dt', key), node('dd', valueText(value)));
  el('settings').append(row);
  el('shared').hidden = false;
}

// ---- charts ----
const state = {show: 'both', against: 'steps', scale: 'linear', smooth: 0, result: metric};
let lossChart = null, keyCharts = [];
function choice(id, options, redraw) {
  for (const option of options) {
    const b = node('button', option);
    b.setAttribute('aria-pressed', state[id] === option);
    b.addEventListener('click', () => {
      state[id] = option;
      for (const other of el(id).children) {
        other.setAttribute('aria-pressed', other.textContent === option);
      }
      redraw();
    });
    el(id).append(b);
  }
}
// Exponential mean without the pull towards its start.
function smoothed(points, beta) {
  let mean = 0, weight = 0;
  return points.map((p) => {
    mean = beta * mean + (1 - beta) * p.y;
    weight = beta * weight + (1 - beta);
    return {x: p.x, y: mean / weight};
  });
}
function axis(title, extra) {
  return Object.assign({
    title: {display: true, text: title, color: css('--soft'), font: {size: 13}},
    ticks: {color: css('--soft')}, grid: {color: css('--grid'), borderColor: css('--line')},
  }, extra);
}
function curveSets(focus) {
  const column = state.against === 'steps' ? 0 : 1;
  const sets = [];
  for (const t of trials) {
    if (hidden.has(groupOf(t))) continue;
    const dim = focus !== null && focus !== groupOf(t);
    const colour = dim ? faded(colourOf(t), 0.12) : colourOf(t);
    const width = focus !== null && !dim ? 3 : 2;
    const points = (list) => list.map((p) => ({x: p[column], y: p[2]}));
    if (state.show !== 'eval' && t.train.length) {
      sets.push({label: t.name + ' train', data: smoothed(points(t.train), state.smooth),
        borderColor: colour, backgroundColor: colour, borderWidth: width,
        pointRadius: t.train.length < 2 ? 3 : 0, pointHitRadius: 6});
    }
    if (state.show !== 'train' && t.eval.length) {
      sets.push({label: t.name + ' eval', data: points(t.eval), borderColor: colour,
        backgroundColor: colour, borderWidth: width * 0.75, borderDash: [5, 4],
        pointRadius: 4, pointHitRadius: 8});
    }
  }
  return sets;
}
function drawLoss(focus = null) {
  const title = state.against === 'steps' ? 'optimizer steps' : 'trained tokens';
  const scales = {
    x: axis(title, {type: 'linear', min: 0}),
    y: axis('loss (nats per token)', {type: state.scale === 'log' ? 'logarithmic' : 'linear'}),
  };
  if (state.scale === 'log') {
    scales.y.ticks = {color: css('--soft'), callback: (v) => Number(v.toPrecision(3))};
  }
  if (lossChart) {
    lossChart.data.datasets = curveSets(focus);
    lossChart.options.scales = scales;
    lossChart.update('none');
    return;
  }
  lossChart = new Chart(el('loss'), {type: 'line', data: {datasets: curveSets(focus)}, options: {
    animation: false, parsing: false, normalized: true, maintainAspectRatio: false, scales,
    interaction: {mode: 'nearest', intersect: false},
    plugins: {legend: {display: false}, tooltip: {callbacks: {
      title: (items) => items.length ? Math.round(items[0].parsed.x).toLocaleString('en-US') + ' ' +
        state.against : '',
      label: (item) => ' ' + item.dataset.label + '  ' + item.parsed.y.toFixed(4),
    }}},
  }});
}
function drawLegend() {
  const groups = colourKey === '' ? trials.map((t) => t.name) : keyValues(keyIndex(colourKey));
  el('legend').replaceChildren(...groups.map((group) => {
    const li = node('li');
    const dot = node('span', undefined, 'dot');
    dot.style.background = colourOf(trials.find((t) => groupOf(t) === group));
    const text = colourKey === '' ? group : colourKey + ' = ' + (valueText(group) || 'none');
    li.append(dot, node('span', text, 'text'));
    li.title = text;
    li.classList.toggle('off', hidden.has(group));
    li.addEventListener('click', () => {
      if (!hidden.delete(group)) hidden.add(group);
      li.classList.toggle('off', hidden.has(group));
      drawLoss();
    });
    li.addEventListener('mouseenter', () => { if (!hidden.has(group)) drawLoss(group); });
    li.addEventListener('mouseleave', () => drawLoss());
    return li;
  }));
}
function keyScale(key, values) {
  const numbers = values.map(Number);
  if (!values.every(isNumber)) {
    return axis(key, {type: 'linear', min: -0.5, max: values.length - 0.5,
      afterBuildTicks: (a) => { a.ticks = values.map((_, i) => ({value: i})); },
      ticks: {color: css('--soft'), autoSkip: false, callback: (v) => {
        const text = values[v] || 'none';
        return text.length > 18 ? text.slice(0, 17) + '\u2026' : text;
      }}});
  }
  const low = Math.min(...numbers), high = Math.max(...numbers);
  const log = low > 0 && high / low >= 4;
  const pad = log ? Math.pow(high / low, 0.08) : (high - low || Math.abs(high) || 1) * 0.08;
  return axis(key, {type: log ? 'logarithmic' : 'linear',
    min: log ? low / pad : low - pad, max: log ? high * pad : high + pad,
    afterBuildTicks: (a) => { if (values.length <= 10) a.ticks = numbers.map((v) => ({value: v})); },
    ticks: {color: css('--soft'), callback: (v) => shortNumber(Number(v.toPrecision(3)))}});
}
function keyChart(key, k, canvas) {
  const values = keyValues(k);
  const numeric = values.every(isNumber);
  const place = (value) => numeric ? Number(value) : values.indexOf(value);
  const column = state.result;
  const points = trials.filter((t) => t[column] !== null);
  const means = values.map((value) => {
    const ys = points.filter((t) => (k < 0 ? t.seed : t.swept[k]) === value).map((t) => t[column]);
    return {x: place(value), y: ys.length ? ys.reduce((a, b) => a + b, 0) / ys.length : NaN};
  }).filter((p) => Number.isFinite(p.y));
  return new Chart(canvas, {type: 'scatter', data: {datasets: [
    {label: 'trials', data: points.map((t) => ({x: place(k < 0 ? t.seed : t.swept[k]), y: t[column],
      name: t.name})), pointRadius: 5, pointHoverRadius: 7,
      backgroundColor: points.map((t) => faded(colourOf(t), 0.85)),
      borderColor: points.map(colourOf)},
    {label: 'mean', type: 'line', data: means, borderColor: css('--soft'), borderWidth: 1.5,
      borderDash: [2, 3], pointStyle: 'line', pointRadius: 9, pointBorderWidth: 2,
      pointBorderColor: css('--soft'), order: 1},
  ]}, options: {
    animation: false, maintainAspectRatio: false,
    scales: {x: keyScale(key, values), y: axis(column, {grace: '8%', ticks: {color: css('--soft'),
      callback: (v) => column === 'peak_bytes' ? bytes(v) : Number(v.toPrecision(5))}})},
    plugins: {legend: {display: false}, tooltip: {callbacks: {
      title: () => '',
      label: (item) => ' ' + (item.raw.name || 'mean') + '  ' + show(column, item.raw.y),
    }}},
  }});
}
function drawKeys() {
  for (const chart of keyCharts) chart.destroy();
  keyCharts = [];
  const keys = data.keys.map((key, k) => [key, k]);
  if (data.several_seeds) keys.push(['seed', -1]);
  const shown = keys.filter(([, k]) => keyValues(k).length > 1);
  el('by-key').hidden = shown.length === 0;
  el('keys').replaceChildren();
  for (const [key, k] of shown) {
    const plot = node('div', undefined, 'plot');
    const canvas = node('canvas');
    plot.append(canvas);
    el('keys').append(plot);
    keyCharts.push(keyChart(key, k, canvas));
  }
}
function options(select, values, chosen) {
  for (const [value, text] of values) {
    const o = node('option', text);
    o.value = value;
    o.selected = value === chosen;
    select.append(o);
  }
}
function drawAll() {
  drawTrials();
  if (typeof Chart === 'undefined') return;
  if (lossChart) lossChart.destroy();
  lossChart = null;
  drawLoss();
  drawLegend();
  drawKeys();
}
function start() {
  drawGroups();
  if (typeof Chart === 'undefined') {
    el('no-charts').hidden = false;
    el('curves').hidden = el('by-key').hidden = true;
    drawTrials();
    return;
  }
  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  const longest = Math.max(0, ...trials.map((t) => t.train.length));
  state.smooth = longest > 200 ? 0.9 : longest > 50 ? 0.8 : longest > 10 ? 0.6 : 0;
  el('smooth').value = state.smooth;
  el('smooth').addEventListener('input', () => { state.smooth = +el('smooth').value; drawLoss(); });
  choice('show', ['both', 'train', 'eval'], () => drawLoss());
  choice('against', ['steps', 'tokens'], () => drawLoss());
  choice('scale', ['linear', 'log'], () => drawLoss());
  const keys = data.keys.filter((_, k) => keyValues(k).length > 1);
  if (data.several_seeds) keys.push('seed');
  options(el('colour'), [['', 'trial'], ...keys.map((k) => [k, k])], '');
  el('colour').addEventListener('change', () => {
    colourKey = el('colour').value;
    hidden.clear();
    drawAll();
  });
  const results = unique([metric, 'eval_loss', 'best_eval_loss', 'train_loss', 'tokens_per_s',
    'peak_bytes', 'trainable_params']);
  options(el('result'), results.map((c) => [c, c]), metric);
  el('result').addEventListener('change', () => { state.result = el('result').value; drawKeys(); });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawAll);
  drawAll();
}
start();
)js";

}  // namespace qlab
