// The report's plots: decodes the series, lays runs along the chosen axis, smooths and averages as align.py does,
// and hands them to Plotly. A panel is drawn when it comes near the screen.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const state = { align: data.align, window: data.window, seeds: true, hidden: new Set(), metric: data.metrics[0] };
const touch = matchMedia("(pointer: coarse)").matches;
const dashes = ["solid", "dash", "dot", "dashdot"];
const types = { i1: Int8Array, i2: Int16Array, i4: Int32Array, f4: Float32Array, f8: Float64Array };

function decode(packed) {
  if (packed === undefined || packed === null) return null;
  if ("n" in packed) return new Array(packed.n).fill(packed.c === null ? NaN : packed.c);
  const bytes = Uint8Array.from(atob(packed.b), (c) => c.charCodeAt(0));
  return Array.from(new types[packed.d](bytes.buffer));
}

const decoded = new Map();
function cached(packed) {
  if (!decoded.has(packed)) decoded.set(packed, decode(packed));
  return decoded.get(packed);
}

function movingAverage(values, window) {
  if (window === 1) return values;
  return values.map((_, i) => {
    const part = values.slice(Math.max(0, i + 1 - window), i + 1).filter(Number.isFinite);
    return part.length ? part.reduce((a, b) => a + b, 0) / part.length : NaN;
  });
}

function interpolate(at, x, y) {
  let i = 1;
  return at.map((v) => {
    while (i < x.length - 1 && x[i] < v) i++;
    if (v <= x[0]) return y[0];
    if (v >= x[x.length - 1]) return y[y.length - 1];
    return y[i - 1] + ((y[i] - y[i - 1]) * (v - x[i - 1])) / (x[i] - x[i - 1]);
  });
}

