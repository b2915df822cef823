// Shows the open pair and sends the annotator's answer. The server keeps all state: a reload loses nothing.
"use strict";

const KEYS = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", t: "tie", b: "bad", c: "unsure", s: "skip", u: "undo" };
const RETRY_MILLISECONDS = 1000;
const at = (id) => document.getElementById(id);

let pair = null;
let busy = false; // from an answer until the next pair is visible; key presses in between are ignored

async function post(path, body) {
  for (;;) {
    try {
      const response = await fetch(path, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
      });
      return { status: response.status, ...(await response.json()) };
    } catch {
      // The server records an answer to a pair only once, so it is safe to send it until a response comes.
      setMessage("The server does not respond. Your answer will be sent again until it does.");
      await new Promise((resume) => setTimeout(resume, RETRY_MILLISECONDS));
    }
  }
}

function setMessage(text) {
  at("message").textContent = text;
}

function load(image, name) {
  image.src = `/image/${name}`;
  return image.decode().then(() => {
    image.style.imageRendering = image.naturalWidth < 128 ? "pixelated" : "auto";
    image.closest(".choice").style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  });
}

function pace() {
  const seconds = pair.seconds_per_answer, left = pair.total - pair.answered;
  if (!seconds || !left) return "";
  const minutes = Math.ceil((seconds * left) / 60);
  return `, about ${minutes} minute${minutes === 1 ? "" : "s"} left at ${seconds.toFixed(1)} s each`;
}

function zoom() {
  const dialog = at("zoom");
  if (dialog.open) dialog.close();
  else if (pair && pair.prompt !== null && !at("questions").hidden) {
    for (const [i, image] of [...dialog.querySelectorAll("img")].entries()) {
      const shown = at(["left", "right"][i]);
      image.src = shown.src;
      image.style.imageRendering = shown.style.imageRendering;
    }
    dialog.showModal();
  }
}

async function show(next) {
  pair = next;
  const open = pair.prompt !== null;
  at("entrance").hidden = true;
  at("questions").hidden = false;
  at("annotator").textContent = pair.annotator;
  at("count").textContent = `${pair.answered} of ${pair.total}${pace()}`;
  at("progress").max = pair.total;
  at("progress").value = pair.answered;
  at("prompt").hidden = at("images").hidden = !open;
  at("criterion").hidden = !open || pair.criterion === null;
  at("criterion").querySelector("b").textContent = pair.criterion;
  if (at("zoom").open) at("zoom").close();
  at("done").hidden = open;
  at("prompt").textContent = pair.prompt;
  for (const button of document.querySelectorAll("[data-answer]")) {
    button.disabled = button.dataset.answer === "undo" ? !pair.can_undo : !open;
  }
  at("enlarge").disabled = !open;
  if (open) {
    await Promise.all([load(at("left"), pair.left), load(at("right"), pair.right)]);
    for (const name of pair.following) new Image().src = `/image/${name}`;
  }
}

async function exchange(path, body) {
  if (busy) return;
  busy = true;
  at("images").classList.add("busy");
  try {
    const reply = await post(path, body);
    setMessage(reply.error ?? reply.known_answer ?? "");
    if (reply.status === 401) {
      at("questions").hidden = true;
      at("entrance").hidden = false;
    }
    const next = reply.status === 200 ? reply : reply.pair;
    if (next) await show(next);
  } catch {
    pair = null; // an answer to an invisible pair would be wrong
    setMessage("An image could not be loaded. Reload the page.");
  } finally {
    busy = false;
    at("images").classList.remove("busy");
  }
}

function send(answer) {
  const button = document.querySelector(`[data-answer=${answer}]`);
  if (pair && !at("questions").hidden && !button.disabled) {
    exchange("/answer", { annotator: pair.annotator, shown: pair.shown, answer });
  }
}

document.addEventListener("keydown", (event) => {
  const free = !(event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT");
  if (free && event.key.toLowerCase() === "z") return zoom();
  const answer = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!answer || !free) return;
  event.preventDefault();
  send(answer);
});

for (const button of document.querySelectorAll("[data-answer]")) {
  button.addEventListener("click", () => {
    send(button.dataset.answer);
    button.blur();
  });
}

for (const button of [at("enlarge"), ...document.querySelectorAll(".look")]) {
  button.addEventListener("click", () => {
    zoom();
    button.blur();
  });
}
at("zoom").addEventListener("click", () => at("zoom").close());

at("entrance").addEventListener("submit", async (event) => {
  event.preventDefault();
  await exchange("/enter", { annotator: at("name").value, token: at("token")?.value ?? "" });
  if (pair) sessionStorage.setItem("annotator", pair.annotator);
});

if (sessionStorage.getItem("annotator")) exchange("/enter", { annotator: sessionStorage.getItem("annotator") });
