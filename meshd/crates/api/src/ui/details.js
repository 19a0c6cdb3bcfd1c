// Everything about one link, or about this node.

import { $, drawn, element, problem } from "./dom.js";
import { MARKS, age, bytes, duration, median, rate } from "./links.js";
import { SELF, view } from "./view.js";

export function showDetails() {
  if (view.chosen === null) return;
  const link = view.links.get(view.chosen);
  const facts = view.chosen === SELF ? factsOfSelf() : link ? factsOf(link) : [["gone", "No longer in the mesh."]];
  const name = view.chosen === SELF ? view.status.node : link?.peer.name ?? "gone";
  const found = view.chosen === SELF ? view.status.problems : problemsOf(link);
  const panel = $("details");
  if (!panel.firstChild) panel.append(...frame());
  const [top, list, problems] = panel.children;
  top.children[0].className = `mark ${link?.classes ?? ""}`;
  top.children[0].textContent = link ? MARKS[link.look] : "◉";
  if (top.children[1].textContent !== name) top.children[1].textContent = name;
  // What somebody is about to copy stays as it is.
  const selection = getSelection();
  if (!selection.isCollapsed && panel.contains(selection.anchorNode)) return;
  list.replaceChildren(...facts.flatMap(([term, ...values]) => [
    element("dt", { textContent: term }),
    element("dd", {}, ...values.map((value, at) => value instanceof Element ? value : element(at ? "p" : "span", { textContent: value }))),
  ]));
  problems.replaceChildren(...found.map(problem));
}

function frame() {
  return [
    element("div", { className: "top" }, element("span", { ariaHidden: "true" }), element("h2", { id: "details-title" }),
      element("button", { type: "button", className: "close", textContent: "Close", onclick: () => view.close() })),
    element("dl"),
    element("div"),
  ];
}

const code = (text) => element("code", { textContent: text });
const lines = (texts) => (texts.length ? texts.map((text) => element("div", {}, code(text))) : ["none"]);

function factsOfSelf() {
  const { policy } = view.status;
  return [
    ["site", view.status.site ?? "none"],
    ["subnets", ...lines(view.status.subnets)],
    ["overlay", ...lines(view.status.overlay)],
    ["identity", code(view.status.id)],
    ["etcd", view.status.etcd.endpoint ?? "none", view.status.etcd.connected ? "connected" : "disconnected; the last known state stays in force"],
    ["revision", String(view.status.revision)],
    ["policies", `${policy.policies} in force, ${policy.pods} pods known`, policy.mode],
    ["dropped", ...lines(view.status.drops.map((drop) => `${drop.reason} ${drop.packets}`))],
  ];
}

function factsOf(link) {
  const { peer, health, echoes } = link;
  const facts = [
    ["site", peer.outside ? `external peer${peer.site ? `, ${peer.site}` : ""}` : peer.site ?? "none"],
    ["path", peer.path, peer.reason].filter((text) => text !== ""),
    ["health", health.text],
    ["round trip", link.roundTripText, ...(echoes.length > 1 ? [trend(link)] : []), ...roundTrips(link)],
    ["rate", ...rates(link)],
    ["subnets", ...lines(peer.subnets)],
    ["overlay", ...lines(peer.overlay ?? [])],
    ["endpoint", peer.endpoint ? code(peer.endpoint) : "none known"],
    ["handshake", peer.latestHandshake ? `${age(Date.now() / 1000 - peer.latestHandshake)} ago` : "none yet"],
    ["public key", peer.publicKey ? code(peer.publicKey) : "none: no tunnel"],
  ];
  if (peer.mtu) facts.push(["mtu", `${peer.mtu} bytes`]);
  if (!peer.outside) facts.push(["identity", code(peer.id)]);
  return facts;
}

function roundTrips({ echoes, address, misses, why }) {
  if (misses > 0) return [`${misses} echo requests to ${address} unanswered, the last one: ${why}`];
  if (echoes.length < 2) return address ? [`echo to ${address}`] : [];
  const [least, most] = [Math.min(...echoes), Math.max(...echoes)];
  return [`${duration(least)} to ${duration(most)}, median ${duration(median(echoes))}, of the last ${echoes.length} echoes to ${address}`];
}

function rates(link) {
  if (link.peer.path === "unreachable") return ["–", "no packets are sent"];
  const counted = `${bytes(link.peer.rx)} received and ${bytes(link.peer.tx)} sent through the tunnel so far`;
  if (!link.metered) return ["not measured", `only tunnel traffic is counted; ${counted}`];
  return [link.rates ? `${rate(link.rates.rx)} received, ${rate(link.rates.tx)} sent` : "…", counted];
}

function trend(link) {
  const top = Math.max(...link.echoes) * 1.1;
  const step = 100 / (link.echoes.length - 1);
  const points = link.echoes.map((seconds, at) => `${(at * step).toFixed(1)} ${(30 - (seconds / top) * 28).toFixed(1)}`);
  return drawn("svg", { class: `trend ${link.classes}`, viewBox: "0 0 100 30", preserveAspectRatio: "none", "aria-hidden": "true" },
    drawn("path", { d: `M${points.join("L")}` }));
}

function problemsOf(link) {
  if (!link) return [];
  return view.status.problems.filter(({ cause }) => {
    const words = cause.split(/[^\w.:-]+/);
    return [link.peer.name, link.peer.id].some((name) => words.includes(name) || words.includes(`${name}:`) || cause.includes(`/${name}:`));
  });
}
