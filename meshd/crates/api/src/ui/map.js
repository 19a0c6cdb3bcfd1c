// The map: this node, the sites with their nodes, and the links to them.

import { $, drawn, element } from "./dom.js";
import { MARKS, duration, median, rate } from "./links.js";
import { SELF, byName, view } from "./view.js";

// A site with more peers is a grid of marks, with one line for each path.
const SINGLY = 10;
// How far down this node may stand, so that its links spread to both sides and it is still seen.
const LOWEST = 160;
const HERE = "0/here";

// The node of each link.
const shown = new Map();
let structure = "";

// The sites with their links: this node's, the others by name, nodes without a site, outside peers.
function sites() {
  const found = new Map([[HERE, { title: view.status.site ? `site ${view.status.site}` : "this node", links: [] }]]);
  for (const [key, link] of [...view.links].sort(byName)) {
    const { site, outside } = link.peer;
    // The first digit is the order.
    const name = outside ? "3/outside" : !site ? "2/none" : site === view.status.site ? HERE : `1/${site}`;
    const title = outside ? "external peers" : site ? `site ${site}` : "without a site";
    if (!found.has(name)) found.set(name, { title, links: [] });
    found.get(name).links.push([key, link]);
  }
  return [...found].sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
}

const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) view.visible.add(target.dataset.key);
    else view.visible.delete(target.dataset.key);
  }
});

export function showMap() {
  const all = sites();
  const now = JSON.stringify([view.status.node, all.map(([name, site]) => [name, site.links.map(([key]) => key)])]);
  if (now !== structure) {
    structure = now;
    build(all);
  }
  for (const [key, node] of shown) {
    const link = view.links.get(key);
    if (!link) continue;
    node.button.className = `node ${link.classes}${key === view.chosen ? " chosen" : ""}`;
    node.mark.textContent = MARKS[link.look];
    node.figures.textContent = link.label;
    const told = `${link.peer.name}: ${link.peer.path}, ${link.health.text}`;
    if (node.button.ariaLabel !== told) node.button.ariaLabel = node.button.title = told;
  }
  $("self").classList.toggle("chosen", view.chosen === SELF);
  drawLinks(all);
}

function build(all) {
  const focused = document.activeElement?.dataset?.key;
  watcher.disconnect();
  view.visible.clear();
  shown.clear();
  const cards = all.map(([name, site]) => {
    const many = site.links.length > SINGLY;
    const inside = element("div", { className: many ? "inside cells" : "inside" }, ...site.links.map(nodeButton));
    const count = site.links.length + (name === HERE ? 1 : 0);
    const heading = element("h2", {}, element("div", { textContent: site.title }),
      element("span", { textContent: name === "3/outside" ? `${count}` : count === 1 ? "1 node" : `${count} nodes` }));
    const card = element("section", { className: "site", ariaLabel: site.title }, heading);
    card.dataset.site = name;
    card.classList.toggle("many", many);
    card.classList.toggle("single", site.links.length === 0);
    if (site.links.length > 0) card.append(inside);
    if (name === HERE) card.append(selfButton());
    return card;
  });
  $("here").replaceChildren(cards[0]);
  $("others").replaceChildren(...cards.slice(1));
  $("map").classList.toggle("alone", cards.length === 1);
  for (const { button } of shown.values()) watcher.observe(button);
  if (focused) document.querySelector(`#map [data-key="${CSS.escape(focused)}"]`)?.focus();
}

function selfButton() {
  const button = element("button", { id: "self", type: "button", className: "node self", onclick: () => view.choose(SELF, button) },
    element("span", { className: "mark", textContent: "◉", ariaHidden: "true" }),
    element("b", { textContent: view.status.node }), element("small", { textContent: "this node" }));
  button.dataset.key = SELF;
  return button;
}

function nodeButton([key, link]) {
  const sign = element("span", { className: "mark", ariaHidden: "true" });
  const figures = element("small", { className: "figures" });
  const button = element("button", { type: "button", onclick: () => view.choose(key, button) },
    sign, element("b", { textContent: link.peer.name }), figures);
  button.dataset.key = key;
  shown.set(key, { button, mark: sign, figures });
  return button;
}

function drawLinks(all) {
  const spare = $("others").offsetHeight - $("here").offsetHeight;
  $("here").style.marginTop = `${Math.min(LOWEST, Math.max(0, spare / 2))}px`;
  const map = $("map").getBoundingClientRect();
  const at = (node) => {
    const box = node.getBoundingClientRect();
    return { left: box.left - map.left, right: box.right - map.left, y: box.top + box.height / 2 - map.top, top: box.top - map.top };
  };
  const self = at($("self"));
  const groups = [];
  for (const [name, site] of all) {
    const inward = name === HERE;
    const from = inward ? self.left : self.right;
    const card = at(document.querySelector(`[data-site="${CSS.escape(name)}"]`));
    if (site.links.length > SINGLY) {
      const box = at(shown.get(site.links[0][0]).button.parentElement);
      bundles(site.links).forEach((bundle, nth) => {
        const end = { x: inward ? box.right + 6 : box.left - 10, y: box.top + 20 + nth * 34 };
        groups.push(line(bundle.classes, null, { x: from, y: self.y }, end, inward ? null : card.left, bundle.label, bundle.flow));
      });
      continue;
    }
    for (const [key, link] of site.links) {
      const node = at(shown.get(key).button);
      const end = { x: inward ? node.right : node.left, y: node.y };
      const flow = link.rates ? link.rates.rx + link.rates.tx : 0;
      groups.push(line(link.classes, key, { x: from, y: self.y }, end, inward ? null : card.left, link.label, flow));
    }
  }
  $("links").replaceChildren(...groups);
}

// The links of a site with many, by look: how many, the median round trip, the rate of all.
function bundles(members) {
  const looks = new Map();
  for (const [, link] of members) {
    if (!looks.has(link.classes)) looks.set(link.classes, []);
    looks.get(link.classes).push(link);
  }
  return [...looks].map(([classes, some]) => {
    const trip = median(some.map((link) => link.roundTrip).filter((seconds) => seconds !== null));
    const metered = some.filter((link) => link.metered && link.rates);
    const flow = metered.reduce((sum, link) => sum + link.rates.rx + link.rates.tx, 0);
    const text = [`${some.length} ${some[0].look === "warn" ? "without answer" : some[0].peer.path}`];
    if (trip !== null) text.push(duration(trip));
    if (metered.length > 0) text.push(rate(flow));
    return { classes, label: text.join(" · "), flow };
  });
}

// From this node to `end`: a curve to the edge of its site, then straight to it with the label on top.
function line(classes, key, start, end, edge, label, flow) {
  const toward = Math.sign(end.x - start.x);
  const bend = edge ?? start.x - 44;
  const middle = (start.x + bend) / 2;
  const d = `M${start.x} ${start.y}C${middle} ${start.y} ${middle} ${end.y} ${bend} ${end.y}H${end.x}`;
  const seen = drawn("path", { class: "seen", d });
  seen.style.strokeWidth = key !== null && key === view.chosen ? 4.5 : 1.8 + Math.min(3, Math.log10(1 + flow / 1000) * 0.6);
  const text = drawn("text", { x: end.x - toward * 10, y: end.y - 7, "text-anchor": toward > 0 ? "end" : "start" });
  text.textContent = label;
  const group = drawn("g", { class: classes }, seen, text);
  if (key !== null) {
    const touch = drawn("path", { class: "touch", d });
    touch.addEventListener("click", () => view.choose(key, shown.get(key).button));
    group.append(touch);
  }
  return group;
}
