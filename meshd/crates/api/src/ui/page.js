// Asks the daemon, and shows what it says: as a map, a table and details.

import { showDetails } from "./details.js";
import { $, element, problem } from "./dom.js";
import { Link, age } from "./links.js";
import { showMap } from "./map.js";
import { showTable } from "./table.js";
import { view } from "./view.js";

const ASK_EVERY = 2000;
const ECHO_EVERY = 5000;
// One that did not answer is asked again sooner, until it is sure.
const AGAIN_AFTER = 1500;
const ECHOES_AT_ONCE = 4;

let heardAt = null;
let opener = null;

async function get(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(10_000) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return JSON.parse(await answer.text(), (_, value) => (typeof value === "string" ? printable(value) : value));
}

// Others wrote what is shown: control and format characters would hide text or reorder it. As `meshctl` prints them.
function printable(text) {
  return text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
}

async function ask() {
  if (!document.hidden) {
    const answers = await Promise.all([get("/v1/status"), get("/v1/peers")]).catch(() => null);
    $("silence").hidden = answers !== null;
    if (answers === null) {
      const since = heardAt ? `since ${heardAt.toLocaleTimeString()}; this page shows the state of that time` : "yet";
      $("silence").textContent = `meshd does not answer ${since}. Is it running? systemctl status meshd`;
    } else {
      heardAt = new Date();
      take(...answers);
    }
  }
  setTimeout(ask, ASK_EVERY);
}

function take(nextStatus, peers) {
  view.status = nextStatus;
  const now = performance.now();
  const present = new Set();
  for (const peer of peers) {
    const key = `${peer.outside ? "peer" : "node"}/${peer.id}`;
    present.add(key);
    const link = view.links.get(key);
    if (link) link.see(peer, now);
    else view.links.set(key, new Link(peer, now));
  }
  for (const key of view.links.keys()) if (!present.has(key)) view.links.delete(key);
  show();
}

// One that nobody looks at is not asked.
async function echoes() {
  const due = [...view.visible, view.chosen].map((key) => view.links.get(key)).filter((link) => link?.address && !link.asking);
  const asking = [...view.links.values()].filter((link) => link.asking).length;
  const now = performance.now();
  const next = [...new Set(due)].filter((link) => now - link.askedAt >= (link.inDoubt ? AGAIN_AFTER : ECHO_EVERY)).sort((a, b) => a.askedAt - b.askedAt);
  if (!document.hidden) for (const link of next.slice(0, Math.max(0, ECHOES_AT_ONCE - asking))) echo(link, now);
  setTimeout(echoes, 100);
}

async function echo(link, now) {
  const { path } = link.peer;
  link.asking = true;
  link.askedAt = now;
  try {
    const answer = await get(`/v1/echo?address=${encodeURIComponent(link.address)}&size=84`);
    // An answer that came by another path says nothing of this one.
    if (link.peer.path === path) link.heard(answer.roundTrip, answer.text);
    queueShow();
  } catch {
    // That the daemon does not answer says nothing of the peer.
  } finally {
    link.asking = false;
  }
}

let queued = false;
function queueShow() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    show();
  });
}

function show() {
  showHead();
  showProblems();
  showMap();
  showTable();
  showDetails();
}

function showHead() {
  const state = $("state");
  document.title = `${view.status.node}: ${view.status.state} – meshd`;
  $("title").textContent = view.status.node;
  state.textContent = view.status.state;
  state.className = `chip ${view.status.state === "running" ? "well" : ["removed", "cloned"].includes(view.status.state) ? "bad" : "warn"}`;
  const facts = {
    site: view.status.site ?? "none",
    etcd: view.status.etcd.connected ? "connected" : view.status.etcd.age === null ? "never connected" : `disconnected for ${age(view.status.etcd.age)}`,
    revision: String(view.status.revision),
    links: summary(),
    version: view.status.version,
  };
  $("facts").replaceChildren(...Object.entries(facts).map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
}

function summary() {
  const well = [...view.links.values()].filter((link) => ["well", "idle"].includes(link.health.level)).length;
  return view.links.size === 0 ? "none" : well === view.links.size ? `${well}, all healthy` : `${view.links.size - well} of ${view.links.size} unhealthy`;
}

let problemsShown = "";
function showProblems() {
  const text = JSON.stringify(view.status.problems);
  if (text === problemsShown) return;
  problemsShown = text;
  $("problems").replaceChildren(...view.status.problems.map(problem));
  $("problems").hidden = view.status.problems.length === 0;
}

function choose(key, from) {
  view.chosen = key;
  opener = from;
  $("details").hidden = false;
  show();
  $("details").scrollTop = 0;
  $("details").focus();
}

function close() {
  view.chosen = null;
  $("details").hidden = true;
  show();
  // A node that has come back has a new button.
  (opener?.isConnected ? opener : $("self"))?.focus();
}

$("search").addEventListener("input", () => view.status && showTable());
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && view.chosen !== null) close();
});
for (const moved of ["resize", "scroll"]) addEventListener(moved, () => view.status && queueShow(), { passive: true });
document.addEventListener("visibilitychange", () => {
  // What came back before a pause says nothing of now.
  if (!document.hidden) for (const link of view.links.values()) link.forgetEchoes();
});
Object.assign(view, { choose, close });
ask();
echoes();
