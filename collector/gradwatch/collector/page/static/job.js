// One job: how it is, its picture, its incidents, its checkpoints, and what was decided.

import { getAudit, getJob, getPicture } from "./api.js";
import { rollbackButton } from "./dialog.js";
import { h, number, Part, since, table } from "./dom.js";
import { card, status } from "./fleet.js";
import { Picture } from "./picture.js";

const SHOWN = 50;

export class Job {
  constructor(name) {
    this.name = name;
    this.title = name;
    this.trail = [["all jobs", "#/"], [name]];
    this.facts = new Part("section");
    this.order = new Part("section");
    this.picture = new Picture();
    this.incidents = new Part("section");
    this.checkpoints = new Part("section");
    this.decisions = new Part("section");
    this.element = h("div", {}, this.facts.element, this.order.element, this.picture.element, this.incidents.element,
      this.checkpoints.element, this.decisions.element);
  }

  async load() {
    const [job, picture, audit] = await Promise.all([getJob(this.name), getPicture(this.name), getAudit(this.name)]);
    return { job, picture, audit };
  }

  show({ job, picture, audit }) {
    const { incidents, decisions, dropped, faults, launches, ...facts } = job;
    this.facts.show(facts, describe);
    // Not among the facts: a button that is made anew at every step loses the click that meets it.
    this.order.show({ job: job.job, status: job.status, policy: job.policy === null ? null : {}, last_good_checkpoint: job.last_good_checkpoint }, rollbackButton);
    this.picture.show(picture);
    const newest = [...incidents].reverse().slice(0, SHOWN)
      .map(({ id, job: name, status: how, cause, step, verdict, opened_at }) => ({ id, job: name, status: how, cause, step, verdict: verdict[0] ?? "", opened_at }));
    this.incidents.show({ newest, older: incidents.length + job.incidents_left_out - newest.length }, (told) => [
      h("h2", {}, "Incidents"),
      told.newest.length ? told.newest.map(card) : h("p.card", {}, "None."),
      told.older > 0 ? h("p.soft", {}, `and ${number(told.older)} older ones`) : null,
    ].flat());
    this.checkpoints.show(picture.checkpoints, checkpointTable);
    this.decisions.show(audit.slice(-SHOWN), auditTable);
  }
}

function describe(job) {
  const facts = [
    ["status", job.halted === null ? status(job.status) : h("span.badge.bad", {}, `halted: ${job.halted}`)],
    ["step", number(job.step)],
    ["slowest rank at", number(job.slowest_step)],
    ["ranks watched", `${job.ranks_watched} of ${job.world_size ?? "?"}`],
    ["generation", number(job.generation)],
    ["good checkpoint", job.last_good_checkpoint === null ? "none" : `step ${number(job.last_good_checkpoint.step)}`],
    ["overhead", job.overhead.ratio === null ? "–" : `${(100 * job.overhead.ratio).toFixed(1)}%`],
    ["policy", job.policy === null ? "none" : job.policy.mode === null ? "does not load" : job.policy.mode.replaceAll("_", " ")],
    ["last seen", since(job.last_seen)],
  ];
  const warnings = [
    ...job.warnings,
    ...(job.policy?.problems ?? []).map((problem) => `policy: ${problem}`),
    ...job.unwatched.map((one) => `a process on ${one.node} (pid ${one.pid}) is not watched: ${one.reason}`),
  ];
  return [
    h("dl.facts", {}, facts.map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, value)))),
    job.recovery === null ? null : h("p.warning", { role: "status" }, `A rollback is under way: ${job.recovery.phase.replaceAll("_", " ")}.`),
    ...warnings.map((warning) => h("p.warning", {}, `⚠ ${warning}`)),
  ];
}

function checkpointTable(checkpoints) {
  if (!checkpoints.length) return [];
  const looks = { good: "good", bad: "bad", unknown: "warn", quarantined: "quiet" };
  const rows = [...checkpoints].sort((a, b) => (b.step ?? Infinity) - (a.step ?? Infinity)).slice(0, SHOWN).map((one) => ({
    cells: [number(one.step), h(`span.badge.${looks[one.verdict]}`, {}, one.verdict), h("code", {}, one.path)],
  }));
  return [h("h2", {}, "Checkpoints"), table("The newest first. Good: complete, finite, of a known step.", ["step", "verdict", "path"], rows)];
}

export function auditTable(audit) {
  if (!audit.length) return [];
  const rows = [...audit].reverse().map((one) => ({ cells: [since(one.at), one.what, one.text, one.about === null ? null : h("code", {}, one.about)] }));
  return [h("h2", {}, "What was decided and done"), table("The audit trail, the newest first.", ["when", "what", "in words", "decision"], rows)];
}
