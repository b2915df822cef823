// Shows the open pair and sends the annotator's answer.
"use strict";

const KEYS = {
  ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", t: "tie", b: "bad", c: "unsure", s: "skip", u: "undo", z: "zoom",
};

function pace() {
  const seconds = state.seconds_per_answer, left = state.total - state.answered;
  if (!seconds || !left) return "";
  const minutes = Math.ceil((seconds * left) / 60);
  return `, about ${minutes} minute${minutes === 1 ? "" : "s"} left at ${seconds.toFixed(1)} s each`;
}

function zoom() {
  const dialog = at("zoom");
  if (dialog.open) dialog.close();
  else if (state && state.prompt !== null && !at("questions").hidden) {
    for (const [i, image] of [...dialog.querySelectorAll("img")].entries()) {
      const shown = at(["left", "right"][i]);
      image.src = shown.src;
      image.style.imageRendering = shown.style.imageRendering;
    }
    dialog.showModal();
  }
}

async function show(next) {
  state = next;
  const open = state.prompt !== null;
  at("entrance").hidden = true;
  at("questions").hidden = false;
  at("annotator").textContent = state.annotator;
  at("count").textContent = `${state.answered} of ${state.total}${pace()}`;
  at("progress").max = state.total;
  at("progress").value = state.answered;
  at("prompt").hidden = at("images").hidden = !open;
  at("criterion").hidden = !open || state.criterion === null;
  at("criterion").querySelector("b").textContent = state.criterion;
  if (at("zoom").open) at("zoom").close();
  at("done").hidden = open;
  at("prompt").textContent = state.prompt;
  for (const button of document.querySelectorAll("[data-answer]")) {
    button.disabled = button.dataset.answer === "undo" ? !state.can_undo : !open;
  }
  if (open) {
    await Promise.all([load(at("left"), state.left), load(at("right"), state.right)]);
    for (const name of state.following) new Image().src = `/image/${name}`;
  }
}

function send(answer) {
  if (answer === "zoom") return zoom();
  const button = document.querySelector(`[data-answer=${answer}]`);
  if (state && !at("questions").hidden && !button.disabled) {
    exchange("/answer", { annotator: state.annotator, shown: state.shown, answer });
  }
}

listen(KEYS, send);
at("zoom").addEventListener("click", () => at("zoom").close());
start();
