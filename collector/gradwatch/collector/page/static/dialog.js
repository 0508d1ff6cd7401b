// The one order that the page can give: asked for twice, and only from an operator.

import { getMe, Refused, rollBack, Unreachable } from "./api.js";
import { h, number } from "./dom.js";

/** The button, and what it says it would do. */
export function rollbackButton(job) {
  const good = job.last_good_checkpoint;
  const why = job.status === "ended" ? "The job's run has ended." : job.policy === null ? "The job has no policy, so nobody waits for orders." : good === null ? "No checkpoint is known good." : null;
  const button = h("button.danger", { type: "button", disabled: why !== null, "data-key": "roll-back", onclick: () => ask(job.job, good) },
    good === null ? "Roll back" : `Roll back to step ${number(good.step)} …`);
  return h("p", {}, button, why === null ? null : h("span.soft", {}, ` ${why}`));
}

async function ask(job, good) {
  let me;
  try {
    me = await getMe();
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
    cannot(job, error.message);
    return;
  }
  // A second click came while the answer to the first was on its way.
  if (document.querySelector("dialog")) return;
  const named = me.identity !== null;
  const allowed = me.role === "operator";
  const name = h("input", { id: "operator", required: true, maxlength: 200, autocomplete: "username", value: named ? me.identity : "" });
  const token = h("input", { id: "token", type: "password", autocomplete: "off", required: !allowed });
  const tokenRow = h("div", { hidden: allowed && !named }, h("label", { for: "token" }, "An operator's token; used for this order only"), token);
  const answer = h("p.answer", { role: "alert" });
  const send = h("button.danger", { type: "submit" }, "Yes, roll the job back");
  const form = h("form", { method: "dialog" },
    h("h2", {}, `Roll ${job} back?`),
    h("p", {}, `Its processes are stopped on every host, and started again from the checkpoint of step ${number(good.step)}:`),
    h("p", {}, h("code", {}, good.path)),
    h("p", {}, "Newer checkpoints are set aside, and none is deleted. Work since that step is done again."),
    allowed ? null : h("p.warning", {}, `You are ${me.identity ?? "known"} as ${me.role}: only an operator may do this.`),
    h("label", { for: "operator" }, "Your name, for the audit trail"), name,
    tokenRow, answer,
    h("div.buttons", {}, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), send));
  const dialog = h("dialog", { "aria-label": `Roll ${job} back`, onclose: () => dialog.remove() }, form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    send.disabled = true;
    answer.className = "answer";
    answer.textContent = "Asking …";
    try {
      const decision = await rollBack(job, name.value, token.value);
      token.value = "";
      answer.textContent = `Decided (${decision.id}): ${decision.effect}. It is being done; the job's page shows how far it is.`;
      send.remove();
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
      answer.className = "answer bad";
      answer.textContent = error instanceof Refused ? error.message
        : "No answer from the collector: whether the order was taken is not known. Look at the job's decisions before you ask again.";
      send.disabled = false;
      if (error.status === 401 || error.status === 403) {
        tokenRow.hidden = false;
        token.focus();
      }
    }
  });
  document.body.append(dialog);
  dialog.showModal();
}

function cannot(job, why) {
  const close = h("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const dialog = h("dialog", { "aria-label": `Roll ${job} back`, onclose: () => dialog.remove() },
    h("p", { role: "alert" }, `Nothing was ordered: ${why}.`), h("div.buttons", {}, close));
  document.body.append(dialog);
  dialog.showModal();
}
