#include "experiments/report_page.h"

namespace qlab {

const char* const report_script = R"js(
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const el = (id) => document.getElementById(id);
const measured = ['eval_loss_0', 'eval_loss', 'best_eval_loss', 'train_loss', 'tokens_per_s',
  'peak_bytes', 'trainable_params', 'steps', 'trained_tokens', 'gang_size',
  ...(data.trials.some((t) => t.gang !== null) ? ['gang'] : []),
  ...(data.trials.some((t) => t.moved_bytes !== null) ? ['moved_bytes', 'stalled_seconds'] : [])];
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
  if (column === 'peak_bytes' || column === 'moved_bytes') return bytes(x);
  if (column === 'stalled_seconds') return x.toFixed(4) + ' s';
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
// A derived key says nothing that those it follows do not.
const freeKeys = data.keys.filter((key) => !data.derived.includes(key));
el('title').textContent = data.name;
const count = (status) => trials.filter((t) => t.status === status).length;
const parts = unique(trials.map((t) => t.status)).map((s) => count(s) + ' ' + s);
el('subtitle').textContent = trials.length + (trials.length === 1 ? ' trial' : ' trials') + ' (' +
  parts.join(', ') + ')' + (freeKeys.length ? ' over ' + freeKeys.join(', ') : '');
const order = ['sweep', 'model', 'data', 'device', 'date', 'commit', 'version'];
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
if (data.median_tokens_per_s !== null) {
  tile('median tokens/s', show('tokens_per_s', data.median_tokens_per_s),
    'per trial; highest peak ' + bytes(Math.max(...trials.map((t) => t.peak_bytes || 0))));
}

// ---- colours ----
const palette = ['#4269d0', '#e08a00', '#e8553d', '#2fa58f', '#3c9a46', '#e0619f', '#9352e8',
  '#5aa0e8', '#9c6b4e', '#7d8794'];
function hue(i, n) {
  if (n <= palette.length) return palette[i];
  return 'hsl(' + Math.round(360 * i / n) + ' 62% ' + [42, 56][i % 2] + '%)';
}
const ramp = [[112, 92, 214], [52, 120, 190], [33, 155, 145], [80, 180, 95], [224, 170, 30]];
function ramped(t) {
  const x = t * (ramp.length - 1), i = Math.min(Math.floor(x), ramp.length - 2), f = x - i;
  const mix = ramp[i].map((c, k) => Math.round(c + f * (ramp[i + 1][k] - c)));
  return 'rgb(' + mix.join(' ') + ')';
}
let colourKey = '';
const hidden = new Set();
function keyValues(k) {
  const values = unique(trials.map((t) => k < 0 ? t.seed : t.swept[k]));
  return values.every(isNumber) ? values.sort(compareText) : values;
}
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
  }}, {title: 'status', value: (t) => t.status, render: (td, t) => {
    td.append(node('span', t.status_text, 'status ' + t.status));
    td.title = t.error;
  }}, ...sweptColumns, plain('seed', (t) => t.seed, true)];
  for (const c of measured) {
    columns.push({title: c, numeric: true, value: (t) => t[c], render: (td, t) => {
      td.textContent = show(c, t[c]);
      if (c === metric && best && t[c] === best[c]) td.classList.add('best');
    }});
  }
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
const state = {show: 'both', against: 'steps', scale: 'linear', lines: 'trials', smooth: 0,
  result: metric};
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
// What is drawn as one line: a trial, or the mean of the finished trials of one colour.
function curves() {
  const column = state.against === 'steps' ? 0 : 1;
  const points = (list) => list.map((p) => ({x: p[column], y: p[2]}));
  if (colourKey === '' || state.lines === 'trials') {
    return trials.map((t) => ({name: t.name, group: groupOf(t), colour: colourOf(t),
      train: points(t.train), eval: points(t.eval)}));
  }
  const mean = (lists) => {
    const sums = new Map();
    for (const p of lists.flat()) {
      const sum = sums.get(p[0]) || {n: 0, x: 0, y: 0};
      sums.set(p[0], {n: sum.n + 1, x: sum.x + p[column], y: sum.y + p[2]});
    }
    return [...sums.entries()].sort((a, b) => a[0] - b[0])
      .map(([, sum]) => ({x: sum.x / sum.n, y: sum.y / sum.n}));
  };
  return keyValues(keyIndex(colourKey)).map((group) => {
    const members = trials.filter((t) => groupOf(t) === group && t.status === 'finished');
    return {name: colourKey + ' = ' + valueText(group), group,
      colour: colourOf(trials.find((t) => groupOf(t) === group)),
      train: mean(members.map((t) => t.train)), eval: mean(members.map((t) => t.eval))};
  });
}
function curveSets(focus) {
  const shown = curves().filter((c) => !hidden.has(c.group));
  const strength = shown.length > 30 ? 0.5 : 1;
  const sets = [];
  for (const c of shown) {
    const dim = focus !== null && focus !== c.group, strong = focus !== null && !dim;
    const base = dim ? 0.08 : strong ? 1 : strength;
    const trainColour = faded(c.colour, state.show === 'both' && !strong ? base * 0.6 : base);
    const evalColour = faded(c.colour, base);
    if (state.show !== 'eval' && c.train.length) {
      sets.push({label: c.name + ' train', data: smoothed(c.train, state.smooth),
        borderColor: trainColour, backgroundColor: trainColour,
        borderWidth: strong ? 2.5 : state.show === 'both' ? 1.4 : 1.9,
        pointRadius: c.train.length < 2 ? 3 : 0, pointHitRadius: 6});
    }
    if (state.show !== 'train' && c.eval.length) {
      sets.push({label: c.name + ' eval', data: c.eval, borderColor: evalColour,
        backgroundColor: evalColour, borderWidth: strong ? 3 : 2, borderDash: [6, 4],
        pointRadius: shown.length > 30 ? 2.5 : 4.5, pointHitRadius: 8});
    }
  }
  return sets;
}
function lossScale(sets) {
  const title = 'loss (nats per token)';
  const losses = sets.flatMap((set) => set.data.map((p) => p.y)).filter((y) => y > 0);
  if (state.scale === 'linear' || losses.length === 0) return axis(title, {type: 'linear'});
  // Losses span far less than a decade: equal ratios make better ticks than powers of ten.
  const low = losses.reduce((a, b) => Math.min(a, b)) * 0.98;
  const high = losses.reduce((a, b) => Math.max(a, b)) * 1.02;
  const values = [0, 1, 2, 3, 4, 5, 6].map((i) =>
    Number((low * Math.pow(high / low, i / 6)).toPrecision(3)));
  return axis(title, {type: 'logarithmic', min: Math.min(low, values[0]),
    max: Math.max(high, values[6]),
    afterBuildTicks: (a) => { a.ticks = values.map((value) => ({value})); },
    ticks: {color: css('--soft'), callback: (v) => String(v)}});
}
function drawLoss(focus = null) {
  const title = state.against === 'steps' ? 'optimizer steps' : 'trained tokens';
  const sets = curveSets(focus);
  const scales = {x: axis(title, {type: 'linear', min: 0}), y: lossScale(sets)};
  if (lossChart) {
    lossChart.data.datasets = sets;
    lossChart.options.scales = scales;
    lossChart.update('none');
    return;
  }
  lossChart = new Chart(el('loss'), {type: 'line', data: {datasets: sets}, options: {
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
  const scale = keyScale(key, values);
  const points = trials.filter((t) => t[column] !== null);
  const valueOf = (t) => k < 0 ? t.seed : t.swept[k];
  // Points of one value side by side, so that none hides another.
  const beside = (t) => {
    const same = points.filter((o) => valueOf(o) === valueOf(t));
    const at = place(valueOf(t)), shift = same.indexOf(t) / same.length - 0.5 + 0.5 / same.length;
    if (values.length > 12 || same.length < 2) return at;
    const width = Math.min(0.3, 0.04 * same.length) / values.length;
    return scale.type === 'logarithmic' ? at * Math.pow(scale.max / scale.min, shift * width)
      : at + (scale.max - scale.min) * shift * width;
  };
  const means = values.map((value) => {
    const ys = points.filter((t) => valueOf(t) === value).map((t) => t[column]);
    return {x: place(value), y: ys.length ? ys.reduce((a, b) => a + b, 0) / ys.length : NaN};
  }).filter((p) => Number.isFinite(p.y));
  return new Chart(canvas, {type: 'scatter', data: {datasets: [
    {label: 'trials', data: points.map((t) => ({x: beside(t), y: t[column], name: t.name})), pointRadius: points.length > 40 ? 3.5 : 5,
      pointHoverRadius: 7,
      backgroundColor: points.map((t) => faded(colourOf(t), 0.85)),
      borderColor: points.map(colourOf)},
    {label: 'mean', type: 'line', data: means, borderColor: css('--soft'), borderWidth: 1.5,
      borderDash: [2, 3], pointStyle: 'line', pointRadius: 9, pointBorderWidth: 2,
      pointBorderColor: css('--soft'), order: 1},
  ]}, options: {
    animation: false, maintainAspectRatio: false,
    scales: {x: scale, y: axis(column, {grace: '8%', ticks: column === 'peak_bytes'
      ? {color: css('--soft'), callback: (v) => bytes(v)} : {color: css('--soft')}})},
    plugins: {legend: {display: false}, tooltip: {callbacks: {
      title: () => '',
      label: (item) => ' ' + (item.raw.name || 'mean') + '  ' + show(column, item.raw.y),
    }}},
  }});
}
function drawKeys() {
  for (const chart of keyCharts) chart.destroy();
  keyCharts = [];
  const keys = freeKeys.map((key) => [key, keyIndex(key)]);
  if (data.several_seeds) keys.push(['seed', -1]);
  const shown = keys.filter(([, k]) => keyValues(k).length > 1);
  el('by-key').hidden = shown.length === 0;
  el('keys').replaceChildren();
  const missing = trials.every((t) => t[state.result] === null);
  el('key-hint').textContent = !missing ? 'One point per trial; the line joins the means.'
    : trials.every((t) => t.eval.length === 0) && state.result.includes('eval')
    ? 'Nothing has been evaluated yet.' : 'No trial has ' + state.result + ' yet.';
  if (missing) return;
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
  drawMemory();
}
function start() {
  drawGroups();
  if (typeof Chart === 'undefined') {
    el('no-charts').hidden = false;
    el('curves').hidden = el('by-key').hidden = true;
    drawTrials();
    startMemory();
    drawMemory();
    return;
  }
  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  const longest = Math.max(0, ...trials.map((t) => t.train.length));
  state.smooth = longest > 200 ? 0.9 : longest > 50 ? 0.8 : longest > 10 ? 0.7 : 0;
  el('smooth').value = state.smooth;
  el('smooth').addEventListener('input', () => { state.smooth = +el('smooth').value; drawLoss(); });
  choice('show', ['both', 'train', 'eval'], () => drawLoss());
  choice('against', ['steps', 'tokens'], () => drawLoss());
  choice('scale', ['linear', 'log'], () => drawLoss());
  const keys = data.keys.filter((_, k) => keyValues(k).length > 1);
  if (data.several_seeds) keys.push('seed');
  // Beyond a dozen trials single colours tell nothing: show what the first key with few values does.
  if (trials.length > 12) {
    colourKey = keys.find((k) => keyValues(keyIndex(k)).length <= 8) || '';
    if (colourKey !== '') state.lines = 'means';
  }
  choice('lines', ['trials', 'means'], () => drawLoss());
  el('lines').hidden = colourKey === '';
  options(el('colour'), [['', 'trial'], ...keys.map((k) => [k, k])], colourKey);
  el('colour').addEventListener('change', () => {
    colourKey = el('colour').value;
    el('lines').hidden = colourKey === '';
    hidden.clear();
    drawAll();
  });
  const results = unique([metric, 'eval_loss', 'best_eval_loss', 'train_loss', 'tokens_per_s',
    'peak_bytes', 'trainable_params']);
  options(el('result'), results.map((c) => [c, c]), metric);
  el('result').addEventListener('change', () => { state.result = el('result').value; drawKeys(); });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawAll);
  startMemory();
  drawAll();
}
)js";

}  // namespace qlab
