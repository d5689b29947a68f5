#include "experiments/report_page.h"

namespace qlab {

const char* const report_memory_script = R"js(
// ---- memory ----
const remembered = trials.filter((t) => t.memory !== null);
let memoryChart = null;
state.clock = 'time';
function chosenMemory() {
  return remembered.find((t) => t.directory === el('memory-trial').value) || remembered[0];
}
const moments = (t) => t.memory.moments.map(
  ([seconds, phase, step, categories, total, peak, used, host, shared]) =>
    ({seconds, phase, step, categories, total, peak, used, host, shared}));
function timeUnit(seconds) {
  if (seconds > 3 * 3600) return ['hours', 3600];
  return seconds > 300 ? ['minutes', 60] : ['seconds', 1];
}
// Stretches of one phase after another.
function phaseSpans(points, xs) {
  const spans = [];
  points.forEach((p, i) => {
    const last = spans[spans.length - 1];
    if (last) last.to = xs[i];
    if (!last || last.phase !== p.phase) spans.push({phase: p.phase, from: xs[i], to: xs[i]});
  });
  return spans;
}
function phaseMarks(spans) {
  return {id: 'phaseMarks', beforeDatasetsDraw: (chart) => {
    const {ctx, chartArea: area, scales: {x}} = chart;
    ctx.save();
    ctx.font = '12px ' + Chart.defaults.font.family;
    ctx.textBaseline = 'top';
    spans.forEach((span, i) => {
      const left = x.getPixelForValue(span.from), width = x.getPixelForValue(span.to) - left;
      ctx.fillStyle = faded(css('--soft'), i % 2 ? 0.12 : 0.03);
      ctx.fillRect(left, area.top, width, area.bottom - area.top);
      if (ctx.measureText(span.phase).width + 8 > width) return;
      ctx.fillStyle = css('--soft');
      ctx.fillText(span.phase, left + 4, area.top + 4);
    });
    ctx.restore();
  }};
}
// What one line holds lies on those before it. The steps are those of the samples: a value stands
// until another was seen.
function memorySets(points, xs, predicted) {
  const sets = [], ground = points.map(() => 0);
  data.categories.forEach((category, c) => {
    if (points.every((p) => !p.categories[c])) return;
    sets.push({label: category, pointStyle: 'rect', fill: sets.length ? '-1' : 'origin',
      data: points.map((p, i) => ({x: xs[i], y: ground[i] += p.categories[c] || 0,
        own: p.categories[c] || 0})),
      borderColor: palette[c], backgroundColor: faded(palette[c], 0.6), borderWidth: 0.5});
  });
  const line = (label, value, colour, dash) => {
    if (points.every((p) => value(p) === null)) return;
    sets.push({label, pointStyle: 'line', fill: false, borderColor: colour, backgroundColor: colour, borderWidth: 2,
      borderDash: dash, data: points.map((p, i) => ({x: xs[i], y: value(p), own: value(p)}))});
  };
  line('device used, by everybody', (p) => p.used, css('--ink'), []);
  line('host, resident', (p) => p.host, css('--soft'), [2, 2]);
  line('predicted peak', () => predicted, css('--bad'), [8, 4]);
  for (const set of sets) Object.assign(set, {stepped: true, pointRadius: 0, pointHitRadius: 4});
  return sets;
}
function drawMemoryChart(trial) {
  if (memoryChart) memoryChart.destroy();
  const points = moments(trial), last = points[points.length - 1].seconds;
  const [unit, size] = timeUnit(last), timed = state.clock === 'time';
  const xs = points.map((p, i) => timed ? p.seconds / size : i);
  const spans = phaseSpans(points, xs);
  memoryChart = new Chart(el('memory-chart'), {type: 'line',
    data: {datasets: memorySets(points, xs, trial.memory.predicted)},
    plugins: [phaseMarks(spans)],
    options: {animation: false, parsing: false, maintainAspectRatio: false,
      scales: {x: axis(timed ? unit : 'samples', {type: 'linear', min: 0, max: xs[xs.length - 1]}),
        y: axis('bytes', {type: 'linear', min: 0, grace: '4%',
          ticks: {color: css('--soft'), callback: (v) => bytes(v)}})},
      interaction: {mode: 'index', intersect: false},
      plugins: {
        legend: {position: 'bottom', onClick: () => {},
          labels: {color: css('--soft'), usePointStyle: true}},
        tooltip: {itemSort: (a, b) => b.datasetIndex - a.datasetIndex, callbacks: {
          title: (items) => {
            const p = points[items[0].dataIndex];
            return p.seconds.toFixed(p.seconds < 100 ? 2 : 0) + ' s  ' + p.phase +
              (p.step === null ? '' : ', step ' + p.step) + (p.shared ? ', shared' : '');
          },
          label: (item) => ' ' + item.dataset.label + '  ' + bytes(item.raw.own),
          footer: (items) => 'allocator in all  ' + bytes(points[items[0].dataIndex].total),
        }},
      }}});
}
function drawMemoryTable(trial) {
  const size = (title, key) => ({title, numeric: true, value: (r) => r[key], render: (td, r) => {
    td.textContent = r[key] === null ? '' : bytes(r[key]);
    if (r[key] !== null) td.title = r[key].toLocaleString('en-US') + ' bytes';
  }});
  const rows = trial.memory.phases, columns = [
    {title: 'phase', value: (r) => r.phase, render: (td, r) => {
      td.textContent = r.phase + (r.shared ? ' (for an earlier trial)' : '');
    }},
    {title: 'seconds', numeric: true, value: (r) => r.seconds,
      render: (td, r) => { td.textContent = r.seconds.toFixed(r.seconds < 10 ? 3 : 0); }},
    size('peak of the allocator', 'peak')];
  if (rows.some((r) => r.device_used !== null)) columns.push(size('device used', 'device_used'));
  if (rows.some((r) => r.host !== null)) columns.push(size('host, resident', 'host'));
  table(el('memory-phases'), columns, [...rows]);
}
function drawMemory() {
  el('memory').hidden = remembered.length === 0;
  if (remembered.length === 0) return;
  const trial = chosenMemory(), {predicted, damaged, resumed, before} = trial.memory;
  const notes = ['Stacked: what the allocator holds, by category' + (trial.gang_size > 1 ?
    ', of the whole gang of ' + trial.gang_size + '.' : '.')];
  if (predicted !== null && trial.peak_bytes !== null) {
    const difference = trial.peak_bytes - predicted;
    notes.push('Peak after loading' + (resumed ? ', since it last went on' : '') +
      (trial.status === 'running' ? ', so far' : '') + ': ' + bytes(trial.peak_bytes) + ', ' +
      (difference === 0 ? 'as predicted to the byte.' : 'predicted ' + bytes(predicted) +
      (trial.status === 'running' ? '.' : ', a difference of ' +
      difference.toLocaleString('en-US') + ' bytes.')));
  }
  if (before !== null) notes.push('Before it went on: ' + bytes(before) + '.');
  if (damaged > 0) {
    notes.push('Lines of memory.jsonl that do not read and are left out: ' + damaged + '.');
  }
  el('memory-hint').textContent = notes.join(' ');
  drawMemoryTable(trial);
  if (typeof Chart !== 'undefined') drawMemoryChart(trial);
}
function startMemory() {
  const charted = typeof Chart !== 'undefined';
  el('memory-plot').hidden = !charted;
  if (charted) choice('clock', ['time', 'samples'], drawMemory);
  const first = remembered.includes(best) ? best : remembered[0];
  options(el('memory-trial'), remembered.map((t) => [t.directory, t.name]),
    first ? first.directory : '');
  el('memory-trial').addEventListener('change', drawMemory);
}
)js";

}  // namespace qlab
