// What is known of the links over time: counters become rates, echoes become round trips, both together health.

const ECHOES_KEPT = 60;
// Fewer unanswered in a row are the loss that every network has.
const MISSES = 3;

export const MARKS = { direct: "●", wireguard: "◆", unreachable: "✕", idle: "○", warn: "▲" };

export class Link {
  constructor(peer) {
    this.rates = null;
    this.echoes = [];
    this.misses = 0;
    this.why = "";
    this.askedAt = -Infinity;
    this.asking = false;
    this.see(peer, performance.now());
  }

  // Takes in what `/v1/peers` says, at this time in milliseconds.
  see(peer, now) {
    const before = this.peer;
    this.peer = peer;
    if (before && now - this.seenAt >= 500) {
      const [rx, tx] = [peer.rx - before.rx, peer.tx - before.tx];
      const seconds = (now - this.seenAt) / 1000;
      // Counters begin anew with the daemon, or with the peer's tunnel.
      this.rates = rx < 0 || tx < 0 ? null : { rx: rx / seconds, tx: tx / seconds };
    }
    if (!before || now - this.seenAt >= 500) this.seenAt = now;
    if (before && before.path !== peer.path) this.forgetEchoes();
  }

  forgetEchoes() {
    this.echoes = [];
    this.misses = 0;
    this.askedAt = -Infinity;
  }

  // An echo came back after so many seconds, or (null) did not, and why.
  heard(seconds, why) {
    if (seconds === null) {
      this.misses += 1;
      this.why = why;
      return;
    }
    this.misses = 0;
    this.echoes.push(seconds);
    if (this.echoes.length > ECHOES_KEPT) this.echoes.shift();
  }

  get address() {
    return this.peer.path === "unreachable" ? null : (this.peer.overlay ?? [])[0] ?? null;
  }

  // { level, text }: level is `well`, `idle` (nothing to worry about), `warn` or `bad`.
  get health() {
    if (this.peer.path === "unreachable") return { level: "bad", text: "unreachable" };
    if (this.peer.outside && !this.peer.latestHandshake) return { level: "idle", text: "never connected" };
    if (this.misses >= MISSES) return { level: this.peer.outside ? "idle" : "warn", text: this.why === "no answer" ? this.why : "no echo" };
    if (this.echoes.length > 0) return { level: "well", text: "answers" };
    if (this.address === null) return { level: "well", text: "not measured" };
    return { level: "well", text: "being measured" };
  }

  // Whether it did not answer just now, but that may be chance.
  get inDoubt() {
    return this.misses > 0 && this.misses < MISSES;
  }

  // Name of its look: that of the path, unless health overrules it.
  get look() {
    const { level } = this.health;
    return level === "warn" || level === "idle" ? level : this.peer.path;
  }

  get classes() {
    return this.look === this.peer.path ? this.peer.path : `${this.peer.path} ${this.look}`;
  }

  get roundTrip() {
    return this.misses >= MISSES || this.echoes.length === 0 ? null : this.echoes[this.echoes.length - 1];
  }

  get roundTripText() {
    if (this.peer.path === "unreachable") return "–";
    return this.roundTrip === null ? this.health.text : duration(this.roundTrip);
  }

  // A direct link's packets do not pass the tunnel, which is what counts.
  get metered() {
    return this.peer.path === "wireguard";
  }

  rateText(direction) {
    if (this.peer.path === "unreachable") return "–";
    if (!this.metered) return "not measured";
    return this.rates ? rate(this.rates[direction]) : "…";
  }

  get label() {
    if (this.peer.path === "unreachable") return "unreachable";
    if (!this.metered) return `${this.roundTripText} · rate not measured`;
    return this.rates ? `${this.roundTripText} · ${rate(this.rates.rx + this.rates.tx)}` : this.roundTripText;
  }
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length / 2;
  return sorted.length ? (sorted[Math.ceil(middle) - 1] + sorted[Math.floor(middle)]) / 2 : null;
}

export function duration(seconds) {
  const ms = seconds * 1000;
  return ms < 10 ? `${ms.toFixed(2)} ms` : ms < 1000 ? `${ms.toFixed(ms < 100 ? 1 : 0)} ms` : `${seconds.toFixed(1)} s`;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let at = 0;
  while (count >= 1000 && at < units.length - 1) {
    count /= 1000;
    at += 1;
  }
  return `${count.toFixed(at === 0 || count >= 100 ? 0 : 1)} ${units[at]}`;
}

export const rate = (perSecond) => `${bytes(perSecond)}/s`;

export function age(seconds) {
  if (seconds < 120) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}
