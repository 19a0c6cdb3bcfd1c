// The links as a table, with a search.

import { $, element } from "./dom.js";
import { MARKS } from "./links.js";
import { byName, view } from "./view.js";

const rows = new Map();

export function showTable() {
  const wanted = $("search").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const body = $("rows");
  const sorted = [...view.links].sort(byName);
  for (const [key, row] of rows) {
    if (view.links.has(key)) continue;
    row.line.remove();
    rows.delete(key);
  }
  let found = 0;
  sorted.forEach(([key, link], nth) => {
    const { peer } = link;
    if (!rows.has(key)) rows.set(key, newRow(key));
    const row = rows.get(key);
    const values = [peer.name, peer.outside ? "external" : peer.site ?? "none", peer.path, link.health.text,
      link.roundTripText, link.rateText("rx"), link.rateText("tx"), peer.subnets.join(" ")];
    const text = [...values.slice(0, 4), peer.subnets.join(" "), peer.endpoint ?? "", (peer.overlay ?? []).join(" ")].join(" ").toLowerCase();
    const matches = wanted.every((word) => text.includes(word));
    found += matches;
    row.line.hidden = !matches;
    row.line.className = key === view.chosen ? "chosen" : "";
    row.mark.className = `mark ${link.classes}`;
    row.mark.textContent = MARKS[link.look];
    values.forEach((value, at) => {
      if (row.texts[at].textContent !== value) row.texts[at].textContent = value;
    });
    if (body.children[nth] !== row.line) body.insertBefore(row.line, body.children[nth] ?? null);
  });
  $("found").textContent = wanted.length > 0 ? `${found} of ${view.links.size}` : `${view.links.size}`;
}

function newRow(key) {
  const name = element("button", { type: "button" });
  const sign = element("span", { className: "mark", ariaHidden: "true" });
  const path = element("span");
  const plain = Array.from({ length: 6 }, (_, at) => element("td", { className: at >= 2 && at <= 4 ? "number" : at === 5 ? "mono" : "" }));
  const line = element("tr", { onclick: () => view.choose(key, name) }, element("td", {}, name), plain[0], element("td", {}, sign, path), ...plain.slice(1));
  line.dataset.key = key;
  return { line, mark: sign, texts: [name, plain[0], path, ...plain.slice(1)] };
}
