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
#memory .plot { height: 320px; }
#memory table { margin-top: 10px; }
.scroll { overflow-x: auto; max-height: 640px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 6px 9px; text-align: left; white-space: nowrap; }
th {
  position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600;
  border-bottom: 2px solid var(--line); cursor: pointer; user-select: none;
}
th[aria-sort="ascending"]::after { content: " \2191"; }
th[aria-sort="descending"]::after { content: " \2193"; }
td { border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
td:first-child { position: sticky; left: 0; background: var(--card); }
tbody tr:hover td { background: var(--mark); }
.num { text-align: right; font-variant-numeric: tabular-nums; }
.best { font-weight: 700; color: var(--good); }
td .dot { margin-right: 8px; vertical-align: -1px; }
.status { font-size: 12.5px; font-weight: 600; }
.finished { color: var(--good); } .failed { color: var(--bad); }
.interrupted, .running, .pending, .unreadable { color: var(--warn); }
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
    <span class="choice" id="lines" hidden></span>
    <label>smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.02"></label>
    <label>colour by <select id="colour"></select></label>
  </div>
  <div class="curves">
    <div class="plot"><canvas id="loss"></canvas></div>
    <ul class="legend" id="legend"></ul>
  </div>
  <p class="hint">Thin lines: training loss, smoothed. Dashed lines with points: evaluation loss. Click
  an entry to hide or show it, point at one to bring it out.</p>
</section>
<section id="by-key">
  <div class="bar"><h2>Result against each swept key</h2>
    <label>result <select id="result"></select></label></div>
  <div class="keys" id="keys"></div>
  <p class="hint" id="key-hint"></p>
</section>
<section id="memory" hidden>
  <div class="bar"><h2>Memory</h2>
    <span class="choice" id="clock"></span>
    <label>trial <select id="memory-trial"></select></label></div>
  <div class="plot" id="memory-plot"><canvas id="memory-chart"></canvas></div>
  <p class="hint" id="memory-hint"></p>
  <div class="scroll"><table id="memory-phases"></table></div>
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

}  // namespace qlab
