// The figures of a scaling study: Plotly's traces with colours of the style sheet; redrawn when those change.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const picked = document.getElementById("axis");
const dark = matchMedia("(prefers-color-scheme: dark)");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axis(title, log) {
  const lines = { gridcolor: colour("--grid"), zerolinecolor: colour("--zero"), linecolor: colour("--line") };
  const exponent = { exponentformat: "power", automargin: true };
  return { title: { text: title }, type: log ? "log" : "linear", ...lines, ...exponent };
}

function draw(figure) {
  const traces = figure.traces.map(({ hue, ...trace }) => {
    const shown = colour(`--group-${hue % data.colours}`);
    return { ...trace, line: { ...trace.line, color: shown }, marker: { color: shown, size: 6 } };
  });
  const layout = {
    margin: { l: 56, r: 12, t: 12, b: 48 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), size: 12 },
    xaxis: axis(figure.x, figure.log_x),
    yaxis: axis(figure.y, figure.log_y),
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--zero"), activecolor: colour("--ink") },
    legend: { orientation: "h", y: -0.28 },
  };
  Plotly.react(`plot-${figure.key}`, traces, layout, { responsive: true, displaylogo: false });
}

function drawAll() {
  for (const figure of data.figures) {
    const shown = figure.axis === null || figure.axis === picked.value;
    document.getElementById(`figure-${figure.key}`).hidden = !shown;
    if (shown) draw(figure);
  }
}

picked.addEventListener("change", drawAll);
dark.addEventListener("change", drawAll);
drawAll();
