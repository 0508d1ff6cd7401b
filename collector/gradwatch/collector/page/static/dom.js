// Elements, made without ever reading text as markup.

/** An element: `h("a.big", {href: "#"}, "text", child)`. */
export function h(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** A part of the page that is made anew only when what it shows has changed. */
export class Part {
  constructor(name) {
    this.element = h(name);
    this.shown = undefined;
  }

  show(data, make) {
    const text = JSON.stringify(data);
    if (text === this.shown) return;
    this.shown = text;
    const focused = this.element.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
    this.element.replaceChildren(...[make(data)].flat().filter(Boolean));
    if (focused) this.element.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }
}

/** A table with a caption; on a phone each row is a card. */
export function table(caption, heads, rows) {
  return h("div.scroll", {},
    h("table.stack", {},
      h("caption", {}, caption),
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, rows.map((row) => h(row.name ?? "tr", {}, row.cells.map((cell, place) =>
        h("td", { "data-head": heads[place] }, cell ?? "–")))))));
}

/** A point in time as people say it; kept up to date by `tick`. */
export function since(at) {
  if (!at) return "–";
  return h("time", { datetime: at, title: at, "data-at": at }, ago(at));
}

export function tick() {
  for (const element of document.querySelectorAll("time[data-at]")) element.textContent = ago(element.dataset.at);
}

function ago(at) {
  const seconds = Math.max(0, Math.round((Date.now() - Date.parse(at)) / 1000));
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} days ago`;
}

export function number(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString("en");
}

/** Ranks as ranges: 0, 2–1023. */
export function ranges(ranks) {
  const parts = [];
  for (const rank of ranks) {
    const last = parts.at(-1);
    if (last && last[1] + 1 === rank) last[1] = rank;
    else parts.push([rank, rank]);
  }
  return parts.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`)).join(", ");
}
