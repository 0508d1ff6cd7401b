// Which view is shown, and keeping it up to date.

import { Refused, Unreachable } from "./api.js";
import { h, tick } from "./dom.js";
import { Fleet } from "./fleet.js";
import { Incident } from "./incident.js";
import { Job } from "./job.js";

const LOOK_MS = 1500;

const refusal = h("p.card", { role: "alert", hidden: true });
const main = document.getElementById("main");
const trail = document.getElementById("trail");
const connection = document.getElementById("connection");

let view = null;
let timer = 0;
let gone = null;
// A view that was left must not be shown when its answer comes late.
let turn = 0;

function route() {
  const [, kind, ...rest] = location.hash.split("/");
  const name = rest.map(decodeURIComponent).join("/");
  if (kind === "jobs" && name) return new Job(name);
  if (kind === "incidents" && name) return new Incident(name);
  return new Fleet();
}

function open() {
  turn += 1;
  view = route();
  document.title = view.title;
  trail.replaceChildren(...view.trail.map(([text, href]) => h("span.crumb", {}, href ? h("a", { href }, text) : text)));
  main.replaceChildren(h("h1", { tabindex: "-1" }, view.title), refusal, view.element);
  refuse(null);
  // Until something is known of it, nothing is said below.
  view.element.hidden = true;
  if (turn > 1) main.querySelector("h1").focus();
  look();
}

async function look() {
  clearTimeout(timer);
  const mine = turn;
  const looking = view;
  try {
    const data = await looking.load();
    if (mine !== turn) return;
    refuse(null);
    looking.show(data);
    looking.element.hidden = false;
    say(null);
  } catch (error) {
    if (mine !== turn) return;
    if (error instanceof Refused) {
      refuse(error.message);
      say(null);
    } else if (error instanceof Unreachable) {
      say(gone ?? Date.now());
    } else {
      throw error;
    }
  } finally {
    if (mine === turn && !document.hidden) timer = setTimeout(look, LOOK_MS);
  }
}

// The view stays as it is below: what is refused now may be answered at the next look.
function refuse(why) {
  refusal.hidden = why === null;
  if (why !== null && refusal.textContent !== why) refusal.textContent = why;
}

function say(since) {
  gone = since;
  connection.className = since ? "gone" : "";
  const text = since ? `no answer from the collector since ${new Date(since).toLocaleTimeString()}; trying again` : "live";
  if (connection.textContent !== text) connection.textContent = text;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else look();
});
addEventListener("hashchange", open);
document.querySelector(".skip").addEventListener("click", (event) => {
  // The hash is the view's.
  event.preventDefault();
  main.focus();
});
setInterval(tick, 1000);
open();
