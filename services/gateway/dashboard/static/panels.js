// What a snapshot says of services, ranks, decisions and requests.
import { element, milliseconds, number } from "./dom.js";

const role = (status) => status.role.replace("ROLE_", "").toLowerCase().replace("_", "-");

export function services(place, views) {
  place.replaceChildren(...views.map(service));
}

function service({ address, status, error }) {
  const state = error ? "unreachable" : status.ready ? "ready" : "not ready";
  const work = error ? error : `${status.running} running, ${status.waiting} waiting`;
  return element(
    "li",
    {},
    element("span", { className: `state ${state}`, "aria-hidden": "true" }, error ? "✕" : status.ready ? "●" : "○"),
    element("span", { className: "name" }, status.instance_id || role(status), element("small", {}, `${address} · ${work}`)),
    element("span", { className: `state ${state}` }, state),
  );
}

function meter(label, value, max, text) {
  const bar = element("progress", { max: Math.max(1, max), value, "aria-label": `${label}: ${text}` });
  return element("div", { className: "meter" }, element("span", {}, label), bar, element("span", {}, text));
}

export function ranks(place, views) {
  const rows = [];
  for (const { status } of views.filter((view) => !view.error && role(view.status) === "decode-root")) {
    rows.push(element("h3", { className: "quiet" }, status.instance_id));
    const all = status.ranks.length ? status.ranks : [{ ...status, rank: 0, attached: true, context_tokens: 0 }];
    const longest = Math.max(...all.map((rank) => Number(rank.context_tokens)));
    for (const rank of all) {
      const used = rank.blocks_total - rank.blocks_free;
      const name = `rank ${rank.rank}`;
      if (!rank.attached) {
        rows.push(element("p", { className: "failed" }, `${name} is not attached: ${rank.error}`));
        continue;
      }
      rows.push(meter(`${name} KV`, used, rank.blocks_total, `${number(used)}/${number(rank.blocks_total)} blocks`));
      if (status.ranks.length) rows.push(meter("context", Number(rank.context_tokens), longest, `${number(rank.context_tokens)} tokens`));
    }
    if (status.group && Number(status.group.steps)) {
      const { efficiency, speedup, imbalance, exchange_us_p50 } = status.group;
      const parts = [`speed-up ${number(speedup, 2)}`, `efficiency ${number(efficiency, 2)}`];
      if (imbalance) parts.push(`imbalance ${number(imbalance, 2)}`);
      parts.push(`exchange ${number(exchange_us_p50)} µs per layer`);
      rows.push(element("p", { className: "group" }, parts.join(" · ")));
    }
  }
  place.replaceChildren(...rows);
}

export function decisions(place, counts) {
  const entries = Object.entries(counts).map(([name, count]) => [name.replaceAll("_", " "), Number(count)]);
  entries.sort((a, b) => b[1] - a[1]);
  const all = entries.reduce((sum, [, count]) => sum + count, 0);
  const rows = entries.map(([name, count]) => meter(name, count, all, number(count)));
  place.replaceChildren(...(rows.length ? rows : [element("p", { className: "quiet" }, "No request yet.")]));
}

// Rows are kept and changed in place: whoever has one focused must not lose it every second.
export function requests(place, views, open) {
  const known = new Map([...place.children].map((row) => [row.dataset.id, row]));
  const rows = views.map((view) => {
    const row = known.get(view.request_id) ?? requestRow(view, open);
    fill(row.firstChild, view);
    return row;
  });
  for (const row of [...place.children]) if (!rows.includes(row)) row.remove();
  rows.forEach((row, index) => {
    if (place.children[index] !== row) place.insertBefore(row, place.children[index] ?? null);
  });
}

function requestRow(view, open) {
  const button = element("button", { type: "button" });
  const row = element("li", {}, button);
  row.dataset.id = view.request_id;
  button.addEventListener("click", () => open(view.request_id));
  button.addEventListener("keydown", (event) => {
    const next = { ArrowDown: row.nextSibling, ArrowUp: row.previousSibling }[event.key];
    if (next) {
      event.preventDefault();
      next.firstChild.focus();
    }
  });
  return row;
}

function fill(button, view) {
  const failed = !["running", "finished", "cancelled"].includes(view.outcome);
  const texts = [
    view.request_id,
    (view.decision || "–").replaceAll("_", " "),
    view.outcome,
    `${number(view.prompt_tokens)} → ${number(view.output_tokens)}`,
    `${number(milliseconds(view.duration))} ms`,
  ];
  while (button.children.length < texts.length) button.append(element("span"));
  texts.forEach((text, index) => {
    const cell = button.children[index];
    if (cell.textContent !== text) cell.textContent = text;
  });
  button.children[2].className = failed ? "failed" : "";
}