// Only where every run has a value; see align.mean_curve.
function meanCurve(curves, align) {
  const kept = curves.map(({ x, y }) => {
    const at = x.map((_, i) => i).filter((i) => Number.isFinite(x[i]) && Number.isFinite(y[i]));
    return { x: at.map((i) => x[i]), y: at.map((i) => y[i]) };
  });
  if (!kept.length || kept.some((c) => !c.x.length)) return { x: [], y: [] };
  if (align === "step") {
    const maps = kept.map((c) => new Map(c.x.map((v, i) => [v, c.y[i]])));
    const x = kept[0].x.filter((v) => maps.every((m) => m.has(v)));
    return { x, y: x.map((v) => maps.reduce((sum, m) => sum + m.get(v), 0) / maps.length) };
  }
  const low = Math.max(...kept.map((c) => c.x[0]));
  const high = Math.min(...kept.map((c) => c.x[c.x.length - 1]));
  if (low > high) return { x: [], y: [] };
  const n = Math.max(...kept.map((c) => c.x.length));
  const one = n === 1 || high === low;
  const x = one ? [low] : Array.from({ length: n }, (_, i) => low + ((high - low) * i) / (n - 1));
  const ys = kept.map((c) => interpolate(x, c.x, c.y));
  return { x, y: x.map((_, i) => ys.reduce((sum, y) => sum + y[i], 0) / ys.length) };
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function colour(index) {
  return css(`--group-${index % data.colours}`);
}

function faded(hex, alpha) {
  const at = (i) => parseInt(hex.slice(i, i + 2), 16);
  return `rgba(${at(1)}, ${at(3)}, ${at(5)}, ${alpha})`;
}

function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

function shown() {
  return data.groups.map((group, index) => ({ group, index })).filter(({ index }) => !state.hidden.has(index));
}

// The curves of a metric: for each visible group its runs, each with x and y.
function curvesOf(metric, window) {
  return shown().map(({ group, index }) => ({
    group,
    index,
    runs: group.runs.flatMap((run) => {
      const x = cached(run.x[state.align]);
      const y = cached(run.series[metric]);
      return x && y ? [{ name: run.name, x, y: movingAverage(y, window) }] : [];
    }),
  }));
}

function lineTraces(panel) {
  const window = panel.cumulative ? 1 : state.window;
  const unit = data.axes[state.align].name;
  const traces = [];
  for (const { group, index, runs } of curvesOf(panel.metric, window)) {
    const base = { type: "scatter", showlegend: false };
    const hue = colour(index);
    const dash = dashes[Math.floor(index / data.colours) % dashes.length];
    const several = runs.length > 1;
    const hover = `${unit} %{x:,.6~g}<br>%{y:.6~g}<extra></extra>`;
    for (const run of state.seeds || !several ? runs : []) {
      let { x, y } = run;
      if (panel.markers) {
        const at = x.map((_, i) => i).filter((i) => Number.isFinite(y[i]));
        [x, y] = [at.map((i) => x[i]), at.map((i) => y[i])];
      }
      const points = panel.markers || run.x.length === 1;
      traces.push({
        ...base, x, y, name: run.name, meta: "run", mode: points ? "lines+markers" : "lines", marker: { size: 5 },
        line: { color: several ? faded(hue, 0.4) : hue, width: several ? 1 : 2, dash },
        hovertemplate: `<b>${plain(run.name)}</b><br>${hover}`,
      });
    }
    if (several) {
      const mean = meanCurve(runs, state.align);
      const name = `${group.label}, mean of ${runs.length}`;
      traces.push({
        ...base, ...mean, name, meta: "mean", mode: panel.markers ? "lines+markers" : "lines", marker: { size: 6 },
        line: { color: hue, width: 2.6, dash }, hovertemplate: `<b>${plain(name)}</b><br>${hover}`,
      });
    }
  }
  return traces;
}

// The target band of each visible group: a rectangle where the target is constant, an area where it is not.
function bands() {
  const flat = new Map();
  const traces = [];
  for (const { group, index } of shown()) {
    for (const run of group.runs) {
      const target = cached(run.target);
      if (!target) continue;
      const first = target.find(Number.isFinite);
      if (first === undefined) continue;
      if (target.every((t) => t === first || !Number.isFinite(t))) {
        const entry = flat.get(first) || { groups: new Set(), steered: false };
        entry.groups.add(index);
        entry.steered = entry.steered || run.steered;
        flat.set(first, entry);
      } else {
        const x = cached(run.x[state.align]);
        if (!x) continue;
        const edge = { type: "scatter", mode: "lines", x, showlegend: false, hoverinfo: "skip", meta: "band" };
        const line = { color: faded(colour(index), 0.35), width: 0.8 };
        traces.push({ ...edge, y: target.map((t) => t * (1 - data.tolerance)), line });
        traces.push({
          ...edge, y: target.map((t) => t * (1 + data.tolerance)), line, fill: "tonexty",
          fillcolor: faded(colour(index), 0.12),
        });
      }
    }
  }
  const shapes = [...flat].flatMap(([target, { groups, steered }]) => {
    const own = groups.size === 1 && flat.size > 1 ? colour([...groups][0]) : css("--neutral");
    const across = { xref: "paper", x0: 0, x1: 1, layer: "below" };
    const text = `H<sub>tgt</sub> = ${target} ± 30 %${steered ? "" : ", for comparison"}`;
    const label = { text, textposition: "top left", font: { size: 10.5, color: css("--muted") }, padding: 3 };
    return [
      { ...across, type: "rect", y0: target * (1 - data.tolerance), y1: target * (1 + data.tolerance),
        fillcolor: faded(own, 0.16), line: { width: 0 }, label },
      { ...across, type: "line", y0: target, y1: target, line: { color: faded(own, 0.9), width: 1, dash: "dash" } },
    ];
  });
  return { shapes, traces };
}

function pointTraces(panel) {
  return shown().map(({ group, index }) => {
    const points = group.runs.flatMap((run) => {
      const x = cached(run.series[data.predicted]);
      const y = cached(run.series[panel.metric]);
      const steps = cached(run.x.step);
      if (!x || !y) return [];
      return x.map((v, i) => ({ x: v, y: y[i], text: `${plain(run.name)}, step ${steps[i]}` }));
    }).filter((p) => Number.isFinite(p.x) && Number.isFinite(p.y));
    return {
      type: "scatter", mode: "markers", name: group.label, showlegend: false,
      x: points.map((p) => p.x), y: points.map((p) => p.y), text: points.map((p) => p.text),
      marker: { color: faded(colour(index), 0.6), size: 4.5 },
      hovertemplate: "<b>%{text}</b><br>predicted %{x:.4~g}<br>measured %{y:.4~g}<extra></extra>",
    };
  });
}

function short(label) {
  return label.length > 22 ? label.slice(0, 21) + "…" : label;
}

function dotTraces(panel) {
  const traces = [];
  for (const { group, index } of shown().reverse()) {
    const cell = group.measures[panel.metric];
    const label = plain(short(group.label));
    const names = Object.keys(cell.values);
    traces.push({
      type: "bar", orientation: "h", x: [cell.mean], y: [label], marker: { color: faded(colour(index), 0.3) },
      showlegend: false, meta: "mean", width: 0.6,
      hovertemplate: cell.n ? `<b>${plain(group.label)}</b><br>mean of ${cell.n}: %{x:.4~g}<extra></extra>` : null,
    });
    traces.push({
      type: "scatter", mode: "markers", x: names.map((n) => cell.values[n]), y: names.map(() => label), text: names,
      marker: { color: colour(index), size: 9, line: { color: css("--card"), width: 1 } }, showlegend: false,
      meta: "run", hovertemplate: "<b>%{text}</b><br>%{x:.4~g}<extra></extra>", cliponaxis: false,
    });
  }
  return traces;
}

function phaseTraces() {
  const visible = shown().reverse();
  return data.phases.map((phase, i) => ({
    type: "bar", orientation: "h", name: phase.replace("time/", ""),
    y: visible.map(({ group }) => plain(short(group.label))), x: visible.map(({ group }) => group.phases[phase]),
    marker: { color: css(`--phase-${i % 8}`), line: { width: 0 } },
    hovertemplate: `<b>%{y}</b><br>${phase} %{x:.4~g} s<extra></extra>`,
  }));
}

function subtitle(panel) {
  if (panel.kind === "dots") return "each dot is a run, the bar their mean";
  if (panel.kind === "phases") return "mean over all steps and runs";
  if (panel.kind === "points") return "every step of every run";
  if (panel.cumulative) return "running share of all steps so far";
  if (state.window > 1) return `moving average of the last ${state.window} ${panel.markers ? "steps (or fewer)" : "steps"}`;
  return panel.markers ? "each evaluation, not smoothed" : "every step, not smoothed";
}

function layoutOf(panel, traces) {
  const ink = css("--ink"), muted = css("--muted"), grid = css("--grid");
  const axis = {
    gridcolor: grid, zerolinecolor: css("--zero"), linecolor: css("--zero"), tickcolor: css("--zero"), automargin: true,
    tickfont: { size: 11, color: muted }, title: { font: { size: 12, color: muted }, standoff: 8 },
  };
  const flat = panel.kind === "dots" || panel.kind === "phases";
  const values = flat ? [] : traces.filter((t) => t.meta !== "band").flatMap((t) => t.y).filter(Number.isFinite);
  const log = panel.log && values.length > 0 && values.every((v) => v > 0);
  const xTitle = { lines: data.axes[state.align].title, points: data.predictedTitle }[panel.kind] || panel.y;
  const layout = {
    title: {
      text: plain(panel.title), x: 0, xref: "container", xanchor: "left", pad: { l: 2 }, font: { size: 15, color: ink, weight: 600 },
      subtitle: { text: subtitle(panel), font: { size: 11.5, color: muted } },
    },
    font: { family: css("--sans"), color: ink, size: 12 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 52, r: 12, t: 58, b: 44 }, hovermode: "closest", dragmode: touch ? false : "zoom",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--zero"), font: { color: ink, size: 12 }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: ink },
    barmode: panel.kind === "phases" ? "stack" : "overlay", shapes: [],
    xaxis: { ...axis, title: { ...axis.title, text: xTitle }, nticks: 7 },
    yaxis: { ...axis, title: { ...axis.title, text: flat ? "" : panel.y }, nticks: 7 },
    legend: { orientation: "h", x: 0, y: -0.22, yanchor: "top", font: { size: 11, color: muted } },
  };
  if (flat) layout.yaxis.type = "category";
  if (panel.kind === "phases") Object.assign(layout, { margin: { ...layout.margin, b: 84 } });
  if (panel.kind === "dots") layout.xaxis.range = [0, 1.02];
  if (log) Object.assign(layout.yaxis, { type: "log", exponentformat: "power", nticks: 6 });
  else if (panel.zero && !flat) layout.yaxis.rangemode = "tozero";
  return layout;
}

const makers = { lines: lineTraces, points: pointTraces, dots: dotTraces, phases: phaseTraces };

function draw(panel) {
  const place = document.getElementById("plot-" + panel.key);
  let traces = makers[panel.kind](panel);
  let shapes = [];
  if (panel.metric === "policy/entropy") {
    const found = bands();
    shapes = found.shapes;
    traces = [...found.traces, ...traces];
  }
  const layout = { ...layoutOf(panel, traces), shapes };
  const button = { format: "png", filename: panel.key, scale: 2 };
  const config = { responsive: true, displaylogo: false, displayModeBar: !touch, toImageButtonOptions: button,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };
  return Plotly.react(place, traces, layout, config);
}

const stale = new Set(data.panels.map((p) => p.key));
const near = new Set();
const byKey = new Map(data.panels.map((p) => [p.key, p]));

async function refresh(keys) {
  for (const key of keys) {
    if (!stale.has(key)) continue;
    stale.delete(key);
    await draw(byKey.get(key));
  }
}

function changed() {
  for (const key of byKey.keys()) stale.add(key);
  refresh([...near]);
}

// Draw panels, all unless named, also those off the screen: for printing, and for tests.
window.drawAll = (keys) => {
  for (const more of document.querySelectorAll("details.more")) more.open = true;
  return refresh(keys || [...byKey.keys()]);
};
window.report = { data, state, decode, changed };

const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const key = entry.target.id.replace("plot-", "");
    if (entry.isIntersecting) near.add(key);
    else near.delete(key);
  }
  refresh([...near]);
}, { rootMargin: "400px" });
for (const key of byKey.keys()) observer.observe(document.getElementById("plot-" + key));

for (const chip of document.querySelectorAll("[data-group]")) {
  chip.addEventListener("click", () => {
    const index = Number(chip.dataset.group);
    const show = state.hidden.delete(index);
    if (!show) state.hidden.add(index);
    for (const same of document.querySelectorAll(`[data-group="${index}"]`)) same.setAttribute("aria-pressed", show);
    changed();
  });
}

function control(id, apply) {
  const element = document.getElementById(id);
  if (element) element.addEventListener("change", () => { apply(element); changed(); });
}
control("align", (e) => { state.align = e.value; });
control("window", (e) => { state.window = Number(e.value); });
control("seeds", (e) => { state.seeds = e.checked; });
control("metric", (e) => {
  const { name, unit, meaning } = data.info[e.value];
  Object.assign(byKey.get("any"), { metric: name, title: name, y: unit || name, note: meaning });
  document.getElementById("note-any").textContent = meaning;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
addEventListener("beforeprint", () => window.drawAll());
