// The trace of one request: a bar per span, in the order and depth in which work was handed on.
import { read } from "./api.js";
import { drawing, element, milliseconds, number } from "./dom.js";

const dialog = document.getElementById("trace");
document.getElementById("trace-close").addEventListener("click", () => dialog.close());

export async function openTrace(id) {
  document.getElementById("trace-title").textContent = id;
  const note = document.getElementById("trace-note");
  const place = document.getElementById("waterfall");
  place.replaceChildren();
  note.textContent = "";
  if (!dialog.open) dialog.showModal();
  try {
    const trace = await (await read(`/dashboard/api/traces/${encodeURIComponent(id)}`)).json();
    const count = `${trace.spans.length} spans` + (trace.dropped ? `, ${trace.dropped} more were not kept` : "");
    note.replaceChildren(element("span", {}, count), ...legend(trace.spans));
    draw(place, trace.spans);
  } catch (error) {
    note.textContent = `${error.message || "not available"}. Spans are recorded with telemetry.traces: on, and arrive when work ends.`;
  }
}

const role = (span) => span.service.replace(/-\d+$/, "");

function legend(spans) {
  return [...new Set(spans.map(role))].map((name) => element("span", { className: `key ${name}` }, name));
}

function draw(place, spans) {
  const timed = spans.map((span) => ({ ...span, from: Date.parse(span.start) + fraction(span.start), ms: milliseconds(span.duration) }));
  const begin = Math.min(...timed.map((span) => span.from));
  const length = Math.max(0.001, ...timed.map((span) => span.from + span.ms - begin));
  place.replaceChildren(...timed.map((span) => row(span, begin, length)));
}

// Date.parse stops at milliseconds.
const fraction = (stamp) => Number(`0.${(stamp.match(/\.\d{3}(\d+)/) ?? [])[1] ?? 0}`);

function row(span, begin, length) {
  const name = span.name.replace(/^tokenmesh\.(v1\.)?/, "");
  const bar = drawing("rect", {
    x: `${((span.from - begin) / length) * 100}%`,
    width: `${Math.max(0.3, (span.ms / length) * 100)}%`,
    height: "100%",
    class: span.error ? "error" : role(span),
  });
  const label = element("span", { className: span.error ? "label failed" : "label" }, `${"\u2003".repeat(span.depth)}${name}`);
  label.title = `${span.service}: ${name}`;
  const track = element("span", { className: "track" }, drawing("svg", { "aria-hidden": "true" }, bar));
  const ms = element("span", { className: "ms" }, `${number(span.ms, 1)} ms`);
  return element("li", {}, element("details", {}, element("summary", {}, label, track, ms), details(span)));
}

function details(span) {
  const facts = { service: span.service, ...(span.message ? { message: span.message } : {}), ...span.attributes };
  const events = span.events.map((event) => [event.name, Object.entries(event.attributes).map((pair) => pair.join(" ")).join(", ")]);
  return element("dl", {}, ...[...Object.entries(facts), ...events].flatMap(([key, value]) => [element("dt", {}, key), element("dd", {}, value)]));
}
