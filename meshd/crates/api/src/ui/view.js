// What is shown: what the daemon said last, and what the reader chose.

// The key of this node, beside those of the links.
export const SELF = "self";

export const view = {
  status: null,
  // By key: `node/ID` or `peer/NAME`.
  links: new Map(),
  // Keys of the links whose nodes are on the screen.
  visible: new Set(),
  chosen: null,
  // Shows the details of a key; the second argument is what was clicked.
  choose: () => {},
  close: () => {},
};

export const byName = ([, a], [, b]) => a.peer.name.localeCompare(b.peer.name, "en", { numeric: true });
