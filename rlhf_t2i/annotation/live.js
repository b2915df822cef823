// Shows the newest question and sends votes.
"use strict";

const KEYS = { ArrowLeft: "1", ArrowRight: "2", 1: "1", 2: "2", 3: "3", 4: "4", t: "tie", g: "good", b: "bad", c: "unsure", s: "skip", u: "undo" };
const POLL_MILLISECONDS = 1000;
const GUARD_MILLISECONDS = 600; // after images were replaced by newer ones, a vote may still mean the old ones
const percent = (share) => `${Math.round(100 * share)}\u00a0%`;

let guardedUntil = 0;

function kept() {
  return state.votes === 1 ? "The one vote is kept" : `All ${state.votes} votes are kept`;
}

function nothing() {
  const training = state.training;
  if (training.failure) return ["Training has failed", `${training.failure}. ${kept()}.`];
  if (training.has_ended) return ["Training has ended. Thank you.", `${kept()} in the run's folder.`];
  return ["The model is making new images", "They appear here by themselves."];
}

function showTraining() {
  const training = state.training;
  const ended = training.failure ? "failed" : training.has_ended ? "finished" : null;
  const paused = ended ?? (training.paused_by ? `paused by ${training.paused_by}` : training.phase);
  at("phase").querySelector("span").textContent = `Step ${training.step} of ${training.num_steps}: ${paused}`;
  at("pause").textContent = training.paused_by ? "Continue" : "Pause";
  at("pause").disabled = training.has_ended || Boolean(training.failure);
  const said = [];
  if (training.certainty !== null) {
    said.push(`The reward model expects to be right on ${percent(training.certainty)} of the pairs of this step.`);
  }
  if (training.foreseen_of) said.push(`It foresaw ${training.foreseen} of the last ${training.foreseen_of} choices.`);
  at("sure").textContent = said.join(" ");
  const box = document.querySelector(".progress");
  while (box.children.length > training.progress.length) box.lastChild.remove();
  training.progress.forEach((one, i) => {
    if (!box.children[i]) {
      const figure = document.createElement("figure");
      figure.innerHTML = '<div class="row"></div><figcaption></figcaption>';
      for (const name of ["before", "a step ago", "now"]) {
        const cell = document.createElement("div");
        cell.append(new Image(), Object.assign(document.createElement("span"), { textContent: name }));
        figure.firstChild.append(cell);
      }
      box.append(figure);
    }
    [...box.children[i].querySelectorAll("img")].forEach((image, k) => {
      image.alt = `${one.prompt}, ${["before training", "a step ago", "now"][k]}`;
      load(image, one.images[k]).catch(() => {});
    });
    box.children[i].querySelector("figcaption").textContent =
      `${one.prompt}: preferred to before with a probability of ${percent(one.better_than_start)}, to a step ago with ${percent(one.better_than_last)}`;
  });
}

async function show(next) {
  const replaced = state?.question && next.question && next.question.shown !== state.question.shown;
  state = next;
  const open = state.question !== null;
  at("entrance").hidden = true;
  at("questions").hidden = false;
  at("annotator").textContent = state.annotator;
  at("count").textContent = `${state.votes} vote${state.votes === 1 ? "" : "s"}, ${state.own_votes} of them yours`;
  at("prompt").hidden = at("images").hidden = !open;
  at("nothing").hidden = open;
  at("others").hidden = state.training.has_ended || Boolean(state.training.failure);
  [at("nothing").firstChild.textContent, at("nothing").lastChild.textContent] = open ? ["", ""] : nothing();
  at("prompt").textContent = open ? state.question.prompt : "";
  for (const button of document.querySelectorAll("[data-answer]")) {
    button.disabled = button.dataset.answer === "undo" ? !state.undo : !open;
  }
  showTraining();
  if (open) {
    const images = [...document.querySelectorAll(".shown")];
    await Promise.all(images.map((image, i) => load(image, state.question.images[i])));
  }
  return replaced;
}

async function poll() {
  if (!busy && state) {
    try {
      const reply = await request(`/state?annotator=${encodeURIComponent(state.annotator)}`);
      if (!busy && reply.status === 200 && (await show(reply))) {
        guardedUntil = Date.now() + GUARD_MILLISECONDS;
        setMessage("The model has changed: these images are newer.");
      }
    } catch {
      if (!state?.training.has_ended && !state?.training.failure) {
        setMessage("The server does not respond; votes up to now are kept.");
      }
    }
  }
  setTimeout(poll, POLL_MILLISECONDS);
}

function send(vote) {
  const button = document.querySelector(`[data-answer="${vote}"]`);
  if (state && button && !button.disabled && !at("questions").hidden && Date.now() >= guardedUntil) {
    exchange("/vote", { annotator: state.annotator, shown: vote === "undo" ? state.undo : state.question.shown, vote });
  }
}

at("pause").addEventListener("click", () => {
  exchange("/pause", { annotator: state.annotator, paused: !state.training.paused_by });
});

listen(KEYS, send);
start();
poll();
