// Elements of the page. What comes from the mesh is only ever set as text.

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function problem(found) {
  return element("article", { className: "problem" },
    element("h3", { textContent: found.code.replaceAll("_", " ") }),
    element("p", { textContent: found.cause }),
    element("p", { className: "remedy", textContent: found.remedy }));
}
