// Tokens per second, TTFT and ITL over the last minutes.
import { drawing, element, number } from "./dom.js";

const POINTS = 180;
const history = [];

const CHARTS = [
  { label: "tokens/s", of: (p) => [p.tokens_per_second], text: (p) => number(p.tokens_per_second, 1) },
  { label: "TTFT ms", of: (p) => [p.ttft_p50 * 1e3, p.ttft_p99 * 1e3], text: (p) => pair(p.ttft_p50, p.ttft_p99, 0) },
  { label: "ITL ms", of: (p) => [p.itl_p50 * 1e3, p.itl_p99 * 1e3], text: (p) => pair(p.itl_p50, p.itl_p99, 1) },
];

const pair = (p50, p99, digits) => (p50 ? `${number(p50 * 1e3, digits)} · ${number(p99 * 1e3, digits)}` : "–");

export function charts(place, pulse) {
  history.push(pulse);
  if (history.length > POINTS) history.shift();
  place.replaceChildren(...CHARTS.map(chart));
}

function chart({ label, of, text }) {
  const series = history.map(of);
  // Few points fill the width as well, but not less than half a minute of it.
  const shown = Math.max(30, series.length);
  const top = Math.max(1e-9, ...series.flat());
  const title = series[0].length > 1 ? `${label}: median and 99th percentile (dashed)` : label;
  const svg = drawing("svg", { viewBox: `0 0 ${shown - 1} 100`, preserveAspectRatio: "none", role: "img", "aria-label": title });
  for (let line = series[0].length - 1; line >= 0; line--) {
    const start = shown - series.length;
    const points = series.map((values, index) => `${start + index},${100 - (values[line] / top) * 95}`);
    svg.append(drawing("path", { d: `M${points.join("L")}`, class: line ? "second" : "" }));
  }
  return element("div", { className: "chart", title }, element("span", {}, label), svg, element("output", {}, text(history.at(-1))));
}
